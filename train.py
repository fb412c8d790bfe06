"""train.py: REPA-E, the VAE and the diffusion transformer trained end to end (arXiv 2504.10483).

    python train.py                                               the tiny preset: emoji, minutes, no GPU
    torchrun --nproc_per_node=8 train.py --preset sdvae-xl2 --data-dir imagenet/train --vae-ckpt sdvae.pt

Read `train_step` first: it is the method. Everything else in this file exists so that its lines can be plain.
"""
import argparse
import atexit
import copy
import dataclasses
import json
import logging
import os
import sys
import time
import warnings
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch._inductor.config
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data.images import (ImageFolder, cache_latents, end_loaders, image_folder, latents_folder, load_batches,
                         report_unreadable, step_batches)
from data.openmoji import render_openmoji
from repa import DINOV2_B, LITE0, EncoderDistance, FrozenEncoder, alignment_loss, projector, timm_name
from sample import Model, sample_images
from sit import SiT, SiTBlock, draw_times, interpolate, parse_model
from support.checkpoints import (Saver, check_settings, checkpoints, clear_run, load_parts,
                                 newest_complete, read_checkpoint, start_from, sweep_run)
from support.commands import (Parser, UserError, below_one, catch_signals, count, existing_path, fraction,
                              non_negative, path_name, plain_name, positive, positive_fraction, positive_int,
                              run_command, seed_number)
from support.devices import (avoid_wrong_attention, choose_precision, cores, end_processes,
                             memory_format, pick_device, start_processes, why_no_compile)
from support.files import hash_tensors, load_into, load_tensors, lock, write_atomic
from support.metrics import check_logger, start_metrics
from support.pictures import image_grid, latents_in_colour, save_png, to_float, to_uint8
from support.profile import count_flops, mark_sections, peak_flops, profile
from vae import (LPIPS, AttnBlock, AutoencoderKL, DiagonalGaussian, Discriminator, ResnetBlock, chroma_error,
                 hinge_loss, load_vae, psnr)


# --- Settings: the defaults are the paper's; a preset changes some of them, a flag any ----------------------

def flag(default, help, type=str, choices=None):
    return field(default=default, metadata=dict(help=help, type=type, choices=choices))


@dataclass
class Config:
    preset: str = flag("tiny", "a row of PRESETS, see train.py")
    # the run
    output_dir: str = flag("exps", "runs go to OUTPUT_DIR/EXP_NAME", path_name)
    exp_name: str = flag("", "default: the preset's name", plain_name)
    seed: int = flag(0, "with the step it fixes all randomness", seed_number)
    max_train_steps: int = flag(400_000, "the paper's 80 epochs", positive_int)
    checkpointing_steps: int = flag(5_000, "between checkpoints; the last is always saved", positive_int)
    keep_every: int = flag(50_000, "checkpoints at its multiples stay, and the newest two", positive_int)
    sampling_steps: int = flag(10_000, "steps between pictures, which the last has too; 0: none", count)
    log_steps: int = flag(100, "steps between lines of metrics.jsonl", positive_int)
    profile: int = flag(0, "run that many steps, print where the time goes, and stop", count)
    resume: bool = flag(False, "go on from the newest checkpoint, or start afresh where there is none")
    overwrite: bool = flag(False, "delete what the run of the same name has written")
    report_to: str = flag("", "also log to this", choices=["", "tensorboard", "wandb"])
    device: str = flag("auto", "cpu, cuda, mps or auto")
    mixed_precision: str = flag("auto", "autocast: bf16, no, or auto: bf16 where the hardware computes it; "
                                "losses and norms stay float32", choices=["auto", "no", "bf16"])
    compile: bool = flag(True, "torch.compile the networks")
    gradient_checkpointing: bool = flag(False, "keep less for the backward pass, compute it again instead")
    gradient_accumulation_steps: int = flag(1, "micro-batches per step, each normalised by its own statistics",
                                            positive_int)
    num_workers: int = flag(8, "loader processes per GPU", count)
    # the data
    data_dir: str = flag("", "DIR/CLASS/*.jpg, DIR with dataset.json, or a folder of images (one class); "
                         "without it (tiny) OpenMoji is drawn into data/", image_folder)
    val_dir: str = flag("", "held-out images for reconstructions and val_psnr; default: training images, and "
                        "the log has train_psnr", image_folder)
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
    bn_momentum: float = flag(0.1, "of the latent norm's running statistics", positive_fraction)
    vae: str = flag("f8d4", "architecture: one of vae.py's VAES; with --vae-ckpt, that of the file")
    vae_ckpt: str = flag("", "the VAE to start from: weights, checkpoint, diffusers directory or hub id",
                         path_name)
    vae_from_scratch: bool = flag(False, "start the VAE from random weights when there is no --vae-ckpt")
    init_from: str = flag("", "the training checkpoint whose SiT and VAE to start from", existing_path)
    # what reaches the VAE besides its own losses; the alignment
    vae_grad: str = flag("repa", "the alignment's gradient (REPA-E), none (the VAE is frozen), the diffusion "
                         "loss's (naive end to end), or both", choices=["repa", "none", "diffusion", "both"])
    vae_only: bool = flag(False, "train the VAE by its own losses, without SiT")
    cache_latents: bool = flag(False, "of a frozen VAE: write the latents once, then never run it")
    enc_type: str = flag(DINOV2_B, f"timm encoders with commas, or {LITE0}")
    enc_ckpt: str = flag("", "the encoder's weights file, in place of the hub", existing_path)
    projector: str = flag("mlp", "three layers, or iREPA's 3x3 convolution", choices=["mlp", "conv"])
    projector_dim: int = flag(2048, "width of the mlp projector's hidden layers", positive_int)
    spatial_norm: float = flag(0.0, "gamma of iREPA's norm of the features (0.6); 0: none", non_negative)
    encoder_depth: int = flag(8, "the block whose output is aligned", positive_int)
    proj_coeff: float = flag(0.5, "weight of the alignment in SiT's pass; 0: no alignment", non_negative)
    vae_align_proj_coeff: float = flag(1.5, "weight of the alignment in the VAE's pass", non_negative)
    # the VAE's other losses
    perceptual: str = flag("lpips", "perceptual distance, over VGG16 or this", choices=["lpips", LITE0])
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
    ema_decay: float = flag(0.9999, "of SiT's parameters and latent statistics", below_one)
    # the pictures on the way
    cfg_scale: float = flag(1.0, "guidance of the sample grids", positive)
    allow_random_weights: bool = flag(False, "frozen encoders without weights: for trying things out")


