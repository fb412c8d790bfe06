"""experiments/gpu.sh and measure.py: what is timed, what is noted, what is not done twice; the whole at toy size."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from shutil import which

import pytest
import torch

import train
from conftest import CPU, ROOT, noise_pictures, one_line, run, slow
from experiments import measure
from experiments.memory import read_flags
from support.commands import UserError
from support.profile import count_flops

TINY = ["--resolution", "32", "--preset", "tiny"]
ENDLESS = 10 ** 12                                                # images: more than any address can reach


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """measured(what, *flags): measure.py in this process; the rows that its file then has."""
    file = tmp_path / "results.jsonl"
    switches = [(torch.backends.cuda.matmul, "allow_tf32"), (torch.backends.cudnn, "allow_tf32"),
                (torch.backends.cudnn, "benchmark")]
    before = [getattr(owner, name) for owner, name in switches]

    def call(what, *flags):
        monkeypatch.setattr(sys, "argv", ["measure.py", what, str(file), *map(str, flags)])
        measure.main()
        return measure.read_rows(file)

    yield call
    for (owner, name), value in zip(switches, before):
        setattr(owner, name, value)


def test_only_the_steps_after_the_third_are_timed(measured, monkeypatch):
    """Steps of known length: the first as where it compiles, two that are still slow, then the steps that count."""
    seen = []

    def known_step(m, cfg, k, batch, rank, world):
        seen.append((len(batch[0]), k))
        time.sleep({0: 0.6, 1: 0.4, 2: 0.4}.get(k, 0.05))

    monkeypatch.setattr(train, "run_step", known_step)
    rows = measured("steps", *TINY, "--images", 2, "--most", 4, "--steps", 2)
    assert seen == [(n, k) for n in (2, 4) for k in range(5)]
    for row, n in zip(rows, (2, 4), strict=True):
        assert row["images"] == n and 0.05 <= row["step"] < 0.15 and 0.6 <= row["first_step"] < 0.9
        assert row["images_per_second"] == pytest.approx(n / row["step"])
        assert row["share_of_peak"] == pytest.approx(row["tflop"] / row["step"] / row["peak_tflops"])
    assert measured("steps", *TINY, "--images", 2, "--most", 4, "--steps", 2) == rows and len(seen) == 10
    assert measured("steps", *TINY, "--images", 2, "--most", 3, "--compile") == rows      # it would begin with 4


@pytest.mark.parametrize("flags", [[], ["--vae-grad", "none", "--cache-latents"]])
def test_the_flops_are_those_of_the_step(measured, flags):
    row, = measured("steps", *TINY, "--images", 2, "--most", 2, "--steps", 1, *flags)
    cfg = read_flags([*TINY, "--batch-size", "2", *flags], 1)
    m = train.build(cfg, CPU)
    batch = measure.random_batch(m, cfg)
    assert len(batch) == 3 + bool(flags) and batch[0].float().std() > 50                  # not all black
    assert row["tflop"] == pytest.approx(count_flops(lambda: train.run_step(m, cfg, 0, batch, 0, 1)) / 1e12)


def test_the_end_of_memory_is_noted_and_not_tried_again(measured):
    row, = rows = measured("steps", *TINY, "--images", ENDLESS, "--most", 2 * ENDLESS)
    assert "memory is not enough" in row["ended"] and "step" not in row
    assert measured("steps", *TINY, "--images", ENDLESS, "--most", 2 * ENDLESS) == rows
    assert f"| SiT-T/2 | REPA-E | {ENDLESS} | memory ends |" in "\n".join(measure.table(rows))


def test_rates_of_sampling_and_evaluation(measured, monkeypatch):
    """Images over seconds of the second call, which is of known length."""
    calls = []

    def draw(model, indices, **settings):
        calls.append((len(indices), settings["cfg_scale"], settings["num_steps"]))
        time.sleep(0.1 if len(calls) % 2 == 0 else 0.6)

    monkeypatch.setattr(measure, "sample_images", draw)
    rows = measured("sampling", *TINY, "--vae-grad", "none", "--proj-coeff", 0, "--images", 3, "--steps", 5)
    assert calls == [(3, 1, 5)] * 2 + [(3, 2, 5)] * 2
    for row in rows:
        assert 15 < row["images_per_second"] <= 30 and 0.6 <= row["first_seconds"] < 0.9
    rows = measured("evaluating", "--images", 2, "--steps", 2, "--resolution", 32)[len(rows):]
    assert rows[0]["features"] == "inception" and len(rows) == 2 and rows[0]["images_per_second"] > 0


def test_the_table_shows_the_newest_of_each():
    settings = dict(device="GPU", torch="2", model="SiT-XL/2", resolution=256, precision="bf16", vae_grad="repa",
                    flags="x")
    step = settings | dict(measured="steps", images=4, compiled=False, peak_tflops=100)
    rows = [settings | dict(measured="startup", images=4, what="imports", seconds=9.0),
            settings | dict(measured="startup", images=4, what="imports", seconds=3.14159),
            step | dict(step=0.5, images_per_second=8.0, share_of_peak=0.25, memory_gib=20.04),
            step | dict(images=8, ended="no"),
            step | dict(compiled=True, step=0.25, images_per_second=16.0, share_of_peak=0.5, memory_gib=10.0),
            step | dict(vae_grad="none", step=0.1, images_per_second=40.0, share_of_peak=0.125, memory_gib=9.0),
            settings | dict(measured="sampling", images=64, num_steps=50, cfg_scale=2.0, compiled=True,
                            images_per_second=9.8),
            dict(device="GPU", torch="2", part="tests", outcome="failed: x", seconds=3),
            dict(device="GPU", torch="2", part="tests", outcome="6 passed in 2.0s", seconds=2)]
    lines = measure.table(rows)
    assert lines[0] == "GPU, PyTorch 2." and "| imports | 3.14 |" in lines and not any("9.00" in x for x in lines)
    assert "| SiT-XL/2 | REPA-E | 4 | 500.0 | 8.0 | 25% | 20.0 | 250.0 | 16.0 | 50% | 10.0 |" in lines
    assert "| SiT-XL/2 | REPA-E | 8 | memory ends |  |  |  |  |  |  |  |" in lines
    assert "| SiT-XL/2 | second stage | 4 | 100.0 | 40.0 | 12% | 9.0 |  |  |  |  |" in lines
    assert "| SiT-XL/2, 50 Euler steps, 64 at a time, guided |  | 9.80 |" in lines
    assert "| tests | 6 passed in 2.0s | 2 |" in lines and not any("failed" in line for line in lines)


def test_a_line_cut_off_by_a_kill_is_left_out_and_errors_are_one_line(measured, tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text('{"part": "tests"}\n{"part": "sta')
    assert measure.read_rows(file) == [dict(part="tests")]
    script = (sys.executable, ROOT / "experiments/measure.py")
    one_line(run(*script, "table", "nothing.jsonl", cwd=tmp_path, code=2), "nothing.jsonl", "gpu.sh")
    with pytest.raises(UserError, match="--preset x"):
        measured("steps", "--preset", "x")


@pytest.mark.skipif(not which("timeout"), reason="gpu.sh needs GNU coreutils' timeout")
@slow
def test_gpu_sh_at_toy_size(tmp_path):
    """Every part is measured, one that fails is noted and the next goes on; what is done is not done twice."""
    for folder in ("train/one", "train/two", "val/one"):
        noise_pictures(tmp_path / "data" / folder, 6, size=32)
    out = tmp_path / "out"
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
           "TOY": "1", "OUT": str(out), "DATA": str(tmp_path / "data"), "MODELS": "SiT-T/2 SiT-Q/2"}

    def start(code=0, **settings):
        done = subprocess.run(["bash", "experiments/gpu.sh"], cwd=ROOT, env=env | settings, capture_output=True,
                              text=True)
        assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout, done.stderr, measure.read_rows(out / "results.jsonl")

    *_, rows = start(TOTAL="0")
    assert rows and {row["outcome"] for row in rows} == {"no time was left"}
    assert not (out / "emoji").exists() and not any((out / "done").iterdir())
    printed, _, rows = start()
    outcomes = {row["part"]: row["outcome"] for row in rows if "part" in row}
    bad = [name for name in outcomes if "SiT-Q-2" in name]
    assert len(bad) == 2 and all("--model SiT-Q/2: unknown" in outcomes.pop(name) for name in bad)
    assert "passed" in outcomes["tests"] or "skipped" in outcomes.pop("tests")
    assert set(outcomes.values()) == {"done"}, outcomes
    laps = [row for row in rows if row.get("measured") == "startup"]
    whole, = (row["seconds"] for row in rows if row.get("part") == "startup" and row["outcome"] == "done")
    assert len(laps) == 9 and 0.5 * (whole - 1) < sum(lap["seconds"] for lap in laps) < whole + 1
    steps = [(row["vae_grad"], row["images"]) for row in rows if row.get("measured") == "steps"]
    assert steps == [("repa", 2), ("repa", 4), ("none", 2), ("none", 4)]
    rates = [row["images_per_second"] for row in rows if row.get("measured") in ("sampling", "evaluating")]
    features = {row["features"] for row in rows if "features" in row}
    assert len(rates) == 4 and min(rates) > 0 and "inception" in features
    settings = {run: json.loads((out / "emoji" / run / "args.json").read_text()) for run in ("repa", "repae")}
    frozen = dict(exp_name="repa", vae_grad="none", cache_latents=True)
    assert settings["repa"] == settings["repae"] | frozen and settings["repae"]["vae_ckpt"].endswith("0000002.pt")
    for row in rows[-3:-1]:
        judged = json.loads((out / "emoji" / row["run"] / "fd.json").read_text())
        assert row["value"] == judged[row["distance"]] and row["samples"] == judged["n_samples"] == 8
    table = (out / "table.md").read_text()
    assert printed.endswith(table) and table.count("| REPA-E |") == 2 and "| repae | 2 |" in table

    (out / "done/evaluating").unlink()
    printed, _, again = start()
    assert again[:len(rows)] == rows and printed.startswith(table)
    assert {row.get("part", row.get("features")) for row in again[len(rows):]} == {
        "evaluating", *bad, *features}
    for wrong in (dict(VAE_STEPS="3"), dict(RESOLUTION="64")):
        error = start(2, **wrong)[1]
        assert len(error.splitlines()) == 1 and error.startswith("error") and "was begun with" in error
