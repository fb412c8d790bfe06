"""Memory, waiting, compiling and the profile; the README's commands."""
import copy
import json
import re
import shlex
import sys

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from data import images
from support import devices, pictures
import repa
import sample
import train
import vae
from conftest import CPU, ROOT, SHORT, run, slow, torchrun

compiled = pytest.mark.skipif(not devices.can_compile(CPU), reason="no C++ compiler")


def most_saved(m, step):
    """(what step() returns, the most bytes that autograd held for a backward pass; parameters are not counted)."""
    held, sizes = {}, [0]
    for net in (m.vae, m.sit, m.disc, m.perceptual):
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


@pytest.mark.parametrize("perceptual", ["encoder", "lpips"])
def test_recomputing_changes_no_gradient_and_keeps_less(tiny, perceptual):
    """Metrics, AdamW's first moments (which are the clipped gradients) and statistics are equal."""
    def step(*flags):
        m, cfg, args = tiny("--disc-weight", "0", "--perceptual", perceptual, "--allow-random-weights", *flags)
        metrics, size = most_saved(m, lambda: train.train_step(m, cfg, 0, *args))
        moments = [torch.cat([state["exp_avg"].flatten() for state in o.state_dict()["state"].values()])
                   for o in (m.opt, m.opt_vae)]
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


def test_the_flops_of_a_step(tiny):
    """Against the transformer's and the VAE's products counted by hand; the step that is counted leaves no trace."""
    m, cfg, _ = tiny("--disc-weight", "0")
    before = {name: t.clone() for net in (m.sit, m.vae, m.disc) for name, t in net.state_dict().items()}
    flops, peak = train.measure_speed(m, cfg, CPU)
    after = {name: t for net in (m.sit, m.vae, m.disc) for name, t in net.state_dict().items()}
    assert all(torch.equal(t, after[name]) for name, t in before.items()) and peak > 1e9
    assert all(p.grad is None for net in (m.sit, m.vae) for p in net.parameters())
    depth, width, tokens, convolutions = 6, 256, 16, 0                # multiply-adds x 2
    block = 2 * tokens * 12 * width ** 2 + 2 * 2 * tokens ** 2 * width + 2 * 6 * width ** 2
    least = (3 * depth + 2 * 2) * block  # SiT's pass and back; 2 blocks aligned and back

    def count(conv, args, out):
        nonlocal convolutions
        convolutions += 2 * out.numel() * conv.weight[0].numel()

    for module in m.vae.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(count)
    m.vae(torch.zeros(1, 3, 32, 32), torch.zeros(1, 8, 8, 8))
    least += 3 * convolutions
    assert least < flops < 3 * least                                  # the encoder's features come on top


@pytest.mark.parametrize("flags", [[], pytest.param(["--vae-grad", "none", "--cache-latents", "--vae-ckpt", "VAE"],
                                                    marks=slow)])
def test_profile_prints_its_table_and_touches_no_run(pictures, frozen_vae, tmp_path, flags):
    flags = [frozen_vae if flag == "VAE" else flag for flag in flags]
    out = run(sys.executable, ROOT / "train.py", "--data-dir", pictures, "--profile", "1", *SHORT, *flags,
              cwd=tmp_path)
    names = ["# SiT", "# encoder features", "Optimizer.step#AdamW.step"]
    if not flags:
        names += ["# VAE encoder", "# VAE decoder", "# SiT, alignment pass", "# perceptual distance"]
    assert all(re.search(rf"^ *{name}  ", out, re.M) for name in names), out
    rate = re.search(r"step [\d.]+ ms, [\d.]+ images/s", out)                     # first, whatever the table takes
    assert rate.start() < out.index("# SiT") and "of a matrix product's" in out
    assert re.search(r"^ *# SiT .* 3 *$", out, re.M)                  # calls: three profiled steps, whatever N is
    assert not (tmp_path / "exps/tiny").exists()


