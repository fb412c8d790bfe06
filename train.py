"""train.py: REPA-E, the VAE and the diffusion transformer trained end to end (arXiv 2504.10483).

    python train.py                                               the tiny preset: emoji, minutes, no GPU
    torchrun --nproc_per_node=8 train.py --preset sdvae-xl2 --data-dir imagenet/train --vae-ckpt sdvae.pt

Read `train_step` first: it is the method. Everything else in this file exists so that its lines can be plain.
"""
import argparse
import atexit
import copy
import dataclasses
import itertools
import json
import logging
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
import timeit
import warnings
import zipfile
import zlib
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.nn.utils import clip_grad_norm_
from torch.profiler import record_function
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from repa import DINOV2_B, EMBEDDED, EncoderDistance, FrozenEncoder, alignment_loss, projector, timm_name
from sample import Model, checkpoints, read_checkpoint, sample_images, start_processes
from sit import SiT, SiTBlock, draw_times, interpolate, parse_model
from vae import (LPIPS, AttnBlock, AutoencoderKL, DiagonalGaussian, Discriminator, Parser, ResnetBlock,
                 UserError, can_compile, chroma_error, count, existing_folder, existing_path, fraction,
                 hash_tensors, hinge_loss, image_grid, latents_in_colour, list_images, load_into,
                 load_tensors, load_vae, non_negative, one_line, pick_device, positive, positive_int, psnr,
                 read_image, run_command, save_png, to_float, to_uint8, write_atomic)

try:
    import fcntl
except ImportError:                                                   # Windows: two runs are not told apart
    fcntl = None


# --- Settings: the defaults are the paper's; a preset changes some of them, a flag any ----------------------

def flag(default, help, type=str, choices=None):
    return field(default=default, metadata=dict(help=help, type=type, choices=choices))


@dataclass
class Config:
    preset: str = flag("sdvae-xl2", "a row of PRESETS; tiny where none is named")
    # the run
    output_dir: str = flag("exps", "runs go to OUTPUT_DIR/EXP_NAME")
    exp_name: str = flag("", "default: the preset's name")
    seed: int = flag(0, "with the step it fixes all randomness", count)
    max_train_steps: int = flag(400_000, "the paper's 80 epochs", positive_int)
    checkpointing_steps: int = flag(5_000, "between checkpoints; the last is always saved", positive_int)
    keep_every: int = flag(50_000, "checkpoints at its multiples stay, and the newest two", positive_int)
    sampling_steps: int = flag(10_000, "steps between pictures", positive_int)
    log_steps: int = flag(100, "steps between lines of metrics.jsonl", positive_int)
    profile: int = flag(0, "run that many steps, print where the time goes, and stop", count)
    resume: bool = flag(False, "go on from the newest checkpoint, or start afresh where there is none")
    overwrite: bool = flag(False, "delete the run of the same name")
    report_to: str = flag("", "also log to this", choices=["", "tensorboard", "wandb"])
    device: str = flag("auto", "cpu, cuda, mps or auto")
    mixed_precision: str = flag("bf16", "autocast; losses and norms stay float32", choices=["no", "bf16"])
    compile: bool = flag(True, "torch.compile the networks")
    gradient_checkpointing: bool = flag(False, "keep less for the backward pass, compute it again instead")
    gradient_accumulation_steps: int = flag(1, "parts of a batch, each with its own statistics", positive_int)
    num_workers: int = flag(8, "loader processes per GPU", count)
    # the data
    data_dir: str = flag("", "DIR/CLASS/*.jpg, DIR with dataset.json, or a folder of images (one class); "
                         "without it (tiny) OpenMoji is drawn into data/", existing_folder)
    val_dir: str = flag("", "pictures for reconstructions and PSNR; default: data_dir", existing_folder)
    resolution: int = flag(256, "pixels", positive_int)
    num_classes: int = flag(0, "labels 0 to N-1, label N stands for none; 0: as many as the data has", count)
    batch_size: int = flag(256, "global, over all processes", positive_int)
    flip: bool = flag(False, "random horizontal flips (the release trains without)")
    # the models
    model: str = flag("SiT-XL/2", "SiT-SIZE/PATCH, SIZE of T S B L XL")
    qk_norm: bool = flag(False, "normalise queries and keys")
    cfg_prob: float = flag(0.1, "share of labels dropped, for guidance", fraction)
    path_type: str = flag("linear", "interpolant", choices=["linear", "cosine"])
    weighting: str = flag("uniform", "of training times", choices=["uniform", "lognormal"])
    latent_norm: bool = flag(True, "off: the statistics stay as measured at the start (the paper's ablation)")
    bn_momentum: float = flag(0.1, "of the latent norm's running statistics", fraction)
    vae: str = flag("f8d4", "from random weights: one of vae.py's VAES; a file brings its own")
    vae_ckpt: str = flag("", "the VAE to start from: weights, checkpoint, diffusers directory or hub id")
    vae_from_scratch: bool = flag(False, "start the VAE from random weights when there is no --vae-ckpt")
    init_from: str = flag("", "the training checkpoint whose SiT and VAE to start from", existing_path)
    # what reaches the VAE besides its own losses; the alignment
    vae_grad: str = flag("repa", "the alignment's gradient (REPA-E), none (the VAE is frozen), the diffusion "
                         "loss's (naive end to end), or both", choices=["repa", "none", "diffusion", "both"])
    vae_only: bool = flag(False, "train the VAE by its own losses, without SiT")
    cache_latents: bool = flag(False, "of a frozen VAE: write the latents once, then never run it")
    enc_type: str = flag(DINOV2_B, f"timm encoders with commas, or {EMBEDDED}")
    enc_ckpt: str = flag("", "the encoder's weights file, in place of the hub", existing_path)
    projector: str = flag("mlp", "three layers, or iREPA's 3x3 convolution", choices=["mlp", "conv"])
    projector_dim: int = flag(2048, "width of the mlp projector's hidden layers", positive_int)
    spatial_norm: float = flag(0.0, "gamma of iREPA's norm of the features (0.6); 0: none", non_negative)
    encoder_depth: int = flag(8, "the block whose output is aligned", positive_int)
    proj_coeff: float = flag(0.5, "weight of the alignment in SiT's pass; 0: no alignment", non_negative)
    vae_align_proj_coeff: float = flag(1.5, "weight of the alignment in the VAE's pass", non_negative)
    # the VAE's other losses
    perceptual: str = flag("lpips", "perceptual distance", choices=["lpips", "encoder"])
    lpips_ckpt: str = flag("", "LPIPS' heads (vgg.pth), in place of the lpips package's", existing_path)
    vgg_ckpt: str = flag("", "torchvision's VGG16 weights, in place of the hub", existing_path)
    perceptual_weight: float = flag(1.0, "of the perceptual distance", non_negative)
    kl_weight: float = flag(1e-6, "of the KL term (nats per image)", non_negative)
    disc_weight: float = flag(0.1, "of the GAN term; at 0 the discriminator is not trained", non_negative)
    disc_pretrained_ckpt: str = flag("", "the discriminator to start from", existing_path)
    disc_start: int = flag(20_000, "the VAE feels the discriminator from here on (pretrained: 0)", count)
    # optimisation
    learning_rate: float = flag(1e-4, "AdamW, of SiT and projectors", positive)
    vae_learning_rate: float = flag(1e-4, "AdamW, of the VAE", positive)
    disc_learning_rate: float = flag(1e-4, "AdamW, of the discriminator", positive)
    lr_warmup_steps: int = flag(0, "linear warm-up of all three rates (the paper: none)", count)
    lr_decay_steps: int = flag(0, "linear decay to zero over the last steps (the paper: none)", count)
    max_grad_norm: float = flag(1.0, "each of the three gradients is clipped to it", positive)
    ema_decay: float = flag(0.9999, "of SiT's parameters and latent statistics", fraction)
    # the pictures on the way
    cfg_scale: float = flag(1.0, "guidance of the sample grids", positive)
    allow_random_weights: bool = flag(False, "frozen encoders without weights: for trying things out")


