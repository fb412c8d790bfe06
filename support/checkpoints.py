"""checkpoints.py: the checkpoints of a run: finding, saving, reading, resuming.

A checkpoint is a file of torch.save, a dict with the keys of the authors' release: model, ema, vae,
discriminator (state dicts of networks), opt, opt_vae, opt_disc (of optimizers), args (the settings, a plain
dict; in the release an argparse.Namespace) and steps. A run keeps them as checkpoints/STEP.pt.
"""
import itertools
import json
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from support.commands import UserError, require
from support.files import is_whole_archive, load_into, load_tensors, strip_wrappers, write_atomic

# --- Finding ------------------------------------------------------------------------------------------------

def checkpoints(run):
    """A run's checkpoints, oldest first."""
    numbered = [path for path in (run / "checkpoints").glob("*.pt") if path.stem.isdecimal()]
    return sorted(numbered, key=lambda path: int(path.stem))


def run_folder(ckpt):
    """The folder of a checkpoint's run; of one that lies in no run's folder its own."""
    return ckpt.parent.parent if ckpt.parent.name == "checkpoints" else ckpt.parent


def newest_checkpoint(root="exps"):
    """The last checkpoint of the newest run under `root`. Raises UserError."""
    found = [path for run in Path(root).glob("*") for path in checkpoints(run)[-1:]]
    require(found, f"no checkpoint under {root}/; run python train.py first, or give --ckpt FILE")
    return max(found, key=lambda path: path.stat().st_mtime)


def newest_complete(run):
    """A run's newest complete checkpoint, or None; damaged ones are renamed to STEP.damaged."""
    for path in reversed(checkpoints(run)):
        if is_whole_archive(path):
            return path
        renamed = path.replace(path.with_suffix(".damaged"))
        tqdm.write(f"{path} is damaged: renamed to {renamed.name}")
    return None


def find_newest(run, processes):
    """A run's newest complete checkpoint, or None, the same on all processes. Raises UserError where the file
    is missing on a machine."""
    path = processes.from_first(newest_complete(run) if processes.rank == 0 else None)
    missing = processes.any(path and not path.is_file())
    require(not missing, f"{path}: not on every machine; copy it to the same path on each")
    return path


# --- Saving -------------------------------------------------------------------------------------------------

def write_settings(run, settings):
    """Write args.json in a run's folder."""
    write_atomic(run / "args.json", lambda tmp: tmp.write_text(json.dumps(settings, indent=2)))


class Saver:
    """Writes a run's checkpoints. From a GPU it is asynchronous: only the copy to the host is waited for, a
    thread writes the file. Deletes older checkpoints, except the latest two and multiples of keep_every."""

    def __init__(self, run, keep_every):
        self.run, self.keep_every = run, keep_every
        self.thread, self.saving = ThreadPoolExecutor(1), None

    def save(self, step, parts, args):
        """parts: {key: network or optimizer}. Raises UserError, also about the save before."""
        self.wait()
        ckpt = {key: part.state_dict() for key, part in parts.items()} | dict(args=args, steps=step)
        if next(parts["vae"].parameters()).is_cuda:
            ckpt = tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), ckpt)
            self.saving = self.thread.submit(self.write, ckpt)
        else:
            self.write(ckpt)

    def write(self, ckpt):
        path = self.run / f"checkpoints/{ckpt['steps']:07d}.pt"
        write_atomic(path, lambda tmp: torch.save(ckpt, tmp))
        for old in checkpoints(self.run)[:-2]:
            if int(old.stem) % self.keep_every:
                old.unlink()
        tqdm.write(f"saved {path}")

    def check(self):
        """Raise the error of a save that has failed in the thread."""
        if self.saving and self.saving.done():
            self.saving.result()

    def wait(self):
        """Wait until the last save is on the disk; raises its error."""
        if self.saving:
            self.saving.result()

    def newest(self):
        """The name of the newest checkpoint, after the last save."""
        self.wait()
        found = checkpoints(self.run)
        return found[-1].name if found else "none yet"


# --- Reading ------------------------------------------------------------------------------------------------

def is_checkpoint(content):
    """Whether the dict in a file is a training checkpoint, of this project or the release."""
    return "ema" in content and "args" in content


def plain_checkpoint(content, file):
    """A checkpoint whose args are a plain dict with today's names, and whose tensors have no prefixes of DDP
    or torch.compile. Raises UserError."""
    try:
        args = content["args"]
        args = dict(args if isinstance(args, dict) else vars(args))                        # the release's
        if "latent_norm" in args:                                 # older than --fixed-latent-stats
            args["fixed_latent_stats"] = not args.pop("latent_norm")
        if args.get("classes"):                                   # once they could be in any Unicode form
            args["classes"] = [unicodedata.normalize("NFC", name) for name in args["classes"]]
        networks = {key: strip_wrappers(content[key]) for key in ("model", "ema")}
        return content | networks | dict(args=args, steps=content["steps"])
    except (KeyError, IndexError, TypeError, AttributeError):
        raise UserError(f"{file}: not a training checkpoint (of model, ema, vae, args and steps)") from None


def read_checkpoint(file):
    """A checkpoint from a file, as `plain_checkpoint`. Raises UserError."""
    return plain_checkpoint(load_tensors(file), file)


def check_settings(path, old, new, immutable, classes, log):
    """Whether a run with the settings `old`, those of the checkpoint `path`, can resume with `new`. Raises
    UserError if one of `immutable` or a class name has changed; other changes are logged by log(line)."""
    for label, (before, now) in enumerate(itertools.zip_longest(old.get("classes", classes), classes)):
        require(before == now, f"{path} was trained with {before} as class {label}; in {new['data_dir']} "
                f"that is {now}")
    for name, now in new.items():
        before, flag = old.get(name, now), name.replace("_", "-")
        require(before == now or name not in immutable,
                f"{path} was trained with --{flag} {before}; it cannot be resumed with {now}")
        if before != now and name not in ("resume", "output_dir", "exp_name"):
            log(f"resuming with a changed {name}: {before} -> {now}")


def resume(path, parts, settings, immutable, classes, log):
    """Load a checkpoint into `parts`, {key: network or optimizer}; returns its step. The other arguments are
    those of `check_settings`. Raises UserError."""
    ckpt = read_checkpoint(path)
    check_settings(path, ckpt["args"], settings, immutable, classes, log)
    for key, part in parts.items():
        require(key in ckpt, f"{path}: no {key} in it; it cannot be resumed")
        state = ckpt[key]
        if not isinstance(part, torch.optim.Optimizer):
            if settings["vae_only"] and key in ("model", "ema"):      # older runs also saved an untrained SiT
                state = {name: state[name] for name in part.state_dict() if name in state}
            load_into(part, state, f"{path}: {key}")
            continue
        try:
            # Cloned: on a CPU an optimizer keeps the tensors it is given, and so the mapped file.
            state = tree_map_only(torch.Tensor, torch.clone, state)
            for group in state["param_groups"]:
                group["fused"] = part.defaults["fused"]               # the device may be of another kind
            part.load_state_dict(state)
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path}: its {key} is of another model; it cannot be resumed") from None
    return ckpt["steps"]
