"""sample.py: pictures from a checkpoint.

    python sample.py                                        a grid from the newest checkpoint under exps/
    python sample.py --ckpt X.pt --num-samples 50000 --mode sde --num-steps 250 --out X.npz
    torchrun --nproc_per_node=8 sample.py ...               the same pictures, the work split

Model, sizes, VAE and latent statistics all come from the checkpoint; no encoder is loaded. Image i depends on
(seed, i) alone: its label, its first noise and every later one come from a generator of its own.
"""
import argparse
import atexit
import math
import os
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from sit import SIZES, SiT, interpolant
from vae import (Parser, UserError, allocate_rows, can_compile, image_grid, load_into, load_tensors, load_vae,
                 pick_device, run_command, save_png, to_uint8, write_atomic)


# ------------------------------------------------------------------------------------------------------------
# Samplers: integrate from noise at t = 1 to data at t = 0
# ------------------------------------------------------------------------------------------------------------

def time_grid(mode, num_steps):
    """The times of `num_steps` steps (SiT's settings); the SDE's last one, 0.04 to 0, goes without noise."""
    if mode == "ode":
        return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64).tolist()
    return torch.linspace(1, 0.04, num_steps, dtype=torch.float64).tolist() + [0.0]


def sde_drift(x, v, t, path_type):
    """Drift of the reverse SDE with diffusion w(t) = 2t, the score taken from the velocity (SiT, eq. 9)."""
    alpha, sigma, d_alpha, d_sigma = (float(a) for a in interpolant(torch.tensor(t, dtype=torch.float64), path_type))
    ratio = alpha / d_alpha
    score = (ratio * v - x) / (sigma ** 2 - ratio * d_sigma * sigma)
    return v - 0.5 * (2 * t) * score


def integrate(velocity, x, mode="ode", num_steps=50, heun=False, path_type="linear", noise=None):
    """Integrate dx = v dt (ode: Euler or Heun) or the reverse SDE (sde: Euler-Maruyama) from t = 1 to 0.

    velocity(x, t, start) -> v: start is the time at which the step began (Heun's second evaluation keeps the
    first one's guidance by it). x: float64 [B, C, h, w]; noise() -> standard normal like x, for the SDE."""
    times = time_grid(mode, num_steps)
    for i, (t, s) in enumerate(zip(times, times[1:])):
        v, dt = velocity(x, t, t), s - t
        if mode == "sde":
            x = x + sde_drift(x, v, t, path_type) * dt
            if i < num_steps - 1:
                x = x + (2 * t * -dt) ** 0.5 * noise()
        elif heun and s > 0:
            x = x + 0.5 * (v + velocity(x + v * dt, s, t)) * dt
        else:
            x = x + v * dt
    return x


def guided_velocity(sit, y, cfg_scale=1.0, low=0.0, high=1.0):
    """SiT's velocity with classifier-free guidance inside low <= t <= high (arXiv 2404.07724). Guiding v is
    guiding the drift of either sampler: the drift is affine in v and the two weights sum to 1."""
    null = torch.full_like(y, sit.null_class or 0)

    def velocity(x, t, start):
        state, x, times = x.dtype, x.float(), torch.full((len(y),), t, device=y.device)
        if cfg_scale <= 1 or not low <= start <= high:
            return sit(x, times, y)[0].to(state)
        v, v_null = sit(x.repeat(2, 1, 1, 1), times.repeat(2), torch.cat([y, null]))[0].to(state).chunk(2)
        return v_null + cfg_scale * (v - v_null)

    return velocity


def label_of(i, seed, classes, labels="equal"):
    """Image i's label: i mod the number of classes ('equal', as the paper's later tables), or 'random'."""
    if labels == "equal":
        return classes[i % len(classes)]
    return classes[np.random.default_rng((seed, i, 1)).integers(len(classes))]


# ------------------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------------------

# What sampling needs: the averaged SiT (with its latent statistics), the VAE, the settings, the step.
Model = namedtuple("Model", "sit vae args step device")


def checkpoints(run):
    """A run's checkpoints, oldest first."""
    found = [p for p in (run / "checkpoints").glob("*.pt") if p.stem.isdecimal()]
    return sorted(found, key=lambda p: int(p.stem))


def newest_checkpoint(root="exps"):
    """The last checkpoint of the newest run under `root`, the same one for all processes. Raises UserError
    where there is none."""
    found = [path for run in Path(root).glob("*") for path in checkpoints(run)[-1:]]
    if not found:
        raise UserError(f"no checkpoint under {root}/; run python train.py first, or give --ckpt FILE")
    newest = [max(found, key=lambda p: p.stat().st_mtime)]
    if dist.is_initialized():
        dist.broadcast_object_list(newest)
    return newest[0]


def read_checkpoint(file):
    """The checkpoint's dict, its args as a plain dict. Raises UserError for anything else."""
    ckpt = load_tensors(file)
    if not isinstance(ckpt, dict) or not {"model", "ema", "args", "steps"} <= ckpt.keys():
        raise UserError(f"{file}: not a training checkpoint (it needs model, ema, vae, args and steps)")
    args = ckpt["args"]
    return ckpt | dict(args=vars(args) if isinstance(args, argparse.Namespace) else args)   # the release's