SECOND_STAGE = dict(vae_grad="none", cache_latents=True, max_train_steps=4_000_000, keep_every=500_000)
PRESETS = {
    "tiny": dict(
        resolution=32, batch_size=16, max_train_steps=2500, checkpointing_steps=500, sampling_steps=500,
        log_steps=50, num_workers=0, compile=False, cfg_scale=2.5, model="SiT-T/2", weighting="lognormal",
        encoder_depth=2, enc_type=EMBEDDED, projector_dim=512, vae="f4d8", vae_from_scratch=True,
        perceptual="encoder", perceptual_weight=0.25, kl_weight=2e-5, disc_weight=0.0, learning_rate=2e-3,
        vae_learning_rate=3e-3, lr_warmup_steps=50, lr_decay_steps=1500, ema_decay=0.99),
    "sdvae-xl2": dict(vae="f8d4", model="SiT-XL/2"),
    "invae-xl1": dict(vae="f16d32", model="SiT-XL/1"),
    "vavae-xl1": dict(vae="f16d32", model="SiT-XL/1"),         # as IN-VAE, from VA-VAE's weights
    # the second stage: REPA over the frozen VAE that one of the above has tuned, 800 epochs
    "e2e-sdvae-xl2": dict(vae="f8d4", model="SiT-XL/2", **SECOND_STAGE),
    "e2e-vavae-xl1": dict(vae="f16d32", model="SiT-XL/1", **SECOND_STAGE),
}


# --- The step -----------------------------------------------------------------------------------------------

def train_step(m, cfg, step, x, y, z, posterior_noise, eps, t, drop, last=True):
    """One step of REPA-E (paper, section 3 and algorithm 1). Returns {name: scalar tensor}.

    x: images [B, 3, H, W] in [-1, 1]; y: labels [B]; z: latents [B, C, h, w] of a frozen VAE, None where the
    VAE trains; posterior_noise, eps: standard normal [B, C, h, w]; t: times [B] in [0, 1]; drop: bool [B],
    labels hidden from SiT; last: False while more parts of the same batch follow, whose gradients add up.
    m.vae, m.sit, m.disc are the networks, m.ddp_* the same ones with gradients averaged over processes."""
    zero, log = torch.zeros((), device=x.device), {}
    with m.autocast(), torch.no_grad():
        f = [encoder(x) for encoder in m.encoders]                              # the targets [B, N, C_i]

    if z is None:
        # 1. The VAE. SiT, projectors and D are frozen: this backward touches encoder and decoder alone.
        with frozen(m.sit_params), frozen(m.disc_params):
            with m.autocast():
                posterior, z, x_rec = m.ddp_vae(x, posterior_noise)         # q(z|x), z ~ q, x^ = decode(z)
                l1, kl = (x - x_rec).abs().mean(), posterior.kl().mean()
                perceptual, gan, align, diffusion = m.perceptual(x_rec, x), zero, zero, zero
                x_t, velocity = interpolate(m.sit.bn.normalize(z), t, eps, cfg.path_type)   # running stats
                if cfg.disc_weight > 0 and step >= cfg.disc_start:
                    gan = -m.disc(x_rec).mean()
                if cfg.vae_grad in ("diffusion", "both"):     # naive end to end: z reaches both x_t and v*
                    diffusion = (m.sit(x_t, t, y)[0] - velocity).square().mean()
                if cfg.vae_grad in ("repa", "both") and f:    # blocks 1..depth, with all labels
                    align = alignment_loss(m.sit.align(x_t, t, y), f)
                vae_loss = (l1                                                        # encoder, decoder
                            + cfg.perceptual_weight * perceptual                      # encoder, decoder
                            + cfg.kl_weight * kl                                      # encoder
                            + cfg.disc_weight * gan                                   # encoder, decoder
                            + cfg.vae_align_proj_coeff * align                        # encoder
                            + diffusion)                                              # encoder: not in REPA-E
            vae_loss.backward()
        # 2. The discriminator, on sg(x^): it alone.
        disc_loss = zero
        if cfg.disc_weight > 0:
            disc_loss = hinge_loss(real=m.ddp_disc(x), fake=m.ddp_disc(x_rec.detach()))
            disc_loss.backward()
        log = dict(vae_loss=vae_loss, l1_loss=l1, perceptual_loss=perceptual, kl_loss=kl, gan_loss=gan,
                   vae_align_loss=align, vae_denoising_loss=diffusion, disc_loss=disc_loss)

    # 3. SiT and projectors, on sg(z): the stop-gradient, no loss below reaches the VAE. Batch statistics.
    z = m.sit.bn(z.detach())
    if not cfg.vae_only:
        with m.autocast():
            x_t, velocity = interpolate(z, t, eps, cfg.path_type)               # the same t and eps
            v, projected = m.ddp_sit(x_t, t, y.masked_fill(drop, m.sit.num_classes))
            denoising = (v - velocity).square().mean()
            align = alignment_loss(projected, f) if f else zero
            loss = (denoising                                          # all blocks and the head
                    + cfg.proj_coeff * align)                          # blocks 1..depth, projectors
        loss.backward()
        log |= dict(loss=loss, denoising_loss=denoising, proj_loss=align)
    log = {name: value for name, value in log.items() if value is not zero}
    return (log | update(m, cfg)) if last else log


