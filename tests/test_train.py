"""A step in its surroundings: memory, precision, other devices, compiling, FLOPs; what a run starts from."""
import contextlib
import copy
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import repa
import sample
import train
import vae
from conftest import CPU, slow, tiny_config
from data.images import ImageFolder
from support.checkpoints import Saver
from support.devices import why_no_compile
from support.files import load_tensors
from support.grids import to_float

compiled = pytest.mark.skipif(bool(why_no_compile(CPU)), reason="nothing to compile with")


# --- What a run starts from -------------------------------------------------------------------------------------------

@torch.no_grad()
def test_latents_are_measured_over_samples_of_the_posterior(image_dir):
    """The law of total variance: samples vary as the posteriors' means do, plus the mean of their variances."""
    m, dataset = train.build(tiny_config(), CPU), ImageFolder(image_dir, 32)
    m.vae.quant_conv.bias[8:] = -1                          # a posterior about as wide as its means are apart
    posterior = m.vae.encode(to_float(torch.stack([dataset[i, False][0] for i in range(24)])))
    mean, spread = posterior.mean.mean((0, 2, 3)), posterior.mean.var((0, 2, 3))
    width = posterior.logvar.exp().mean((0, 2, 3))
    assert (width > 0.5 * spread).all() and (spread > 0.2 * width).all()
    assert train.measure_latents(m, dataset) == 24 and train.measure_latents(m, dataset, n=7) == 7
    assert not torch.allclose(m.sit.bn.running_var, spread + width, rtol=0.02)      # of other images
    assert train.measure_latents(m, dataset) == 24
    for bn in (m.sit.bn, m.ema.bn):
        assert torch.allclose(bn.running_var, spread + width, rtol=0.12)
        assert torch.allclose(bn.running_mean, mean, atol=4 * (spread + width).max().sqrt().item() / math.sqrt(24 * 64))


def test_losses_and_norms_stay_float32_under_bf16(tiny):
    """What the help promises; the networks' products are of bf16 all the same."""
    m, cfg, args = tiny("--mixed-precision", "bf16", "--disc-start", "0")
    dtypes = []
    m.sit.blocks[0].mlp.fc1.register_forward_hook(lambda layer, x, out: dtypes.append(out.dtype))
    metrics = train.train_step(m, cfg, 0, *args)
    assert set(dtypes) == {torch.bfloat16} and {value.dtype for value in metrics.values()} == {torch.float32}
    with m.autocast():
        posterior, z, x_rec = m.vae(args[0], args[3])
    for t in (posterior.mean, posterior.logvar, z, posterior.kl(), x_rec, m.sit.bn.normalize(z)):
        assert t.dtype == torch.float32
    moments = posterior.moments.double()
    assert torch.equal(posterior.mean.double(), moments[:, :8]) and moments.abs().max() > 0
    expected = moments[:, :8] + (0.5 * moments[:, 8:]).exp() * args[3]
    assert (z - expected).abs().max() < 1e-5 * expected.abs().max()


def test_init_from_another_number_of_classes_and_resolution(short_run, capsys):
    """New label rows and positional embeddings, in a printed line; all other weights as they were."""
    ckpt = short_run / "exps/a/checkpoints/0000004.pt"
    saved = load_tensors(ckpt)
    m = train.build(tiny_config("--init-from", str(ckpt), "--num-classes", "7", "--resolution", "64"), CPU)
    said = [line for line in capsys.readouterr().out.splitlines() if "re-initialized" in line]
    assert len(said) == 1 and "pos_embed, y_embedder" in said[0] and "projectors" not in said[0]
    for net, key in ((m.sit, "model"), (m.ema, "ema")):
        assert net.y_embedder.embedding_table.weight.shape == (8, 256) and net.pos_embed.shape == (1, 64, 256)
        anew = {name for name, t in net.state_dict().items() if not torch.equal(t, saved[key][name])}
        assert anew == {"pos_embed", "y_embedder.embedding_table.weight"}
    assert torch.equal(m.sit.pos_embed, train.SiT("SiT-T/2", 16, 8, 7, encoder_depth=2).pos_embed)
    train.build(tiny_config("--init-from", str(ckpt), "--num-classes", "2"), CPU)
    assert "re-initialized" not in capsys.readouterr().out


