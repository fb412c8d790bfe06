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
            for name, p in m.sit.named_parameters():                    # as if trained: times and labels count
                if "adaLN" in name or "final_layer.linear" in name or "t_embedder" in name:
                    p.normal_(0, 0.1, generator=g)
                elif "embedding_table" in name:
                    p.normal_(0, 1, generator=g)
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


def the_papers_step(m, cfg, step, x, y, posterior_noise, eps, t, drop):
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
        loss = l1 + cfg.perceptual_weight * perceptual + cfg.kl_weight * kl
        loss = loss + cfg.disc_weight * gan if step >= cfg.disc_start else loss
        if not cfg.vae_only:
            denoising, align = diffuse((z - mean) / torch.sqrt(var + 1e-4), y)          # running statistics, no dropout
            if cfg.vae_grad == "repa":
                loss, losses["vae_align_loss"] = loss + cfg.vae_align_proj_coeff * align, align
            else:
                loss, losses["vae_denoising_loss"] = loss + denoising, denoising
        losses |= dict(vae_loss=loss, l1_loss=l1, perceptual_loss=perceptual, kl_loss=kl)
        differentiate("vae", v, loss)
        # 2. the discriminator
        if cfg.disc_weight > 0:
            real, fake = d(x), d(rec.detach())
            hinge = (torch.clamp(1 - real, min=0).mean() + torch.clamp(1 + fake, min=0).mean()) / 2
            losses |= dict(gan_loss=gan, disc_loss=hinge)
            differentiate("disc", d, hinge)
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
    [], ["--path-type", "cosine", "--disc-start", "1"], ["--projector", "conv", "--spatial-norm", "0.6"],
    ["--vae-grad", "none"], ["--vae-grad", "none", "--proj-coeff", "0", "--path-type", "cosine"],
    ["--vae-grad", "diffusion"], ["--vae-grad", "diffusion", "--path-type", "cosine", "--disc-weight", "0"],
    ["--vae-only"]], ids=" ".join)
def test_the_step_is_the_paper(small, flags):
    """Two steps in a row: every gradient, logged loss, statistic, clipped AdamW update, and the average of SiT."""
    m, cfg, args = small("--kl-weight", "1e-3", "--learning-rate", "1e-3", "--vae-learning-rate", "2e-3",
                         "--disc-learning-rate", "3e-3", *flags)
    nets, rates = dict(vae=m.vae, sit=m.sit, disc=m.disc), dict(vae=2e-3, sit=1e-3, disc=3e-3)
    optimizers = {net: AdamW(module.named_parameters(), rates[net]) for net, module in nets.items()}
    trained = {"none": {"sit"}, "repa": {"vae", "sit", "disc"}, "diffusion": {"vae", "sit", "disc"}}[cfg.vae_grad]
    trained -= {"sit"} if cfg.vae_only else set()
    trained -= {"disc"} if cfg.disc_weight == 0 else set()
    for step in range(2):
        losses, expected, mean, var = the_papers_step(m, cfg, step, *args)
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


# --- the numbers around it ----------------------------------------------------------------------------------------

PAPER = dict(batch_size=256, max_train_steps=400_000, resolution=256, learning_rate=1e-4, vae_learning_rate=1e-4,
             disc_learning_rate=1e-4, lr_warmup_steps=0, lr_decay_steps=0, max_grad_norm=1.0, ema_decay=0.9999,
             bn_momentum=0.1, cfg_prob=0.1, path_type="linear", weighting="uniform", flip=False, qk_norm=False,
             enc_type="vit_base_patch14_dinov2.lvd142m", encoder_depth=8, projector="mlp", projector_dim=2048,
             spatial_norm=0.0, proj_coeff=0.5, vae_align_proj_coeff=1.5, vae_grad="repa", perceptual="lpips",
             perceptual_weight=1.0, kl_weight=1e-6, disc_weight=0.1, seed=0, mixed_precision="bf16",
             gradient_accumulation_steps=1, vae_only=False)
