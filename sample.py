"""sample.py: pictures from a checkpoint.

    python sample.py                                        a grid from the newest checkpoint under exps/
    python sample.py --ckpt X.pt --num-samples 50000 --mode sde --num-steps 250 --out X.npz
    torchrun --nproc_per_node=8 sample.py ...               the same pictures, the work split

Model, sizes, VAE and latent statistics come from the checkpoint. Image i depends on its label and (seed, i)
alone: its noise comes from a generator of its own. Process 0 gathers all images and writes them.
"""
import argparse
import math
import os
import tempfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from sit import interpolant, sit_of
from support.checkpoints import newest_checkpoint, read_checkpoint
from support.commands import (Parser, UserError, existing_path, fraction, path_name, positive, positive_int,
                              run_command, seed_number)
from support.devices import (choose_precision, end_processes, memory_format, pick_device, start_processes,
                             why_no_compile)
from support.files import if_supported, load_into, save_npz
from support.pictures import image_grid, save_png, to_uint8
from vae import load_vae


# --- Samplers: integrate from noise at t = 1 to data at t = 0 -----------------------------------------------

def time_grid(mode, num_steps):
    """The times of `num_steps` steps (SiT's settings); the SDE's last one, 0.04 to 0, goes without noise."""
    if mode == "ode":
        return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64).tolist()
    return torch.linspace(1, 0.04, num_steps, dtype=torch.float64).tolist() + [0.0]


def sde_drift(x, v, t, path_type):
    """Drift of the reverse SDE with diffusion w(t) = 2t, the score taken from the velocity (SiT, eq. 9)."""
    path = interpolant(torch.tensor(t, dtype=torch.float64), path_type)
    alpha, sigma, d_alpha, d_sigma = (float(a) for a in path)
    ratio = alpha / d_alpha
    score = (ratio * v - x) / (sigma ** 2 - ratio * d_sigma * sigma)
    return v - 0.5 * (2 * t) * score


def integrate(velocity, x, mode="ode", num_steps=50, heun=False, path_type="linear", noise=None):
    """Integrate dx = v dt (ode: Euler or Heun) or the reverse SDE (sde: Euler-Maruyama) from t = 1 to 0, x:
    float64 [B, C, h, w]. velocity(x, t, start) -> v; start: when the step began, for its guidance. noise():
    standard normal like x, for the SDE."""
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
    """SiT's velocity with classifier-free guidance inside low <= t <= high (arXiv 2404.07724). Guiding v
    guides the drift of either sampler: it is affine in v, and the two weights sum to 1."""
    null = torch.full_like(y, sit.null_class or 0)

    def velocity(x, t, start):                   # Heun's second look, at s, is guided as its step's start t
        dtype, x, times = x.dtype, x.float(), torch.full((len(y),), t, device=y.device)
        if cfg_scale <= 1 or not low <= start <= high:
            return sit(x, times, y)[0].to(dtype)
        both = sit(x.repeat(2, 1, 1, 1), times.repeat(2), torch.cat([y, null]))[0].to(dtype)
        v, v_null = both.chunk(2)
        return v_null + cfg_scale * (v - v_null)
    return velocity


def label_of(i, seed, classes, labels="equal", n=None):
    """Label of image i of n (None: many) from `classes`: in turn, or spread where n is fewer; or 'random'."""
    if labels == "random":
        return classes[np.random.default_rng((seed, i, 1)).integers(len(classes))]
    turn = i if n is None or n >= len(classes) else i * len(classes) // n
    return classes[turn % len(classes)]


# --- A checkpoint's images ----------------------------------------------------------------------------------

Model = namedtuple("Model", "sit vae args step device")            # sit: with its latent statistics


def load_checkpoint(file, device="cpu", vae_ckpt=None, compile=False, ema=True):
    """The Model of a checkpoint, ours or the release's. vae_ckpt: the VAE (see `load_vae`), if it holds none.
    ema: the averaged weights, else those of the last step. The Model's args have `resolution` in pixels and
    `classes`, names or else numbers. Raises UserError."""
    ckpt, key = read_checkpoint(file), "ema" if ema else "model"
    args = ckpt["args"]
    tensors = {name: t for name, t in ckpt[key].items() if not name.startswith("projectors.")}
    vae, stats = load_vae(vae_ckpt or file)
    sit = sit_of(tensors, args, f"{file}: {key}")
    if sit.channels != vae.latent_channels:
        raise UserError(f"{file}: its SiT draws {sit.channels} channels, the VAE has {vae.latent_channels}")
    if "bn.running_mean" not in tensors:
        if stats is None:
            raise UserError(f"{file}: no latent statistics, nor with the VAE (config.json, "
                            "X-latents-stats.pt)")
        sit.bn.start(*stats)
        tensors |= {f"bn.{name}": value for name, value in sit.bn.state_dict().items()}
    load_into(sit, tensors, f"{file}: {key}")
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise UserError(f"{file}: {key} holds values that are not finite")
    sit.place(device).eval().requires_grad_(False)
    vae.to(device, memory_format=memory_format(device)).eval().requires_grad_(False)
    if compile:
        sit.compile_blocks()
        vae.decoder.compile()
    classes = args.get("classes") or [str(k) for k in range(sit.num_classes)]
    args |= dict(resolution=sit.size * vae.stride, classes=classes)
    return Model(sit, vae, args, ckpt["steps"], torch.device(device))


