"""sample.py: images from a checkpoint.

    python sample.py                                        a grid from the newest checkpoint under exps/
    python sample.py --ckpt X.pt --num-samples 50000 --mode sde --num-steps 250 --out X.npz
    torchrun --nproc_per_node=8 sample.py ...               the same images, the work split

Model, sizes, VAE and latent statistics come from the checkpoint. Image i depends on its label and (seed, i)
alone: its noise comes from a generator of its own. Process 0 gathers all images and writes them.
"""
import argparse
import math
import os
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data.images import IMAGE_SUFFIXES, nfc
from sit import SiT, infer_sit, interpolant
from support.checkpoints import newest_checkpoint, read_checkpoint, run_folder
from support.commands import (
    Parser,
    UserError,
    existing_path,
    fraction,
    path_name,
    positive,
    positive_int,
    require,
    run_command,
    seed_number,
)
from support.devices import (
    Processes,
    can_compile,
    choose_precision,
    end_processes,
    memory_format,
    pick_device,
    start_processes,
)
from support.files import if_supported, load_into, save_npz
from support.grids import image_grid, save_png, to_uint8
from vae import AutoencoderKL, load_vae

# --- Samplers: integrate from noise at t = 1 to data at t = 0 -----------------------------------------------

def time_grid(mode, num_steps):
    """The times of `num_steps` steps (SiT's settings); the last SDE step, 0.04 to 0, is deterministic."""
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


def integrate(velocity, x, mode="ode", num_steps=50, heun=False, path_type="linear", noise=None,
              guidance=(0.0, 1.0)):
    """Integrate dx = v dt (ode: Euler or Heun) or the reverse SDE (sde: Euler-Maruyama) from t = 1 to 0, x:
    float64 [B, C, h, w]. velocity(x, t, guided) -> v; a step is guided if its start t lies in the interval
    `guidance` (arXiv 2404.07724). noise(): standard normal like x, for the SDE."""
    timesteps, (low, high) = time_grid(mode, num_steps), guidance
    for t, t_next in pairwise(timesteps):
        dt, guided = t_next - t, low <= t <= high
        v = velocity(x, t, guided)
        if mode == "sde":
            x = x + sde_drift(x, v, t, path_type) * dt
            if t_next > 0:
                x = x + (2 * t * -dt) ** 0.5 * noise()
        elif heun and t_next > 0:
            x = x + 0.5 * (v + velocity(x + v * dt, t_next, guided)) * dt
        else:
            x = x + v * dt
    return x


def guided_velocity(sit, y, cfg_scale=1.0):
    """SiT's velocity, with classifier-free guidance where `guided`. Guiding v guides the drift of either
    sampler: it is affine in v, and the two weights sum to 1."""
    null = torch.full_like(y, sit.null_class or 0)

    def velocity(x, t, guided):
        inputs, t = x.float(), torch.full((len(y),), t, device=y.device)
        if cfg_scale <= 1 or not guided:
            return sit(inputs, t, y)[0].to(x.dtype)
        both = sit(inputs.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, null]))[0].to(x.dtype)
        v, v_null = both.chunk(2)
        return v_null + cfg_scale * (v - v_null)
    return velocity


LABEL = 1                                      # a stream of random numbers: default_rng((seed, i, stream))


