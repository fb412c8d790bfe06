"""checkpoints.py: the checkpoints of a run: found, saved, read, resumed, started from.

A checkpoint is one file of torch.save, a dict with the keys of the authors' release: model, ema, vae,
discriminator (state dicts of networks), opt, opt_vae, opt_disc (of optimizers), args (the settings, a plain
dict; in the release an argparse.Namespace) and steps. A run keeps them as checkpoints/STEP.pt.
"""
import itertools
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from support.commands import UserError
from support.files import is_whole_archive, load_into, load_tensors, strip_wrappers, write_atomic

OPTIMIZERS = ("opt", "opt_vae", "opt_disc")


# --- A run's folder -----------------------------------------------------------------------------------------

FOLDERS = ("checkpoints", "pictures", ".")
BY_THE_RUN = r"args\.json|metrics\.jsonl|checkpoints/\d+\.pt|pictures/(samples|reconstructions)-\d+\.png"
BY_OTHERS = (r"checkpoints/\d+\.damaged|events\.out\.tfevents\..+"        # set aside; tensorboard's
             r"|samples-\d+\.png|evaluation-\d+\.(json|png)"              # sample.py, analyze.py
             r"|judged\.json")                                            # judge.py


def files_of(run):
    """(file, its name) of each file in a run's folder and in the two folders that it makes there; the name is
    relative to the run, with / in it. A folder that is a link counts as a file."""
    for folder in FOLDERS:
        if (run / folder).is_dir() and (folder == "." or not (run / folder).is_symlink()):
            for path in sorted((run / folder).iterdir()):
                if path.name not in (".lock", *FOLDERS) or path.is_symlink():
                    yield path, path.relative_to(run).as_posix()


def finished_name(name):
    """The name of the file that `write_atomic` would make of this one; the same for a finished file."""
    return re.sub(r"(^|/)\.([^/]+)\.\d+\.tmp$", r"\1\2", name)


def sweep_run(run):
    """Delete what a killed run left half-written. The run's lock must be held."""
    for path, name in files_of(run):
        if finished_name(name) != name and re.fullmatch(BY_THE_RUN, finished_name(name)):
            path.unlink()


def clear_run(run, say):
    """Delete what a run, and the commands that judge it, have written into its folder, and nothing else:
    say(line) names what is left, wandb's folder for one. Of a link only the link goes."""
    left = []
    for path, name in files_of(run):
        ours = re.fullmatch(f"{BY_THE_RUN}|{BY_OTHERS}", finished_name(name)) and not path.is_dir()
        if ours or path.is_symlink() and name in FOLDERS:
            path.unlink()
        else:
            left.append(name)
    for folder in FOLDERS[:2]:
        if (run / folder).is_dir() and not any((run / folder).iterdir()):
            (run / folder).rmdir()
    if left:
        say(f"{run}: left as they were: {', '.join(left[:5])}{', ...' if len(left) > 5 else ''}")


# --- Finding ------------------------------------------------------------------------------------------------

def checkpoints(run):
    """A run's checkpoints, oldest first."""
    numbered = [path for path in (run / "checkpoints").glob("*.pt") if path.stem.isdecimal()]
    return sorted(numbered, key=lambda path: int(path.stem))


def newest_checkpoint(root="exps"):
    """The last checkpoint of the newest run under `root`, the same for all processes. Raises UserError."""
    found = [path for run in Path(root).glob("*") for path in checkpoints(run)[-1:]]
    if not found:
        raise UserError(f"no checkpoint under {root}/; run python train.py first, or give --ckpt FILE")
    newest = [max(found, key=lambda path: path.stat().st_mtime)]
    if dist.is_initialized():
        dist.broadcast_object_list(newest)
    return newest[0]


def newest_complete(run):
    """The newest checkpoint whose archive is whole; a damaged one is renamed, so that no one takes it."""
    for path in reversed(checkpoints(run)):
        if is_whole_archive(path):
            return path
        aside = path.replace(path.with_suffix(".damaged"))
        tqdm.write(f"{path} is damaged: set aside as {aside.name}")
    return None


# --- Saving -------------------------------------------------------------------------------------------------

