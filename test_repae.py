"""The method: what must be true of REPA-E, compared with a reference implementation of the paper's formulas
in this file, closed forms and independent code. `python -m pytest -q` runs this file and tests/."""
import copy
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import repa
import sit
import train
import vae

CPU = torch.device("cpu")
LATENTS = 8, 8, 8                                                  # of the VAE below, at 32 pixels


def statistics(channels):
    """(mean, std) of latents, [C] each."""
    return torch.linspace(-0.5, 0.5, channels), torch.linspace(0.5, 1.5, channels)


def smaller_networks(monkeypatch, folder):
    """make(*flags, micro_batches) -> (networks, config, a batch as the loader gives it): the tiny preset made
    smaller, in float32, on noise. All terms are on, no weight is at its initial zero, and the latent
    statistics are not the batch's."""
    monkeypatch.setitem(sit.SIZES, "T", (4, 64, 4))
    monkeypatch.setitem(vae.VAES, "f4d8", dict(ch=8, ch_mult=(1, 2, 2), num_res_blocks=1, attn_levels=(2,),
                                               latent_channels=8, groups=4))

    def make(*flags, micro_batches=1):
        if "none" in flags:                                        # a frozen VAE comes from a file
            torch.manual_seed(7)
            torch.save(vae.AutoencoderKL("f4d8").state_dict(), folder / "vae.pt")
            flags = [*flags, "--vae-ckpt", str(folder / "vae.pt")]
        cfg = train.parse_config([
            "--model", "SiT-T/2", "--projector-dim", "32", "--num-classes", "10", "--mixed-precision", "no",
            "--seed",
            "1", "--cfg-prob", "0.5", "--disc-weight", "0.1", "--disc-start", "0", "--ema-decay", "0.9",
            "--lr-warmup-steps", "0", "--batch-size", str(4 * micro_batches), "--gradient-accumulation-steps",
            str(micro_batches), *flags])
        m = train.build(cfg, CPU)
        train.wrap(m, cfg, 1)
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, p in m.sit.named_parameters():               # as if trained: timesteps and labels count
                if "adaLN" in name or "final_layer.linear" in name or "t_embedder" in name:
                    p.normal_(0, 0.1, generator=g)
                elif "embedding_table" in name:
                    p.normal_(0, 1, generator=g)
            for name, p in m.vae.named_parameters():
                if name.endswith(("conv2.weight", "proj_out.weight")):
                    p.normal_(0, 0.1, generator=g)
        for net in (m.sit, m.ema):
            net.bn.set_statistics(*statistics(8))
        n = cfg.batch_size
        x = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=g)
        return m, cfg, (x, torch.arange(n), [""] * n)
    return make


@pytest.fixture
def small(tmp_path, monkeypatch):
    return smaller_networks(monkeypatch, tmp_path)


def networks(m):
    """{name: network} of what the run has."""
    return {name: getattr(m, name) for name in ("vae", "sit", "disc") if getattr(m, name) is not None}


def take_step(m, cfg, step, batch):
    """train.run_step: its metrics and, per network, the gradients as each parameter last held them, before
    they are divided by the number of micro-batches and clipped."""
    seen, hooks = {name: {} for name in networks(m)}, []
    for net, grads in seen.items():
        for name, p in networks(m)[net].named_parameters():
            def keep(p, grads=grads, name=name):
                grads[name] = p.grad.clone()
            if p.requires_grad:
                hooks.append(p.register_post_accumulate_grad_hook(keep))
    metrics = train.run_step(m, cfg, step, batch, 0, 1)
    for hook in hooks:
        hook.remove()
    return metrics, {net: grads for net, grads in seen.items() if grads}


# --- The step is the paper's --------------------------------------------------------------------------------

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
        return F.conv2d(image, net.weight, net.bias, padding=1).reshape(len(h), -1,
                                                                        grid * grid).transpose(1, 2)
    first, _, second, _, third = net
    for layer in (first, second):
        h = h @ layer.weight.T + layer.bias
        h = h * torch.sigmoid(h)
    return h @ third.weight.T + third.bias


