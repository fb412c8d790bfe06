"""The rehearsal of the README's commands for ImageNet, experiments/rehearse.sh: what it finds, and all of it, small."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, slow

from experiments import rehearse
from support.commands import UserError
from vae import AutoencoderKL

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is measured by Linux's /proc")


# --- The checks find what is wrong ------------------------------------------------------------------------------------

@pytest.fixture
def run(tmp_path):
    """run(name, *rows) -> a run's folder with this log, for which a step is a dict."""
    def make(name, *rows):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name
    return make


def row(step, **changes):
    return dict(step=step, loss=0.5 / step, grad_norm=2.0, images_per_second=1 / step, skipped=0.0) | changes


def test_losses(run):
    good = run("good", row(1), row(2))
    rehearse.check_losses(good, 2)
    rehearse.check_losses(good, 2, run("near", row(1, images_per_second=9), row(2, loss=0.25 * 1.00005)))
    rehearse.check_losses(good, 2, run("longer", row(1), row(2), row(3)))
    for name, rows, words in (("short", [row(1)], "logged steps .1., not 1 to 2"),
                              ("twice", [row(1), row(1), row(2)], "logged steps"),
                              ("nan", [row(1), row(2, grad_norm=float("nan"))], "step 2: not finite: .'grad_norm'"),
                              ("skipped", [row(1), row(2, skipped=1.0)], "skipped: 1")):
        with pytest.raises(UserError, match=words):
            rehearse.check_losses(run(name, *rows), 2)
    with pytest.raises(UserError, match="step 2: loss is 0.25 in .*good, 0.26 in .*other"):
        rehearse.check_losses(good, 2, run("other", row(1), row(2, loss=0.26)))
    with pytest.raises(UserError, match="logged 1 steps"):
        rehearse.check_losses(good, 2, run("shorter", row(1)))


def test_batch_and_scores(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (4, 8, 8, 3), np.uint8)
    alike = images.copy()
    alike[3] = alike[0]
    for name, array, words in (("good", images, None), ("few", images[:3], "uint8 .3, 8, 8, 3., not"),
                               ("float", images / 255, "float64"), ("alike", alike, "two of its images are alike"),
                               ("channels first", images.transpose(0, 3, 1, 2), "4, 3, 8, 8")):
        np.savez(tmp_path / f"{name}.npz", arr_0=array)
        if words is None:
            rehearse.check_batch(tmp_path / f"{name}.npz", "4", "8")
        else:
            with pytest.raises(UserError, match=words):
                rehearse.check_batch(tmp_path / f"{name}.npz", "4", "8")

    scores = dict.fromkeys("fid sfid is kid precision recall".split(), 1.0) | dict(n_samples=4, features="inception")
    file = tmp_path / "scores.json"
    file.write_text(json.dumps(scores))
    rehearse.check_scores(file, "4")
    for change, words in ((dict(sfid=float("inf")), "sfid is inf"), (dict(n_samples=3), "3 samples, inception; not 4"),
                          (dict(features="efficientnet-lite0"), "4 samples, efficientnet-lite0; not 4, inception")):
        file.write_text(json.dumps(scores | change))
        with pytest.raises(UserError, match=words):
            rehearse.check_scores(file, "4")
    file.write_text(json.dumps({name: value for name, value in scores.items() if name != "kid"}))
    with pytest.raises(UserError, match="kid is None"):
        rehearse.check_scores(file, "4")


def test_vaes_bit_for_bit(tmp_path):
    states = {}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        states[name] = AutoencoderKL("f4d8").state_dict()
        states[name] |= {key: torch.rand(tensor.shape) for key, tensor in states[name].items() if tensor.ndim == 1}
    states["c"] = states["a"] | {"decoder.conv_out.bias": states["b"]["decoder.conv_out.bias"]}
    files = {name: tmp_path / f"{name}.pt" for name in states}
    for name, state in states.items():
        torch.save(state, files[name])
    rehearse.check_same_vae(files["a"], files["a"])
    rehearse.check_trained_vae(files["a"], files["b"])
    with pytest.raises(UserError, match="1 of the VAE's .* differ .*decoder.conv_out.bias"):
        rehearse.check_same_vae(files["a"], files["c"])
    with pytest.raises(UserError, match="1 of the VAE's .* alike"):
        rehearse.check_trained_vae(files["b"], files["c"])