@contextmanager
def frozen(params):
    """No gradient for these parameters inside (pos_embed is in no such list: it never gets one)."""
    for p in params:
        p.requires_grad_(False)
    yield                                                                 # an error in there ends the run
    for p in params:
        p.requires_grad_(True)


SKIPPED, ZEROS = 20, 100                                      # so many bad steps in a row end a run


def update(m, cfg):
    """Clip each network's gradient, step its optimizer, move the EMA; returns {name: norm before clipping}
    and m.health. Where a gradient is not finite, no network steps and the statistics go back: decided on the
    device, and alike on all processes, since averaging brings a bad gradient of one to all."""
    norms = {}
    for name, optimizer in m.trained.items():
        params = optimizer.param_groups[0]["params"]
        if cfg.gradient_accumulation_steps > 1:
            torch._foreach_div_([p.grad for p in params], cfg.gradient_accumulation_steps)
        norms[name] = clip_grad_norm_(params, cfg.max_grad_norm)
    bad = (~torch.stack(list(norms.values())).isfinite().all()).float()
    for optimizer in m.trained.values():
        if m.fused:
            optimizer.found_inf = bad                                     # the fused kernels skip by it
        if m.fused or not bad:                                            # MPS reads it: its kernel would not
            optimizer.step()
        optimizer.zero_grad()
    for buffer, kept in zip(m.statistics, m.kept_statistics):
        buffer.copy_(torch.where(bad > 0, kept, buffer))
        kept.copy_(buffer)
    torch._foreach_lerp_(m.ema_tensors, m.sit_tensors, 1 - cfg.ema_decay)        # and the latent statistics
    still = norms.get("grad_norm", norms.get("vae_grad_norm")) == 0       # SiT's, or of a VAE alone its own
    skipped, zeros = m.health["skipped_in_a_row"], m.health["zero_gradients_in_a_row"]
    m.health = dict(skipped=m.health["skipped"] + bad,                   # alarms stay until the log sees them
                    skipped_in_a_row=torch.where(skipped < SKIPPED, (skipped + bad) * bad, skipped),
                    zero_gradients_in_a_row=torch.where(zeros < ZEROS, (zeros + 1) * still, zeros))
    return norms | m.health


def run_step(m, cfg, step, batch, rank, world, device):
    """train_step on a batch as it comes from the loader, part by part; rates warm up and decay linearly."""
    x, y, _, *moments = batch
    x, y, *moments = (tensor.to(device, non_blocking=True) for tensor in (x, y, *moments))
    x = to_float(x).contiguous(memory_format=torch.channels_last)
    left = cfg.max_train_steps - step
    scale = min(1.0, (step + 1) / max(cfg.lr_warmup_steps, 1), left / max(cfg.lr_decay_steps, 1))
    for optimizer, rate in ((m.opt, cfg.learning_rate), (m.opt_vae, cfg.vae_learning_rate),
                            (m.opt_disc, cfg.disc_learning_rate)):
        optimizer.param_groups[0]["lr"] = rate * scale
    noise = draw_noise(cfg, step, (m.vae.latent_channels, m.size, m.size), rank, world, device)
    parts, logs = cfg.gradient_accumulation_steps, []
    for k in range(parts):
        x_k, y_k, *noise_k = (values.chunk(parts)[k] for values in (x, y, *noise))
        z = None
        if cfg.vae_grad == "none":
            with torch.no_grad(), m.autocast():
                posterior = DiagonalGaussian(moments[0].chunk(parts)[k]) if moments else m.vae.encode(x_k)
            z = posterior.sample(noise_k[0])
        logs.append(train_step(m, cfg, step, x_k, y_k, z, *noise_k, last=k == parts - 1))
    return {name: torch.stack([log[name].detach() for log in logs if name in log]).mean()
            for name in logs[-1]}


def draw_noise(cfg, step, latent_shape, rank, world, device):
    """(posterior_noise, eps, t, drop) of a step: drawn for the global batch from (seed, step), then this
    process's slice, so that neither resuming nor the number of processes changes them."""
    seed = np.random.SeedSequence((cfg.seed, step)).generate_state(1, np.uint64)      # each pair has its own
    g = torch.Generator(device).manual_seed(int(seed[0]))
    posterior_noise = torch.randn(cfg.batch_size, *latent_shape, generator=g, device=device)
    eps = torch.randn(cfg.batch_size, *latent_shape, generator=g, device=device)
    t = draw_times(cfg.batch_size, cfg.path_type, cfg.weighting, g, device)
    drop = torch.rand(cfg.batch_size, generator=g, device=device) < cfg.cfg_prob
    return [values.chunk(world)[rank] for values in (posterior_noise, eps, t, drop)]


# --- The flags, checked without reading, drawing or building anything heavy ---------------------------------