def the_papers_step(m, cfg, step, mean, var, x, y, posterior_noise, eps, t, drop):
    """A reference implementation of the step on one micro-batch: (losses, gradients of each network's
    parameters, latents), given the latents' running mean and variance. Of the networks only the forward
    passes are used."""
    v, s, d = (copy.deepcopy(net) for net in (m.vae, m.sit, m.disc))
    hidden, losses, grads = [], {}, {}
    if not cfg.vae_only:
        s.blocks[cfg.encoder_depth - 1].register_forward_hook(lambda block, args, h: hidden.append(h))
    features = [encoder(x) for encoder in m.encoders]
    alpha, sigma, d_alpha, d_sigma = interpolant(t, cfg.path_type)

    def distance(p, f):
        return -cosine(p, f) if cfg.align_loss == "cosine" else (p - f).pow(2).mean()

    def normalise(z, mean, var):
        return (z - mean.view(1, -1, 1, 1)) / torch.sqrt(var.view(1, -1, 1, 1) + 1e-4)

    def diffuse(z, labels):
        """Denoising and alignment loss of normalised latents z."""
        velocity, _ = s(alpha * z + sigma * eps, t, labels)
        denoising = (velocity - d_alpha * z - d_sigma * eps).pow(2).mean()
        h = hidden.pop()
        align = [distance(project(net, h), f) for net, f in zip(s.projectors, features, strict=True)]
        return denoising, sum(align) / max(len(align), 1)

    def differentiate(net, module, loss):
        trained = [pair for pair in module.named_parameters() if pair[1].requires_grad]
        names, params = zip(*trained, strict=True)
        values = torch.autograd.grad(loss, params, allow_unused=True)
        grads[net] = {name: g for name, g in zip(names, values, strict=True) if g is not None}

    # 1. z ~ q(z|x), x^ = decode(z); the VAE's loss
    mu, logvar = v.quant_conv(v.encoder(x)).split(v.latent_channels, 1)
    if cfg.posterior_std:
        logvar = torch.full_like(mu, 2 * math.log(cfg.posterior_std))
    z = mu + torch.exp(logvar / 2) * posterior_noise
    if cfg.vae_grad != "none":
        rec = v.decoder(v.post_quant_conv(z))
        prior = (mu ** 2 + torch.exp(logvar) + math.log(2 * math.pi)).sum() / 2 / len(x)
        entropy = (logvar + math.log(2 * math.pi * math.e)).sum() / 2 / len(x)
        l1, perceptual = torch.abs(x - rec).mean(), m.perceptual(rec, x)
        loss = l1 + cfg.perceptual_weight * perceptual + cfg.kl_weight * prior - cfg.entropy_weight * entropy
        if cfg.disc_weight > 0 and step >= cfg.disc_start:
            losses["gan_loss"] = -d(rec).mean()
            loss = loss + cfg.disc_weight * losses["gan_loss"]
        if not cfg.vae_only:
            denoising, align = diffuse(normalise(z, mean, var), y)  # running statistics, no dropout
            if cfg.vae_grad != "diffusion":
                loss, losses["vae_align_loss"] = loss + cfg.vae_align_proj_coeff * align, align
            if cfg.vae_grad != "repa":
                loss, losses["vae_denoising_loss"] = loss + cfg.vae_denoising_coeff * denoising, denoising
        losses |= dict(vae_loss=loss, l1_loss=l1, perceptual_loss=perceptual, kl_loss=prior - entropy)
        differentiate("vae", v, loss)
        # 2. the discriminator
        if cfg.disc_weight > 0:
            real, fake = d(x), d(rec.detach())
            hinge = (torch.clamp(1 - real, min=0).mean() + torch.clamp(1 + fake, min=0).mean()) / 2
            losses["disc_loss"] = hinge
            differentiate("disc", d, hinge)
    # 3. SiT on sg(z), normalised with the micro-batch's own statistics, over a frozen VAE with fixed ones
    z = z.detach()
    if cfg.vae_grad != "none" and not cfg.fixed_latent_stats:
        mean, var = z.mean((0, 2, 3)), z.transpose(0, 1).flatten(1).var(1, correction=0)
    if not cfg.vae_only:
        denoising, align = diffuse(normalise(z, mean, var), torch.where(drop, cfg.num_classes, y))
        losses |= dict(denoising_loss=denoising, loss=denoising + cfg.proj_coeff * align)
        if m.encoders:
            losses["proj_loss"] = align
        differentiate("sit", s, losses["loss"])
    return {name: value.item() for name, value in losses.items()}, grads, z


def norm(grads):
    return math.sqrt(sum(g.double().pow(2).sum().item() for g in grads.values()))