@slow
@pytest.mark.parametrize("preset, patch", [("sdvae-xl2", 2), ("invae-xl1", 1)])
def test_512_pixels(preset, patch, tmp_path, monkeypatch):
    """A preset's VAE, a quarter as wide, and a small SiT: built, stepped, saved and sampled at 512."""
    name = train.PRESETS[preset]["vae"]
    monkeypatch.setitem(vae.VAES, name, vae.VAES[name] | dict(ch=32))
    cfg = train.parse_config([
        "--preset", preset, "--resolution", "512", "--model", f"SiT-T/{patch}", "--encoder-depth", "2", "--enc-type",
        "efficientnet-lite0", "--perceptual", "efficientnet-lite0", "--vae-from-scratch", "--data-dir", str(tmp_path),
        "--batch-size", "1", "--no-compile", "--disc-start", "0", "--projector-dim", "32", "--num-classes", "3"])
    m = train.build(cfg, CPU)
    train.wrap(m, cfg, 1)
    assert m.latent_shape[1] == (64 if name == "f8d4" else 32) and m.sit.pos_embed.shape[1] == 1024
    batch = torch.randint(256, (1, 3, 512, 512), dtype=torch.uint8), torch.zeros(1, dtype=torch.long), [""]
    metrics = train.run_step(m, cfg, 0, batch, 0, 1)
    assert all(value.isfinite() for value in metrics.values()) and metrics["skipped"] == 0
    Saver(tmp_path, 1).save(1, m.parts(), vars(cfg))
    images = sample.sample_images(sample.load_checkpoint(tmp_path / "checkpoints/0000001.pt"), [0], num_steps=1)
    assert images.shape == (1, 3, 512, 512)


def test_both_gradients_take_one_pass_through_the_first_blocks(tiny):
    """Each block runs once in the VAE's pass and once in SiT's."""
    m, cfg, args = tiny("--vae-grad", "both", "--disc-weight", "0")
    calls = []
    for k, block in enumerate(m.sit.blocks):
        block.register_forward_hook(lambda block, args, h, k=k: calls.append(k))
    m.keep_statistics()
    train.train_step(m, cfg, 0, *args)
    assert sorted(calls) == sorted([*range(6)] * 2)


def test_frozen_latents_are_float32_with_and_without_a_cache(tiny, frozen_vae, image_dir):
    """Also the statistics at the start: the encoder runs in float32 in a bf16 run."""
    m, cfg, _ = tiny("--vae-grad", "none", "--vae-ckpt", str(frozen_vae), "--mixed-precision", "bf16")
    types = set()
    m.vae.quant_conv.register_forward_hook(lambda conv, args, out: types.add(out.dtype))
    batch = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.long), [""] * 4
    train.run_step(m, cfg, 0, batch, 0, 1)
    train.measure_latents(m, ImageFolder(image_dir, 32))
    assert types == {torch.float32}


# --- Memory, and waiting ----------------------------------------------------------------------------------------------