def parse_config(argv=None):
    """Flags -> Config. Raises UserError for what would otherwise fail late or train something else."""
    parser = Parser(description="Train REPA-E. In brackets: the paper's values; a preset changes some.")
    for f in dataclasses.fields(Config):
        kind = dict(type=f.metadata["type"], choices=f.metadata["choices"])
        if f.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        default = "" if f.default == "" else f" ({f.default})"
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=f.metadata["help"] + default, **kind)
    given = vars(parser.parse_args(argv))
    preset = given.setdefault("preset", "tiny")
    if preset not in PRESETS:
        raise UserError(f"--preset {preset}: unknown; take one of {', '.join(PRESETS)}")
    cfg = Config(**(PRESETS[preset] | given))
    cfg.exp_name = cfg.exp_name or preset
    if cfg.disc_pretrained_ckpt and "disc_start" not in given:
        cfg.disc_start = 0
    parts = int(os.environ.get("WORLD_SIZE", 1)) * cfg.gradient_accumulation_steps
    trained, vae_frozen = cfg.vae_ckpt or cfg.init_from, cfg.vae_grad == "none"
    for wrong, line in (
            (cfg.batch_size % parts, f"--batch-size {cfg.batch_size}: not divisible by {parts}, the processes"
             " times --gradient-accumulation-steps"),
            (cfg.resume and cfg.overwrite, "--resume and --overwrite exclude each other"),
            (cfg.cfg_scale > 1 and cfg.cfg_prob == 0,
             "--cfg-scale above 1 needs labels dropped in training: --cfg-prob above 0"),
            (not cfg.data_dir and preset != "tiny", f"--preset {preset} needs --data-dir DIR, see --help"),
            (cfg.vae_only and cfg.vae_grad != "repa", "--vae-only trains no SiT: drop it or --vae-grad"),
            (cfg.vae_grad in ("repa", "both") and cfg.proj_coeff == 0 and not cfg.vae_only,
             "--proj-coeff 0 leaves no alignment for the VAE; take --vae-grad none or diffusion"),
            (cfg.cache_latents and (cfg.flip or not vae_frozen),
             "--cache-latents needs latents that stay: --vae-grad none and no --flip"),
            (vae_frozen and not trained, "--vae-grad none freezes the VAE: give a trained one by --vae-ckpt"),
            (not (trained or cfg.vae_from_scratch), "the VAE needs --vae-ckpt FILE, or --vae-from-scratch"),
            (cfg.report_to and not find_spec(cfg.report_to), f"--report-to: pip install {cfg.report_to}")):
        if wrong:
            raise UserError(line)
    for name in cfg.enc_type.split(","):
        timm_name(name)
    if not trained:
        with torch.device("meta"):                                  # names, sizes and depths, at no cost
            size = AutoencoderKL(cfg.vae).latent_size(cfg.resolution)
            SiT(cfg.model, size, 4, 1, encoder_depth=cfg.encoder_depth)
    return cfg


# --- Data ---------------------------------------------------------------------------------------------------

