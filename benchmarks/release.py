"""release.py: a training step of the authors' code, to compare ours with.

Models and losses are theirs, from a folder with models/ and loss/ of their repository's first commit. The
step follows their train_repae.py: fp16 by accelerate; three backward passes, an optimizer's step after each;
the EMA; and logged values that the CPU waits for. Weights and images are random, the target features ours.
"""
import copy
import sys
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torchvision

from benchmarks.memory import random_batch
from sit import parse_model
from support.commands import UserError


def release_step(folder, cfg, m):
    """step(k), the authors' step on cfg.batch_size images, with sizes and encoder of our networks m. Raises
    UserError without their code or its packages."""
    sys.path.insert(0, folder)
    sys.modules["dictdot"] = SimpleNamespace(dictdot=lambda values: SimpleNamespace(**values))     # a package
    try:
        from accelerate import Accelerator
        from loss.losses import ReconstructionLoss_Single_Stage
        from loss.lpips import LPIPS
        from models.autoencoder import AutoencoderKL
        from models.sit import SiT
    except ImportError as e:
        raise UserError(f"--release {folder}: {e}; it needs models/ and loss/ of the authors' code, and pip "
                        "install accelerate einops") from None
    ones = dict(discriminator_factor=1.0, discriminator_weight=1.0, perceptual_weight=1.0,
                reconstruction_weight=1.0, quantizer_weight=1.0)
    losses = SimpleNamespace(**ones, lecam_regularization_weight=0.0, discriminator_start=0,
                             perceptual_loss="lpips", reconstruction_loss="l1",
                             get=lambda name, default: default)
    model = SimpleNamespace(vq_model=dict(quantize_mode="vae"))
    (channels, size, _), encoders = m.latent_shape, m.encoders
    depth, width, heads, patch_size = parse_model(cfg.model)
    with (m.device, patch.object(torchvision.models, "VGG16_Weights", SimpleNamespace(IMAGENET1K_V1=None)),
          patch.object(LPIPS, "load_pretrained", lambda self: None)):
        pixels, labels, _ = random_batch(m, cfg, cfg.batch_size)
        nets = [AutoencoderKL(channels, m.vae.config["ch_mult"]),
                ReconstructionLoss_Single_Stage(SimpleNamespace(losses=losses, model=model)),
                SiT(input_size=size, patch_size=patch_size, in_channels=channels, hidden_size=width,
                    decoder_hidden_size=width, encoder_depth=cfg.encoder_depth, depth=depth, num_heads=heads,
                    z_dims=[e.channels for e in encoders], fused_attn=True, qk_norm=False)]
    ema = copy.deepcopy(nets[2])
    optimizers = [torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0.0) for net in nets]
    if cfg.compile:
        torch._dynamo.config.recompile_limit = 64
        nets = [torch.compile(net) for net in nets]
    accelerator = Accelerator(mixed_precision=cfg.mixed_precision)
    vae, loss, sit, *optimizers = accelerator.prepare(*nets, *optimizers)

    def update(value, net, optimizer):
        """An optimizer's step by the gradient of a loss."""
        accelerator.backward(value)
        accelerator.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    @accelerator.autocast()
    def step(k):
        x = pixels.float() / 127.5 - 1
        with torch.no_grad():
            features = [encoder(x) for encoder in encoders]
        posterior, z, x_rec = vae(x)
        sit.eval().requires_grad_(False)
        vae_loss, vae_log = loss(x, x_rec, posterior, k, "generator")
        settings = dict(path_type="linear", prediction="v", weighting="uniform", align_only=True)
        aligned = sit(z, labels, features, settings)
        update(vae_loss + 1.5 * aligned["proj_loss"], vae, optimizers[0])
        disc_loss, disc_log = loss(x, x_rec, posterior, k, "discriminator")
        update(disc_loss, loss, optimizers[1])
        sit.train().requires_grad_(True)
        settings["align_only"] = False
        out = sit(z.detach(), labels, features, settings, aligned["time_input"], aligned["noises"])
        denoising = out["denoising_loss"].mean()
        update(denoising + 0.5 * out["proj_loss"], sit, optimizers[2])
        with torch.no_grad():
            for average, value in zip(ema.parameters(), sit.parameters(), strict=True):
                average.mul_(0.9999).add_(value, alpha=1e-4)
        for value in (denoising, out["proj_loss"], *vae_log.values(), *disc_log.values()):
            value.item()                                                                    # for the log

    return step