def choose_labels(n, classes, how="equal", seed=0):
    """Labels of images 0 to n - 1 out of `classes`: in turn, or spread evenly where n is fewer; or
    'random'."""
    k = len(classes)
    if how == "random":
        return [classes[np.random.default_rng((seed, i, LABEL)).integers(k)] for i in range(n)]
    return [classes[i % k if n >= k else i * k // n] for i in range(n)]


# --- A checkpoint's images ----------------------------------------------------------------------------------

class Sampler(NamedTuple):
    """What images are sampled with. args: the training's settings, with `resolution` in pixels and `classes`,
    names or else numbers."""
    sit: SiT                                                # with its latent statistics; None of --vae-only
    vae: AutoencoderKL
    args: dict
    step: int
    device: torch.device


def load_sit(tensors, args, stats, what):
    """The SiT of a checkpoint's tensors; stats: the latent statistics that came with the VAE, or None. Raises
    UserError."""
    tensors = {name: t for name, t in tensors.items() if not name.startswith("projectors.")}
    sit = infer_sit(tensors, args, what)
    if "bn.running_mean" not in tensors:
        require(stats, f"{what}: no latent statistics, nor with the VAE (config.json, X-latents-stats.pt)")
        sit.bn.set_statistics(*stats)
        tensors |= {f"bn.{name}": value for name, value in sit.bn.state_dict().items()}
    load_into(sit, tensors, what)
    require(all(t.isfinite().all() for t in tensors.values()), f"{what} holds values that are not finite")
    return sit


def load_checkpoint(file, device="cpu", vae_ckpt=None, compile=False, ema=True):
    """The Sampler of a checkpoint, ours or the release's. vae_ckpt: the VAE (see `load_vae`), if it holds
    none. ema: the averaged weights, else those of the last step. Raises UserError."""
    ckpt, key, sit = read_checkpoint(file), "ema" if ema else "model", None
    args = ckpt["args"]
    vae, stats = load_vae(vae_ckpt or file)
    if not args.get("vae_only"):
        sit = load_sit(ckpt[key], args, stats, f"{file}: {key}")
        require(sit.channels == vae.latent_channels,
                f"{file}: its SiT has {sit.channels} latent channels, the VAE has {vae.latent_channels}")
        sit.to(device).eval().requires_grad_(False)
        if compile:
            sit.compile_blocks()
        args["resolution"] = sit.size * vae.stride
        args["classes"] = args.get("classes") or [str(k) for k in range(sit.num_classes)]
    vae.to(device, memory_format=memory_format(device)).eval().requires_grad_(False)
    if compile:
        vae.decoder.compile()
    return Sampler(sit, vae, args, ckpt["steps"], torch.device(device))


def warn_of_short_average(decay, steps, log):
    """Log a warning where less than half of the averaged weights comes from the steps trained."""
    trained = 1 - decay ** steps
    if trained < 0.5:
        log(f"warning: after {steps} steps only {trained:.1%} of the averaged weights come from training "
            f"(decay {decay}); sample.py --no-ema samples the weights of the last step")


def check_finite(images, what, numbers):
    """Raises UserError where a decoder's images [B, 3, H, W] are not finite: "WHAT NUMBER is not finite"."""
    bad = (~images.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        raise UserError(f"{what} {numbers[bad[0]]} is not finite ({len(bad)} of a batch of {len(images)}): "
                        "a value overflowed in the network; take another checkpoint")


@torch.no_grad()
def sample_images(sampler, indices, labels, *, num_steps=50, mode="ode", heun=False, cfg_scale=1.0,
                  guidance_low=0.0, guidance_high=1.0, seed=0, mixed_precision="no"):
    """Images `indices` of these labels, uint8 [n, 3, H, W] on the device. Raises UserError."""
    sit, vae, args, _, device = sampler
    require(sit, "this checkpoint was trained with --vae-only: it has no SiT to sample from")
    require(cfg_scale <= 1 or sit.null_class is not None and sit.num_classes > 1,
            "--cfg-scale above 1: this model has one class only or no null class (--cfg-prob 0)")
    y = torch.tensor(labels, device=device)
    generators = [np.random.default_rng((seed, i)) for i in indices]
    precision = torch.float32 if device.type == "mps" else torch.float64                # MPS has no float64

    def noise(dtype=np.float64):
        eps = np.stack([g.standard_normal((sit.channels, sit.size, sit.size), dtype) for g in generators])
        return torch.from_numpy(eps).to(precision).to(device)

    with torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision == "bf16"):
        # The first noise is float32, the SDE's float64: a generator's values differ between the two.
        z = integrate(guided_velocity(sit, y, cfg_scale), noise(np.float32), mode, num_steps, heun,
                      args.get("path_type", "linear"), noise, (guidance_low, guidance_high))
        images = vae.decode(sit.bn.denormalize(z.float()))
    check_finite(images, "sample", indices)
    return to_uint8(images)


# --- The command --------------------------------------------------------------------------------------------

def add_sampler_flags(parser):
    add = parser.add_argument
    add("--ckpt", type=existing_path, help="ours or the release's; default: the newest under exps/")
    add("--vae-ckpt", type=path_name, help="the VAE, if the checkpoint has none: file, folder or hub id")
    add("--batch-size", type=positive_int, default=64, help="per process")
    add("--device", default="auto")
    add("--num-steps", type=positive_int, default=50, help="steps of the sampler (paper: 250, sde)")
    add("--mode", choices=["ode", "sde"], default="ode")
    add("--heun", action="store_true", help="second order for --mode ode")
    add("--cfg-scale", type=positive, default=1.0, help="guidance; 1 is none")
    add("--guidance-low", type=fraction, default=0.0, help="guided steps start at low <= t <= high")
    add("--guidance-high", type=fraction, default=1.0)
    add("--label-sampling", choices=["equal", "random"], default="equal")
    add("--seed", type=seed_number, default=0)
    add("--ema", action=argparse.BooleanOptionalAction, default=True,
        help="sample the averaged weights; --no-ema: those of the last step")
    add("--mixed-precision", choices=["no", "bf16", "auto"], default="no",
        help="no: float32 (TF32 on GPUs) as the release; auto: bf16 where it is faster")
    add("--compile", action="store_true", help="torch.compile; faster from some hundreds of images on")


def open_sampler(args, device, processes):
    """(checkpoint file, its Sampler, the keywords of `sample_images`) of parsed flags. Switches TF32 on, as
    in the paper's sampling. Raises UserError."""
    require(not (args.heun and args.mode == "sde"), "--heun goes with --mode ode")
    require(args.cfg_scale >= 1 and args.guidance_low <= args.guidance_high,
            "--cfg-scale: 1 (no guidance) or more; --guidance-low: at most --guidance-high")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    ckpt = Path(args.ckpt or processes.from_first(newest_checkpoint()))
    compile = args.compile and can_compile(device, processes)
    sampler = load_checkpoint(ckpt, device, args.vae_ckpt, compile, args.ema)
    if args.ema:
        warn_of_short_average(sampler.args.get("ema_decay", 0.9999), sampler.step, processes.log)
    names = "num_steps mode heun cfg_scale guidance_low guidance_high seed"
    settings = {name: getattr(args, name) for name in names.split()}
    settings["mixed_precision"] = choose_precision(args.mixed_precision, device, processes)
    return ckpt, sampler, settings


def generate(sampler, labels, batch_size, processes, **settings):
    """Sample image i with label labels[i], the work split over the processes. Process 0 yields all images in
    order, as (number of the first, uint8 [k, H, W, 3] on the CPU); the others send it theirs, and wait while
    it writes them."""
    rank, world, n = processes.rank, processes.world, len(labels)
    batch_size = min(batch_size, math.ceil(n / world))
    for first in tqdm(range(0, n, batch_size * world), "sampling", leave=False, disable=rank > 0):
        indices, images = range(n)[first + rank * batch_size:][:batch_size], []
        if indices:
            images = [sample_images(sampler, indices, [labels[i] for i in indices], **settings).cpu()]
        gathered = processes.gather(images)
        if rank == 0:
            yield first, torch.cat(sum(gathered, [])).permute(0, 2, 3, 1)                     # [k, H, W, 3]


def save_images(out, batches, shape, columns):
    """Write what `generate` yields, in all of this shape [N, H, W, 3], to an .npz (arr_0), a .png (a grid,
    small images enlarged), or a folder of PNGs. Raises UserError, and OSError: a disk too full for the .npz
    shows before any sampling."""
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
        for first, images in batches:
            for i, image in enumerate(images.numpy(), first):
                Image.fromarray(image).save(out / f"{i:06d}.png", compress_level=1)              # 1: faster


def save_sample_grid(sampler, path, cfg_scale, mixed_precision):
    """Write a grid of samples (25 steps) with a column per class, 10 at most."""
    size, columns = sampler.args["resolution"], min(sampler.sit.num_classes, 10)
    labels = [*range(columns)] * (8 if size <= 64 else 4)
    batch_size = columns * (10 // columns)                       # whole rows, about ten samples at a time
    batches = generate(sampler, labels, batch_size, Processes(), num_steps=25, cfg_scale=cfg_scale,
                       mixed_precision=mixed_precision)
    save_images(path, batches, (len(labels), size, size, 3), columns)


def main():
    parser = Parser(description="Generate images from a checkpoint.")
    add = parser.add_argument
    add("--num-samples", type=positive_int, help="default: 8 per class, 80 at most")
    add("--out", type=path_name, help="X.png: a grid; X.npz: arr_0 as ADM's evaluator; else a folder of PNGs")
    add("--classes", help="those to sample, by name or number: cat,3 (default: all)")
    add_sampler_flags(parser)
    args = parser.parse_args()
    device = pick_device(args.device)
    processes = start_processes(device)
    ckpt, sampler, settings = open_sampler(args, device, processes)
    names, size = sampler.args["classes"], sampler.args["resolution"]
    number_of = {str(k): k for k in range(len(names))} | {name: k for k, name in enumerate(names)}
    try:
        classes = [number_of[word] for word in (nfc(args.classes).split(",") if args.classes else names)]
    except KeyError as e:
        raise UserError(f"--classes {e}: take 0 to {len(names) - 1}, or of {', '.join(names[:20])}") from None
    n = args.num_samples or min(8 * len(classes), 80)
    labels = choose_labels(n, classes, args.label_sampling, args.seed)
    batches = generate(sampler, labels, args.batch_size, processes, **settings)
    if processes.rank > 0:
        list(batches)                                          # samples and sends: process 0 gets the images
    else:
        out = Path(args.out or run_folder(ckpt) / f"samples-{ckpt.stem}.png")
        is_file = out.suffix in (".png", ".npz")
        require(is_file or out.suffix.lower() not in IMAGE_SUFFIXES,
                f"--out {out}: write a .png, a .npz or a folder's name")
        require(not out.is_dir() or not is_file and not any(out.glob("*.png")),
                f"--out {out}: this folder exists; name another")
        (out.parent if is_file else out).mkdir(parents=True, exist_ok=True)
        k = len(classes)
        columns = k * max(1, 8 // k) if k <= 20 else 10                   # one per class, or several
        save_images(out, batches, (n, size, size, 3), columns)
        if out.suffix == ".png":
            print("first row:", ", ".join(names[k] for k in labels[:columns]))
        data = sampler.args.get("data_dir", "unnamed data")
        print(f"{n} samples of {ckpt}, step {sampler.step}, trained on {data} -> {out}")
    end_processes(processes)


if __name__ == "__main__":
    run_command(main)
