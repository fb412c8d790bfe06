"""What only a GPU shows; skipped where there is none. Run it before a job: python -m pytest -q
tests/test_gpu.py"""
import math
import re
import sys
import time

import pytest
import torch
import torch.nn.functional as F

import sample
import train
import vae
from conftest import ROOT, SHORT, close, losses, metrics_of, one_line, run, torchrun
from support import commands, devices
from support.checkpoints import Saver
from support.files import load_tensors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
GPU = [*SHORT[:SHORT.index("--mixed-precision")], "--device", "cuda", "--compile", "--mixed-precision",
       "bf16"]
train_py = (sys.executable, ROOT / "train.py")


def test_compiled_steps_agree_with_those_of_a_cpu(tiny):
    """bf16 and compiled on the GPU, float32 on the CPU: losses and statistics of the same batch."""
    found = {}
    for device, flags in (("cpu", []), ("cuda", ["--compile", "--mixed-precision", "bf16"])):
        m, cfg, args = tiny("--disc-start", "0", *flags, device=device)
        _, _, args = tiny("--disc-start", "0")                          # a GPU's generator has other numbers
        args = [v if v is None else v.to(device) for v in args]
        metrics = [train.train_step(m, cfg, step, *args) for step in range(2)]
        found[device] = [{name: value.item() for name, value in row.items()}
                         for row in metrics], m.sit.bn.running_var
    slacks = (0.02, 0.1)                                                                # Adam's first step: signs
    for cpu, gpu, slack in zip(found["cpu"][0], found["cuda"][0], slacks, strict=True):
        assert cpu.keys() == gpu.keys()
        for name in cpu:
            if "grad_norm" not in name:
                assert gpu[name] == pytest.approx(cpu[name], rel=0.05, abs=slack), name
    close(found["cuda"][1].cpu(), found["cpu"][1], 0.05)                # bf16 on a CPU: 0.018


def test_the_vaes_forms_for_cuda_are_as_exact_as_pytorchs(monkeypatch):
    """Reconstructions in bf16, compared with float32."""
    torch.manual_seed(0)
    net = vae.AutoencoderKL("f8d4").to("cuda", memory_format=torch.channels_last)
    x, errors = torch.rand(2, 3, 64, 64, device="cuda") * 2 - 1, []
    with torch.no_grad():
        for form in (False, True):
            monkeypatch.setattr(vae, "on_cuda", lambda x, form=form: form)
            exact = net.decode(net.encode(x).mean)
            with torch.autocast("cuda", torch.bfloat16):
                errors.append((net.decode(net.encode(x).mean) - exact).norm() / exact.norm())
    assert 0 < errors[1] < 1.5 * errors[0]


def test_a_step_with_nan_is_skipped_without_synchronisation(tiny):
    m, cfg, (x, y, z, *noise) = tiny("--compile", "--mixed-precision", "bf16", device="cuda")
    train.train_step(m, cfg, 0, x, y, z, *noise)

    def tensors():
        nets = [t for net in (m.sit, m.vae, m.disc) for t in net.state_dict().values()]
        return nets + [t for o in m.optimizers.values() for s in o.state_dict()["state"].values()
                       for t in s.values()]

    before = [t.clone() for t in tensors()]
    bad = x.clone()
    bad[0, 0, 0, 0] = math.nan
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics = train.train_step(m, cfg, 1, bad, y, z, *noise)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert metrics["skipped"].item() == 1 and all(torch.equal(a, b) for a, b in zip(before, tensors(), strict=True))
    assert train.train_step(m, cfg, 2, x, y, z, *noise)["loss"].isfinite()


def test_checkpoints_are_written_while_steps_continue(tiny, tmp_path, monkeypatch):
    m, cfg, args = tiny("--mixed-precision", "bf16", device="cuda")
    train.train_step(m, cfg, 0, *args)
    weight, save = m.vae.encoder.conv_in.weight.detach().clone(), torch.save
    monkeypatch.setattr(torch, "save", lambda *arguments: time.sleep(2) or save(*arguments))
    start = time.perf_counter()
    saver = Saver(tmp_path, 1)
    saver.save(1, m.parts(), vars(cfg))
    train.train_step(m, cfg, 1, *args)                                  # changes what is being saved
    torch.cuda.synchronize()
    assert time.perf_counter() - start < 2
    saver.wait()
    saved = load_tensors(tmp_path / "checkpoints/0000001.pt")
    assert torch.equal(saved["vae"]["encoder.conv_in.weight"], weight.cpu())
    assert not torch.equal(m.vae.encoder.conv_in.weight, weight)