def load_checkpoint(file, device="cpu", vae_ckpt=None, compile=False):
    """Build the sampling Model of a checkpoint, ours or the release's; sizes come from its tensors. vae_ckpt:
    the VAE of a second-stage checkpoint, which holds none (anything `load_vae` takes). Raises UserError."""
    ckpt = read_checkpoint(file)
    args, state = ckpt["args"], {k: v for k, v in ckpt["ema"].items() if not k.startswith("projectors.")}
    if not vae_ckpt and "vae" not in ckpt:
        raise UserError(f"{file}: no VAE in this checkpoint, it was frozen; give its file by --vae-ckpt")
    vae, stats = load_vae(vae_ckpt or file)
    try:
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
        size = patch * math.isqrt(state["pos_embed"].shape[1])
        rows = state["y_embedder.embedding_table.weight"].shape[0]
        name = next(name for name, (blocks, wide, _) in SIZES.items() if (blocks, wide) == (depth, width))
    except (KeyError, ValueError, StopIteration):
        raise UserError(f"{file}: ema is not a SiT of the sizes {', '.join(SIZES)}") from None
    num_classes = args.get("num_classes", rows - (args.get("cfg_prob", 0.1) > 0))
    sit = SiT(f"SiT-{name}/{patch}", size, channels, num_classes, cfg_prob=float(rows > num_classes),
              qk_norm="blocks.0.attn.q_norm.weight" in state, encoder_depth=1)
    if channels != vae.latent_channels:
        raise UserError(f"{file}: its SiT draws {channels} channels, the VAE has {vae.latent_channels}")
    if "bn.running_mean" not in state:
        if stats is None:
            raise UserError(f"{file}: no latent statistics in it, nor beside the VAE (config.json, or "
                            "NAME-latents-stats.pt beside NAME.pt)")
        sit.bn.start(*stats)
        state |= {f"bn.{name}": value for name, value in sit.bn.state_dict().items()}
    load_into(sit, state, f"{file}: ema")
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise UserError(f"{file}: ema holds values that are not finite")
    sit.place(device).eval().requires_grad_(False)
    vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    if compile:
        sit.compile_blocks()
        vae.decoder.compile()
    return Model(sit, vae, args | dict(resolution=size * vae.stride), ckpt["steps"], torch.device(device))


@torch.no_grad()
def sample_images(model, indices, labels=None, *, num_steps=50, mode="ode", heun=False, cfg_scale=1.0,
                  guidance_low=0.0, guidance_high=1.0, seed=0, mixed_precision="no"):
    """Images `indices` (any integers) as uint8 [n, 3, H, W] on the model's device, not waited for; labels:
    one each, i mod classes by default. Raises UserError."""
    sit, size = model.sit, model.args["resolution"] // model.vae.stride
    if model.args.get("vae_only"):
        raise UserError("this checkpoint was trained with --vae-only: it has no SiT to draw with")
    if cfg_scale > 1 and sit.null_class is None:
        raise UserError("--cfg-scale above 1: this model was trained with --cfg-prob 0, it has no null class")
    if labels is None:
        labels = [label_of(i, seed, range(sit.num_classes)) for i in indices]
    y = torch.tensor(labels, device=model.device)
    generators = [np.random.default_rng((seed, i)) for i in indices]
    state = torch.float32 if model.device.type == "mps" else torch.float64        # MPS has no float64

    def noise(dtype=np.float64):
        drawn = [g.standard_normal((sit.channels, size, size), dtype=dtype) for g in generators]
        return torch.from_numpy(np.stack(drawn)).to(state).to(y.device)

    with torch.autocast(y.device.type, torch.bfloat16, enabled=mixed_precision == "bf16"):
        velocity = guided_velocity(sit, y, cfg_scale, guidance_low, guidance_high)
        z = integrate(velocity, noise(np.float32), mode, num_steps, heun,
                      model.args.get("path_type", "linear"), noise)
        return to_uint8(model.vae.decode(sit.bn.denormalize(z.float())))


# ------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------