def warn_of_short_average(model):
    """A warning where less than half of the averaged weights comes from the steps trained, else ''."""
    decay = model.args.get("ema_decay", 0.9999)
    trained = 1 - decay ** model.step
    return "" if trained >= 0.5 else (
        f"warning: only {trained:.1%} of the averaged weights come from the {model.step} steps trained "
        f"(decay {decay}); --no-ema samples the weights of the last step")


def check_finite(images, name):
    """Raises UserError where a decoder's images [B, 3, H, W] are not finite. name(b): what image b is."""
    bad = (~images.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        raise UserError(f"{name(bad[0])} is not finite (of its batch, {len(bad)} of {len(images)}): a value "
                        "overflowed in the network; take another checkpoint")


@torch.no_grad()
def sample_images(model, indices, labels=None, *, num_steps=50, mode="ode", heun=False, cfg_scale=1.0,
                  guidance_low=0.0, guidance_high=1.0, seed=0, mixed_precision="no"):
    """Images `indices`, uint8 [n, 3, H, W] on the device; labels: by default in turn. Raises UserError."""
    if model.args.get("vae_only"):
        raise UserError("this checkpoint was trained with --vae-only: it has no SiT to draw with")
    if cfg_scale > 1 and (model.sit.null_class is None or model.sit.num_classes == 1):
        raise UserError("--cfg-scale above 1: this model has one class only or no null class (--cfg-prob 0)")
    sit, size = model.sit, model.args["resolution"] // model.vae.stride
    if labels is None:
        labels = [label_of(i, seed, range(sit.num_classes)) for i in indices]
    y = torch.tensor(labels, device=model.device)
    generators = [np.random.default_rng((seed, i)) for i in indices]
    precision = torch.float32 if model.device.type == "mps" else torch.float64    # MPS has no float64

    def eps(dtype=np.float64):
        drawn = [g.standard_normal((sit.channels, size, size), dtype=dtype) for g in generators]
        return torch.from_numpy(np.stack(drawn)).to(precision).to(y.device)

    with torch.autocast(y.device.type, torch.bfloat16, enabled=mixed_precision == "bf16"):
        velocity = guided_velocity(sit, y, cfg_scale, guidance_low, guidance_high)
        path_type = model.args.get("path_type", "linear")
        z = integrate(velocity, eps(np.float32), mode, num_steps, heun, path_type, eps)
        images = model.vae.decode(sit.bn.denormalize(z.float()))
    check_finite(images, lambda b: f"sample {indices[b]}")
    return to_uint8(images)


# --- The command --------------------------------------------------------------------------------------------

def add_sampler_flags(parser):
    parser.add_argument("--num-steps", type=positive_int, default=50, help="the sampler's (paper: 250, sde)")
    parser.add_argument("--mode", choices=["ode", "sde"], default="ode")
    parser.add_argument("--heun", action="store_true", help="second order for --mode ode")
    parser.add_argument("--cfg-scale", type=positive, default=1.0, help="guidance; 1 is none")
    parser.add_argument("--guidance-low", type=fraction, default=0.0, help="guided: low <= t <= high")
    parser.add_argument("--guidance-high", type=fraction, default=1.0)
    parser.add_argument("--label-sampling", choices=["equal", "random"], default="equal")
    parser.add_argument("--seed", type=seed_number, default=0)
    parser.add_argument("--ema", action=argparse.BooleanOptionalAction, default=True,
                        help="sample the averaged weights; --no-ema: those of the last step")
    parser.add_argument("--mixed-precision", choices=["no", "bf16", "auto"], default="no",
                        help="no: float32 (TF32 on GPUs) as the release; auto: bf16 where there is hardware")
    parser.add_argument("--compile", action="store_true", help="pays from some hundreds of images")


def sampler_settings(args):
    """The keywords of `sample_images` from parsed flags. Raises UserError where they do not go together."""
    if args.heun and args.mode == "sde":
        raise UserError("--heun goes with --mode ode")
    if args.cfg_scale < 1 or args.guidance_low > args.guidance_high:
        raise UserError("--cfg-scale: 1 (no guidance) or more; --guidance-low: at most --guidance-high")
    lacking = why_no_compile(pick_device(args.device)) if args.compile else ""
    if lacking:
        raise UserError(f"--compile: {lacking}; leave it out")
    names = "num_steps mode heun cfg_scale guidance_low guidance_high seed mixed_precision"
    return {name: getattr(args, name) for name in names.split()}


def draw(model, labels, batch_size, processes, **settings):
    """Draw image i with label labels[i], the work split over the processes. Process 0 yields all images in
    order, as (number of the first, uint8 [k, H, W, 3] on the CPU); the others send it theirs, and wait while
    it writes them."""
    rank, world = processes.rank, processes.world
    starts = range(0, len(labels), batch_size * world)
    for start in tqdm(starts, desc="sampling", unit="batch", disable=rank > 0):
        rest = len(labels) - start
        share = min(batch_size, math.ceil(rest / world))
        indices = [start + min(k * world + rank, rest - 1) for k in range(share)]    # pads with the last one
        images = sample_images(model, indices, [labels[i] for i in indices], **settings)
        images = images.permute(0, 2, 3, 1).contiguous().cpu()                         # [share, H, W, 3]
        if world > 1:
            parts = [torch.empty_like(images) for _ in range(world)] if rank == 0 else None
            dist.gather(images, parts, group=processes.host)
        if rank == 0:
            images = torch.stack(parts, dim=1).flatten(0, 1)[:rest] if world > 1 else images
            yield start, images


def save_images(out, batches, shape, columns):
    """Write what `draw` yields, in all of this shape [N, H, W, 3], to an .npz (arr_0), a .png (a grid), or a
    folder of PNGs. Raises UserError, and OSError: a disk too full for the .npz shows before any drawing."""
    if out.suffix == ".npz":
        with tempfile.TemporaryFile(dir=out.parent) as f:                     # not all images fit into memory
            if hasattr(os, "posix_fallocate"):                            # twice: the .npz needs room, too
                if_supported(os.posix_fallocate, f.fileno(), 0, 2 * math.prod(shape))
            for _, images in batches:
                f.write(images.numpy().tobytes())
            f.truncate()
            save_npz(out, arr_0=np.memmap(f, np.uint8, "r", shape=shape))
    elif out.suffix == ".png":
        images = torch.cat([images for _, images in batches]).permute(0, 3, 1, 2)
        save_png(image_grid(images, columns, scale=max(1, 64 // shape[1])), out)
    else:
        for start, images in batches:
            for i, image in enumerate(images.numpy(), start):
                Image.fromarray(image).save(out / f"{i:06d}.png", compress_level=1)              # 1: faster


def main():
    parser = Parser(description="Draw pictures from a checkpoint.")
    parser.add_argument("--ckpt", type=existing_path, help="ours or the release's; default: newest in exps/")
    parser.add_argument("--vae-ckpt", type=path_name,
                        help="the VAE, where the checkpoint has none: file, folder or hub id")
    parser.add_argument("--num-samples", type=positive_int, help="default: 8 of each class, 80 at most")
    parser.add_argument("--out", type=path_name,
                        help="X.png: a grid; X.npz: arr_0 as ADM's evaluator; else a folder of PNGs")
    parser.add_argument("--classes", help="those to draw, by name or number: cat,3 (default: all)")
    parser.add_argument("--batch-size", type=positive_int, default=64, help="per process")
    parser.add_argument("--device", default="auto")
    add_sampler_flags(parser)
    args = parser.parse_args()
    settings = sampler_settings(args)
    device = pick_device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True     # as the paper samples
    processes = start_processes(device)
    settings["mixed_precision"] = choose_precision(args.mixed_precision, device, processes)
    ckpt = Path(args.ckpt) if args.ckpt else newest_checkpoint()
    model = load_checkpoint(ckpt, device, args.vae_ckpt, args.compile, args.ema)
    warning = args.ema and warn_of_short_average(model)
    if warning:
        processes.say(warning)
    names, size = model.args["classes"], model.args["resolution"]
    number_of = {str(k): k for k in range(len(names))} | {name: k for k, name in enumerate(names)}
    try:
        classes = [number_of[word] for word in (args.classes.split(",") if args.classes else names)]
    except KeyError as e:
        raise UserError(f"--classes {e}: take 0 to {len(names) - 1}, or of {', '.join(names[:20])}") from None
    n = args.num_samples or min(8 * len(classes), 80)
    labels = [label_of(i, args.seed, classes, args.label_sampling, n) for i in range(n)]
    batches = draw(model, labels, args.batch_size, processes, **settings)
    if processes.rank > 0:
        list(batches)                                                            # draws this process's share
    else:
        out = Path(args.out or ckpt.parent.parent / f"samples-{ckpt.stem}.png")
        is_file = out.suffix in (".png", ".npz")
        if out.is_dir() and (is_file or any(out.glob("*.png"))):
            raise UserError(f"--out {out}: this folder exists; name another")
        (out.parent if is_file else out).mkdir(parents=True, exist_ok=True)
        by_class = args.label_sampling == "equal" and len(classes) <= 20           # a grid's column, a class
        columns = len(classes) * max(1, 8 // len(classes)) if by_class else 10
        save_images(out, batches, (n, size, size, 3), columns)
        if out.suffix == ".png":
            print("columns:" if by_class else "first row:", ", ".join(names[k] for k in labels[:columns]))
        drawn = ", ".join(names[label] for label in classes) if args.classes else f"{len(names)} classes"
        data = model.args.get("data_dir", "unnamed data")
        print(f"{n} samples ({drawn}) of {ckpt}, step {model.step}, trained on {data} -> {out}")
    end_processes(processes)


if __name__ == "__main__":
    run_command(main)