def test_attention_over_64_tokens_has_finite_gradients(tiny):
    """Also if all logits of a row are -120: cuDNN's backward pass has given NaN."""
    tiny(device="cuda")                                                 # 8 x 8 latents
    q, k, v = (0.1 * torch.randn(1, 1, 64, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    q[..., 0], k[..., 0] = 1, -120 * 128 ** 0.5
    for tensor in (q, k, v):
        tensor.requires_grad_()
    F.scaled_dot_product_attention(q, k, v).sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (q, k, v))


def test_training_resuming_profiling_and_sampling(image_dir, tmp_path):
    flags = ["--data-dir", image_dir, *GPU, "--disc-weight", "0.1", "--disc-start", "0",
             "--checkpointing-steps", "2"]
    run(*train_py, *flags, "--exp-name", "whole", cwd=tmp_path)
    run(*train_py, *flags, "--exp-name", "halves", "--max-train-steps", "2", cwd=tmp_path)
    run(*train_py, *flags, "--exp-name", "halves", "--resume", cwd=tmp_path)
    whole, halves = (metrics_of(tmp_path / f"exps/{name}") for name in ("whole", "halves"))
    assert [row["step"] for row in whole] == [row["step"] for row in halves] == [1, 2, 3, 4]
    for a, b in zip(whole, halves, strict=True):
        assert a["loss"] == pytest.approx(b["loss"],
                                          rel=0.05) and a["skipped"] == 0 and math.isfinite(a["vae_loss"])
    out = run(sys.executable, ROOT / "benchmarks/profile_step.py", "2", *flags, cwd=tmp_path)
    assert re.search(r"GPU memory [\d.]+ GiB", out) and "# SiT, alignment pass" in out and "TFLOP/s" in out
    ckpt = tmp_path / "exps/whole/checkpoints/0000004.pt"
    for extra in (["--mode", "sde"],
                  ["--heun", "--cfg-scale", "2", "--mixed-precision", "bf16", "--compile"]):
        run(sys.executable, ROOT / "sample.py", "--ckpt", ckpt, "--num-samples", "8", "--num-steps", "4",
            "--out",
            "x.npz", *extra, cwd=tmp_path)
    a, b = (sample.sample_images(sample.load_checkpoint(ckpt, device), range(4), [0, 1, 0, 1],
                                 num_steps=4).cpu().int() for device in ("cuda", "cpu"))
    assert (a - b).abs().float().mean() < 1                             # TF32


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_two_nccl_processes_have_the_losses_of_one(image_dir, tmp_path):
    flags = ["--data-dir", image_dir, *GPU, "--no-compile", "--mixed-precision", "no", "--disc-weight", "0"]
    run(*train_py, *flags, "--exp-name", "one", cwd=tmp_path)
    run(*torchrun(2), ROOT / "train.py", *flags, "--exp-name", "two", cwd=tmp_path)
    for a, b in zip(losses(tmp_path / "exps/one"), losses(tmp_path / "exps/two"), strict=True):
        assert b == pytest.approx(a, rel=0.02, abs=3e-3)
    run(*torchrun(2), ROOT / "sample.py", "--ckpt", tmp_path / "exps/two/checkpoints/0000004.pt",
        "--num-samples", "5",
        "--num-steps", "3", "--out", "x.npz", cwd=tmp_path)


def test_precision_and_out_of_memory(capsys):
    """bf16 is computed from capability 8.0 on; out of memory is one line with the size that was tried."""
    device = devices.pick_device("cuda")
    assert devices.bf16_is_faster(device) == (torch.cuda.get_device_capability(device) >= (8, 0))
    assert devices.memory_format(device) == torch.channels_last
    with pytest.raises(SystemExit):
        commands.run_command(lambda: torch.empty(1 << 45, device=device), "TAKE LESS")
    one_line(capsys.readouterr().err, "memory", "131072.00 GiB", "TAKE LESS")
