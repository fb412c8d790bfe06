"""benchmarks/profile_step.py: FLOPs counted by hand, and its table."""
import re
import sys

import pytest
import torch

import vae
from benchmarks import profile_step
from conftest import CPU, ROOT, SHORT, run, slow


def test_flops_per_image_are_those_counted_by_hand(tiny, monkeypatch):
    """The products of the transformer and the VAE, the same where the VAE takes its forms for CUDA."""
    m, cfg, _ = tiny("--disc-weight", "0")
    batch = torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(1, dtype=torch.long), [""]
    flops = profile_step.flops_per_image(m, cfg, batch)
    monkeypatch.setattr(vae, "on_cuda", lambda x: True)
    assert profile_step.flops_per_image(m, cfg, batch) == flops
    monkeypatch.undo()
    assert profile_step.peak_flops(CPU, None) > 1e9
    depth, width, tokens, convolutions = 6, 256, 16, []               # multiply-adds x 2
    block = 2 * tokens * 12 * width ** 2 + 2 * 2 * tokens ** 2 * width + 2 * 6 * width ** 2
    for module in m.vae.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(
                lambda conv, args, out: convolutions.append(2 * out.numel() * conv.weight[0].numel()))
    m.vae(torch.zeros(1, 3, 32, 32), torch.zeros(1, 8, 8, 8))
    least = (3 * depth + 2 * 2) * block + 3 * sum(convolutions)       # SiT, its alignment pass, the VAE
    assert least < flops < 3 * least                                  # the target encoder's come on top


@pytest.mark.parametrize("flags",
                         [[], pytest.param(["--vae-grad", "none", "--cache-latents", "--vae-ckpt", "VAE"],
                                                    marks=slow)])
def test_profile_prints_its_table_and_touches_no_run(image_dir, frozen_vae, tmp_path, flags):
    flags = [frozen_vae if flag == "VAE" else flag for flag in flags]
    out = run(sys.executable, ROOT / "benchmarks/profile_step.py", "1", "--data-dir", image_dir, *SHORT,
              *flags,
              cwd=tmp_path)
    names = ["# SiT", "# target features", "Optimizer.step#AdamW.step"]
    if not flags:
        names += ["# VAE encoder", "# VAE decoder", "# SiT, alignment pass", "# perceptual distance"]
    assert all(re.search(rf"^ *{name}  ", out, re.M) for name in names), out
    assert re.search(r"step [\d.]+ ms, [\d.]+ images/s", out).start() < out.index("# SiT")
    assert "of a matrix product's" in out
    assert re.search(r"^ *# SiT .* 3 *$", out, re.M)          # calls: three profiled steps, whatever STEPS is
    assert not any(word in out for word in ("USDT", "DeviceProperties", "CUDA runtime", "Warning"))
    assert [path for path in tmp_path.glob("exps/*") if not path.name.startswith("latents-")] == []