def test_a_command_is_measured(tmp_path, monkeypatch, capsys):
    """Memory of a process and its child, which share most of it, without a file's that is read; files that are new."""
    monkeypatch.chdir(tmp_path)
    Path("old").write_bytes(bytes(100_000_000))
    Path("own.py").write_text("import mmap, os, time\n"
                              "file = open('old')\n"
                              "old = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)\n"
                              "old.find(b'x')\n"
                              "shared = bytearray(b'x') * 200_000_000\n"
                              "if os.fork() == 0:\n"
                              "    own = bytearray(b'y') * 100_000_000\n"
                              "time.sleep(4)\n"
                              "open('new', 'wb').write(bytes(300_000))\n")
    rehearse.run("measured", sys.executable, "own.py")
    found, = rehearse.read_rows(rehearse.NOTES)
    assert 0.3e9 < found["memory"] < 0.36e9 and 4 < found["seconds"] < 60
    assert found["written"] == {"new": 300_000} and "new 0.3 MB" in capsys.readouterr().out
    with pytest.raises(UserError, match="broken: ended with 3, see logs/broken.log"):
        rehearse.run("broken", sys.executable, "-c", "print('why'); raise SystemExit(3)")
    assert "why" in capsys.readouterr().out and len(rehearse.read_rows(rehearse.NOTES)) == 1


def test_training_is_asked_to_stop(tmp_path, monkeypatch):
    """By SIGUSR1, once its file is there, and not the process above it; one that has ended by then is not done."""
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text("import signal, sys, time\n"
                                "def stop(*_):\n"
                                "    print('stopped after step 1')\n"
                                "    sys.exit()\n"
                                "signal.signal(signal.SIGUSR1, stop)\n"
                                "open('begun', 'w')\n"
                                "time.sleep(float(sys.argv[1]))\n")
    above = "import subprocess, sys; subprocess.run([sys.executable, '-u', 'train.py', sys.argv[1]], check=True)"
    rehearse.run("stopped", sys.executable, "-c", above, "60", stop="begun")
    assert [row["name"] for row in rehearse.read_rows(rehearse.NOTES)] == ["stopped"]
    Path("begun").unlink()
    with pytest.raises(UserError, match="late: it ended before it was stopped, see logs/late.log"):
        rehearse.run("late", sys.executable, "-c", above, "0", stop="never")
    assert len(rehearse.read_rows(rehearse.NOTES)) == 1


# --- All of it --------------------------------------------------------------------------------------------------------

@slow
def test_rehearse_sh_in_small(tmp_path):
    """It ends well, what it ran are the README's commands, and what is done is not done twice."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
           "SIZE": "S", "RESOLUTION": "64", "PRESETS": "sdvae-xl2", "FLAGS": "--no-compile",
           "OUT": str(tmp_path / "out")}

    def start(code=0, **settings):
        done = subprocess.run(["bash", "experiments/rehearse.sh"], cwd=ROOT, env=env | settings, capture_output=True,
                              text=True)
        assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout, done.stderr

    printed, _ = start()
    rows = rehearse.read_rows(tmp_path / "out" / rehearse.NOTES)
    ran = {row["name"]: row for row in rows if "seconds" in row}
    for what in ("losses exps/sdvae-xl2 4", "batch exps/sdvae-xl2/samples.npz 8 64",
                 "scores exps/sdvae-xl2/fid.json 8", "losses exps/e2e-sdvae-xl2 4"):
        assert f"holds: {what}" in printed
    for name, file in (("sdvae-xl2", "exps/sdvae-xl2/checkpoints/0000004.pt"),
                       ("e2e-sdvae-xl2", "exps/e2e-sdvae-xl2/checkpoints/0000004.pt")):
        assert ran[name]["written"][file] > 4 * 4 * 39e6                # weights, average, two moments of SiT-S
    assert all(row["memory"] > 1e8 for row in ran.values())
    assert ran["128-pixels"]["command"].endswith("--resolution 128 --batch-size 2 --max-train-steps 1")

    section = (ROOT / "README.md").read_text().split("## ImageNet on 8 GPUs")[1].split("```")[1]
    lines = [line.split("#")[0].split() for line in section.replace("\\\n", "").splitlines() if "torchrun" in line]
    commands = [row["command"].split() for row in ran.values()]
    assert len(lines) == 4
    for words in lines:
        words = [word.replace("node=8", "node=2").replace("0400000", "0000004") for word in words]
        assert any(command[:len(words)] == words for command in commands), words

    again, _ = start()
    assert "holds" not in again and again.endswith(printed[printed.index("| | seconds"):])
    assert rehearse.read_rows(tmp_path / "out" / rehearse.NOTES) == rows
    for wrong, words in ((dict(STEPS="5"), "was begun with"), (dict(SIZE="B"), "SIZE=B: take XL or S")):
        error = start(2, **wrong)[1]
        assert len(error.splitlines()) == 1 and error.startswith("error") and words in error