REGIMES = {                                                         # flags, micro-batches
    "repae, two micro-batches": ("", 2),
    "repae, cosine path, GAN from the second step": ("--path-type cosine --disc-start 1", 1),
    "irepa, two encoders": ("--projector conv --spatial-norm 0.6 --enc-type efficientnet-lite0,"
                            "efficientnet-lite2", 1),
    "repa, two micro-batches": ("--vae-grad none", 2),
    "sit, cosine path": ("--vae-grad none --proj-coeff 0 --path-type cosine", 1),
    "naive, cosine path, no GAN": ("--vae-grad diffusion --path-type cosine --disc-weight 0", 1),
    "both, entropy's own weight": ("--vae-grad both --entropy-weight 3e-3 --vae-denoising-coeff 0.3", 1),
    "naive, fixed posterior": ("--vae-grad diffusion --posterior-std 0.5", 1),
    "repae, squared error": ("--align-loss mse", 1),
    "fixed statistics, two micro-batches": ("--fixed-latent-stats", 2),
    "vae alone": ("--vae-only", 1)}
RATES = dict(vae=2e-3, sit=1e-3, disc=3e-3)


def state(m):
    """Copies of all parameters and buffers, {network: {name: tensor}}."""
    nets = networks(m) | dict(ema=m.ema)
    return {net: {name: t.clone() for name, t in module.state_dict().items()} for net, module in nets.items()}


@pytest.fixture(scope="module", params=REGIMES.values(), ids=REGIMES)
def two_steps(request, tmp_path_factory):
    """(config, two consecutive steps: what train.py did, and what the_papers_step says)."""
    flags, n = request.param
    with pytest.MonkeyPatch.context() as monkeypatch:
        m, cfg, batch = smaller_networks(monkeypatch, tmp_path_factory.mktemp("step"))(
            "--kl-weight", "1e-3", "--learning-rate", "1e-3", "--vae-learning-rate", "2e-3",
            "--disc-learning-rate",
            "3e-3", "--max-grad-norm", "0.1", *flags.split(), micro_batches=n)
        steps = []
        for step in range(2):
            s = SimpleNamespace(before=state(m), losses={}, expected={}, latents=[])
            x, y, noise = batch[0] / 127.5 - 1, batch[1], train.draw_noise(cfg, step, LATENTS, 0, 1, CPU)
            assert 0 < noise[3].sum() < len(y)                          # some labels are dropped
            mean, var = s.before["sit"]["bn.running_mean"], s.before["sit"]["bn.running_var"]
            for micro_batch in zip(*(values.chunk(n) for values in (x, y, *noise)), strict=True):
                losses, grads, z = the_papers_step(m, cfg, step, mean, var, *micro_batch)
                s.latents.append(z)
                s.losses = {name: s.losses.get(name, 0) + value / n for name, value in losses.items()}
                for net, values in grads.items():
                    sums = s.expected.setdefault(net, {})
                    for name, g in values.items():
                        sums[name] = sums.get(name, 0) + g / n
            s.metrics, grads = take_step(m, cfg, step, batch)
            s.grads = {net: {name: g / n for name, g in values.items()} for net, values in grads.items()}
            s.after = state(m)
            steps.append(s)
        return cfg, steps


def test_each_gradient_is_the_papers(two_steps):
    """The mean of those of the micro-batches. What does not train has none."""
    cfg, steps = two_steps
    trained = {"sit"} if cfg.vae_grad == "none" else {"vae", "sit", "disc"}
    trained -= {"sit"} if cfg.vae_only else set()
    trained -= {"disc"} if cfg.disc_weight == 0 else set()
    for s in steps:
        assert set(s.grads) == set(s.expected) == trained
        for net, expected in s.expected.items():
            assert s.grads[net].keys() == expected.keys()
            for name, g in expected.items():
                assert (s.grads[net][name] - g).norm() <= 1e-4 * g.norm() + 1e-6 * norm(expected), (net, name)


def test_each_logged_value_is_the_papers(two_steps):
    """Losses and gradient norms; what a regime does not have is absent."""
    for s in two_steps[1]:
        log_names = dict(vae="vae_grad_norm", disc="disc_grad_norm", sit="grad_norm")
        expected = s.losses | {log_names[net]: norm(grads) for net, grads in s.expected.items()}
        assert s.metrics.keys() == expected.keys() | {"skipped", "zero_gradients"}
        for name, value in expected.items():
            assert s.metrics[name].item() == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_each_update_is_adamw_of_clipped_gradients(two_steps):
    """In float64, to a norm of 0.1. What has no gradient stays."""
    steps = two_steps[1]
    for net, before in steps[0].before.items():
        if net == "ema":
            continue
        params = {name: before[name].double() for name in steps[0].grads.get(net, {})}
        if params:
            optimizer = torch.optim.AdamW(params.values(), RATES[net], (0.9, 0.999), 1e-8, weight_decay=0)
        for s in steps:
            if params:
                assert norm(s.grads[net]) > 0.1                     # so that clipping shows
                for name, p in params.items():
                    p.grad = s.grads[net][name].double() * 0.1 / norm(s.grads[net])
                optimizer.step()
            for name, p in s.after[net].items():
                if name in params:
                    error = (p - params[name]).abs().max()
                    assert error <= 1e-4 * RATES[net] + 2e-7 * p.abs().max(), (net, name)
                    params[name].copy_(p)                           # so that roundings do not add up
                elif "running" not in name and "num_batches" not in name:
                    assert torch.equal(p, s.before[net][name]), (net, name)


