"""The method: what must be true of REPA-E, checked against the paper's formulas written out here, closed forms and
independent code. `python -m pytest -q` runs this file and tests/ (formats, evaluation, survival, data)."""
import copy
import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import repa
import sample
import sit
import train
import vae

CPU = torch.device("cpu")
LATENTS = 8, 8, 8                                                       # of f4d8 at 32 pixels


def statistics(channels):
    """(mean, std) of latents, [C] each."""
    return torch.linspace(-0.5, 0.5, channels), torch.linspace(0.5, 1.5, channels)


@pytest.fixture
def small(tmp_path):
    """make(*flags) -> (networks, config, one step's arguments): the tiny preset in float32 on random images, all terms
    on, with no weight at its initial zero and latent statistics that are not the batch's."""
    def make(*flags, batch=4):
        if "none" in flags:                                             # a frozen VAE comes from a file
            torch.manual_seed(7)
            torch.save(vae.AutoencoderKL("f4d8").state_dict(), tmp_path / "vae.pt")
            flags = [*flags, "--vae-ckpt", str(tmp_path / "vae.pt")]
        cfg = train.parse_config(["--batch-size", str(batch), "--mixed-precision", "no", "--seed", "1", "--disc-weight",
                                  "0.1", "--disc-start", "0", "--ema-decay", "0.9", *flags])
        m = train.build(cfg, CPU)
        train.wrap(m, cfg, CPU, 1)
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, p in m.sit.named_parameters():                    # adaLN-Zero starts as the identity: open it
                if "adaLN" in name or "final_layer.linear" in name:
                    p.normal_(0, 0.05, generator=g)
        for net in (m.sit, m.ema):
            net.bn.start(*statistics(8))
        x = torch.rand(batch, 3, 32, 32, generator=g) * 2 - 1
        y = torch.arange(batch) % 10
        posterior_noise, eps, t, _ = train.draw_noise(cfg, 0, LATENTS, 0, 1, CPU)
        drop = torch.arange(batch) % 3 == 1
        return m, cfg, (x, y, posterior_noise, eps, t, drop)
    return make


def take_step(m, cfg, step, x, y, posterior_noise, eps, t, drop):
    """train.train_step, with the latents of a frozen VAE sampled first: its metrics and, per network, the gradients
    as each parameter last held them before they were clipped."""
    nets, seen, hooks = dict(vae=m.vae, sit=m.sit, disc=m.disc), dict(vae={}, sit={}, disc={}), []
    for net, module in nets.items():
        for name, p in module.named_parameters():
            def keep(p, grads=seen[net], name=name):
                grads[name] = p.grad.clone()
            if p.requires_grad:
                hooks.append(p.register_post_accumulate_grad_hook(keep))
    z = None
    if cfg.vae_grad == "none":
        with torch.no_grad():
            z = m.vae.encode(x).sample(posterior_noise)
    metrics = train.train_step(m, cfg, step, x, y, z, posterior_noise, eps, t, drop)
    for hook in hooks:
        hook.remove()
    return metrics, seen


# --- the step is the paper's --------------------------------------------------------------------------------------

def interpolant(t, path_type):
    """alpha, sigma and their derivatives at t [B], as [B, 1, 1, 1]."""
    t = t.view(-1, 1, 1, 1)
    if path_type == "linear":
        return 1 - t, t, -1.0, 1.0
    angle = math.pi / 2 * t
    return torch.cos(angle), torch.sin(angle), -math.pi / 2 * torch.sin(angle), math.pi / 2 * torch.cos(angle)


def cosine(p, f):
    """Mean over images and tokens of the cosine between projected states and features, [B, N, C] both."""
    return ((p * f).sum(2) / (p.square().sum(2).sqrt() * f.square().sum(2).sqrt())).mean()


def project(net, h):
    """Hidden states [B, N, D] through a projector: three linear layers with SiLU, or a 3x3 convolution."""
    if isinstance(net, nn.Conv2d):
        grid = math.isqrt(h.shape[1])
        image = h.transpose(1, 2).reshape(len(h), -1, grid, grid)
        return F.conv2d(image, net.weight, net.bias, padding=1).reshape(len(h), -1, grid * grid).transpose(1, 2)
    first, _, second, _, third = net
    for layer in (first, second):
        h = h @ layer.weight.T + layer.bias
        h = h * torch.sigmoid(h)
    return h @ third.weight.T + third.bias