def most_saved(m, step):
    """(what step() returns, the most bytes that autograd held for a backward pass; parameters are not counted)."""
    held, sizes = {}, [0]
    for net in (m.vae, m.sit, m.perceptual):
        held |= {p.untyped_storage().data_ptr(): 0 for p in net.parameters()}
    empty = dict(held)

    def pack(t):                                                      # tensors of one storage count once
        held.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes())
        sizes.append(sum(held.values()))
        return t

    def clear(p):  # the first layer's gradient: the pass is over
        held.clear()
        held.update(empty)

    hooks = [layer.weight.register_post_accumulate_grad_hook(clear)
             for layer in (m.vae.encoder.conv_in, m.sit.x_embedder.proj)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        metrics = step()
    for hook in hooks:
        hook.remove()
    return metrics, max(sizes)


@pytest.mark.parametrize("perceptual", [repa.LITE0, "lpips"])
def test_recomputing_changes_no_gradient_and_keeps_less(tiny, perceptual):
    """Metrics, AdamW's first moments (which are the clipped gradients) and statistics are equal."""
    def step(*flags):
        m, cfg, args = tiny("--disc-weight", "0", "--perceptual", perceptual, "--allow-random-weights", *flags)
        m.keep_statistics()
        metrics, size = most_saved(m, lambda: train.train_step(m, cfg, 0, *args))
        moments = [torch.cat([state["exp_avg"].flatten() for state in o.state_dict()["state"].values()])
                   for o in m.optimizers.values()]
        return metrics, moments, [m.sit.bn.running_mean, m.sit.bn.running_var], size

    plain, less = step(), step("--gradient-checkpointing")
    assert all(torch.allclose(value, less[0][name], rtol=1e-4, atol=1e-6) for name, value in plain[0].items())
    assert all((x - y).norm() < 5e-3 * x.norm() for x, y in zip(plain[1], less[1]))
    assert all(torch.allclose(x, y, rtol=1e-5) for x, y in zip(plain[2], less[2]))
    assert less[3] < 0.8 * plain[3]


def test_parts_keep_less(tiny):
    batch = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.long), [""] * 4
    sizes = []
    for parts in (1, 4):
        m, cfg, _ = tiny("--disc-weight", "0", "--gradient-accumulation-steps", str(parts))
        sizes.append(most_saved(m, lambda: train.run_step(m, cfg, 0, batch, 0, 1))[1])
    assert sizes[1] < 0.4 * sizes[0]


def test_a_step_never_waits_for_the_device(tiny):
    """Whatever needs a value on the host (item, bool, nonzero, a copy to it) would stall a GPU."""
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    m, cfg, (x, *rest) = tiny("--disc-start", "0")
    called = set()
    with Watch():
        train.train_step(m, cfg, 0, x, *rest)
    waits = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal"}
    assert len(called) > 50 and not called & waits
    with Watch():
        x.sum().item()
    assert called & waits


# --- Machines that are not here: a Mac, another device than the CPU ---------------------------------------------------