def test_latent_statistics_are_those_of_the_whole_batch(two_steps):
    """They move once per step, by the pooled moments of all micro-batches; over a frozen VAE they do not."""
    cfg, steps = two_steps
    for s in steps:
        mean, var = s.before["sit"]["bn.running_mean"], s.before["sit"]["bn.running_var"]
        moving = cfg.vae_grad != "none" and not cfg.fixed_latent_stats
        counts = [when["sit"]["bn.num_batches_tracked"].item() for when in (s.before, s.after)]
        assert counts[1] == counts[0] + moving
        if moving:
            z = torch.cat(s.latents)
            mean, var = 0.9 * mean + 0.1 * z.mean((0, 2, 3)), 0.9 * var + 0.1 * z.var((0, 2, 3))
        assert torch.allclose(s.after["sit"]["bn.running_mean"], mean, rtol=1e-5, atol=1e-6)
        assert torch.allclose(s.after["sit"]["bn.running_var"], var, rtol=1e-5)


def test_ema_follows_sit_and_its_statistics(two_steps):
    for s in two_steps[1]:
        for name, value in s.after["ema"].items():
            if value.is_floating_point():
                expected = 0.9 * s.before["ema"][name] + 0.1 * s.after["sit"][name]
                assert torch.allclose(value, expected, rtol=1e-5, atol=1e-6), name


# --- The numbers around it ----------------------------------------------------------------------------------

PAPER = dict(batch_size=256, max_train_steps=400_000, resolution=256, learning_rate=1e-4,
             vae_learning_rate=1e-4,
             disc_learning_rate=1e-4, lr_warmup_steps=0, lr_decay_steps=0, max_grad_norm=1.0,
             ema_decay=0.9999,
             cfg_prob=0.1, path_type="linear", weighting="uniform", qk_norm=False,
             enc_type="vit_base_patch14_dinov2.lvd142m", encoder_depth=8, projector="mlp", projector_dim=2048,
             spatial_norm=0.0, proj_coeff=0.5, vae_align_proj_coeff=1.5, vae_grad="repa",
             align_loss="cosine", vae_denoising_coeff=1.0, posterior_std=None,
             fixed_latent_stats=False,
             perceptual="lpips", perceptual_weight=1.0, kl_weight=1e-6, disc_weight=0.1, seed=0,
             mixed_precision="auto", gradient_accumulation_steps=1, vae_only=False)
SECOND_STAGE = dict(vae_grad="none", max_train_steps=4_000_000, cache_latents=True)
NUMBERS = {
    "sdvae-xl2": dict(model="SiT-XL/2", vae="f8d4"),
    "invae-xl1": dict(model="SiT-XL/1", vae="f16d32"),
    "vavae-xl1": dict(model="SiT-XL/1", vae="f16d32"),
    "e2e-sdvae-xl2": dict(model="SiT-XL/2", vae="f8d4", **SECOND_STAGE),
    "e2e-vavae-xl1": dict(model="SiT-XL/1", vae="f16d32", **SECOND_STAGE),
    "sd35-xl2": dict(model="SiT-XL/2", vae="f8d16", vae_learning_rate=2e-5),
    "flux-xl2": dict(model="SiT-XL/2", vae="f8d16", vae_learning_rate=2e-5),
    "e2e-sd35-xl2": dict(model="SiT-XL/2", vae="f8d16", **SECOND_STAGE),
    "e2e-flux-xl2": dict(model="SiT-XL/2", vae="f8d16", **SECOND_STAGE),
    "tiny": dict(model="SiT-T/2", vae="f4d8", batch_size=16, max_train_steps=2500, resolution=32,
                 learning_rate=2e-3,
                 vae_learning_rate=3e-3, lr_warmup_steps=50, lr_decay_steps=1500, ema_decay=0.99,
                 weighting="lognormal", enc_type="efficientnet-lite0", encoder_depth=2, projector_dim=512,
                 perceptual="efficientnet-lite0", perceptual_weight=0.25, kl_weight=2e-5, disc_weight=0.0)}