SECOND_STAGE = dict(vae_grad="none", cache_latents=True, max_train_steps=4_000_000, keep_every=500_000)
PRESETS = {
    "tiny": dict(
        resolution=32, batch_size=16, max_train_steps=2500, checkpointing_steps=500, sampling_steps=500,
        log_steps=50, num_workers=0, compile=False, cfg_scale=2.5, model="SiT-T/2", weighting="lognormal",
        encoder_depth=2, enc_type=LITE0, projector_dim=512, vae="f4d8", vae_from_scratch=True,
        perceptual=LITE0, perceptual_weight=0.25, kl_weight=2e-5, disc_weight=0.0, learning_rate=2e-3,
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
    m: the Networks; m.ddp_* are m.vae, m.sit, m.disc with gradients averaged over processes."""
    log = {}
    with m.autocast(), torch.no_grad():
        f = [encoder(x) for encoder in m.encoders]                              # the targets [B, N, C_i]

    if z is None:
        # 1. The VAE. SiT, projectors and D are frozen: this backward touches encoder and decoder alone.
        with frozen(m.sit_params), frozen(m.disc_params):
            with m.autocast():
                posterior, z, x_rec = m.ddp_vae(x, posterior_noise)         # q(z|x), z ~ q, x^ = decode(z)
                l1, kl = (x - x_rec).abs().mean(), posterior.kl().mean()
                perceptual = m.perceptual(x_rec, x)
                x_t, velocity = interpolate(m.sit.bn.normalize(z), t, eps, cfg.path_type)   # running stats
                gan = diffusion = align = 0.0
                if cfg.disc_weight > 0 and step >= cfg.disc_start:
                    log["gan_loss"] = gan = -m.disc(x_rec).mean()
                if cfg.vae_grad in ("diffusion", "both"):     # naive end to end: z reaches both x_t and v*
                    v, projected = m.sit(x_t, t, y)
                    log["vae_denoising_loss"] = diffusion = (v - velocity).square().mean()
                elif f:                                       # blocks 1..depth, with all labels
                    projected = m.sit.align(x_t, t, y)
                if cfg.vae_grad in ("repa", "both") and f:
                    log["vae_align_loss"] = align = alignment_loss(projected, f)
                vae_loss = (l1                                                        # encoder, decoder
                            + cfg.perceptual_weight * perceptual                      # encoder, decoder
                            + cfg.kl_weight * kl                                      # encoder
                            + cfg.disc_weight * gan                                   # encoder, decoder
                            + cfg.vae_align_proj_coeff * align                        # encoder
                            + diffusion)                                              # encoder: not in REPA-E
            vae_loss.backward()
        log |= dict(vae_loss=vae_loss, l1_loss=l1, perceptual_loss=perceptual, kl_loss=kl)
        # 2. The discriminator, on sg(x^): it alone. (In the release not before disc_start, either.)
        if cfg.disc_weight > 0:
            disc_loss = hinge_loss(real=m.ddp_disc(x), fake=m.ddp_disc(x_rec.detach()))
            disc_loss.backward()
            log["disc_loss"] = disc_loss

    # 3. SiT and projectors, on sg(z): the stop-gradient, no loss below reaches the VAE.
    z = z.detach()
    z = m.sit.bn(z)      # by the batch's statistics; by fixed ones over a frozen VAE or with --no-latent-norm
    if not cfg.vae_only:
        with m.autocast():
            x_t, velocity = interpolate(z, t, eps, cfg.path_type)               # the same t and eps
            v, projected = m.ddp_sit(x_t, t, y.masked_fill(drop, m.sit.num_classes))
            denoising, align = (v - velocity).square().mean(), 0.0
            if f:
                log["proj_loss"] = align = alignment_loss(projected, f)
            loss = (denoising                                          # all blocks and the head
                    + cfg.proj_coeff * align)                          # blocks 1..depth, projectors
        loss.backward()
        log |= dict(loss=loss, denoising_loss=denoising)
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
    and m.health. Where a gradient is not finite, no network steps and the statistics go back (the EMA moves
    on): decided on the device, and alike on all processes, as averaging brings one's bad gradient to all."""
    norms = {}
    for name, optimizer in m.trained.items():
        params = optimizer.param_groups[0]["params"]
        if cfg.gradient_accumulation_steps > 1:
            torch._foreach_div_([p.grad for p in params], cfg.gradient_accumulation_steps)
        norms[name] = clip_grad_norm_(params, cfg.max_grad_norm)
    bad = ~torch.stack(list(norms.values())).isfinite().all()
    for optimizer in m.trained.values():
        if optimizer.defaults["fused"]:
            optimizer.found_inf = bad.float()             # the fused kernels read it, and skip, on the device
            optimizer.step()
        elif not bad:                                     # without them (MPS) the device is waited for here
            optimizer.step()
        optimizer.zero_grad()
    m.sit.bn.update_statistics()
    for buffer, kept in zip(m.statistics, m.kept_statistics):
        buffer.copy_(torch.where(bad, kept, buffer))
        kept.copy_(buffer)
    torch._foreach_lerp_(m.ema_tensors, m.sit_tensors, 1 - cfg.ema_decay)        # and the latent statistics
    zero = norms.get("grad_norm", norms.get("vae_grad_norm")) == 0        # SiT's, or of a VAE alone its own
    m.health = dict(
        skipped=m.health["skipped"] + bad,
        skipped_in_a_row=in_a_row(m.health["skipped_in_a_row"], bad, SKIPPED),
        zero_gradients_in_a_row=in_a_row(m.health["zero_gradients_in_a_row"], zero, ZEROS))
    return norms | m.health


def in_a_row(before, happened, alarm):
    """How often it has now happened in a row, after `before` times. A latch: a number that has reached
    `alarm` stays, so that the next logged step reads it."""
    now = torch.where(happened, before + 1, 0)
    return torch.where(before >= alarm, before, now)


# --- A step of a run ----------------------------------------------------------------------------------------

def run_step(m, cfg, step, batch, rank, world):
    """train_step on each part of a batch as it comes from the loader; returns {name: mean over the parts}."""
    images, y, _, *moments = batch                               # moments: where latents are cached
    images, y, *moments = (tensor.to(m.device, non_blocking=True) for tensor in (images, y, *moments))
    x = to_float(images).contiguous(memory_format=memory_format(m.device))
    set_rates(m, cfg, step)
    noise = draw_noise(cfg, step, m.latent_shape, rank, world, m.device)
    parts, logs = cfg.gradient_accumulation_steps, []
    for k in range(parts):
        x_k, y_k, *noise_k = (values.chunk(parts)[k] for values in (x, y, *noise))
        z = None
        if cfg.vae_grad == "none":
            z = frozen_latents(m, x_k, noise_k[0], moments[0].chunk(parts)[k] if moments else None)
        last = k == parts - 1
        with nullcontext() if last else without_averaging(m):
            logs.append(train_step(m, cfg, step, x_k, y_k, z, *noise_k, last))
    metrics = {}
    for name in logs[-1]:                                        # the last part's has the norms as well
        metrics[name] = torch.stack([log[name].detach() for log in logs if name in log]).mean()
    return metrics


@contextmanager
def without_averaging(m):
    """No process sends its gradients inside; they add up until the last part of a batch, and go with its."""
    with ExitStack() as stack:
        for net in (m.ddp_vae, m.ddp_sit, m.ddp_disc):
            if isinstance(net, DDP):
                stack.enter_context(net.no_sync())
        yield


def set_rates(m, cfg, step):
    """The learning rates of a step: linear warm-up, linear decay to zero at the end."""
    left = cfg.max_train_steps - step
    scale = min(1.0, (step + 1) / max(cfg.lr_warmup_steps, 1), left / max(cfg.lr_decay_steps, 1))
    m.opt.param_groups[0]["lr"] = scale * cfg.learning_rate
    m.opt_vae.param_groups[0]["lr"] = scale * cfg.vae_learning_rate
    m.opt_disc.param_groups[0]["lr"] = scale * cfg.disc_learning_rate


@torch.no_grad()
def frozen_latents(m, x, noise, moments=None):
    """Latents [B, C, h, w] of images x by the frozen VAE, or from its cached moments [B, 2C, h, w]: both in
    float32, as the statistics at the start, so that a run with and one without the cache are alike."""
    posterior = m.vae.encode(x) if moments is None else DiagonalGaussian(moments)
    return posterior.sample(noise)


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
    if (cfg.vae_ckpt or cfg.init_from) and "vae" not in given:
        cfg.vae = ""                                                  # `build` sets that of the file
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
            (cfg.disc_weight > 0 and not vae_frozen and cfg.resolution < Discriminator.MIN_SIZE,
             f"--resolution {cfg.resolution}: too small for the discriminator, which needs "
             f"{Discriminator.MIN_SIZE} pixels; take --disc-weight 0")):
        if wrong:
            raise UserError(line)
    check_logger(cfg.report_to)
    for name in cfg.enc_type.split(","):
        timm_name(name)
    if not trained:
        with torch.device("meta"):                                  # names, sizes and depths, at no cost
            size = AutoencoderKL(cfg.vae).latent_size(cfg.resolution)
            SiT(cfg.model, size, 4, 1, encoder_depth=cfg.encoder_depth)
    return cfg


# --- Building -----------------------------------------------------------------------------------------------

@dataclass
class Networks:
    """What a run trains, and what it trains with."""
    vae: AutoencoderKL
    sit: SiT                                         # projectors and latent norm (sit.bn) in it
    ema: SiT                                         # its average, latent statistics included
    disc: Discriminator
    encoders: list                                   # frozen, of the alignment; [] where nothing is aligned
    perceptual: nn.Module                            # LPIPS or EncoderDistance; None where the VAE is frozen
    opt: torch.optim.Optimizer                       # of SiT and its projectors
    opt_vae: torch.optim.Optimizer
    opt_disc: torch.optim.Optimizer
    trained: dict                                    # {name of its gradient's norm: optimizer} in this regime
    autocast: Callable                               # the context of all forward passes
    device: torch.device
    latent_shape: tuple                              # C, h, w
    has_statistics: bool                             # whether latent statistics came with the VAE
    health: dict                                     # numbers of bad steps, on the device; see `update`

    def __post_init__(self):
        self.ddp_vae, self.ddp_sit, self.ddp_disc = self.vae, self.sit, self.disc       # until `wrap`
        self.vae_params, self.disc_params = list(self.vae.parameters()), list(self.disc.parameters())
        self.sit_params = trainable(self.sit)
        self.sit_tensors, self.ema_tensors = float_tensors(self.sit), float_tensors(self.ema)
        self.statistics = [*self.sit.bn.buffers(), *self.disc.buffers()]
        self.kept_statistics = [buffer.clone() for buffer in self.statistics]    # for a step that is skipped

    def parts(self):
        """{key of a checkpoint: network or optimizer}"""
        return dict(model=self.sit, ema=self.ema, vae=self.vae, discriminator=self.disc,
                    opt=self.opt, opt_vae=self.opt_vae, opt_disc=self.opt_disc)


def trainable(net):
    return [p for p in net.parameters() if p.requires_grad]                          # SiT's: not pos_embed


def float_tensors(net):
    """All float parameters and buffers of a network, without a graph."""
    return [t.detach() for t in (*net.parameters(), *net.buffers()) if t.is_floating_point()]


def build(cfg, device):
    """The Networks of a run, the same on every process (the seed fixes the weights)."""
    torch.manual_seed(cfg.seed)
    source = cfg.vae_ckpt or cfg.init_from
    if source:
        vae, stats = load_vae(source)
    else:
        vae, stats = AutoencoderKL(cfg.vae), None
        vae.initialize()
    found = f"f{vae.stride}d{vae.latent_channels}"
    if cfg.vae not in ("", found):
        raise UserError(f"--vae {cfg.vae}: {source} is an {found}; leave --vae out, or give another file")
    cfg.vae = found
    disc = Discriminator()
    if cfg.disc_pretrained_ckpt:
        load_into(disc, load_tensors(cfg.disc_pretrained_ckpt), cfg.disc_pretrained_ckpt)

    vae_trains = cfg.vae_grad != "none"
    aligned = cfg.proj_coeff > 0 and not cfg.vae_only
    size, (_, width, _, patch) = vae.latent_size(cfg.resolution), parse_model(cfg.model)
    encoders, perceptual = [], None
    if aligned:
        encoders = [FrozenEncoder(name, size // patch, cfg.enc_ckpt or None, cfg.allow_random_weights,
                                  cfg.spatial_norm) for name in cfg.enc_type.split(",")]
    projectors = [projector(cfg.projector, width, e.channels, cfg.projector_dim) for e in encoders]
    sit = SiT(cfg.model, size, vae.latent_channels, cfg.num_classes or 1, cfg.cfg_prob, cfg.qk_norm,
              cfg.encoder_depth, projectors, cfg.bn_momentum)
    if vae_trains and cfg.perceptual == LITE0:
        perceptual = EncoderDistance()
    elif vae_trains:
        perceptual = LPIPS(cfg.lpips_ckpt or None, cfg.vgg_ckpt or None, cfg.allow_random_weights)
    if not vae_trains or not cfg.latent_norm:
        sit.bn.eval()                                    # fixed statistics: of fixed latents, or the ablation
    if stats:
        sit.bn.start(*stats)
    ema = copy.deepcopy(sit).eval().requires_grad_(False)
    if cfg.init_from:
        start_from_another(cfg, sit, ema)
    for module in filter(None, (vae, disc, perceptual, *encoders)):
        module.to(device, memory_format=memory_format(device))
    sit.place(device)
    ema.place(device)
    avoid_wrong_attention(size ** 2, (size // patch) ** 2)                           # the VAE's, and SiT's

    adamw = dict(betas=(0.9, 0.999), weight_decay=0.0, fused=device.type != "mps")
    opt = torch.optim.AdamW(trainable(sit), lr=cfg.learning_rate, **adamw)
    opt_vae = torch.optim.AdamW(vae.parameters(), lr=cfg.vae_learning_rate, **adamw)
    opt_disc = torch.optim.AdamW(disc.parameters(), lr=cfg.disc_learning_rate, **adamw)
    trained = {}
    if vae_trains:
        trained["vae_grad_norm"] = opt_vae
    if vae_trains and cfg.disc_weight > 0:
        trained["disc_grad_norm"] = opt_disc
    if not cfg.vae_only:
        trained["grad_norm"] = opt
    # bf16, where the release has fp16, in which a user's run collapsed to gradients of zero.
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=cfg.mixed_precision == "bf16")
    zero = torch.zeros((), device=device)
    return Networks(
        vae, sit, ema, disc, encoders, perceptual, opt, opt_vae, opt_disc, trained,
        autocast=autocast, device=device, latent_shape=(vae.latent_channels, size, size),
        has_statistics=bool(stats),
        health=dict(skipped=zero, skipped_in_a_row=zero, zero_gradients_in_a_row=zero))


def start_from_another(cfg, sit, ema):
    """--init-from: SiT and its average of another run, the latent norm only if its VAE is taken as well."""
    may_differ = {"projectors", "y_embedder", "pos_embed", "bn"}          # other encoders, classes, sizes
    leave_out = {"bn"} if cfg.vae_ckpt else set()
    anew = start_from(cfg.init_from, dict(model=sit, ema=ema), may_differ, leave_out) - {"bn"}
    if anew and int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(f"{cfg.init_from}: its {', '.join(sorted(anew))} do not fit here and start anew")


@torch.no_grad()
def measure_latents(m, dataset, images=512):
    """Start the running statistics from the VAE's own latents (samples of its posterior), over some of the
    data; returns of how many images."""
    indices = np.random.default_rng(0).permutation(len(dataset))[:images]
    z, g = [], torch.Generator().manual_seed(0)
    for chunk in np.array_split(indices, -(-len(indices) // 32)):
        x = to_float(torch.stack([dataset[int(i), False][0] for i in chunk]))
        posterior = m.vae.encode(x.to(m.device, memory_format=memory_format(m.device)))      # in float32
        z.append(posterior.sample(torch.randn(posterior.mean.shape, generator=g).to(m.device)))
    z = torch.cat(z)
    statistics = torch.stack([z.mean((0, 2, 3)), z.var((0, 2, 3))])
    if dist.is_initialized():
        dist.broadcast(statistics, 0)                                 # the same bits on all processes
    for bn in (m.sit.bn, m.ema.bn):
        bn.running_mean.copy_(statistics[0])
        bn.running_var.copy_(statistics[1])
    return len(indices)


def wrap(m, cfg, world):
    """Compile the networks, then let DDP average gradients. Statistics are not broadcast: the latent norm's
    are equal everywhere by construction, the discriminator's are per process, as released."""
    if cfg.compile:
        torch._inductor.config.compile_threads = min(cores(), 32)                # each process would take all
        torch._dynamo.config.optimize_ddp = False             # it would cut the graphs at DDP's small buckets
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)    # no GPU is no fault
        m.sit.compile_blocks()
        m.vae.encoder.compile()
        m.vae.decoder.compile()
        for encoder in m.encoders:
            encoder.compile()
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
        ddp = partial(DDP, device_ids=[m.device.index] if m.device.type == "cuda" else None,
                      broadcast_buffers=False, gradient_as_bucket_view=True)
        if "vae_grad_norm" in m.trained:
            m.ddp_vae = ddp(m.vae)
        if "grad_norm" in m.trained:
            m.ddp_sit = ddp(m.sit)
        if "disc_grad_norm" in m.trained:
            m.ddp_disc = ddp(m.disc)
    m.kept_statistics = [buffer.clone() for buffer in m.statistics]              # as at the first step


# --- Pictures, and where the time goes ----------------------------------------------------------------------

@torch.no_grad()
def draw_pictures(m, cfg, folder, step, shown):
    """Sample grid of the EMA (a column per class), reconstructions beside originals, latents in colour.
    Returns how well `shown`, uint8 [N, 3, R, R], is reconstructed (from the posterior's mean) for the log:
    its mean PSNR in dB, and the mean error of chroma in levels, held-out images' as val_, others' as train_."""
    columns, rows = min(cfg.num_classes, 10), 8 if cfg.resolution <= 64 else 4
    scale = max(1, 64 // cfg.resolution)
    if not cfg.vae_only:
        ema = Model(m.ema, m.vae, vars(cfg), step, m.device)
        numbers, labels = range(columns * rows), [*range(columns)] * rows
        batch, samples = columns * (10 // columns), []                # about ten at a time, whole rows
        for i in range(0, len(labels), batch):
            samples.append(sample_images(ema, numbers[i:i + batch], labels[i:i + batch], num_steps=25,
                                         cfg_scale=cfg.cfg_scale, mixed_precision=cfg.mixed_precision))
        save_png(image_grid(torch.cat(samples), columns, scale), folder / f"pictures/samples-{step:07d}.png")
    originals = to_float(shown)
    latents, decoded = [], []
    with m.autocast():
        for x in originals.split(32):
            z = m.vae.encode(x.to(m.device, memory_format=memory_format(m.device))).mean
            latents.append(z.cpu())
            decoded.append(m.vae.decode(z).cpu())
    latents, decoded = torch.cat(latents), torch.cat(decoded)
    k = min(24, len(shown))
    colour = latents_in_colour(latents, m.vae.stride)[:k]
    triples = torch.stack([shown[:k], to_uint8(decoded[:k]), colour], 1).flatten(0, 1)
    save_png(image_grid(triples, 12, scale), folder / f"pictures/reconstructions-{step:07d}.png")
    of = "val" if cfg.val_dir else "train"
    return {f"{of}_psnr": psnr(originals, decoded).mean().item(),
            f"{of}_chroma_error": chroma_error(originals, decoded).mean().item()}


def flops_of_a_step(m, cfg):
    """FLOPs of a step an image, counted in a step of one image that is not applied and leaves no trace."""
    x = torch.zeros(1, 3, cfg.resolution, cfg.resolution, device=m.device)
    eps = torch.zeros(1, *m.latent_shape, device=m.device)
    y, t = torch.zeros(1, dtype=torch.long, device=m.device), torch.full((1,), 0.5, device=m.device)
    before = [buffer.clone() for buffer in m.statistics]

    def step():
        z = None
        if cfg.vae_grad == "none" and cfg.cache_latents:
            z = eps
        elif cfg.vae_grad == "none":
            z = frozen_latents(m, x, eps)
        train_step(m, cfg, cfg.disc_start, x, y, z, eps, eps, t, y > 0, last=False)

    flops = count_flops(step)
    for optimizer in m.trained.values():
        optimizer.zero_grad()
    m.sit.bn.moments.clear()
    torch._foreach_copy_(m.statistics, before)
    return flops


def profile_run(m, cfg, dataset, processes, flops):
    """Print where the time of cfg.profile steps goes. flops: of a step an image."""
    sections = [("VAE encoder", m.vae, "encode"), ("VAE decoder", m.vae, "decode"), ("D", m.disc, "forward"),
                ("SiT, alignment pass", m.sit, "align"), ("SiT", m.sit, "forward")]
    sections += [("encoder features", encoder, "forward") for encoder in m.encoders]
    if m.perceptual:
        sections.append(("perceptual distance", m.perceptual, "forward"))
    mark_sections(sections)
    cfg.max_train_steps = 3 + cfg.profile + 3
    batches = iter(load_run(m, cfg, dataset, 0, processes))

    def step(k):
        run_step(m, cfg, k, next(batches), processes.rank, processes.world)

    peak = peak_flops(m.device, torch.bfloat16 if cfg.mixed_precision == "bf16" else None)
    share = cfg.batch_size // processes.world
    profile(step, cfg.profile, cfg.batch_size, flops * share, peak, m.device, processes.say)
    sys.stdout.flush()
    os._exit(0)                                                       # at once, loader processes and all


# --- A run --------------------------------------------------------------------------------------------------

def open_data(cfg, processes):
    """The data set of a run, the same on all processes, and what its classes say about the settings."""
    if not cfg.data_dir:
        drawn = Path("data") / f"openmoji-{cfg.resolution}"
        if int(os.environ.get("LOCAL_RANK", 0)) == 0 and not drawn.is_dir():
            render_openmoji(drawn, cfg.resolution)
        cfg.data_dir, cfg.val_dir = str(drawn / "train"), cfg.val_dir or str(drawn / "val")
    dataset = None
    if processes.rank == 0:                                           # one lists the files
        dataset = ImageFolder(cfg.data_dir, cfg.resolution)
    dataset = processes.from_first(dataset)
    processes.wait()                                                  # by now every machine has drawn its own
    classes = dataset.classes
    if cfg.num_classes not in (0, len(classes)):
        raise UserError(f"--num-classes {cfg.num_classes}: {cfg.data_dir} has {len(classes)}; leave it out")
    cfg.num_classes = len(classes)
    if 2 * len(classes) > len(dataset):
        processes.say(f"warning: {len(classes)} classes for {len(dataset)} images; "
                      "is every folder in it a class?")
    if cfg.num_classes == 1:                                          # nothing to guide by
        cfg.cfg_prob, cfg.cfg_scale = 0.0, 1.0
        processes.say(f"{cfg.data_dir} is one class: trained without label dropout, sampled without guidance "
                      "(--cfg-prob 0 --cfg-scale 1)")
    return dataset


# What --resume holds fixed.
FIXED = ("model", "vae", "resolution", "num_classes", "qk_norm", "cfg_prob", "path_type", "enc_type",
         "projector", "projector_dim", "encoder_depth", "vae_grad", "vae_only", "latent_norm")


def resume(m, cfg, path, classes, say):
    """Everything of a checkpoint back into networks and optimizers; returns its step. Raises UserError."""
    ckpt = read_checkpoint(path)
    check_settings(path, ckpt["args"], vars(cfg), FIXED, classes, cfg.data_dir, say)
    load_parts(path, ckpt, m.parts())
    return ckpt["steps"]


def use_cached_latents(m, cfg, dataset, processes):
    """Let the data set give the frozen VAE's latents, written first where they are missing."""
    digest = hash_tensors(m.vae)
    digest.update(json.dumps([m.vae.config, cfg.resolution]).encode())

    @torch.no_grad()
    def encode(images):                                     # in float32, as `frozen_latents` and the statistics
        return m.vae.encode(to_float(images.to(m.device, memory_format=memory_format(m.device)))).moments

    where = None
    if processes.rank == 0:
        where = latents_folder(cfg.output_dir, digest, dataset)
    where = processes.from_first(where)
    cache_latents(dataset, where, encode, cfg.num_workers, processes)
    dataset.cached, dataset.with_images = where, bool(m.encoders)
    processes.say(f"latents: read from {where}")


def load_run(m, cfg, dataset, step, processes):
    """The loader of this process's batches from `step` to the end."""
    batches = step_batches(len(dataset), cfg, step, processes.rank, processes.world)
    return load_batches(dataset, batches, cfg.num_workers, pin_memory=m.device.type == "cuda")


def start_folder(cfg, folder, classes, say):
    """A run's folder: with --overwrite cleared, now that everything else has been found right; args.json."""
    if cfg.overwrite:
        clear_run(folder, say)
    settings = json.dumps(vars(cfg) | dict(classes=classes), indent=2)
    write_atomic(folder / "args.json", lambda tmp: tmp.write_text(settings))


def pictures_to_show(cfg, dataset):
    """256 images, uint8 [256, 3, R, R], for reconstructions and PSNR."""
    shown = ImageFolder(cfg.val_dir, cfg.resolution) if cfg.val_dir else dataset
    chosen = np.random.default_rng(0).permutation(len(shown))[:256]
    return torch.stack([shown[index, False][0] for index in chosen.tolist()])


def read_metrics(m, metrics, world):
    """A step's metrics as numbers, averaged over processes: the one place that waits for the device."""
    metrics = metrics | dict(latent_variance=m.sit.bn.running_var.mean())
    values = torch.stack([value.float() for value in metrics.values()])
    if world > 1:
        dist.all_reduce(values)
        values /= world
    return dict(zip(metrics, values.tolist()))


def what_is_wrong(row):
    """In words, where gradients have been not finite, or exactly zero, for so long that a run should end."""
    if row["skipped_in_a_row"] >= SKIPPED:
        return f"gradients not finite for {SKIPPED} consecutive steps"
    if row["zero_gradients_in_a_row"] >= ZEROS:
        return f"gradients exactly zero for {ZEROS} consecutive steps"
    return ""


def train(m, cfg, folder, dataset, shown, step, processes):
    """The loop, from `step` to the last one or to a signal. Process 0 writes the run's folder; shown: what it
    draws reconstructions of, uint8 [N, 3, R, R], or None."""
    main_process = processes.rank == 0
    settings = vars(cfg) | dict(classes=dataset.classes,
                                vae_groups=m.vae.config["groups"])       # no tensor's shape shows the groups
    saver, bad_files = Saver(folder, cfg.keep_every), set()
    signals = catch_signals()
    if main_process:
        log = start_metrics(folder, step, cfg.report_to, cfg.exp_name, vars(cfg))
    bar = tqdm(total=cfg.max_train_steps, initial=step, unit="step", disable=not main_process, smoothing=0.05)
    since, images_done, saved, lost = time.time(), 0, step, ""
    batches = iter(load_run(m, cfg, dataset, step, processes))
    while step < cfg.max_train_steps:
        try:
            batch = next(batches)
            report_unreadable(batch[2], bad_files, len(dataset))
        except UserError as e:                                          # the data is gone: save, then end
            lost = str(e)
        if processes.any(signals or lost):
            break
        metrics = run_step(m, cfg, step, batch, processes.rank, processes.world)
        step += 1
        bar.update()
        images_done += cfg.batch_size
        last = step == cfg.max_train_steps
        pictures = cfg.sampling_steps > 0 and (step % cfg.sampling_steps == 0 or last)
        logging_now = step % cfg.log_steps == 0 or pictures or last

        if logging_now:
            row = read_metrics(m, metrics, processes.world)
            row["images_per_second"] = images_done / (time.time() - since)
            wrong = what_is_wrong(row)
            if wrong and main_process:
                log(step, row)
                saver.wait()                                           # the newest may still be on its way
                good = checkpoints(folder)[-1].name if checkpoints(folder) else "none yet"
                wrong += f"; last good checkpoint: {good}"
            if wrong:
                raise UserError(f"step {step}: {wrong}")
        if (step % cfg.checkpointing_steps == 0 or last) and main_process:
            saver.save(step, m.parts(), settings)                      # before images, which may fail
            saved = step
        if logging_now:
            if main_process and pictures:
                try:
                    with torch.compiler.set_stance("force_eager"):      # other shapes, not worth compiling
                        row |= draw_pictures(m, cfg, folder, step, shown)
                except UserError as e:
                    processes.say(f"step {step}: no images ({e})")
            if main_process:
                log(step, row)
                tqdm.write(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in row.items()))
            saver.check()
            since, images_done = time.time(), 0
    if step < cfg.max_train_steps:
        if main_process and saved < step:
            saver.save(step, m.parts(), settings)
        processes.say(f"stopped after step {step}; the same command with --resume resumes it")
    bar.close()
    saver.wait()
    processes.wait()
    if lost:
        raise UserError(lost)


def main():
    # Settings and folder
    cfg = parse_config()
    device, folder = pick_device(cfg.device), Path(cfg.output_dir) / cfg.exp_name
    atexit.register(end_loaders)
    if checkpoints(folder) and not (cfg.resume or cfg.overwrite or cfg.profile):
        raise UserError(f"{folder} holds checkpoints already: --resume goes on from the newest, --overwrite "
                        "starts afresh, --exp-name NAME keeps both")
    processes = start_processes(device)
    writes = processes.rank == 0 and not cfg.profile
    if writes:
        held = lock(folder)                                           # a lock, for as long as this name lives
        sweep_run(folder)
    cfg.mixed_precision = choose_precision(cfg.mixed_precision, device, processes)
    lacking = why_no_compile(device) if cfg.compile else ""
    if processes.any(lacking):
        reason = lacking or "another machine cannot compile"
        processes.say(f"{reason}: running eagerly (--no-compile says so in advance)")
        cfg.compile = False
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    # Data
    dataset, resume_from = open_data(cfg, processes), None
    if cfg.resume and not cfg.profile:
        resume_from = processes.from_first(newest_complete(folder) if processes.rank == 0 else None)
    if processes.any(resume_from and not resume_from.is_file()):
        raise UserError(f"{resume_from}: not on every machine; copy it to the same path on each")
    shown = pictures_to_show(cfg, dataset) if writes and cfg.sampling_steps > 0 else None

    # Networks
    m, step = build(cfg, device), 0
    if resume_from:
        step = resume(m, cfg, resume_from, dataset.classes, processes.say)
    elif not m.has_statistics and not cfg.profile:
        processes.say(f"latent statistics: measured over {measure_latents(m, dataset)} images")
    trained = 1 - cfg.ema_decay ** cfg.max_train_steps
    if trained < 0.5 and not (cfg.vae_only or cfg.profile):
        processes.say(f"warning: after {cfg.max_train_steps} steps of --ema-decay {cfg.ema_decay} the averaged "
                      f"weights are to {trained:.1%} trained ones; sample.py --no-ema samples the last ones")
    flops = flops_of_a_step(m, cfg) if cfg.profile else None          # before anything is compiled
    wrap(m, cfg, processes.world)
    if cfg.cache_latents:
        use_cached_latents(m, cfg, dataset, processes)
    if writes:
        start_folder(cfg, folder, dataset.classes, processes.say)
        sizes = [sum(p.numel() for p in params) / 1e6 for params in (m.sit_params, m.vae_params)]
        processes.say(f"{folder}: {len(dataset)} images in {len(dataset.classes)} classes, {cfg.model} "
                      f"{sizes[0]:.1f} M, VAE {cfg.vae} {sizes[1]:.1f} M, {processes.world} x {device.type}, "
                      f"step {step}")
    torch.backends.cudnn.benchmark = True                             # the shapes from here on are the steps'

    # The loop
    if cfg.profile:
        profile_run(m, cfg, dataset, processes, flops)
    train(m, cfg, folder, dataset, shown, step, processes)
    end_processes(processes)


if __name__ == "__main__":
    run_command(main, less_memory="--gradient-checkpointing, --gradient-accumulation-steps N, or a smaller "
                "--batch-size")