SECOND_STAGE = dict(vae_grad="none", max_train_steps=4_000_000, cache_latents=True)
NUMBERS = {
    "sdvae-xl2": dict(model="SiT-XL/2", vae="f8d4"),
    "invae-xl1": dict(model="SiT-XL/1", vae="f16d32"),
    "vavae-xl1": dict(model="SiT-XL/1", vae="f16d32"),
    "e2e-sdvae-xl2": dict(model="SiT-XL/2", vae="f8d4", **SECOND_STAGE),
    "e2e-vavae-xl1": dict(model="SiT-XL/1", vae="f16d32", **SECOND_STAGE),
    "tiny": dict(model="SiT-T/1", vae="f4d8", batch_size=32, max_train_steps=1100, resolution=32, learning_rate=2e-3,
                 vae_learning_rate=3e-3, lr_warmup_steps=50, lr_decay_steps=600, ema_decay=0.99, weighting="lognormal",
                 enc_type="efficientnet-lite0", encoder_depth=2, projector_dim=512, perceptual="encoder",
                 perceptual_weight=0.25, disc_weight=0.0),
}


@pytest.mark.parametrize("preset", NUMBERS)
def test_presets_have_the_papers_numbers(preset, tmp_path):
    (tmp_path / "class").mkdir()
    assert set(NUMBERS) == set(train.PRESETS)
    cfg = train.parse_config(["--preset", preset, "--data-dir", str(tmp_path), "--vae-ckpt", str(Path(__file__))])
    assert {name: getattr(cfg, name) for name in PAPER} == PAPER | {k: v for k, v in NUMBERS[preset].items() if k in PAPER}
    assert all(getattr(cfg, name) == value for name, value in NUMBERS[preset].items())


def test_sizes_are_the_papers():
    assert {name: sit.SIZES[name] for name in "S B L XL".split()} == {
        "S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
    f8d4, f16d32 = vae.VAES["f8d4"], vae.VAES["f16d32"]
    assert (f8d4["ch"], f8d4["ch_mult"], f8d4["num_res_blocks"], f8d4["latent_channels"]) == (128, (1, 2, 4, 4), 2, 4)
    assert (f16d32["ch"], f16d32["ch_mult"], f16d32["num_res_blocks"], f16d32["latent_channels"],
            f16d32["attn_levels"]) == (128, (1, 1, 2, 2, 4), 2, 32, (4,))


def test_optimizers_have_the_papers_numbers(small):
    m, _, _ = small("--learning-rate", "1e-3", "--vae-learning-rate", "2e-3", "--disc-learning-rate", "3e-3")
    for optimizer, net, rate in ((m.opt, m.sit, 1e-3), (m.opt_vae, m.vae, 2e-3), (m.opt_disc, m.disc, 3e-3)):
        group, = optimizer.param_groups
        assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (rate, (0.9, 0.999), 1e-8, 0)
        assert not group["amsgrad"] and type(optimizer) is torch.optim.AdamW
        assert {id(p) for p in group["params"]} == {id(p) for name, p in net.named_parameters() if name != "pos_embed"}


def test_rates_warm_up_and_decay_linearly(small):
    m, cfg, _ = small("--lr-warmup-steps", "4", "--lr-decay-steps", "5", "--max-train-steps", "20", "--learning-rate",
                      "1e-3", "--vae-learning-rate", "2e-3", "--disc-learning-rate", "3e-3")
    batch = [torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.long), [""] * 4]
    for step, factor in ((0, 0.25), (1, 0.5), (3, 1), (10, 1), (15, 1), (16, 0.8), (19, 0.2)):
        train.run_step(m, cfg, step, batch, 0, 1, CPU)
        rates = [optimizer.param_groups[0]["lr"] for optimizer in (m.opt, m.opt_vae, m.opt_disc)]
        assert rates == pytest.approx([1e-3 * factor, 2e-3 * factor, 3e-3 * factor])


