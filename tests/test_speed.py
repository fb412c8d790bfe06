"""Memory, waiting, compiling and the profile; the README's commands."""
import copy
import itertools
import json
import re
import shlex
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import repa
import sample
import train
import vae
from conftest import ROOT, SHORT, losses, one_line, run, slow, tiny_config, torchrun



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
