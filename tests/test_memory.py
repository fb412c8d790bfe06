"""The estimate of benchmarks/memory.py compared with what PyTorch's allocator reports."""
import gc
import json
import re
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import train
from benchmarks import memory
from conftest import CPU, ROOT, one_line, run, slow
from sit import SiTBlock

SMALL = ["--preset", "sdvae-xl2", "--model", "SiT-T/2", "--vae", "f4d8", "--resolution", "32",
         "--encoder-depth", "2",
         "--enc-type", "resnet18", "--perceptual", "lpips", "--projector-dim", "256", "--mixed-precision",
         "no"]
FROZEN = ["--vae-grad", "none", "--cache-latents"]


def allocated(cfg, processes, tmp_path):
    """Bytes at the peak of a process's second step on real tensors: the networks' and, from the first step
    on, those of the events of the CPU's allocator. Not before: gloo's threads free DDP's first broadcast at
    times, which the profiler does not see. With several processes, DDP is that of a single one."""
    gc.collect()
    if processes > 1:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with torch.profiler.profile(profile_memory=True) as profiler:
        m = train.build(cfg, CPU)
        for module in (*m.sit.modules(), *m.ema.modules()):
            if isinstance(module, SiTBlock):
                module.attn.fused_attn = True
        train.wrap(m, cfg, processes)
        for k in range(2):
            with torch.profiler.record_function(f"step {k}"):
                batch = memory.random_batch(m, cfg, cfg.batch_size // processes)
                train.run_step(m, cfg, k, batch, 0, processes)
    if processes > 1:
        dist.destroy_process_group()
    networks = [m.vae, m.sit, m.ema, *m.encoders, *filter(None, (m.disc, m.perceptual))]
    tensors = [t for network in networks for t in (*network.parameters(), *network.buffers())]
    if processes > 1:                                                             # DDP's buckets are as large
        tensors += [p for optimizer in m.optimizers.values() for p in optimizer.param_groups[0]["params"]]
    now = peak = sum(tensor.nbytes for tensor in tensors)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    first, second = (next(e for e in events if e["name"] == f"step {k}") for k in range(2))
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        if first["ts"] <= event["ts"] <= second["ts"] + second["dur"]:
            now += event["args"]["Bytes"]
            if event["ts"] >= second["ts"]:
                peak = max(peak, now)
    return peak


@pytest.mark.parametrize("flags, processes", [([], 2), (["--gradient-checkpointing"], 1),
                                              (["--gradient-accumulation-steps", "4"], 1), (FROZEN, 1),
                                              (["--vae-only"], 1)])
def test_estimate_equals_allocated_memory(flags, processes, tmp_path):
    cfg = memory.read_flags([*SMALL, "--batch-size", str(32 * processes), *flags], processes)
    real = allocated(cfg, processes, tmp_path)
    assert memory.estimate(cfg, [cfg.batch_size], processes)[0] == pytest.approx(real, rel=0.03)


def test_flags_are_read_without_files():
    cfg = memory.read_flags(["--preset", "invae-xl1", "--vae-ckpt", "nowhere"], 8)
    assert (cfg.vae, cfg.vae_ckpt, cfg.mixed_precision) == ("f16d32", "", "bf16")


def test_autocast_follows_cudas_rules():
    """No operation of the forward passes that PyTorch's header lists as float32 gets a bfloat16 tensor."""
    header = Path(torch.__file__).parent / "include/ATen/autocast_mode.h"
    rules = re.search(r"define AT_FORALL_FP32\(_\)(.*?)\n\n", header.read_text(), re.S)[1]
    names, lower = set(re.findall(r"_\((\w+)", rules)), set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            if name.removeprefix("native_") in names and any(
                    isinstance(t, torch.Tensor) and t.dtype == torch.bfloat16 for t in args):
                lower.add(name)
            return func(*args, **(kwargs or {}))

    cfg = memory.read_flags([*SMALL, "--qk-norm", "--mixed-precision", "bf16"], 1)

    def forward():
        lower.clear()
        with m.autocast(), torch.no_grad(), Watch():
            x, z = torch.zeros(2, 3, 32, 32), torch.zeros(2, 8, 8, 8)
            m.vae(x, z)[0].kl()
            m.perceptual(x, x)
            m.encoders[0](x)
            m.sit(z, torch.zeros(2), torch.zeros(2, dtype=torch.long))
        return lower

    with FakeTensorMode():
        m = memory.build(cfg)
        assert forward() >= {"native_group_norm", "upsample_nearest2d"}          # by a CPU's own rules
        with patch.multiple(F, **memory.CUDA_RULES):
            assert not forward()


@slow
def test_the_command_prints_the_estimate_of_xl_without_allocating_it(tmp_path):
    script = ("import resource; from benchmarks import memory; memory.main(); "
              "print('KiB', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    out = run(sys.executable, "-c", script, "--preset", "sdvae-xl2", "--batch-size", "32", "--gpus", "1",
              cwd=tmp_path)
    training, grids = (float(number) for number in re.findall(r"[\d.]+", out.split("32` |")[1])[:2])
    assert training > 60 and training > grids > 0 and int(out.split("KiB ")[1]) < 3 * 2 ** 20
    script = [sys.executable, ROOT / "benchmarks/memory.py"]
    one_line(run(*script, "--gpus", "3", *SMALL, cwd=tmp_path, code=2), "--batch-size 256", "3")