def the_papers_step(m, cfg, x, y, posterior_noise, eps, t, drop):
    """Algorithm 1 written out: (losses, gradients of each network's parameters, running mean and variance after it).
    Of the networks only the forward passes are used; the regime is read off cfg.vae_grad and the coefficients."""
    v, s, d = (copy.deepcopy(net) for net in (m.vae, m.sit, m.disc))
    hidden = []
    s.blocks[cfg.encoder_depth - 1].register_forward_hook(lambda block, args, h: hidden.append(h))
    features = [encoder(x) for encoder in m.encoders]
    alpha, sigma, d_alpha, d_sigma = interpolant(t, cfg.path_type)
    mean, var = s.bn.running_mean.clone().view(1, -1, 1, 1), s.bn.running_var.clone().view(1, -1, 1, 1)
    losses, grads = {}, {}

    def diffuse(z, labels):
        """Denoising and alignment loss of normalised latents z."""
        velocity, _ = s(alpha * z + sigma * eps, t, labels)
        denoising = (velocity - d_alpha * z - d_sigma * eps).pow(2).mean()
        h = hidden.pop()
        align = [-cosine(project(net, h), f) for net, f in zip(s.projectors, features)]
        return denoising, sum(align) / max(len(align), 1)

    def differentiate(net, module, loss):
        names, params = zip(*[pair for pair in module.named_parameters() if pair[1].requires_grad])
        values = torch.autograd.grad(loss, params, allow_unused=True)
        grads[net] = {name: g for name, g in zip(names, values) if g is not None}
        losses[{"vae": "vae_grad_norm", "sit": "grad_norm", "disc": "disc_grad_norm"}[net]] = torch.sqrt(
            sum(g.double().pow(2).sum() for g in grads[net].values()))

    # 1. z ~ q(z|x), x^ = decode(z); the VAE's loss
    mu, logvar = v.quant_conv(v.encoder(x)).split(v.latent_channels, 1)
    z = mu + torch.exp(logvar / 2) * posterior_noise
    if cfg.vae_grad != "none":
        rec = v.decoder(v.post_quant_conv(z))
        kl = (mu ** 2 / 2 + (torch.exp(logvar) - 1 - logvar) / 2).sum() / len(x)
        perceptual = m.perceptual(rec, x)
        l1, gan = torch.abs(x - rec).mean(), -d(rec).mean()
        loss = l1 + cfg.perceptual_weight * perceptual + cfg.kl_weight * kl + cfg.disc_weight * gan
        if not cfg.vae_only:
            denoising, align = diffuse((z - mean) / torch.sqrt(var + 1e-4), y)          # running statistics, no dropout
            if cfg.vae_grad == "repa":
                loss, losses["vae_align_loss"] = loss + cfg.vae_align_proj_coeff * align, align
            else:
                loss, losses["vae_denoising_loss"] = loss + denoising, denoising
        losses |= dict(vae_loss=loss, l1_loss=l1, perceptual_loss=perceptual, kl_loss=kl, gan_loss=gan)
        differentiate("vae", v, loss)
        # 2. the discriminator
        real, fake = d(x), d(rec.detach())
        losses["disc_loss"] = (torch.clamp(1 - real, min=0).mean() + torch.clamp(1 + fake, min=0).mean()) / 2
        differentiate("disc", d, losses["disc_loss"])
        # 3. SiT on sg(z), normalised with the batch's statistics, which the running ones follow
        z = z.detach()
        n = z.numel() // z.shape[1]
        batch_mean = z.mean((0, 2, 3), keepdim=True)
        batch_var = (z - batch_mean).pow(2).mean((0, 2, 3), keepdim=True)
        z = (z - batch_mean) / torch.sqrt(batch_var + 1e-4)
        momentum = cfg.bn_momentum
        mean, var = (1 - momentum) * mean + momentum * batch_mean, (1 - momentum) * var + momentum * batch_var * n / (n - 1)
    else:
        z = ((z - mean) / torch.sqrt(var + 1e-4)).detach()
    if not cfg.vae_only:
        denoising, align = diffuse(z, torch.where(drop, cfg.num_classes, y))
        losses |= dict(denoising_loss=denoising, loss=denoising + cfg.proj_coeff * align)
        if m.encoders:
            losses["proj_loss"] = align
        differentiate("sit", s, losses["loss"])
    return losses, grads, mean.flatten().detach(), var.flatten().detach()


