"""What the tests share: running commands, small pictures, a short run, the tiny preset's networks."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train

torch.set_num_threads(2)
slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="minutes long: SLOW=1 runs it")
SHORT = ["--num-classes", "2", "--batch-size", "4", "--log-steps", "1", "--sampling-steps", "100", "--num-workers", "0",
         "--max-train-steps", "4", "--mixed-precision", "no", "--device", "cpu"]


def torchrun(processes):
    """Its command line; a free port each time."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def run(*command, cwd, env=None, code=0, timeout=600):
    """Run a command in a folder; check its exit code; return its output."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", **(env or {})}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def one_line(output, *words):
    """A command's output ends in one error line that holds these words, and in no traceback."""
    lines = [line for line in output.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and "Traceback" not in output and all(w in lines[0] for w in words), output


def losses(folder):
    """The losses in a run's metrics.jsonl, a row a step."""
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "loss" in k or k == "step"} for row in rows]


def close(a, b, rtol):
    """|a - b| <= rtol max |b|, for arrays or tensors."""
    scale = np.abs(np.asarray(b)).max()
    assert np.abs(np.asarray(a) - np.asarray(b)).max() <= rtol * scale


def statistics(channels):
    """(mean, std) of latents, [C] each."""
    return torch.linspace(-1, 2, channels), torch.linspace(0.5, 3, channels)


def flatten(tree, prefix=""):
    """[(name, tensor)] of nested dicts."""
    if isinstance(tree, dict):
        return [pair for k, v in tree.items() for pair in flatten(v, f"{prefix}.{k}")]
    return [(prefix, tree)] if isinstance(tree, torch.Tensor) else []


def tiny_config(*flags):
    return train.parse_config(["--batch-size", "4", "--mixed-precision", "no", "--seed", "1", "--num-classes", "10",
                               "--disc-weight", "0.1", "--disc-start", "1000", *flags])


@pytest.fixture
def tiny():
    """make(*flags) -> (networks, config, one step's arguments), float32, random weights with every gate open."""
    def make(*flags, device="cpu"):
        cfg, device = tiny_config(*flags), torch.device(device)
        m = train.build(cfg, device)
        train.wrap(m, cfg, device, 1)
        g = torch.Generator().manual_seed(0)
        for net in (m.sit, m.ema):                                # adaLN-Zero starts as the identity: open it
            for name, p in net.named_parameters():
                if "adaLN" in name or "final_layer.linear" in name:
                    p.data.copy_(torch.empty(p.shape).normal_(0, 0.05, generator=g))
        x = (torch.rand(4, 3, 32, 32, generator=g) * 2 - 1).to(device)
        y = torch.tensor([0, 1, 2, 3], device=device)
        return m, cfg, (x, y, None, *train.draw_noise(cfg, 0, (8, 8, 8), 0, 1, device))       # z: the VAE trains
    return make


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of 2 classes x 12 little pictures."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in ("one", "two words"):
        (folder / name).mkdir()
        for i in range(12):
            image = Image.fromarray(rng.integers(0, 255, (40, 36, 3), np.uint8))
            image.resize((50, 44)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def short_run(pictures, tmp_path_factory):
    """A folder in which four steps without GAN were run: exps/a, checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("runs")
    run(sys.executable, ROOT / "train.py", "--data-dir", pictures, "--exp-name", "a", "--disc-weight", "0",
        "--checkpointing-steps", "2", *SHORT, cwd=folder)
    return folder


@pytest.fixture(name="run")
def run_fixture():
    return run
