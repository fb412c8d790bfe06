"""benchmarks/gpu.sh and measure.py: what is timed, what is logged, what is skipped; all of it at toy size."""
import os
import sys
import time
from pathlib import Path
from shutil import which

import pytest
import torch

import train
from benchmarks import measure
from benchmarks.memory import random_batch, read_flags
from conftest import CPU, ROOT, one_line, run, slow
from support.metrics import read_rows
from torch.utils.flop_counter import FlopCounterMode

TINY = ["--resolution", "32", "--preset", "tiny"]
ENDLESS = 10 ** 12                                                # images: more than any memory holds


@pytest.fixture
def measured(tmp_path, monkeypatch, capsys):
    """measured(what, *flags): measure.py in this process; the rows of its file, or the lines of the table."""
    file = tmp_path / "results.jsonl"
    switches = [(torch.backends.cuda.matmul, "allow_tf32"), (torch.backends.cudnn, "allow_tf32"),
                (torch.backends.cudnn, "benchmark")]
    before = [getattr(owner, name) for owner, name in switches]

    def call(what, *flags):
        monkeypatch.setattr(sys, "argv", ["measure.py", what, str(file), *map(str, flags)])
        capsys.readouterr()
        measure.main()
        return capsys.readouterr().out.splitlines() if what == "table" else read_rows(file)

    yield call
    for (owner, name), value in zip(switches, before):
        setattr(owner, name, value)


def test_steps_are_timed_after_the_third(measured, monkeypatch):
    """Steps of known length: the first as if it compiles, two that are still slow, then the steps that count."""
    seen = []

    def known_step(m, cfg, k, batch, rank, world):
        seen.append((len(batch[0]), k))
        time.sleep({0: 0.6, 1: 0.4, 2: 0.4}.get(k, 0.05))

    monkeypatch.setattr(train, "run_step", known_step)
    rows = measured("steps", *TINY, "--images", 2, "--most", 4, "--steps", 2)
    assert seen == [(1, 0), *((n, k) for n in (2, 4) for k in range(5))]                  # first one to count FLOPs
    for row, n in zip(rows, (2, 4), strict=True):
        assert row["images"] == n and 0.05 <= row["step"] < 0.15 and 0.6 <= row["first_step"] < 0.9
        assert row["images_per_second"] == pytest.approx(n / row["step"])
        assert row["share_of_peak"] == pytest.approx(row["tflop"] / row["step"] / row["peak_tflops"])
    assert measured("steps", *TINY, "--images", 2, "--most", 4, "--steps", 2) == rows and len(seen) == 12
    assert measured("steps", *TINY, "--images", 2, "--most", 3, "--compile") == rows      # it would begin with 4


def test_flops_are_those_of_a_step(measured):
    flags = [*TINY, "--vae-grad", "none", "--cache-latents"]
    row, = measured("steps", *flags, "--images", 2, "--most", 2, "--steps", 1)
    cfg = read_flags([*flags, "--batch-size", "2"], 1)
    m = train.build(cfg, CPU)
    batch = random_batch(m, cfg, 2)
    assert len(batch) == 4 and batch[0].float().std() > 50                                # not all black
    with FlopCounterMode(display=False) as counter:
        train.run_step(m, cfg, 0, batch, 0, 1)
    assert row["tflop"] == pytest.approx(counter.get_total_flops() / 1e12)


def test_out_of_memory_is_logged_and_not_tried_again(measured):
    row, = rows = measured("steps", *TINY, "--images", ENDLESS, "--most", 2 * ENDLESS)
    assert "memory" in row["ended"] and "step" not in row
    assert measured("steps", *TINY, "--images", ENDLESS, "--most", 2 * ENDLESS) == rows
    assert any(f"| {ENDLESS} | eager | out of memory |" in line for line in measured("table"))


def test_sampling_is_timed_after_a_warm_up(measured, monkeypatch):
    calls = []

    def known_samples(model, indices, **settings):
        calls.append((len(indices), settings["cfg_scale"], settings["num_steps"]))
        time.sleep(0.1 if len(calls) % 2 == 0 else 0.6)

    monkeypatch.setattr(measure, "sample_images", known_samples)
    rows = measured("sampling", *TINY, "--vae-grad", "none", "--proj-coeff", 0, "--images", 3, "--steps", 5)
    assert calls == [(3, 1, 5)] * 2 + [(3, 2, 5)] * 2 and all(15 < row["images_per_second"] <= 30 for row in rows)


