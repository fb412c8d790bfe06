"""judge.py: how good a run's samples are, at several of its checkpoints; compare.sh calls it for each run.

    python experiments/judge.py exps/compare/repae-1 --points 400 800 1600 --samples 2000
    python experiments/judge.py --floor data/openmoji-32

The first writes judged.json into the run's folder: for each step the Frechet distance of so many samples to
the training pictures; for the last step also that to what its VAE makes of these pictures (so that what the
VAE itself loses is not counted), the distance of these reconstructions to the pictures, and their PSNR. What
is in the file already is not done again. The second measures what the judge says of real pictures.
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))                       # the six modules are there
from fid import ImageSet, Reconstructions, Samples, collect, frechet_distance
from repa import LITE2, FrozenEncoder
from sample import load_checkpoint
from support.commands import Parser, UserError, existing_path, positive_int, run_command
from support.devices import choose_precision, memory_format, pick_device, start_processes
from support.files import READ_ERRORS, hash_tensors, save_npz, write_atomic


def load_judge(name, ckpt, device):
    """The network that judges, in the form `fid.collect` takes."""
    net = FrozenEncoder(name, ckpt=ckpt).to(device, memory_format=memory_format(device))
    net.name = name
    return net


def measure(source, net, device, desc, need="pool"):
    """The mean and covariance of a source's features, or with need='rows' these features [N, D]."""
    batch_size = 256 if device.type == "cuda" else 32              # which moves no figure, but by rounding
    return collect(source, net, {need}, device=device, batch_size=batch_size, desc=desc)[need]


def kept(file, make):
    """What make() gives, {name: array}: from `file`, where an earlier run has written it."""
    if not file.is_file():
        save_npz(file, **make())
    try:
        with np.load(file) as f:
            return {name: torch.from_numpy(f[name]) for name in f}
    except READ_ERRORS:
        raise UserError(f"{file}: damaged; delete it and start again") from None


def statistics(source, net, device, desc):
    """The mean and covariance of a source's features, in the form `kept` takes."""
    mean, cov = measure(source, net, device, desc)
    return dict(mu=mean.numpy(), sigma=cov.numpy())


def reconstructions(path, model, pictures, net, device):
    """The same of a VAE's reconstructions of the pictures, and their mean PSNR."""
    source = Reconstructions(path, model, pictures)
    made = statistics(source, net, device, "reconstructions")
    return made | dict(psnr=(source.quality[0] / source.n).numpy())


def judge(run, points, samples, num_steps, name, ckpt, device, precision):
    """Fill RUN/judged.json. Raises UserError for a missing checkpoint, or results of other settings in it."""
    file, settings = run / "judged.json", dict(features=name, samples=samples, sampler_steps=num_steps)
    record = settings | dict(fd={})
    if file.is_file():
        try:
            record = json.loads(file.read_text())
        except ValueError:
            raise UserError(f"{file}: damaged; delete it and start again") from None
        if {key: record.get(key) for key in settings} != settings:
            raise UserError(f"{file}: made with other settings; delete it to judge the run anew")
    todo = [step for step in points if str(step) not in record["fd"]]
    if record.get("reconstructions_of") != points[-1]:
        todo = [step for step in todo if step != points[-1]] + [points[-1]]
    if not todo:
        return record
    net = load_judge(name, ckpt, device)
    for step in todo:
        path = run / f"checkpoints/{step:07d}.pt"
        if not path.is_file():
            raise UserError(f"{path}: no such checkpoint; --points names those of the run")
        model = load_checkpoint(path, device)
        pictures = ImageSet(model.args["data_dir"], model.args["resolution"])
        real = kept(run.parent / f"pictures-{name}.npz", lambda: statistics(pictures, net, device, "pictures"))
        drawn = Samples(path, model, samples, dict(num_steps=num_steps, mixed_precision=precision))
        mean, cov = measure(drawn, net, device, f"{run.name}, step {step}")
        record["fd"][str(step)] = frechet_distance(real["mu"], real["sigma"], mean, cov)
        if step == points[-1]:
            vae = hash_tensors(model.vae).hexdigest()[:16]
            made = kept(run.parent / f"reconstructions-{name}-{vae}.npz",
                        lambda: reconstructions(path, model, pictures, net, device))
            record["fd_to_reconstructions"] = frechet_distance(made["mu"], made["sigma"], mean, cov)
            record["rfd"] = frechet_distance(real["mu"], real["sigma"], made["mu"], made["sigma"])
            record["psnr"] = made["psnr"].item()
            record["reconstructions_of"] = step
        text = json.dumps(record, indent=1)
        write_atomic(file, lambda tmp: tmp.write_text(text))
    return record


def distance_of_rows(a, b):
    """The Frechet distance of two sets of features [N, D], [M, D]."""
    a, b = a.double(), b.double()
    return frechet_distance(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))


def floor(folder, samples, name, ckpt, device, draws=5):
    """Lines on what the judge says of real pictures: the least that samples can be expected to reach."""
    net, lines = load_judge(name, ckpt, device), []
    train = measure(ImageSet(folder / "train"), net, device, "training pictures", "rows")
    held_out = measure(ImageSet(folder / "val"), net, device, "held-out pictures", "rows")
    rng = np.random.default_rng(0)
    there = distance_of_rows(held_out, train)
    lines.append(f"{len(held_out)} held-out pictures to the {len(train):,} training pictures: {there:.1f}")
    for n in (len(held_out), min(samples, len(train) // 2)):
        values = []
        for _ in range(draws):
            order = torch.from_numpy(rng.permutation(len(train)))
            values.append(distance_of_rows(train[order[:n]], train[order[n:]]))
        lines.append(f"{n:,} training pictures to the other {len(train) - n:,}: {np.mean(values):.1f} "
                     f"({min(values):.1f} to {max(values):.1f} in {draws} draws)")
    return lines


def main():
    parser = Parser(description="Judge a run's samples at several of its checkpoints.")
    add = parser.add_argument
    add("run", metavar="RUN", nargs="?", type=existing_path, help="a run's folder")
    add("--points", metavar="STEP", nargs="+", type=positive_int, help="checkpoints of these steps")
    add("--samples", type=positive_int, default=2000, help="at each (2,000)")
    add("--num-steps", type=positive_int, default=20, help="Euler steps, without guidance (20)")
    add("--features", default=LITE2, help=f"the network that judges ({LITE2})")
    add("--features-weights", metavar="FILE", type=existing_path, help="of a timm model, not the hub's")
    add("--floor", metavar="DATA", type=existing_path, help="measure real pictures: DATA/train, DATA/val")
    add("--device", default="auto")
    args = parser.parse_args()
    device = pick_device(args.device)
    if args.floor:
        print(*floor(Path(args.floor), args.samples, args.features, args.features_weights, device), sep="\n")
        return
    if not (args.run and args.points):
        raise UserError("give RUN and --points, or --floor DATA")
    precision = choose_precision("auto", device, start_processes(device))
    record = judge(Path(args.run), sorted(args.points), args.samples, args.num_steps, args.features,
                   args.features_weights, device, precision)
    print(f"{args.run}: " + ", ".join(f"{step}: {value:.1f}" for step, value in record["fd"].items()))


if __name__ == "__main__":
    run_command(main)