def list_classes(folder):
    """{class name: its image files, sorted}; the k-th class is label k. DIR/CLASS/** has classes by name;
    where DIR holds dataset.json (of EDM's and StyleGAN's tools), its "labels", [file, number] pairs, count; a
    folder of images alone is one class. Raises UserError."""
    root, table, classes = Path(folder), Path(folder) / "dataset.json", defaultdict(list)
    files = list_images(root)
    if table.is_file():
        try:
            labels = dict(json.loads(table.read_text())["labels"] or {})
            for path in files:
                classes[int(labels[path.relative_to(root).as_posix()]) if labels else 0].append(path)
        except (OSError, ValueError, TypeError, KeyError) as e:
            raise UserError(f"{table}: not [file, number] of every image in labels: {one_line(e)}") from None
        return {str(label): classes[label] for label in sorted(classes)}
    for path in files:
        inside = path.parts[len(root.parts):]
        classes[inside[0] if len(inside) > 1 else ""].append(path)
    beside = classes.pop("", [])
    if not classes:
        return {"all": beside}
    empty = {p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")} - set(classes)
    if empty:
        raise UserError(f"{root / min(empty)}: no images in this class folder; take it away")
    if beside:
        tqdm.write(f"warning: {folder}: {len(beside)} images beside the class folders are left out")
    if {"train", "val"} <= set(classes):
        tqdm.write(f"warning: train and val in {folder} are taken for classes; is {folder}/train meant?")
    return dict(sorted(classes.items()))


class ImageFolder(Dataset):
    """The images of `list_classes`. Asked for as (index, flip), an item is (uint8 image [3, R, R], label, ''
    or the path of an unreadable file, in whose place the next readable one comes). Once `cached` is the
    folder of `cache_latents`, moments [2C, h, w] follow and, unless `with_images`, the image is empty."""
    cached, with_images = None, True

    def __init__(self, folder, resolution):
        classes = list_classes(folder)
        self.folder, self.resolution, self.classes = str(folder), resolution, list(classes)
        self.files = np.array([os.fsencode(path) for paths in classes.values() for path in paths])
        self.labels = np.repeat(np.arange(len(classes)), [len(paths) for paths in classes.values()])

    def __len__(self):
        return len(self.files)

    def __getitem__(self, item):
        (index, flip), bad = item, ""
        for k in range(len(self)):
            i = (index + k) % len(self)
            path, moments, image = os.fsdecode(self.files[i]), [], torch.empty(3, 0, 0)
            try:
                if self.cached:
                    rows = torch.load(chunk_file(self.cached, i // CHUNK), mmap=True, weights_only=True)
                    moments = [rows[i % CHUNK].clone()]
                    if moments[0].isnan().any():
                        raise UserError("unreadable when the latents were cached")
                if self.with_images:
                    image = read_image(path, self.resolution, fast=True)
                return image.flip(2) if flip else image, int(self.labels[i]), bad, *moments
            except UserError:
                bad = bad or path
        raise UserError(f"{path}: unreadable, as all {len(self)} images of its data set are")


def step_batches(n, cfg, step, rank, world):
    """This process's batches from `step` on: the data is one endless stream of epochs, each shuffled by
    (seed, epoch); step s takes positions s*B to (s+1)*B of it."""
    shuffled, order, share = None, None, cfg.batch_size // world
    for step in range(step, cfg.max_train_steps):
        flips = np.random.default_rng((cfg.seed, step, 2)).random(cfg.batch_size) < 0.5 * cfg.flip
        batch = []
        for k in range(rank * share, (rank + 1) * share):
            epoch, place = divmod(step * cfg.batch_size + k, n)
            if epoch != shuffled:
                shuffled, order = epoch, np.random.default_rng((cfg.seed, epoch, 3)).permutation(n)
            batch.append((int(order[place]), bool(flips[k])))
        yield batch


CHUNK = 1024                                                          # images a file of cached latents holds


def chunk_file(folder, k):
    return Path(folder) / f"{k:06d}.pt"


@torch.no_grad()
def cache_latents(m, cfg, dataset, device, rank, world, host):
    """Write the posterior's moments of all images once, float16 [1024, 2C, h, w] a file (NaN: an unreadable
    image); returns the folder. Its name is a hash of the VAE, the resolution, and the images' names, sizes
    and times of change. A file is written whole by one process, so that a killed run goes on. Machines
    without a common disk make in a second round what is missing on theirs."""
    folder = [None]
    if rank == 0:
        digest = hash_tensors(m.vae)
        digest.update(json.dumps([m.vae.config, cfg.resolution]).encode())
        for path in dataset.files:
            stat = os.stat(path)                             # nobody can set a time of change back
            digest.update(path + f" {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} ".encode())
        folder = [str(Path(cfg.output_dir) / f"latents-{digest.hexdigest()[:16]}")]
    if world > 1:
        dist.broadcast_object_list(folder, group=host)
    here = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    for first, every in ((rank, world), here):             # by number: others may write while this one looks
        mine = range(first, math.ceil(len(dataset) / CHUNK), every)
        missing = [k for k in mine if not chunk_file(folder[0], k).is_file()]
        for k in tqdm(missing, "caching latents", disable=rank > 0 or not missing):
            items, rows = [(i, False) for i in range(k * CHUNK, min((k + 1) * CHUNK, len(dataset)))], []
            for x, _, bad in DataLoader(dataset, 32, sampler=items, num_workers=cfg.num_workers,
                                        worker_init_fn=ignore_signals):
                posterior = m.vae.encode(to_float(x.to(device, memory_format=torch.channels_last)))  # float32
                rows.append(posterior.moments.half().cpu())
                rows[-1][torch.tensor([name != "" for name in bad])] = math.nan
            write_atomic(chunk_file(folder[0], k), lambda tmp: torch.save(torch.cat(rows), tmp))
        if world > 1:
            dist.barrier(host)
    return folder[0]


# --- Building, saving, resuming -----------------------------------------------------------------------------

def build(cfg, device):
    """All networks and optimizers of a run, the same on every process (the seed fixes the weights)."""
    torch.manual_seed(cfg.seed)
    source = cfg.vae_ckpt or cfg.init_from
    vae, stats = load_vae(source) if source else (AutoencoderKL(cfg.vae), None)
    if not source:
        vae.initialize()
    cfg.vae = f"f{vae.stride}d{vae.latent_channels}"                  # that of a file
    disc = Discriminator()
    if cfg.disc_pretrained_ckpt:
        load_into(disc, load_tensors(cfg.disc_pretrained_ckpt), cfg.disc_pretrained_ckpt)
    aligned = cfg.proj_coeff > 0 and not cfg.vae_only
    size, (_, width, _, patch) = vae.latent_size(cfg.resolution), parse_model(cfg.model)
    compared = cfg.perceptual == "encoder" and cfg.vae_grad != "none"
    encoders = [FrozenEncoder(name, size // patch, cfg.enc_ckpt or None, cfg.allow_random_weights,
                              cfg.spatial_norm) for name in cfg.enc_type.split(",") if aligned or compared]
    projectors = [projector(cfg.projector, width, e.channels, cfg.projector_dim) for e in encoders if aligned]
    sit = SiT(cfg.model, size, vae.latent_channels, cfg.num_classes or 1, cfg.cfg_prob, cfg.qk_norm,
              cfg.encoder_depth, projectors, cfg.bn_momentum)
    perceptual = EncoderDistance(encoders[0]) if compared else None
    if cfg.vae_grad == "none" or not cfg.latent_norm:
        sit.bn.eval()                                    # fixed statistics: of fixed latents, or the ablation
    if cfg.vae_grad != "none" and cfg.perceptual == "lpips":
        perceptual = LPIPS(cfg.lpips_ckpt or None, cfg.vgg_ckpt or None, cfg.allow_random_weights)
    if stats:
        sit.bn.start(*stats)
    ema = copy.deepcopy(sit).eval().requires_grad_(False)
    if cfg.init_from:
        init_from(cfg.init_from, sit, ema, with_norm=not cfg.vae_ckpt)
    for module in filter(None, (vae, disc, perceptual, *encoders)):
        module.to(device, memory_format=torch.channels_last)
    m = SimpleNamespace(vae=vae, sit=sit.place(device), ema=ema.place(device), disc=disc, ddp_vae=vae,
                        ddp_sit=sit, ddp_disc=disc, encoders=encoders if aligned else [],
                        perceptual=perceptual, size=size, has_statistics=bool(stats))
    m.autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=cfg.mixed_precision == "bf16")
    m.vae_params, m.disc_params = list(vae.parameters()), list(disc.parameters())
    m.sit_params = [p for p in sit.parameters() if p.requires_grad]                # all but pos_embed
    m.fused = device.type != "mps"
    adamw = dict(betas=(0.9, 0.999), weight_decay=0.0, fused=m.fused)
    m.opt = torch.optim.AdamW(m.sit_params, lr=cfg.learning_rate, **adamw)
    m.opt_vae = torch.optim.AdamW(m.vae_params, lr=cfg.vae_learning_rate, **adamw)
    m.opt_disc = torch.optim.AdamW(m.disc_params, lr=cfg.disc_learning_rate, **adamw)
    m.trained = {}                                          # {its gradient norm's name in the log: optimizer}
    if cfg.vae_grad != "none":
        m.trained["vae_grad_norm"] = m.opt_vae
        if cfg.disc_weight > 0:
            m.trained["disc_grad_norm"] = m.opt_disc
    if not cfg.vae_only:
        m.trained["grad_norm"] = m.opt
    m.statistics = [*sit.bn.buffers(), *disc.buffers()]
    m.writer, m.saving = ThreadPoolExecutor(1), Future()
    m.saving.set_result(None)
    m.health = dict.fromkeys(("skipped", "skipped_in_a_row", "zero_gradients_in_a_row"),
                             torch.zeros((), device=device))
    m.ema_tensors, m.sit_tensors = ([t.detach() for t in (*net.parameters(), *net.buffers())   # no graph
                                     if t.is_floating_point()] for net in (ema, sit))
    return m


def init_from(path, sit, ema, with_norm):
    """SiT and its average from a training checkpoint, the latent norm only if its VAE is taken as well. What
    does not fit starts anew as a whole: projectors, labels of other classes, positions of another size."""
    ckpt, may_differ = read_checkpoint(path), {"projectors", "y_embedder", "pos_embed", "bn"}
    for net, key in ((sit, "model"), (ema, "ema")):
        own = net.state_dict()
        state = {name: tensor for name, tensor in ckpt[key].items()
                 if name in own or not name.startswith("projectors.")}
        anew = may_differ & {name.split(".")[0] for name, tensor in own.items()
                             if name not in state or state[name].shape != tensor.shape}
        anew |= set() if with_norm else {"bn"}
        state |= {name: tensor for name, tensor in own.items() if name.split(".")[0] in anew}
        load_into(net, state, f"{path}: {key}")
    if anew - {"bn"} and int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(f"{path}: its {', '.join(sorted(anew - {'bn'}))} do not fit here and start anew")


def wrap(m, cfg, device, world):
    """Compile the networks, then let DDP average gradients. Statistics are not broadcast: the latent norm's
    are equal everywhere by construction, the discriminator's are per process, as released."""
    if cfg.compile:
        torch._dynamo.config.optimize_ddp = False             # it would cut the graphs at DDP's small buckets
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)    # no GPU is no fault
        m.sit.compile_blocks()
        m.vae.encoder.compile()
        m.vae.decoder.compile()
        for encoder in m.encoders:
            encoder.forward = torch.compile(encoder.forward)
        if isinstance(m.perceptual, LPIPS):                  # EncoderDistance takes longer compiled, on a CPU
            m.perceptual.features = torch.compile(m.perceptual.features)
    if cfg.gradient_checkpointing:
        again = dict(use_reentrant=False, preserve_rng_state=False)                      # no dropout in them
        for module in (*m.sit.modules(), *m.vae.modules()):
            if isinstance(module, (SiTBlock, ResnetBlock, AttnBlock)):
                module.forward = partial(checkpoint, module.forward, **again)
        if m.perceptual:
            m.perceptual.features = partial(checkpoint, m.perceptual.features, **again)
    if world > 1:
        warnings.filterwarnings("ignore", message=".*broadcast_buffers")     # older PyTorch has no other name
        kwargs = dict(device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False,
                      gradient_as_bucket_view=True)
        for norm, name in (("vae_grad_norm", "vae"), ("grad_norm", "sit"), ("disc_grad_norm", "disc")):
            if norm in m.trained:
                setattr(m, f"ddp_{name}", DDP(getattr(m, name), **kwargs))
    m.kept_statistics = [buffer.clone() for buffer in m.statistics]        # for a step that is to be skipped


@torch.no_grad()
def measure_latents(m, dataset, device, images=512):
    """Start the running statistics from the VAE's own latents, over some of the data."""
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


STATE = dict(model="sit", ema="ema", vae="vae", discriminator="disc", opt="opt", opt_vae="opt_vae",
             opt_disc="opt_disc")


def save_checkpoint(m, cfg, folder, step, classes):
    """The released keys; args as a plain dict, with the names of the classes; the VAE inside, so that this
    one file samples. On GPUs only the copy to the host is waited for. Older checkpoints go, but for the
    newest two and the multiples of --keep-every."""
    ckpt = {key: getattr(m, name).state_dict() for key, name in STATE.items()}
    more = dict(classes=classes, vae_groups=m.vae.config["groups"])   # no tensor's shape shows the groups
    ckpt |= dict(args=vars(cfg) | more, steps=step)
    path = folder / f"checkpoints/{step:07d}.pt"

    def write():
        write_atomic(path, lambda tmp: torch.save(ckpt, tmp))
        for old in checkpoints(folder)[:-2]:
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
                if archive.testzip() is None:                         # reads all, against the archive's CRCs
                    return path
        except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error):
            pass
        aside = path.rename(path.with_suffix(".damaged"))
        tqdm.write(f"{path} is damaged: set aside as {aside.name}")