def test_the_table_shows_the_last_of_equal_measurements(capsys):
    settings = dict(device="GPU", torch="2", model="SiT-XL/2", resolution=256, vae_grad="repa", compiled=False)
    step = settings | dict(measured="steps", images=4, peak_tflops=100, first_step=9.0)
    fast = step | dict(step=0.25, images_per_second=16.0, share_of_peak=0.5, memory_gib=10.0)
    measure.print_table([step | dict(images=8, ended="no"), fast | dict(step=9), fast, fast | dict(compiled=True),
                         fast | dict(vae_grad="none"),
                         settings | dict(measured="sampling", images=64, num_steps=50, cfg_scale=2.0,
                                         images_per_second=9.8),
                         dict(device="GPU", torch="2", part="tests", outcome="failed: x", seconds=3),
                         dict(device="GPU", torch="2", part="tests", outcome="6 passed in 2.0s", seconds=2)])
    cells = "9.0 | 250.0 | 16.0 | 50% of 100 TFLOP/s | 10.0 |"
    assert [line for line in capsys.readouterr().out.splitlines() if "---" not in line] == [
        "GPU, PyTorch 2", "", "| step of | images | mode | first step, s | ms | images/s | of the peak | GiB |",
        "| SiT-XL/2, REPA-E | 8 | eager | out of memory |  |  |  |  |", f"| SiT-XL/2, REPA-E | 4 | eager | {cells}",
        f"| SiT-XL/2, REPA-E | 4 | compiled | {cells}", f"| SiT-XL/2, second stage | 4 | eager | {cells}", "",
        "| samples of | guidance | mode | images/s |",
        "| SiT-XL/2, 50 Euler steps, 64 at a time | 2.0 | eager | 9.80 |", "", "| section | outcome | seconds |",
        "| tests | 6 passed in 2.0s | 2 |"]


@pytest.mark.skipif(not which("timeout"), reason="gpu.sh needs GNU coreutils' timeout")
@slow
def test_gpu_sh_at_toy_size(tmp_path):
    """Each section is measured; one that fails is logged and the next begins; what is done is skipped."""
    out = tmp_path / "out"
    env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "TOY": "1", "OUT": str(out),
           "MODELS": "SiT-T/2 SiT-Q/2"}

    def start(code=0, **settings):
        printed = run("bash", ROOT / "benchmarks/gpu.sh", cwd=tmp_path, env=env | settings, code=code)
        return printed, read_rows(out / "results.jsonl")

    _, rows = start(TOTAL="0")
    assert rows and {row["outcome"] for row in rows} == {"no time was left"} and not any((out / "done").iterdir())
    printed, rows = start()
    outcomes = {row["part"]: row["outcome"] for row in rows if "part" in row}
    bad = [name for name in outcomes if "SiT-Q-2" in name]
    assert len(bad) == 2 and all("--model SiT-Q/2: unknown" in outcomes.pop(name) for name in bad)
    assert "passed" in outcomes["tests"] or "skipped" in outcomes.pop("tests")
    assert set(outcomes.values()) == {"done"}, outcomes
    steps = [(row["vae_grad"], row["images"]) for row in rows if row.get("measured") == "steps"]
    assert steps == [("repa", 2), ("repa", 4), ("none", 2), ("none", 4)]
    assert all(row["images_per_second"] > 0 for row in rows if row.get("measured") == "sampling")
    assert printed.endswith((out / "table.md").read_text()) and printed.count(", REPA-E |") == 2

    _, again = start()
    assert {row["part"] for row in again[len(rows):]} == set(bad)
    one_line(start(2, RESOLUTION="64")[0], "has other settings")


def test_an_empty_table_is_one_line(tmp_path):
    out = run(sys.executable, ROOT / "benchmarks/measure.py", "table", "nothing.jsonl", cwd=tmp_path, code=2)
    one_line(out, "nothing.jsonl", "gpu.sh")