def everything(m):
    """Copies of all parameters and buffers, by network and name."""
    nets = dict(sit=m.sit, ema=m.ema, vae=m.vae, disc=m.disc)
    return {f"{net}.{name}": t.clone() for net, module in nets.items() for name, t in module.state_dict().items()}


def changed(m, before):
    return {name.partition(".")[0] for name, t in everything(m).items() if not torch.equal(t, before[name])}


@pytest.mark.parametrize("flags, nets", [
    ([], {"sit", "ema", "vae", "disc"}), (["--disc-weight", "0"], {"sit", "ema", "vae"}),
    (["--vae-grad", "diffusion"], {"sit", "ema", "vae", "disc"}), (["--vae-grad", "none"], {"sit", "ema"})])
def test_what_a_step_changes(small, flags, nets):
    m, cfg, args = small(*flags)
    before = everything(m)
    take_step(m, cfg, 0, *args)
    assert changed(m, before) == nets
    for name in ("sit.pos_embed", "ema.pos_embed"):                     # fixed, though it is a Parameter
        assert torch.equal(everything(m)[name], before[name])
    moved = {name for name in before if name.startswith("sit.bn") and not torch.equal(everything(m)[name], before[name])}
    assert bool(moved) == ("vae" in nets)                               # a frozen VAE's statistics are fixed


def test_the_stop_gradient(small):
    """Nothing of the diffusion loss reaches the VAE: its gradient does not know of the later blocks, the head or v*.
    In the naive regime it does."""
    for flags, same in (([], True), (["--vae-grad", "diffusion"], False)):
        m, cfg, args = small(*flags)
        _, first = take_step(m, cfg, 0, *args)
        m, cfg, args = small(*flags)
        with torch.no_grad():
            for p in (*m.sit.blocks[cfg.encoder_depth:].parameters(), *m.sit.final_layer.parameters()):
                p.mul_(1.5)
        _, second = take_step(m, cfg, 0, *args)
        assert same == all(torch.equal(g, second["vae"][name]) for name, g in first["vae"].items())
        assert not any(torch.equal(g, second["sit"][name]) for name, g in first["sit"].items() if "final_layer" in name)



@pytest.mark.parametrize("term, columns", [
    (dict(), {"encoder", "decoder", "early", "later"}),                 # L1; diffusion
    (dict(perceptual_weight=1.0), {"encoder", "decoder"}), (dict(disc_weight=0.1), {"encoder", "decoder", "D"}),
    (dict(kl_weight=1e-2), {"encoder"}), (dict(vae_align_proj_coeff=1.5), {"encoder"}),
    (dict(proj_coeff=0.5), {"early", "projector"})], ids=lambda value: "".join(value) if type(value) is dict else "")
def test_routing_table(small, term, columns):
    """Gradients are linear in the losses: a term's own is the difference between a step with and without it."""
    def column(net, name):
        if net == "vae":
            return "encoder" if name.startswith(("encoder.", "quant_conv.")) else "decoder"
        if net == "sit":
            later = name.startswith("final_layer") or name.startswith("blocks.") and int(name.split(".")[1]) >= 2
            return "projector" if name.startswith("projectors") else "later" if later else "early"
        return "D"

    def gradients(**settings):
        m, cfg, args = small()
        for name in ("perceptual_weight", "kl_weight", "vae_align_proj_coeff", "proj_coeff", "disc_weight"):
            setattr(cfg, name, settings.get(name, 0.0))
        return take_step(m, cfg, 0, *args)[1]

    without = gradients() if term else {}
    size = dict.fromkeys(("encoder", "decoder", "early", "later", "projector", "D"), 0.0)
    for net, grads in gradients(**term).items():
        for name, g in grads.items():
            difference = g - without.get(net, {}).get(name, 0.0)
            size[column(net, name)] += difference.abs().sum().item()
    largest = max(size.values())
    assert {name for name, value in size.items() if value > 1e-5 * largest} == columns, size
