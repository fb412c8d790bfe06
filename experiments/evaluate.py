"""evaluate.py: the Frechet distance (FD) of a run's samples at several of its checkpoints, for compare.sh.

    python experiments/evaluate.py exps/compare/repae-1 --points 400 800 1600 --samples 2000
    python experiments/evaluate.py --floor data/openmoji-32

The first writes fd.json into the run's folder: for each step the FD of the samples to the training images;
for the last step also the FD to the VAE's reconstructions of these images (so that the VAE's own loss does
not count), and the rFD and PSNR of the reconstructions. What is in the file already is not measured again.
The second prints the FD of real images: the lowest that samples can be expected to reach.
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))                                 # the six modules are there
from experiments.compare import read_json
from fid import ImageSet, PooledFeatures, Reconstructions, Samples, collect, frechet_distance
from repa import LITE2
from sample import choose_labels, load_checkpoint
from support.commands import Parser, existing_path, positive_int, require, run_command
from support.devices import Processes, choose_precision, memory_format, pick_device
from support.files import save_npz, write_atomic


def measure(source, net, device, need="pool"):
    """Mean and covariance of a source's features, or with need="features" the features [N, D]."""
    batch_size = 256 if device.type == "cuda" else 32              # changes the results by rounding only
    return collect(source, [(net, need)], device, batch_size)[net.id, need]


def measure_once(file, images, net, device):
    """Mean and covariance of the images' features, kept in a file for the other runs."""
    if not file.is_file():
        mean, cov = measure(images, net, device)
        save_npz(file, mu=mean, sigma=cov)
    return next(iter(ImageSet(file).stats.values()))


def evaluate_run(run, points, args, net, device):
    """Write the run's FDs at the steps `points`. Raises UserError for a missing checkpoint, or if there are
    results with other settings."""
    file = run / "fd.json"
    settings = dict(features=args.features, samples=args.samples, sampler_steps=args.num_steps)
    record = read_json(file) if file.is_file() else settings | dict(fd={})
    require(record | settings == record,
            f"{file}: made with other settings; delete it to evaluate the run again")
    sampler = dict(num_steps=args.num_steps, mixed_precision=choose_precision("auto", device, Processes()))
    last = points[-1]
    for step in points:
        if str(step) in record["fd"] and (step != last or record.get("reconstructions_of") == last):
            continue
        path = run / f"checkpoints/{step:07d}.pt"
        require(path.is_file(), f"{path}: no such checkpoint; --points takes steps of the run's checkpoints")
        model = load_checkpoint(path, device)
        images = ImageSet(model.args["data_dir"], model.args["resolution"])
        real = measure_once(run.parent / f"images-{args.features}.npz", images, net, device)
        labels = choose_labels(args.samples, range(model.sit.num_classes))
        sampled = measure(Samples(path, model, labels, sampler), net, device)
        record["fd"][str(step)] = frechet_distance(real, sampled)
        if step == last:
            source = Reconstructions(path, model, images)
            made = measure(source, net, device)
            record |= dict(fd_to_reconstructions=frechet_distance(made, sampled),
                           rfd=frechet_distance(real, made), psnr=source.sums["psnr"] / source.n,
                           reconstructions_of=last)
        write_atomic(file, lambda tmp, record=record: tmp.write_text(json.dumps(record, indent=1)))
    print(f"{run}: " + ", ".join(f"{step}: {value:.1f}" for step, value in record["fd"].items()))


def fd_of_features(a, b):
    """The FD of two sets of features [N, D], [M, D]."""
    a, b = a.double(), b.double()
    return frechet_distance((a.mean(0), a.T.cov()), (b.mean(0), b.T.cov()))


def print_floor(folder, samples, net, device, repeats=5):
    """The FD of real images: held-out to training images, and a part of the training images to the rest."""
    train, held_out = (measure(ImageSet(folder / part), net, device, "features") for part in ("train", "val"))
    print(f"{len(held_out)} held-out images to the {len(train):,} training images: "
          f"{fd_of_features(held_out, train):.1f}")
    rng = np.random.default_rng(0)
    for n in (len(held_out), samples):
        n = min(n, len(train) // 2)
        orders = [torch.from_numpy(rng.permutation(len(train))) for _ in range(repeats)]
        values = [fd_of_features(train[order[:n]], train[order[n:]]) for order in orders]
        print(f"{n:,} training images to the other {len(train) - n:,}: {np.mean(values):.1f} "
              f"({min(values):.1f}-{max(values):.1f} in {repeats} random splits)")


def main():
    parser = Parser(description="Evaluate a run's samples at several of its checkpoints.")
    add = parser.add_argument
    add("run", nargs="?", type=existing_path, help="a run's folder")
    add("--points", metavar="STEP", nargs="+", type=positive_int, help="steps of the checkpoints to evaluate")
    add("--samples", type=positive_int, default=2000, help="per checkpoint (2,000)")
    add("--num-steps", type=positive_int, default=20, help="Euler steps, without guidance (20)")
    add("--features", default=LITE2, help=f"the evaluation network ({LITE2})")
    add("--features-weights", type=existing_path, help="weights of a timm model")
    add("--floor", type=existing_path, help="evaluate real images: FLOOR/train, FLOOR/val")
    add("--device", default="auto")
    args = parser.parse_args()
    require(args.floor or args.run and args.points, "give RUN and --points, or --floor DATA")
    device = pick_device(args.device)
    net = PooledFeatures(args.features, args.features_weights)
    net.to(device, memory_format=memory_format(device))
    if args.floor:
        print_floor(Path(args.floor), args.samples, net, device)
    else:
        evaluate_run(Path(args.run), sorted(args.points), args, net, device)


if __name__ == "__main__":
    run_command(main)