def test_presets_and_sizes_are_the_papers(tmp_path):
    assert set(NUMBERS) == set(train.PRESETS)
    for preset, numbers in NUMBERS.items():
        cfg = vars(train.parse_config(["--preset", preset, "--data-dir", str(tmp_path), "--vae-ckpt",
                                       __file__]))
        assert cfg["vae"] == ""                                     # that of the file
        cfg["vae"] = train.PRESETS[preset]["vae"]
        assert {name: cfg[name] for name in PAPER | numbers} == PAPER | numbers
    assert {name: sit.SIZES[name] for name in ["S", "B", "L", "XL"]} == {
        "S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
    for name, row in (("f8d4", (128, (1, 2, 4, 4), 2, 4, ())),
                      ("f16d32", (128, (1, 1, 2, 2, 4), 2, 32, (4,))),
                      ("f8d16", (128, (1, 2, 4, 4), 2, 16, ()))):
        keys = ["ch", "ch_mult", "num_res_blocks", "latent_channels", "attn_levels"]
        assert tuple(vae.VAES[name][key] for key in keys) == row


def test_learning_rates_warm_up_and_decay_linearly(small):
    m, cfg, batch = small("--lr-warmup-steps", "4", "--lr-decay-steps", "5", "--max-train-steps", "20",
                          "--learning-rate", "1e-3", "--vae-learning-rate", "2e-3", "--disc-learning-rate",
                          "3e-3")
    for step, factor in ((0, 0.25), (1, 0.5), (3, 1), (10, 1), (15, 1), (16, 0.8), (19, 0.2)):
        take_step(m, cfg, step, batch)
        rates = [m.optimizers[net].param_groups[0]["lr"] for net in ("sit", "vae", "disc")]
        assert rates == pytest.approx([1e-3 * factor, 2e-3 * factor, 3e-3 * factor])


def test_stop_gradient_keeps_the_diffusion_loss_from_the_vae(small):
    """Nothing of the diffusion loss reaches the VAE: its gradient does not know of the later blocks, the head
    or v*. In the naive regime it does."""
    for flags, same in (([], True), (["--vae-grad", "diffusion"], False)):
        grads = []
        for factor in (1, 1.5):
            m, cfg, batch = small(*flags)
            with torch.no_grad():
                for p in (*m.sit.blocks[cfg.encoder_depth:].parameters(), *m.sit.final_layer.parameters()):
                    p.mul_(factor)
            grads.append(take_step(m, cfg, 0, batch)[1])
        first, second = grads
        assert same == all(torch.equal(g, second["vae"][name]) for name, g in first["vae"].items())
        assert not any(torch.equal(g, second["sit"][name]) for name,
                       g in first["sit"].items() if "final" in name)


def test_routing_table(small):
    """Gradients are linear in the losses: a term's own is the difference between a step with and without
    it."""
    def column(net, name):
        if net == "vae":
            return "encoder" if name.startswith(("encoder.", "quant_conv.")) else "decoder"
        if net == "sit":
            block = int(name.split(".")[1]) if name.startswith("blocks.") else 0
            later = name.startswith("final_layer") or block >= 2
            return "projector" if name.startswith("projectors") else "later" if later else "early"
        return "D"

    def gradients(**settings):
        m, cfg, batch = small("--disc-weight", str(settings.get("disc_weight", 0.0)))
        for name in ("perceptual_weight", "kl_weight", "entropy_weight", "vae_align_proj_coeff",
                     "proj_coeff"):
            setattr(cfg, name, settings.get(name, 0.0))
        return take_step(m, cfg, 0, batch)[1]

    plain = gradients()
    for term, columns in ((dict(), {"encoder", "decoder", "early", "later"}),               # L1; diffusion
                          (dict(perceptual_weight=1.0), {"encoder", "decoder"}),
                          (dict(disc_weight=0.1), {"encoder", "decoder", "D"}),
                          (dict(kl_weight=1e-2), {"encoder"}), (dict(entropy_weight=1e-2), {"encoder"}),
                          (dict(vae_align_proj_coeff=1.5), {"encoder"}),
                          (dict(proj_coeff=0.5), {"early", "projector"})):
        size = dict.fromkeys(("encoder", "decoder", "early", "later", "projector", "D"), 0.0)
        for net, grads in (gradients(**term) if term else plain).items():
            for name, g in grads.items():
                without = plain.get(net, {}).get(name, 0.0) if term else 0.0
                size[column(net, name)] += (g - without).abs().sum().item()
        largest = max(size.values())
        assert {name for name, value in size.items() if value > 1e-5 * largest} == columns, (term, size)


def changed(m, before):
    """The networks that differ from `before`."""
    now = state(m)
    return {net for net in now if any(not torch.equal(t, before[net][name]) for name, t in now[net].items())}


def test_step_with_a_nan_changes_nothing(small):
    """One NaN in one gradient of any network: no weights, statistics, moments and step counts change."""
    def spoil(p):
        p.grad.view(-1)[0] = math.nan

    m, cfg, batch = small()
    skipped = 0
    for net in ("vae", "disc", "sit"):
        take_step(m, cfg, 0, batch)
        before = state(m)
        moments = {name: copy.deepcopy(optimizer.state_dict()["state"]) for name,
                   optimizer in m.optimizers.items()}
        hook = list(getattr(m, net).parameters())[3].register_post_accumulate_grad_hook(spoil)
        for _ in range(2):
            metrics, skipped = take_step(m, cfg, 1, batch)[0], skipped + 1
            assert metrics["skipped"] == skipped
        hook.remove()
        assert changed(m, before) <= {"ema"}  # which moves on, towards unchanged weights
        for name, optimizer in m.optimizers.items():
            for i, values in optimizer.state_dict()["state"].items():
                assert all(torch.equal(t, moments[name][i][key]) for key, t in values.items())
        assert take_step(m, cfg, 2, batch)[0]["skipped"] == skipped
        assert changed(m, before) == {"sit", "ema", "vae", "disc"}


def test_steps_with_zero_gradients_are_counted(small):
    def clear(p):
        p.grad.zero_()

    m, cfg, batch = small("--vae-grad", "none")
    for step, (zero, counted) in enumerate(((True, 1), (True, 2), (False, 2), (True, 3))):
        hooks = [p.register_post_accumulate_grad_hook(clear) for p in train.trainable(m.sit) if zero]
        assert take_step(m, cfg, step, batch)[0]["zero_gradients"] == counted
        for hook in hooks:
            hook.remove()


def test_what_does_not_train_is_not_built(small):
    """A VAE alone has no SiT but its latent statistics; a frozen VAE has no discriminator. What else is built
    has the same initial weights."""
    def build(*flags):
        return train.build(small(*flags)[1], CPU)

    alone, frozen, whole = build("--vae-only"), build("--vae-grad", "none"), build()
    assert [*alone.sit.state_dict()] == ["bn.running_mean", "bn.running_var", "bn.num_batches_tracked"]
    assert set(alone.parts()) == {"vae", "discriminator", "opt_vae", "opt_disc", "model", "ema"}
    assert set(frozen.parts()) == {"vae", "model", "ema",
                                   "opt"} and frozen.disc is None and frozen.perceptual is None
    assert all(torch.equal(t, alone.vae.state_dict()[name]) for name, t in whole.vae.state_dict().items())
    no_gan = build("--disc-weight", "0")
    assert no_gan.disc is None
    assert all(torch.equal(t, no_gan.sit.state_dict()[name]) for name, t in whole.sit.state_dict().items())


@pytest.mark.parametrize("weighting, path_type", [
    ("uniform", "linear"), ("lognormal", "linear"), ("lognormal", "cosine")])
def test_noise_of_a_step(weighting, path_type):
    """Standard normal, independent; timesteps and dropped labels as in the paper; the same for any number of
    processes, different at another step or seed."""
    cfg = train.parse_config(["--batch-size", "4096", "--weighting", weighting, "--path-type", path_type])
    noise, eps, t, drop = train.draw_noise(cfg, 7, (1, 2, 2), 0, 1, CPU)
    for a in (noise, eps):
        assert abs(a.mean()) < 0.03 and abs(a.std() - 1) < 0.03 and abs((a[1:] * a[:-1]).mean()) < 0.03
    assert abs((noise * eps).mean()) < 0.03 and abs(drop.float().mean() - 0.1) < 0.02
    alpha, sigma, _, _ = interpolant(t, path_type)
    s = (sigma / alpha).log().flatten()                             # lognormal: log(sigma/alpha) ~ N(0, 1)
    values, cdf = (t, t) if weighting == "uniform" else (s, 0.5 + 0.5 * torch.erf(s / math.sqrt(2)))
    ranks = values.argsort().argsort().add(0.5) / len(t)
    assert (cdf - ranks).abs().max() < 0.03                         # Kolmogorov-Smirnov at about 0.1%
    quarters = [train.draw_noise(cfg, 7, (1, 2, 2), rank, 4, CPU) for rank in range(4)]
    for whole, *parts in zip((noise, eps, t, drop), *quarters, strict=True):
        assert torch.equal(whole, torch.cat(parts))
    others = [noise]
    for seed, step in ((0, 8), (1, 7), (0, 1_000_003)):
        cfg.seed = seed
        others.append(train.draw_noise(cfg, step, (1, 2, 2), 0, 1, CPU)[0])
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(others, 2))