def test_a_mac_steps_as_the_fused_kernels_and_skips_what_is_not_finite(tiny):
    """Without fused AdamW, as on a Mac. Nothing in it is of float64 either, which a Mac does not have."""
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            dtypes.update(t.dtype for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    def tensors(m):
        states = [part.state_dict() for part in m.parts().values()]
        return [t.clone() for t in torch.utils._pytree.tree_leaves(states) if isinstance(t, torch.Tensor)]

    (fused, cfg, args), (mac, _, _) = tiny("--disc-start", "0"), tiny("--disc-start", "0")
    for name, optimizer in mac.optimizers.items():
        group = optimizer.param_groups[0]
        mac.optimizers[name] = torch.optim.AdamW(group["params"], group["lr"], betas=group["betas"], weight_decay=0.0,
                                                 fused=False)
    for m in (fused, mac):
        m.keep_statistics()
    train.train_step(fused, cfg, 0, *args)
    dtypes = set()
    with Watch():
        train.train_step(mac, cfg, 0, *args)
    assert torch.float32 in dtypes and torch.float64 not in dtypes
    for a, b in zip(tensors(fused), tensors(mac), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)

    for m in (fused, mac):
        before = tensors(m)
        m.keep_statistics()
        assert train.train_step(m, cfg, 1, args[0] * float("nan"), *args[1:])["skipped"] == 1
        assert sum(not torch.equal(a, b) for a, b in zip(before, tensors(m), strict=True)) > 0      # the EMA moves
        assert all(t.isfinite().all() for t in tensors(m))
        before = [t.clone() for net in (m.sit, m.vae, m.disc) for t in net.state_dict().values()]
        m.keep_statistics()
        train.train_step(m, cfg, 1, args[0] * float("nan"), *args[1:])
        after = [t for net in (m.sit, m.vae, m.disc) for t in net.state_dict().values()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        m.keep_statistics()
        assert train.train_step(m, cfg, 2, *args)["skipped"] == 2 and not torch.equal(before[-1], tensors(m)[-1])


@pytest.mark.parametrize("perceptual", [repa.LITE0, "lpips"])
def test_a_step_and_sampling_keep_to_their_device(monkeypatch, perceptual):
    """All on the device "meta", where nothing is computed: a tensor left on the CPU ends in an error, and so does a
    value that is read back."""
    plain = torch.optim.AdamW, torch.Generator
    monkeypatch.setattr(torch.optim, "AdamW", lambda params, fused, **kwargs: plain[0](params, **kwargs))
    monkeypatch.setattr(torch, "Generator", lambda device: plain[1]())               # meta has neither of the three
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    monkeypatch.setattr(sample, "check_finite", lambda *args: None)                  # which reads a value back
    cfg = tiny_config("--disc-start", "0", "--perceptual", perceptual, "--allow-random-weights")
    device = torch.device("meta")
    m = train.build(cfg, device)
    train.wrap(m, cfg, 1)
    x, y = torch.zeros(4, 3, 32, 32, device=device), torch.zeros(4, dtype=torch.long, device=device)

    def step():
        noise = train.draw_noise(cfg, 0, (8, 8, 8), 0, 1, device)
        return train.train_step(m, cfg, 0, x, y, None, *noise, last=False)

    assert len(step()) == 10
    assert {p.grad.device.type for net in (m.sit, m.vae, m.disc) for p in train.trainable(net)} == {"meta"}
    model = sample.Sampler(m.ema, m.vae, dict(resolution=32), 0, device)
    for mode in ("ode", "sde"):
        images = sample.sample_images(model, [0, 1], num_steps=2, mode=mode, cfg_scale=2.0)
        assert images.device.type == "meta" and images.shape == (2, 3, 32, 32) and images.dtype == torch.uint8
    for module, name in ((m.encoders[0].normalize, "mean_std"), (m.sit.bn, "running_var"), (m.sit.t_embedder, "freqs")):
        kept = getattr(module, name)
        setattr(module, name, torch.ones(kept.shape))
        with pytest.raises(RuntimeError, match="device"):
            step()
        setattr(module, name, kept)


# --- Compiling --------------------------------------------------------------------------------------------------------

@slow
@compiled
def test_compiled_blocks_and_bf16_agree_with_eager(tiny):
    m, _, (_, y, _, noise, _, t, _) = tiny()
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


@slow
@compiled
@pytest.mark.parametrize("flags", [[], ["--gradient-checkpointing"]])
def test_a_compiled_step_breaks_no_graph_and_compiles_once(tiny, flags):
    torch._dynamo.reset()
    m, cfg, args = tiny("--compile", "--mixed-precision", "bf16", "--disc-weight", "0", *flags)
    counters = torch._dynamo.utils.counters
    counters.clear()
    losses, graphs = [], []
    for step in range(4):
        losses.append(train.train_step(m, cfg, step, *args)["loss"].item())
        graphs.append(counters["stats"]["unique_graphs"])
    # VAE encoder, VAE decoder, the frozen encoder, SiT's block with its weights frozen and trained
    assert graphs == [5] * 4 and not counters["graph_break"]
    m, cfg, args = tiny("--mixed-precision", "bf16", "--disc-weight", "0")
    eager = [train.train_step(m, cfg, step, *args)["loss"].item() for step in range(4)]
    assert losses == pytest.approx(eager, rel=0.02)


@slow
@pytest.mark.skipif(bool(why_no_compile(CPU)), reason="nothing to compile with")
def test_compiled_dinov2_and_lpips_break_no_graph_and_compile_once():
    """SiT and VAE stay eager here (the tests above compile them): one graph of the encoder, one of LPIPS."""
    def make(*flags):
        cfg = tiny_config("--enc-type", "dinov2-vit-s", "--perceptual", "lpips", "--allow-random-weights",
                          "--disc-weight", "0", *flags)
        m = train.build(cfg, torch.device("cpu"))
        m.sit.compile_blocks = m.vae.encoder.compile = m.vae.decoder.compile = lambda: None
        train.wrap(m, cfg, 1)
        noise = train.draw_noise(cfg, 0, (8, 8, 8), 0, 1, torch.device("cpu"))
        x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
        return m, cfg, (x, torch.arange(4), None, *noise)

    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    (compiled, cfg, args), (eager, _, _) = make("--compile"), make()
    for step in range(3):
        a, b = (train.train_step(m, cfg, step, *args) for m in (compiled, eager))
        for name in ("loss", "perceptual_loss", "proj_loss"):
            assert torch.allclose(a[name], b[name], rtol=1e-2, atol=1e-3)
        assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