def readme_commands():
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in re.sub(r"\s#.*", "", line).split("&&")]
    return [shlex.split(p) for p in parts if re.search(r"\b(train|sample|fid|vae)\.py", p)]


def test_readme_flags_exist(command):
    commands, helps, scripts = readme_commands(), {}, ("train.py", "sample.py", "fid.py", "vae.py")
    assert len(commands) >= 6
    for words in commands:
        script = next(w for w in words if w in scripts)
        words = words[words.index(script) + 1:]
        key = (script.removesuffix(".py"), *(words[:1] if script == "vae.py" else []))
        if key not in helps:
            helps[key] = command(*key, "--help")
        for word in words:
            if word.startswith("--"):
                assert word.partition("=")[0] in re.findall(r"--[\w-]+", helps[key]), (key, word)


@slow
def test_readme_commands_on_what_is_drawn(tmp_path):
    """The first commands, their steps cut down: drawing the data, training, sampling, evaluating."""
    run(sys.executable, ROOT / "train.py", "--max-train-steps", "2", "--log-steps", "1", "--batch-size", "8",
        cwd=tmp_path)
    exp = tmp_path / "exps/tiny"
    assert {p.name for p in (exp / "pictures").iterdir()} == {"samples-0000002.png", "reconstructions-0000002.png"}
    assert json.loads((exp / "args.json").read_text())["model"] == "SiT-T/2"
    out = run(sys.executable, ROOT / "sample.py", "--num-samples", "10", "--num-steps", "2", cwd=tmp_path)
    assert "samples-0000002.png" in out and Image.open(exp / "samples-0000002.png").size[0] > 600
    run(sys.executable, ROOT / "fid.py", "--num-samples", "20", "--num-steps", "2", "--metrics", "fid", "--json",
        "out.json", cwd=tmp_path)
    numbers = json.loads((tmp_path / "out.json").read_text())
    assert numbers["n_samples"] == 20 and numbers["n_reference"] > 4000


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=slow)])
def test_evaluating_a_run(pictures, short_run, command, processes):
    """Against its own data: drawn in memory, in whatever batches and processes, or from files: the same numbers."""
    def numbers(processes, *flags):
        flags = [*flags, "--features", repa.EMBEDDED, "--device", "cpu", "--num-workers", "0", "--json", "out.json"]
        if processes == 1:
            command("fid", *flags, cwd=short_run)
        else:
            run(*torchrun(processes), ROOT / "fid.py", *flags, cwd=short_run)
        return json.loads((short_run / "out.json").read_text())

    ckpt = short_run / "exps/a/checkpoints/0000004.pt"
    draw, metrics = ["--ckpt", ckpt, "--num-samples", "20", "--num-steps", "2"], ["--metrics", "fid,kid,recall"]
    command("sample", *draw, "--out", "samples.npz", "--device", "cpu", cwd=short_run)
    drawn = numbers(1, *draw, *metrics)
    again = numbers(processes, *draw, *metrics, "--batch-size", "3")
    stored = numbers(1, pictures, "samples.npz", "--resolution", "32", *metrics)
    for other in (again, stored):
        assert (other["n_samples"], other["n_reference"]) == (20, 24)
        for key in ("fd_efficientnet-lite0", "kid", "recall"):
            assert other[key] == pytest.approx(drawn[key], rel=1e-3)
    rec = numbers(processes, "--reconstruct", "--ckpt", ckpt)
    model = sample.load_checkpoint(ckpt)
    x = pictures.to_float(torch.stack([images.read_image(p, 32) for p in images.list_images(pictures)]))
    with torch.no_grad():
        y = pictures.to_float(pictures.to_uint8(model.vae.decode(model.vae.encode(x).mean)))
    assert rec["psnr"] == pytest.approx(vae.psnr(x, y).mean().item(), abs=0.01)
    assert rec["ssim"] == pytest.approx(vae.ssim(x, y).mean().item(), abs=1e-4)