FIXED = ("model", "vae", "resolution", "num_classes", "qk_norm", "cfg_prob", "path_type", "enc_type",
         "projector", "projector_dim", "encoder_depth", "vae_grad", "vae_only", "latent_norm")


def load_run(m, cfg, path, classes, say):
    """Everything of a checkpoint back into the networks and optimizers; returns its step. Settings that
    differ from the run's are told, those that cannot change refused, as are other classes."""
    ckpt = read_checkpoint(path)
    args = ckpt["args"]
    for label, (old, new) in enumerate(itertools.zip_longest(args.get("classes", classes), classes)):
        if old != new:
            raise UserError(f"{path} was trained with {old} as class {label}; in {cfg.data_dir} that is "
                            f"{new}")
    for name, new in vars(cfg).items():
        old, option = args.get(name, new), name.replace("_", "-")
        if old != new and name in FIXED:
            raise UserError(f"{path} was trained with --{option} {old}; it cannot go on with {new}")
        if old != new and name not in ("resume", "overwrite", "output_dir", "exp_name"):
            say(f"going on with another {name}: {old} -> {new}")
    try:
        for key, name in STATE.items():
            if key.startswith("opt"):
                for group in ckpt[key]["param_groups"]:
                    group["fused"] = m.fused                         # it may come from another kind of device
                getattr(m, name).load_state_dict(ckpt[key])
            else:
                load_into(getattr(m, name), ckpt[key], f"{path}: {key}")
    except (KeyError, ValueError):
        raise UserError(f"{path}: its {key} is missing, or of another model; it cannot be resumed") from None
    return ckpt["steps"]


# --- Pictures, and where the time goes ----------------------------------------------------------------------