class AdamW:
    """The paper's optimizer in float64, without weight decay; gradients clipped to norm 1."""

    def __init__(self, params, lr):
        self.lr, self.k = lr, 0
        self.p = {name: p.detach().double() for name, p in params}
        self.m = {name: torch.zeros_like(p) for name, p in self.p.items()}
        self.v = {name: torch.zeros_like(p) for name, p in self.p.items()}

    def step(self, grads):
        self.k += 1
        norm = math.sqrt(sum(g.double().pow(2).sum().item() for g in grads.values()))
        for name, g in grads.items():
            g = g.double() * min(1, 1 / norm)
            self.m[name] = 0.9 * self.m[name] + 0.1 * g
            self.v[name] = 0.999 * self.v[name] + 0.001 * g * g
            m, v = self.m[name] / (1 - 0.9 ** self.k), self.v[name] / (1 - 0.999 ** self.k)
            self.p[name] = self.p[name] - self.lr * m / (torch.sqrt(v) + 1e-8)


@pytest.mark.parametrize("flags", [
    [], ["--path-type", "cosine"], ["--projector", "conv", "--spatial-norm", "0.6"],
    ["--vae-grad", "none"], ["--vae-grad", "none", "--path-type", "cosine"], ["--vae-grad", "none", "--proj-coeff", "0"],
    ["--vae-grad", "diffusion"], ["--vae-grad", "diffusion", "--path-type", "cosine"],
    ["--vae-only"]], ids=" ".join)
def test_the_step_is_the_paper(small, flags):
    """Three steps in a row: every gradient, logged loss, statistic, clipped AdamW update, and the average of SiT."""
    m, cfg, args = small("--kl-weight", "1e-3", "--learning-rate", "1e-3", "--vae-learning-rate", "2e-3",
                         "--disc-learning-rate", "3e-3", *flags)
    nets, rates = dict(vae=m.vae, sit=m.sit, disc=m.disc), dict(vae=2e-3, sit=1e-3, disc=3e-3)
    optimizers = {net: AdamW(module.named_parameters(), rates[net]) for net, module in nets.items()}
    trained = {"none": {"sit"}, "repa": {"vae", "sit", "disc"}, "diffusion": {"vae", "sit", "disc"}}[cfg.vae_grad]
    trained -= {"sit"} if cfg.vae_only else set()
    for step in range(3):
        losses, expected, mean, var = the_papers_step(m, cfg, *args)
        average = {name: value.clone() for name, value in m.ema.state_dict().items()}
        metrics, grads = take_step(m, cfg, step, *args)
        assert {net for net, g in grads.items() if g} == set(expected) == trained
        for net in trained:
            assert grads[net].keys() == expected[net].keys()
            whole = torch.sqrt(sum(g.pow(2).sum() for g in expected[net].values()))
            assert whole > 1                                            # so that clipping changes it
            for name, g in expected[net].items():
                error = (grads[net][name] - g).norm()
                assert error <= 1e-4 * g.norm() + 1e-6 * whole, (net, name, error, g.norm(), whole)
        assert losses.keys() == metrics.keys() - {"skipped", "skipped_in_a_row", "zero_gradients_in_a_row"}
        for name, value in losses.items():
            assert metrics[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
        assert torch.allclose(m.sit.bn.running_mean, mean, rtol=1e-5, atol=1e-6)
        assert torch.allclose(m.sit.bn.running_var, var, rtol=1e-5)
        for net, module in nets.items():
            if net in trained:
                optimizers[net].step(grads[net])
            for name, p in module.named_parameters():
                error = (p.detach() - optimizers[net].p[name]).abs().max()
                assert error <= 1e-4 * rates[net] + 2e-7 * p.abs().max(), (net, name)
                optimizers[net].p[name] = p.detach().double()           # so that roundings do not add up
        now = m.sit.state_dict()
        for name, value in m.ema.state_dict().items():
            if value.is_floating_point():
                assert torch.allclose(value, 0.9 * average[name] + 0.1 * now[name], rtol=1e-5, atol=1e-6), name