def add_sampler_flags(parser):
    parser.add_argument("--num-steps", type=int, default=50, help="sampler's (the paper: 250 with sde)")
    parser.add_argument("--mode", choices=["ode", "sde"], default="ode")
    parser.add_argument("--heun", action="store_true", help="second order for --mode ode")
    parser.add_argument("--cfg-scale", type=float, default=1.0, help="guidance; 1 is none")
    parser.add_argument("--guidance-low", type=float, default=0.0, help="guide only where low <= t <= high")
    parser.add_argument("--guidance-high", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--compile", action="store_true", help="pays from some hundreds of images")


def sampler_settings(args):
    """The sampler's keywords from parsed flags, checked."""
    if args.num_steps < (2 if args.mode == "sde" else 1):
        raise UserError(f"--num-steps {args.num_steps}: at least 1 (ode) or 2 (sde)")
    if args.heun and args.mode == "sde":
        raise UserError("--heun goes with --mode ode")
    if args.cfg_scale < 1:
        raise UserError(f"--cfg-scale {args.cfg_scale}: 1 (no guidance) or more")
    if not 0 <= args.guidance_low <= args.guidance_high <= 1:
        raise UserError("--guidance-low and --guidance-high: 0 <= low <= high <= 1")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: 0 or more")
    if args.compile and not can_compile(pick_device(args.device)):
        raise UserError("--compile: no C++ compiler here; leave it out")
    names = "num_steps mode heun cfg_scale guidance_low guidance_high seed mixed_precision"
    return {name: getattr(args, name) for name in names.split()}


def start_processes(device):
    """Join torchrun's process group, if any (NCCL on CUDA, gloo elsewhere); returns (rank, world size)."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


def save_npz(file, **arrays):
    """np.savez, whole or not at all."""
    def write(tmp):
        with open(tmp, "wb") as f:                           # given a name, np.savez would add .npz to it
            np.savez(f, **arrays)
    write_atomic(file, write)


def main():
    parser = Parser(description="Draw pictures from a checkpoint.")
    parser.add_argument("--ckpt", help="a checkpoint, ours or the release's; default: the newest in exps/")
    parser.add_argument("--vae-ckpt", help="the VAE, where the checkpoint has none: file, folder or hub id")
    parser.add_argument("--num-samples", type=int, help="default: 8 of each class, 80 at most")
    parser.add_argument("--out", help="X.png: a grid; X.npz: arr_0 as ADM's evaluator; else a folder of PNGs")
    parser.add_argument("--classes", help="labels to draw, e.g. 3,5 (default: all)")
    parser.add_argument("--label-sampling", choices=["equal", "random"], default="equal")
    parser.add_argument("--batch-size", type=int, default=64, help="per process")
    parser.add_argument("--device", default="auto")
    add_sampler_flags(parser)
    args = parser.parse_args()
    settings = sampler_settings(args)
    if args.batch_size < 1 or (args.num_samples is not None and args.num_samples < 1):
        raise UserError("--batch-size and --num-samples: at least 1")
    device = pick_device(args.device)
    rank, world = start_processes(device)
    ckpt = Path(args.ckpt) if args.ckpt else newest_checkpoint()
    model = load_checkpoint(ckpt, device, args.vae_ckpt, args.compile)
    classes = range(model.sit.num_classes)
    if args.classes:
        try:
            classes = [classes.index(int(c)) for c in args.classes.split(",")]       # ValueError if outside
        except ValueError:
            raise UserError(f"--classes {args.classes}: write numbers from 0 to {len(classes) - 1}, with "
                            "commas") from None
    n = args.num_samples or min(8 * len(classes), 80)
    out = Path(args.out or ckpt.parent.parent / f"samples-{ckpt.stem}.png")
    is_folder = out.suffix not in (".png", ".npz")
    if is_folder and out.is_dir() and any(out.glob("*.png")):
        raise UserError(f"--out {out}: the folder holds pictures already; name another")

    resolution = model.args["resolution"]
    shared = out.with_name(f".{out.name}.samples.npy")              # every process writes its own rows
    if rank == 0:
        (out if is_folder else out.parent).mkdir(parents=True, exist_ok=True)
        if not is_folder:
            atexit.register(shared.unlink, missing_ok=True)
            allocate_rows(shared, np.uint8, (n, resolution, resolution, 3))
    if world > 1:
        dist.barrier()
    rows = None if is_folder else np.load(shared, mmap_mode="r+")
    mine = range(rank, n, world)

    def store(indices, images):
        for i, image in zip(indices, images.permute(0, 2, 3, 1).cpu().numpy()):
            if is_folder:
                Image.fromarray(image).save(out / f"{i:06d}.png")
            else:
                rows[i] = image

    bar = tqdm(total=len(mine), unit="img", disable=rank > 0, desc="sampling")
    with ThreadPoolExecutor(1) as writer, bar:
        stored = writer.submit(lambda: None)
        for start in range(0, len(mine), args.batch_size):
            indices = mine[start:start + args.batch_size]
            labels = [label_of(i, args.seed, classes, args.label_sampling) for i in indices]
            images = sample_images(model, indices, labels, **settings)
            stored.result()                                  # at most one batch behind; raises what it raised
            stored = writer.submit(store, indices, images)
            bar.update(len(indices))
        stored.result()
    if not is_folder:
        rows.flush()
    if world > 1:
        dist.barrier()
    if rank == 0 and not is_folder:
        rows = np.load(shared, mmap_mode="c")              # anew: on a network drive, with the others' rows
        if out.suffix == ".npz":
            save_npz(out, arr_0=rows)
        else:
            columns = len(classes) if args.label_sampling == "equal" and 4 <= len(classes) <= 20 else 10
            save_png(image_grid(torch.from_numpy(rows).permute(0, 3, 1, 2), columns,
                                scale=max(1, 64 // resolution)), out)
    if rank == 0:
        print(f"{n} samples of {ckpt} (step {model.step}) -> {out}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