@torch.no_grad()
def draw_pictures(m, cfg, folder, step, held_out, device):
    """Sample grid of the EMA (a column per class), reconstructions beside originals, latents in colour.
    Returns how well `held_out`, uint8 [N, 3, R, R], is reconstructed (from the posterior's mean) for the log:
    its mean PSNR in dB, and the mean error of chroma in levels."""
    columns, rows = min(cfg.num_classes, 10), 8 if cfg.resolution <= 64 else 4
    scale = max(1, 64 // cfg.resolution)
    if not cfg.vae_only:
        ema = Model(m.ema, m.vae, vars(cfg), step, device)
        samples = [sample_images(ema, range(i, i + columns), range(columns), num_steps=25,
                                 cfg_scale=cfg.cfg_scale, mixed_precision=cfg.mixed_precision)
                   for i in range(0, columns * rows, columns)]
        save_png(image_grid(torch.cat(samples), columns, scale), folder / f"pictures/samples-{step:07d}.png")
    with m.autocast():
        batches = to_float(held_out).to(device, memory_format=torch.channels_last).split(32)
        latents = [m.vae.encode(x).mean for x in batches]
        recs = torch.cat([m.vae.decode(z).float().cpu() for z in latents])
    k = min(24, len(held_out))
    colour = latents_in_colour(torch.cat(latents).cpu(), m.vae.stride)[:k]
    triples = torch.stack([held_out[:k], to_uint8(recs[:k]), colour], 1).flatten(0, 1)
    save_png(image_grid(triples, 12, scale), folder / f"pictures/reconstructions-{step:07d}.png")
    held_out = to_float(held_out)
    return dict(val_psnr=psnr(held_out, recs).mean().item(),
                val_chroma_error=chroma_error(held_out, recs).mean().item())


def measure_speed(m, cfg, device):
    """(FLOPs of a step an image, forward and backward, counted in a step of one image that is not applied,
    before anything is compiled or recomputed; FLOP/s of a large matrix product in the run's precision, of
    which the log's "mfu" is a share)."""
    x = torch.zeros(1, 3, cfg.resolution, cfg.resolution, device=device)
    eps = torch.zeros(1, m.vae.latent_channels, m.size, m.size, device=device)
    y, t = torch.zeros(1, dtype=torch.long, device=device), torch.full((1,), 0.5, device=device)
    before = [buffer.clone() for buffer in m.statistics]
    with FlopCounterMode(display=False) as counter:
        if cfg.vae_grad == "none" and not cfg.cache_latents:
            with torch.no_grad(), m.autocast():
                m.vae.encode(x)
        z = eps if cfg.vae_grad == "none" else None
        train_step(m, cfg, cfg.disc_start, x, y, z, eps, eps, t, y > 0, last=False)
    for optimizer in m.trained.values():
        optimizer.zero_grad()
    torch._foreach_copy_(m.statistics, before)
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if cfg.mixed_precision == "bf16" else None)
    seconds = min(timeit.repeat(lambda: (a @ a)[0, 0].item(), repeat=4, number=1))       # item() waits for it
    return counter.get_total_flops(), 2 * n ** 3 / seconds


def profile(m, cfg, batches, rank, world, device, flops, peak, say):
    """The rate of cfg.profile steps after three of warm-up; then torch.profiler's table of three more, with a
    row for each section of the forward pass (its backward stands in autograd's own rows)."""
    sections = [("VAE encoder", m.vae, "encode"), ("VAE decoder", m.vae, "decode"), ("D", m.disc, "forward"),
                ("SiT, alignment pass", m.sit, "align"), ("SiT", m.sit, "forward"),
                *(("encoder features", encoder, "forward") for encoder in m.encoders)]
    if m.perceptual:
        sections.append(("perceptual distance", m.perceptual, "forward"))
    for name, owner, method in sections:
        setattr(owner, method, record_function(f"# {name}")(getattr(owner, method)))

    def seconds_a_step(steps):
        start = time.perf_counter()
        for step in range(steps):
            run_step(m, cfg, step, next(batches), rank, world, device)
        getattr(torch, device.type).synchronize()
        return (time.perf_counter() - start) / steps

    seconds_a_step(3)
    seconds = seconds_a_step(cfg.profile)
    memory = torch.cuda.max_memory_allocated() / 2 ** 30 if device.type == "cuda" else math.nan
    rate = cfg.batch_size / seconds
    say(f"step {seconds * 1e3:.1f} ms, {rate:.1f} images/s, GPU memory {memory:.2f} GiB\n"
        f"{flops / 1e12:.4f} TFLOP an image: {flops * rate / world / 1e12:.3f} TFLOP/s a process, "
        f"{flops * rate / world / peak:.1%} of a matrix product's {peak / 1e12:.3f}")
    os.environ["KINETO_LOG_LEVEL"] = "99"                             # the profiler's own notes stay unsaid
    with torch.profiler.profile() as profiler:
        seconds_a_step(3)                                             # a GPU's events are many to sort
    order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    rows = profiler.key_averages()                       # sections (and AdamW, which PyTorch marks) first
    rows.sort(key=lambda row: ("#" not in row.key, -getattr(row, order)))
    say(rows.table(row_limit=40, max_name_column_width=50))


# --- The loop -----------------------------------------------------------------------------------------------

def start_metrics(folder, step, cfg):
    """metrics.jsonl cut back to `step` and open for appending, another logger if wanted: log(step, row)."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    lines = [line + "\n" for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    write_atomic(path, lambda tmp: tmp.write_text("".join(lines)))
    file = open(path, "a", buffering=1)
    if cfg.report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(folder)
    elif cfg.report_to == "wandb":
        import wandb
        wandb.init(project="repa-e", name=cfg.exp_name, config=vars(cfg), dir=folder)

    def log(step, row):
        file.write(json.dumps(dict(step=step) | row) + "\n")
        if cfg.report_to == "tensorboard":
            for name, value in row.items():
                writer.add_scalar(name, value, step)
        elif cfg.report_to == "wandb":
            wandb.log(row, step=step)
    return log


def lock(folder):
    """Refuse a folder that a living run writes to (the lock goes with the process, however it ends); sweep
    up what a killed one left half-written."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)          # flock's would live on in the loaders
    except (BlockingIOError, PermissionError):
        raise UserError(f"{folder}: another run is writing to it; --exp-name NAME names another") from None
    except OSError as e:
        tqdm.write(f"{folder}: no locks on this file system ({e.strerror}); let no other run write to it")
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
        stop = torch.tensor(stopping, dtype=torch.uint8)
        dist.all_reduce(stop, dist.ReduceOp.MAX, group=host)
    except RuntimeError as e:
        raise UserError(f"the processes lost each other: {str(e).splitlines()[0]}") from None
    return bool(stop)


