"""A step in its surroundings: memory, precision, other devices, compiling, FLOPs; what a run starts from."""
import contextlib
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sample
import train
from conftest import CPU, slow, tiny_config
from data.images import ImageFolder
from support.devices import why_no_compile
from support.grids import to_float

compiled = pytest.mark.skipif(bool(why_no_compile(CPU)), reason="nothing to compile with")


# --- What a run starts from ---------------------------------------------------------------------------------

@torch.no_grad()
def test_latent_statistics_are_those_of_posterior_samples(image_dir):
    """The law of total variance: samples vary as the posteriors' means do, plus the mean of their
    variances."""
    m, dataset = train.build(tiny_config(), CPU), ImageFolder(image_dir, 32)
    m.vae.quant_conv.bias[8:] = -1                          # a posterior about as wide as its means are apart
    posterior = m.vae.encode(to_float(dataset.some(24)[0]))
    var = posterior.mean.var((0, 2, 3)) + posterior.logvar.exp().mean((0, 2, 3))
    assert train.measure_latents(m, dataset, n=7) == 7 and train.measure_latents(m, dataset) == 24
    for bn in (m.sit.bn, m.ema.bn):
        assert torch.allclose(bn.running_var, var, rtol=0.12)
        error = bn.running_mean - posterior.mean.mean((0, 2, 3))
        assert error.abs().max() < 4 * math.sqrt(var.max() / (24 * 64))


def test_losses_and_norms_stay_float32_under_bf16(tiny):
    """What the help promises; the networks' products are of bf16 all the same."""
    m, cfg, args = tiny("--mixed-precision", "bf16", "--disc-start", "0")
    dtypes = []
    m.sit.blocks[0].mlp.fc1.register_forward_hook(lambda layer, x, out: dtypes.append(out.dtype))
    metrics = train.train_step(m, cfg, 0, *args)
    assert set(dtypes) == {torch.bfloat16} and {value.dtype for value in metrics.values()} == {torch.float32}
    with m.autocast():
        posterior, z, x_rec = m.vae(args[0], args[3])
    moments = posterior.moments
    assert moments.dtype == torch.bfloat16 and x_rec.dtype == m.sit.bn.normalize(z).dtype == torch.float32
    expected = moments[:, :8].double() + (0.5 * moments[:, 8:].double()).exp() * args[3]
    assert z.dtype == torch.float32 and (z - expected).abs().max() < 1e-5 * expected.abs().max()


def test_frozen_latents_are_float32_with_and_without_a_cache(tiny, frozen_vae, image_dir):
    """Also the statistics at the start: the encoder runs in float32 in a bf16 run."""
    m, cfg, _ = tiny("--vae-grad", "none", "--vae-ckpt", str(frozen_vae), "--mixed-precision", "bf16")
    types = set()
    m.vae.quant_conv.register_forward_hook(lambda conv, args, out: types.add(out.dtype))
    batch = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.long), [""] * 4
    train.run_step(m, cfg, 0, batch, 0, 1)
    train.measure_latents(m, ImageFolder(image_dir, 32))
    assert types == {torch.float32}


# --- Memory, and waiting ------------------------------------------------------------------------------------

def test_recomputing_changes_no_gradient_and_keeps_less(tiny):
    """Metrics, AdamW's first moments (which are the clipped gradients) and statistics are equal. Kept are the
    bytes that autograd holds for a backward pass of the VAE and of SiT, parameters aside."""
    def step(*flags):
        m, cfg, args = tiny("--disc-weight", "0", *flags)

        def kept_by(forward):
            held = {p.data_ptr(): 0 for net in (m.vae, m.sit, m.perceptual) for p in net.parameters()}

            def pack(t):                                              # tensors of one storage count once
                held.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes())
                return t

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                out = forward()
            size = sum(held.values())
            del out
            return size

        sizes = [kept_by(lambda: m.perceptual(m.vae(args[0], args[3])[2], args[0])),
                 kept_by(lambda: m.sit(args[4], args[5], args[1]))]
        metrics = train.train_step(m, cfg, 0, *args)
        moments = [torch.cat([state["exp_avg"].flatten() for state in o.state_dict()["state"].values()])
                   for o in m.optimizers.values()]
        return metrics, [*moments, m.sit.bn.running_mean, m.sit.bn.running_var], sizes

    (plain, tensors, sizes), (less, less_tensors, less_sizes) = step(), step("--gradient-checkpointing")
    assert all(torch.allclose(value, less[name], rtol=1e-4, atol=1e-6) for name, value in plain.items())
    assert all((a - b).norm() < 5e-3 * a.norm() for a, b in zip(tensors, less_tensors, strict=True))
    assert all(b < 0.8 * a for a, b in zip(sizes, less_sizes, strict=True))


