"""The dry run of the README's commands for ImageNet, benchmarks/dry_run.sh: its checks, and all of it at
small size."""
import json
import os
import sys
from pathlib import Path
from shutil import which

import numpy as np
import pytest
import torch

from benchmarks import dry_run
from conftest import ROOT, one_line, slow
from conftest import run as run_command
from support.commands import UserError
from support.metrics import read_rows
from vae import AutoencoderKL

pytestmark = pytest.mark.skipif(sys.platform != "linux" or not which("pkill"), reason="needs Linux and pkill")


# --- The checks find what is wrong --------------------------------------------------------------------------

def row(step, **changes):
    return dict(step=step, loss=0.5 / step, grad_norm=2.0, images_per_second=1 / step, skipped=0.0) | changes


@pytest.mark.parametrize("rows, other, words", [
    ([row(1), row(2)], [row(1, images_per_second=9), row(2, loss=0.25 * 1.00005), row(3)], None),
    ([row(1)], None, "logged steps .1., not 1 to 2"),
    ([row(1), row(1), row(2)], None, "logged steps"),
    ([row(1), row(2, grad_norm=None)], None, "step 2: not finite: .'grad_norm'"),
    ([row(1), row(2, skipped=1.0)], None, "skipped: 1"),
    ([row(1), row(2)], [row(1), row(2, loss=0.26)], "step 2: loss is 0.25 in .*a, 0.26 in .*b"),
    ([row(1), row(2)], [row(1)], "logged 1 steps")])
def test_check_losses(rows, other, words, tmp_path):
    for name, logged in (("a", rows), ("b", other or [])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logged))
    arguments = [tmp_path / "a", "2", *([tmp_path / "b"] if other else [])]
    if words:
        with pytest.raises(UserError, match=words):
            dry_run.check_losses(*arguments)
    else:
        dry_run.check_losses(*arguments)


def test_check_batch_and_scores(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (4, 8, 8, 3), np.uint8)
    file = tmp_path / "samples.npz"
    np.savez(file, arr_0=images)
    dry_run.check_batch(file, "4", "8")
    for array, words in ((images[:3], "uint8 .3, 8, 8, 3., not"), (images / 255, "float64"),
                         (images[[0, 1, 2, 0]], "two of its images are equal")):
        np.savez(file, arr_0=array)
        with pytest.raises(UserError, match=words):
            dry_run.check_batch(file, "4", "8")

    scores = dict.fromkeys(["fid", "sfid", "is", "kid", "precision", "recall"], 1.0) | dict(n_samples=4,
                                                                                   features="inception")
    file = tmp_path / "scores.json"
    file.write_text(json.dumps(scores))
    dry_run.check_scores(file, "4")
    for change, words in ((dict(sfid=float("inf")), "sfid is inf"), (dict(kid=float("nan")), "kid is nan"),
                          (dict(n_samples=3), "3 samples, inception; not 4")):
        file.write_text(json.dumps(scores | change))
        with pytest.raises(UserError, match=words):
            dry_run.check_scores(file, "4")


def test_check_vaes_bit_for_bit(tmp_path):
    states = [{name: torch.rand_like(tensor) for name, tensor in AutoencoderKL("f4d8").state_dict().items()}
              for _ in range(2)]
    files = [tmp_path / f"{k}.pt" for k in range(3)]
    for file, state in zip(files,
                           [*states,
                            states[0] | {"decoder.conv_out.bias": states[1]["decoder.conv_out.bias"]}], strict=True):
        torch.save(state, file)
    dry_run.check_vae("same", files[0], files[0])
    dry_run.check_vae("trained", files[0], files[1])
    with pytest.raises(UserError, match="not same, 155 of 156"):
        dry_run.check_vae("same", files[0], files[2])
    with pytest.raises(UserError, match="not trained, 1 of 156"):
        dry_run.check_vae("trained", files[1], files[2])


TRAIN = """import signal, sys, time
def stop(*_):
    open('new', 'wb').write(bytes(300_000))
    sys.exit(print('stopped after step 1'))
signal.signal(signal.SIGUSR1, stop)
memory = bytearray(b'x') * 800_000_000
open('empty', 'w')
open('begun', 'w').write('{"step": 1}')
time.sleep(float(sys.argv[1]))
"""


def test_a_command_is_measured_and_stopped(tmp_path, monkeypatch, capsys):
    """By SIGUSR1 once the file has a row, train.py and not its parent. A failed or late command is not
    done."""
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(TRAIN)
    Path("old").write_bytes(bytes(1_000))
    Path("logs").mkdir()
    parent = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-u', 'train.py', sys.argv[1]]))"
    command = [sys.executable, "-c", parent]
    dry_run.run("begun", "stopped", *command, "60")
    result, = read_rows(dry_run.RESULTS)
    assert result["name"] == "stopped" and result["memory"] > 0.8e9 and 0 < result["seconds"] < 60
    assert 300_000 <= result["written"] < 301_000 and "stopped: " in capsys.readouterr().out
    for never in ("never", "empty"):
        with pytest.raises(UserError, match="late: it was not stopped after a step, see logs/late.log"):
            dry_run.run(never, "late", *command, "0.5")
    with pytest.raises(UserError, match="broken: exit code 1, see logs/broken.log"):
        dry_run.run("", "broken", *command, "x")
    assert "could not convert" in capsys.readouterr().out and read_rows(dry_run.RESULTS) == [result]


# --- All of it ----------------------------------------------------------------------------------------------

@slow
def test_dry_run_sh_at_small_size(tmp_path):
    """It passes, it ran the README's commands, and rerun it repeats nothing."""
    env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "SIZE": "S", "RESOLUTION": "64",
           "PRESETS": "sdvae-xl2 sd35-xl2", "FLAGS": "--no-compile", "OUT": str(tmp_path / "out")}

    def start(code=0, **settings):
        return run_command("bash", ROOT / "benchmarks/dry_run.sh", cwd=tmp_path, env=env | settings,
                           code=code,
                           timeout=3600)

    printed = start()
    rows = read_rows(tmp_path / "out" / dry_run.RESULTS)
    ran = {row["name"]: row for row in rows if "seconds" in row}
    for what in ("losses exps/sdvae-xl2 4 exps/unstopped", "batch exps/sdvae-xl2/samples.npz 8 64",
                 "scores exps/sdvae-xl2/fid.json 8", "losses exps/e2e-sdvae-xl2 4"):
        assert f"passed: {what}" in printed
    for name in ("sdvae-xl2", "e2e-sdvae-xl2"):
        assert ran[name]["written"] > 4 * 4 * 39e6                      # weights, EMA, two moments of SiT-S
    assert ran["128-pixels"]["command"].endswith("--resolution 128 --batch-size 2 --max-train-steps 1")

    readme = (ROOT / "README.md").read_text().replace("\\\n", "")
    lines = [line.split("#")[0].split() for line in readme.splitlines() if line.startswith("torchrun")]
    assert len(lines) == 7
    for words in lines:
        for old, new in (("node=8", "node=2"), ("0400000", "0000004"), ("0020000", "0000004"),
                         ("$VAE", "pretrained/sd35")):
            words = [word.replace(old, new) for word in words]
        assert any(row["command"].split()[:len(words)] == words for row in ran.values()), words

    again = start()
    assert "passed" not in again and again.endswith(printed[printed.index("| | seconds"):])
    assert read_rows(tmp_path / "out" / dry_run.RESULTS) == rows
    one_line(start(2, SIZE="B"), "SIZE=B: choose XL or S")
