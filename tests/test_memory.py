"""The estimate of experiments/memory.py against what PyTorch's allocator reports."""
import gc
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import CPU, ROOT, one_line, run, slow
from experiments import memory
import train

SMALL = ["--preset", "sdvae-xl2", "--model", "SiT-T/2", "--vae", "f4d8", "--resolution", "32", "--encoder-depth", "2",
         "--enc-type", "resnet18", "--perceptual", "encoder", "--projector-dim", "256", "--mixed-precision", "no"]
FROZEN = ["--vae-grad", "none", "--cache-latents"]


def allocated(cfg, processes, tmp_path):
    """Bytes at the peak of a process's second step on real tensors, by the events of the CPU's allocator; DDP, where
    there are several processes, is one of a single process."""
    gc.collect()
    if processes > 1:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with torch.profiler.profile(profile_memory=True) as profiler:
        m = train.build(cfg, CPU)
        for block in (*m.sit.blocks, *m.ema.blocks):
            block.attn.fused_attn = True
        train.wrap(m, cfg, processes)
        n = cfg.batch_size // processes
        for k in range(2):
            with torch.profiler.record_function(f"step {k}"):
                batch = [torch.zeros(n, 3, 32, 32, dtype=torch.uint8), torch.zeros(n, dtype=torch.long), [""] * n]
                if cfg.cache_latents:
                    batch.append(torch.zeros(n, 16, 8, 8, dtype=torch.float16))
                train.run_step(m, cfg, k, batch, 0, processes)
    if processes > 1:
        dist.destroy_process_group()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    second, = (e for e in events if e["name"] == "step 1")
    now = peak = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        now += event["args"]["Bytes"]
        if second["ts"] <= event["ts"] <= second["ts"] + second["dur"]:
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("flags, processes", [([], 1), ([], 2), (["--gradient-checkpointing"], 1),
                                              (["--gradient-accumulation-steps", "4"], 1), (FROZEN, 1)])
def test_the_estimate_is_what_is_allocated(flags, processes, tmp_path):
    cfg = memory.read_flags([*SMALL, "--batch-size", str(32 * processes), *flags], processes)
    real = allocated(cfg, processes, tmp_path)
    assert memory.estimate(cfg, [cfg.batch_size], processes)[0] == pytest.approx(real, rel=0.03)