# --- SiT ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("qk_norm", [False, True])
def test_sit_equals_its_forward_written_out(qk_norm):
    """The published transformer over its own parameters, with every one of them random."""
    torch.manual_seed(0)
    net = sit.SiT("SiT-T/2", 8, 3, 10, qk_norm=qk_norm, encoder_depth=2, projectors=[nn.Identity()])
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0, 0.1)
    w, width, heads = net.state_dict(), 256, 4
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.9]), torch.tensor([4, 10])

    def linear(name, h):
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(h, shift, scale):
        return F.layer_norm(h, (width,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def head_norm(name, h):
        if not qk_norm:
            return h
        return F.layer_norm(h, (64,), w[f"{name}.weight"], w[f"{name}.bias"], net.blocks[0].attn.q_norm.eps)

    patches = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=2)
    h = patches.flatten(2).mT + w["pos_embed"]
    angles = t[:, None] * torch.tensor([10000 ** (-k / 128) for k in range(128)])
    c = linear("t_embedder.mlp.2",
               F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))
    c = F.silu(c + w["y_embedder.embedding_table.weight"][y])
    states = []
    for k in range(6):
        b = f"blocks.{k}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{b}.adaLN_modulation.1", c).split(width, 1)
        q, k, v = linear(f"{b}.attn.qkv", norm(h, shift1, scale1)).view(2, 16, 3, heads, 64).permute(2, 0, 3,
                                                                                                     1, 4)
        q, k = head_norm(f"{b}.attn.q_norm", q), head_norm(f"{b}.attn.k_norm", k)
        attention = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 16, width)
        h = h + gate1[:, None] * linear(f"{b}.attn.proj", attention)
        hidden = F.gelu(linear(f"{b}.mlp.fc1", norm(h, shift2, scale2)), approximate="tanh")
        h = h + gate2[:, None] * linear(f"{b}.mlp.fc2", hidden)
        states.append(h)
    shift, scale = linear("final_layer.adaLN_modulation.1", c).split(width, 1)
    tokens = linear("final_layer.linear", norm(h, shift, scale)).view(2, 4, 4, 2, 2, 3)  # (h, w), (p, q, C)
    expected = torch.einsum("bhwpqc->bchpwq", tokens).reshape(2, 3, 8, 8)
    velocity, projected = net(x, t, y)
    assert (velocity - expected).abs().max() < 1e-4 * expected.abs().max()
    assert len(projected) == 1 and (projected[0] - states[1]).abs().max() < 1e-4 * states[1].abs().max()
    for module in (*net.blocks[2:], net.final_layer):  # the alignment's pass runs none of these
        module.register_forward_pre_hook(lambda *_: pytest.fail("a block behind the depth, or the head, ran"))
    assert torch.equal(net.forward_projections(x, t, y)[0], projected[0])