class Saver:
    """Writes a run's checkpoints, those of GPUs in a thread beside the next steps: only the copy to the host
    is waited for. Older ones go, but for the newest two and the multiples of keep_every."""

    def __init__(self, run, keep_every):
        self.run, self.keep_every = run, keep_every
        self.thread, self.saving = ThreadPoolExecutor(1), None

    def save(self, step, parts, args):
        """parts: {key: network or optimizer}. Raises UserError, where it is found in the thread later on."""
        self.wait()
        ckpt = {key: part.state_dict() for key, part in parts.items()}
        ckpt |= dict(args=args, steps=step)
        if next(parts["model"].parameters()).is_cuda:
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
        """Raise what a save that has ended in the thread raised."""
        if self.saving and self.saving.done():
            self.saving.result()

    def wait(self):
        """Until the last save is on the disk; raises what it raised."""
        if self.saving:
            self.saving.result()


# --- Reading ------------------------------------------------------------------------------------------------

def is_checkpoint(content):
    """Whether the dict of a file is a training checkpoint, ours or the release's."""
    return "ema" in content and "args" in content


def plain_checkpoint(content, file):
    """A checkpoint with args as a plain dict, no prefixes of DDP and compile in names. Raises UserError."""
    try:
        args = content["args"]
        if not isinstance(args, dict):
            args = vars(args)                                                                  # the release's
        networks = {key: strip_wrappers(content[key]) for key in ("model", "ema")}
        return content | networks | dict(args=args, steps=content["steps"])
    except (KeyError, IndexError, TypeError, AttributeError):
        raise UserError(f"{file}: not a training checkpoint (of model, ema, vae, args and steps)") from None


def read_checkpoint(file):
    """The dict of a checkpoint, as `plain_checkpoint`. Raises UserError."""
    return plain_checkpoint(load_tensors(file), file)


def check_settings(path, old, new, fixed, classes, data_dir, say):
    """Whether a run with the settings `old`, those of the checkpoint `path`, can go on with `new`: those that
    differ are told by say(line), unless they only name the run. Raises UserError where one of `fixed`
    or the names of the classes differ."""
    trained = [unicodedata.normalize("NFC", name) for name in old.get("classes", classes)]
    for label, (before, now) in enumerate(itertools.zip_longest(trained, classes)):
        if before != now:
            raise UserError(f"{path} was trained with {before} as class {label}; in {data_dir} that is {now}")
    for name, now in new.items():
        before = old.get(name, now)
        if before == now:
            continue
        if name in fixed:
            option = name.replace("_", "-")
            raise UserError(f"{path} was trained with --{option} {before}; it cannot go on with {now}")
        if name not in ("resume", "overwrite", "output_dir", "exp_name"):
            say(f"going on with another {name}: {before} -> {now}")


def load_parts(path, ckpt, parts):
    """Everything of a checkpoint back into `parts`, {key: network or optimizer}. Raises UserError."""
    for key, part in parts.items():
        if key not in ckpt:
            raise UserError(f"{path}: its {key} is missing; it cannot be resumed")
        if key not in OPTIMIZERS:
            load_into(part, ckpt[key], f"{path}: {key}")
            continue
        try:
            # Copies: on a CPU an optimizer keeps the tensors that it is given, and with them the file mapped.
            state = tree_map_only(torch.Tensor, torch.clone, ckpt[key])
            for group in state["param_groups"]:
                group["fused"] = part.defaults["fused"]              # it may come from another kind of device
            part.load_state_dict(state)
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path}: its {key} is of another model; it cannot be resumed") from None


def start_from(path, networks, may_differ, leave_out=()):
    """The weights of a checkpoint into networks, {key: network}; returns the names of what starts anew as a
    whole: modules of `may_differ` that do not fit. Those of `leave_out` stay as they are. Raises
    UserError."""
    ckpt, anew = read_checkpoint(path), set()
    for key, net in networks.items():
        own = net.state_dict()
        state = {name: tensor for name, tensor in ckpt[key].items()
                 if name in own or name.split(".")[0] not in may_differ}
        misfits = {name.split(".")[0] for name, tensor in own.items()
                   if name not in state or state[name].shape != tensor.shape}
        anew |= misfits & may_differ
        for name, tensor in own.items():
            if name.split(".")[0] in anew or name.split(".")[0] in leave_out:
                state[name] = tensor
        load_into(net, state, f"{path}: {key}")
    return anew