def ignore_signals(worker):
    """Loader processes outlive a Ctrl-C or SIGTERM to the group: the main process ends them, see `main`."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def main():
    cfg = parse_config()
    device = pick_device(cfg.device)
    atexit.register(lambda: [worker.kill() for worker in multiprocessing.active_children()])
    folder = Path(cfg.output_dir) / cfg.exp_name
    if checkpoints(folder) and not (cfg.resume or cfg.overwrite or cfg.profile):
        raise UserError(f"{folder} holds checkpoints already: --resume goes on from the newest, --overwrite "
                        "starts afresh, --exp-name NAME keeps both")
    rank, world = start_processes(device)
    main_process, writes = rank == 0, rank == 0 and not cfg.profile
    host = dist.new_group(backend="gloo") if world > 1 else None      # to agree on stopping

    def say(line):
        if main_process:
            tqdm.write(line)

    if writes:
        held = lock(folder)                                           # while this name lives
    if cfg.compile and not can_compile(device):
        say("no C++ compiler here: running eagerly (--no-compile says so in advance)")
        cfg.compile = False
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True

    if not cfg.data_dir:
        from data.openmoji import draw_openmoji
        drawn = Path("data") / f"openmoji-{cfg.resolution}"
        if int(os.environ.get("LOCAL_RANK", 0)) == 0 and not drawn.is_dir():
            draw_openmoji(drawn, cfg.resolution)
        cfg.data_dir, cfg.val_dir = str(drawn / "train"), cfg.val_dir or str(drawn / "val")
    shared = [None, None]                                    # process 0 lists files and finds the checkpoint
    if main_process:
        shared = [ImageFolder(cfg.data_dir, cfg.resolution),
                  newest_complete(folder) if cfg.resume and not cfg.profile else None]
    if world > 1:
        dist.broadcast_object_list(shared, group=host)
    dataset, resume_from = shared
    if agree(resume_from is not None and not resume_from.is_file(), host):      # all have their data by now
        raise UserError(f"{resume_from}: not on every machine; copy it to the same path on each")
    classes = dataset.classes
    if cfg.num_classes not in (0, len(classes)):
        raise UserError(f"--num-classes {cfg.num_classes}: {cfg.data_dir} has {len(classes)}; leave it out")
    cfg.num_classes = len(classes)
    if 2 * len(classes) > len(dataset):
        say(f"warning: {len(classes)} classes for {len(dataset)} images; is every folder in it a class?")
    if cfg.num_classes == 1:                                          # nothing to guide by
        cfg.cfg_prob, cfg.cfg_scale = 0.0, 1.0

    m = build(cfg, device)
    step = load_run(m, cfg, resume_from, classes, say) if resume_from else 0
    if not (resume_from or m.has_statistics or cfg.profile):
        say(f"latent statistics: measured over {measure_latents(m, dataset, device)} images")
    flops, peak = measure_speed(m, cfg, device)
    wrap(m, cfg, device, world)
    if cfg.profile:
        cfg.max_train_steps = 3 + cfg.profile + 3
    if writes:
        if cfg.overwrite and (folder / "args.json").is_file():
            for stale in set(folder.iterdir()) - {folder / ".lock"}:  # also its evaluations
                if stale.is_dir() and not stale.is_symlink():
                    shutil.rmtree(stale)
                else:
                    stale.unlink()
        settings = json.dumps(vars(cfg) | dict(classes=classes), indent=2)
        write_atomic(folder / "args.json", lambda tmp: tmp.write_text(settings))
        log = start_metrics(folder, step, cfg)
        shown = ImageFolder(cfg.val_dir, cfg.resolution) if cfg.val_dir else dataset
        chosen = np.random.default_rng(0).permutation(len(shown))[:256]
        shown = torch.stack([shown[index, False][0] for index in chosen.tolist()])
        sizes = [sum(p.numel() for p in params) / 1e6 for params in (m.sit_params, m.vae_params)]
        say(f"{folder}: {len(dataset)} images in {len(classes)} classes, {cfg.model} {sizes[0]:.1f} M, "
            f"VAE {cfg.vae} {sizes[1]:.1f} M, {world} x {device.type}, step {step}")
    if cfg.cache_latents:
        dataset.cached = cache_latents(m, cfg, dataset, device, rank, world, host)
        dataset.with_images = bool(m.encoders)
        say(f"latents: read from {dataset.cached}")
    loader = DataLoader(dataset, batch_sampler=step_batches(len(dataset), cfg, step, rank, world),
                        num_workers=cfg.num_workers, pin_memory=device.type == "cuda",
                        persistent_workers=cfg.num_workers > 0, worker_init_fn=ignore_signals)
    if cfg.profile:
        profile(m, cfg, iter(loader), rank, world, device, flops, peak, say)
        sys.stdout.flush()
        os._exit(0)                                                   # at once, loader processes and all
    signals, bad_files = [], set()

    def on_signal(number, frame):
        if signals:                                                   # the second one: at once
            os._exit(128 + number)
        signals.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    bar = tqdm(total=cfg.max_train_steps, initial=step, unit="step", disable=not main_process, smoothing=0.05)
    since, images_done = time.time(), 0
    for batch in loader:
        for name in set(filter(None, batch[2])) - bad_files:
            tqdm.write(f"skipped an unreadable image: {name}")
            bad_files.add(name)
            if len(bad_files) > 0.01 * len(dataset):
                raise UserError(f"{len(bad_files)} of {len(dataset)} images unreadable, the last one {name}")
        stopping = agree(bool(signals), host)
        metrics = run_step(m, cfg, step, batch, rank, world, device)
        step += 1
        bar.update()
        images_done += cfg.batch_size
        last = step == cfg.max_train_steps
        pictures = step % cfg.sampling_steps == 0 or last

        if step % cfg.log_steps == 0 or pictures:
            metrics["latent_variance"] = m.sit.bn.running_var.mean()
            values = torch.stack([v.float() for v in metrics.values()])
            if world > 1:
                dist.all_reduce(values)
                values /= world
            row = dict(zip(metrics, values.tolist()))                # the one synchronisation with the device
            row["images_per_second"] = images_done / (time.time() - since)
            row["mfu"] = flops * row["images_per_second"] / world / peak
            if main_process and pictures:
                row |= draw_pictures(m, cfg, folder, step, shown, device)
            if main_process:
                log(step, row)
                say(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in row.items()))
            if row["skipped_in_a_row"] >= SKIPPED or row["zero_gradients_in_a_row"] >= ZEROS:
                what = f"not finite for {SKIPPED}"
                if row["skipped_in_a_row"] < SKIPPED:
                    what = f"exactly zero for {ZEROS}"
                good = checkpoints(folder)[-1].name if checkpoints(folder) else "none yet"
                raise UserError(f"step {step}: gradients {what} steps in a row; last good checkpoint: {good}")
            if m.saving.done():
                m.saving.result()                                    # raises what a save in its thread raised
            since, images_done = time.time(), 0
        if (step % cfg.checkpointing_steps == 0 or last or stopping) and main_process:
            save_checkpoint(m, cfg, folder, step, classes)
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