def test_positional_embedding():
    """Columns in the first half of the width, rows in the second; in each, sines first."""
    table = sit.sincos_positions(16, 3)[0]
    omega = [10000 ** (-k / 4) for k in range(4)]
    for row, column in itertools.product(range(3), repeat=2):
        expected = [f(place * w) for place in (column, row) for f in (math.sin, math.cos) for w in omega]
        assert np.allclose(table[3 * row + column], expected, atol=1e-6)
    assert torch.equal(sit.SiT("SiT-T/1", 8, 8, 10, encoder_depth=2).pos_embed, sit.sincos_positions(256, 8))


def test_latent_norm_is_batch_norm_with_its_own_inverse():
    norm, (mean, std) = sit.LatentNorm(5), statistics(5)
    std[0] = 0.02                                                   # so small that eps counts
    norm.set_statistics(mean, std)
    z = mean.view(5, 1, 1) + std.view(5, 1, 1) * torch.randn(4, 5, 2, 3)
    assert torch.allclose(norm(z), F.batch_norm(z, None, None, training=True, eps=1e-4), atol=1e-4)
    norm.fixed, z = True, (mean + 2 * std).view(1, 5, 1, 1)
    assert torch.allclose(norm(z), torch.tensor(2.0), atol=1e-4)
    assert torch.allclose(norm.denormalize(norm(z)), z, atol=1e-6)
    with pytest.raises(AssertionError, match="sg"):
        norm(z.clone().requires_grad_())