def test_step_never_waits_for_the_device(tiny):
    """Whatever needs a value on the host (item, bool, nonzero, a copy to it) would stall a GPU."""
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    m, cfg, (x, *rest) = tiny("--disc-start", "0")
    called = set()
    with Watch():
        train.train_step(m, cfg, 0, x, *rest)
    assert len(called) > 50
    assert not called & {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal"}


# --- Machines that are not here: a Mac, another device than the CPU -----------------------------------------

def test_step_on_a_mac_equals_that_of_the_fused_kernels(tiny):
    """Without fused AdamW, as on a Mac; a step that is not finite changes nothing there, either."""
    def weights(m):
        return [t.clone() for net in (m.sit, m.vae, m.disc) for t in net.state_dict().values()]

    (fused, cfg, args), (mac, _, _) = tiny("--disc-start", "0"), tiny("--disc-start", "0")
    for name, optimizer in mac.optimizers.items():
        group = optimizer.param_groups[0]
        mac.optimizers[name] = torch.optim.AdamW(group["params"], group["lr"], betas=group["betas"],
                                                 weight_decay=0.0,
                                                 fused=False)
    for m in (fused, mac):
        train.train_step(m, cfg, 0, *args)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a,
               b in zip(weights(fused), weights(mac), strict=True))
    before = weights(mac)
    mac.keep_statistics()
    assert train.train_step(mac, cfg, 1, args[0] * float("nan"), *args[1:])["skipped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, weights(mac), strict=True))


def test_step_and_sampling_keep_to_their_device(monkeypatch):
    """All on the device "meta", where nothing is computed: a tensor left on the CPU ends in an error, and so
    does a value that is read back."""
    plain = torch.optim.AdamW, torch.Generator
    monkeypatch.setattr(torch.optim, "AdamW", lambda params, fused, **kwargs: plain[0](params, **kwargs))
    monkeypatch.setattr(torch, "Generator", lambda device: plain[1]())         # meta has neither of the three
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    monkeypatch.setattr(sample, "check_finite", lambda *args: None)                 # which reads a value back
    cfg = tiny_config("--disc-start", "0", "--perceptual", "lpips", "--allow-random-weights")
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
        images = sample.sample_images(model, [0, 1], [0, 1], num_steps=2, mode=mode, cfg_scale=2.0)
        assert images.device.type == "meta" and images.shape == (2, 3, 32, 32) and images.dtype == torch.uint8
    m.sit.bn.running_var = torch.ones(8)                                           # so that it shows
    with pytest.raises(RuntimeError, match="device"):
        step()


# --- Compiling ----------------------------------------------------------------------------------------------

@slow
@compiled
@pytest.mark.parametrize("flags", [[], ["--gradient-checkpointing", "--enc-type", "dinov2-vit-s"]])
def test_compiled_step_breaks_no_graph_and_compiles_once(tiny, flags):
    flags = ["--mixed-precision", "bf16", "--disc-weight", "0", "--allow-random-weights", *flags]
    torch._dynamo.reset()
    m, cfg, args = tiny("--compile", *flags)
    counters = torch._dynamo.utils.counters
    counters.clear()
    losses, graphs = [], []
    for step in range(4):
        losses.append(train.train_step(m, cfg, step, *args)["loss"].item())
        graphs.append(counters["stats"]["unique_graphs"])
    # VAE encoder, VAE decoder, the target encoder (or its block), SiT's block with its weights frozen and
    # trained
    assert graphs == [5] * 4 and not counters["graph_break"]
    m, cfg, args = tiny(*flags)
    eager = [train.train_step(m, cfg, step, *args)["loss"].item() for step in range(4)]
    assert losses == pytest.approx(eager, rel=0.02)