def test_initial_vae_preserves_variances():
    """Every convolution gives independent values of variance 1 back with it, but for the last of each block,
    which gives nothing; the posterior's std is about exp(-3)."""
    torch.manual_seed(0)
    net = vae.AutoencoderKL("f4d8")
    net.initialize()
    for name, conv in net.named_modules():
        if isinstance(conv, nn.Conv2d):
            with torch.no_grad():
                out = conv(torch.randn(8, conv.in_channels, 24, 24))[:, :, 1:-1, 1:-1]    # not at the borders
            out = out[:, net.latent_channels:] if name == "quant_conv" else out
            mean, var = (-6,
                         1) if name == "quant_conv" else (0, 0 if name.endswith(("conv2", "proj_out")) else 1)
            assert out.mean() == pytest.approx(mean, abs=0.2), name
            assert out.var((0, 2, 3)).mean() == pytest.approx(var, rel=0.4), name
    built = train.build(train.parse_config(["--vae-only"]), CPU).vae        # so does a run from scratch begin
    assert built.quant_conv.bias.tolist() == [0] * 8 + [-6] * 8
    assert not built.decoder.mid.block_1.conv2.weight.any()


# --- What it is aligned with, and the VAE's losses ----------------------------------------------------------

def test_log_variance_is_clamped():
    for value, clamped in ((99.0, 20.0), (-99.0, -30.0)):
        assert vae.DiagonalGaussian(torch.tensor([0.0, value]).view(1, 2, 1, 1)).logvar.item() == clamped


def test_discriminator_equals_its_forward_written_out():
    """Batch statistics whatever the mode, float32 whatever autocast says."""
    torch.manual_seed(0)
    net, x = vae.Discriminator(), torch.randn(2, 3, 32, 32)
    h = x
    for layer in net.main:
        if isinstance(layer, nn.Conv2d):
            h = F.conv2d(h, layer.weight, layer.bias, layer.stride, layer.padding)
        elif isinstance(layer, nn.BatchNorm2d):
            scale = layer.weight / torch.sqrt(h.var((0, 2, 3), correction=0) + 1e-5)
            shift = layer.bias - h.mean((0, 2, 3)) * scale
            h = h * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
        else:
            h = torch.where(h > 0, h, 0.2 * h)
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(x)
    assert logits.shape == (2, 1, 2, 2) and logits.dtype == torch.float32 and torch.allclose(logits, h,
                                                                                             atol=1e-5)


def test_encoder_distance_and_features_equal_their_formulas():
    """On the embedded EfficientNet: images in [0, 1], ImageNet's mean and std, then every level of stride 2
    to 16 for the distance; the last of stride 16, enlarged to 16 pixels a token (bicubic), for the
    alignment."""
    encoder = repa.PatchFeatures(repa.LITE0, 4)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def maps(x, size=32):
        x = F.interpolate((x * 0.5 + 0.5 - mean) / std, (size, size), mode="bicubic")
        return encoder.net.forward_intermediates(x, output_fmt="NCHW", intermediates_only=True)[:4]

    torch.manual_seed(0)
    x, y = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    assert [f.shape[2] for f in maps(x)] == [16, 8, 4, 2]
    expected = 0
    for a, b in zip(maps(x), maps(y), strict=True):
        difference = a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True)
        expected += difference.square().sum(1).mean() / 4
    distance = repa.EncoderDistance()
    assert distance(x, y).item() == pytest.approx(expected.item(), rel=1e-5) and distance(x, x) == 0
    assert torch.allclose(encoder(x), maps(x, 64)[3].flatten(2).mT, atol=1e-5) and encoder.channels == 112
    assert not any(p.requires_grad for p in distance.parameters()) and not distance.encoder.training
    zero, target = torch.zeros(1, 3, 1, 1, requires_grad=True), x.clone().requires_grad_()
    vae.unit_length(zero).sum().backward()
    distance(y.requires_grad_(), target).backward()
    assert zero.grad.isfinite().all() and target.grad is None


def test_irepas_norm():
    rng = np.random.default_rng(0)
    f = rng.normal(2, 3, (2, 9, 5))
    expected = (f - 0.6 * f.mean(1, keepdims=True)) / (f.std(1, ddof=1, keepdims=True) + 1e-6)
    assert np.allclose(repa.spatial_norm(torch.tensor(f), 0.6), expected)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    plain = repa.PatchFeatures(repa.LITE0, 2)(x)
    normed = repa.PatchFeatures(repa.LITE0, 2, gamma=0.6)(x)
    assert torch.allclose(normed, repa.spatial_norm(plain, 0.6), atol=1e-5)
