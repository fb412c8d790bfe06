"""Runs of one process: what they log, killed and resumed, with other settings and by wrong flags."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import train
import vae
from conftest import (CPU, ROOT, SHORT, flatten, losses, metrics_of, noise_pictures, one_line, run, slow,
                      tiny_config, torchrun)
from data.images import list_images, read_image
from support.checkpoints import checkpoints
from support.commands import UserError
from support.files import load_tensors
from support.pictures import to_float

KEYS = ("model", "ema", "vae", "discriminator", "opt", "opt_vae", "opt_disc")                # of a checkpoint


# --- Whole runs -------------------------------------------------------------------------------------------------------

def test_the_regimes_train_on_what_vae_only_made(pictures, tmp_path, command):
    common = ["--data-dir", pictures, "--disc-weight", "0", *SHORT, "--max-train-steps", "2"]
    command("train", "--exp-name", "v", "--vae-only", *common)
    ckpt = tmp_path / "exps/v/checkpoints/0000002.pt"
    assert not list((tmp_path / "exps/v/pictures").glob("samples*"))
    one_line(command("sample", "--ckpt", ckpt, "--device", "cpu", code=2), "no SiT to draw with")
    frozen = ["--vae-grad", "none", "--vae-ckpt", ckpt, *common]
    command("train", "--exp-name", "plain", *frozen)
    command("train", "--exp-name", "cached", "--cache-latents", *frozen)
    plain, cached = losses(tmp_path / "exps/plain"), losses(tmp_path / "exps/cached")
    for a, b in zip(plain, cached):                                    # float16 moments
        assert "vae_loss" not in a and all(b[k] == pytest.approx(v, rel=5e-3, abs=1e-3) for k, v in a.items())
    first = load_tensors(ckpt)
    last = load_tensors(tmp_path / "exps/cached/checkpoints/0000002.pt")
    assert all(torch.equal(t, last["vae"][name]) for name, t in first["vae"].items())
    for name in ("bn.running_mean", "bn.running_var"):                 # fixed at what the first run had
        assert torch.allclose(last["ema"][name], first["ema"][name], rtol=1e-5, atol=1e-6)
    out = command("train", "--exp-name", "plain", "--resume", *common, "--max-train-steps", "3", "--vae-ckpt", ckpt,
                  code=2)
    one_line(out, "was trained with --vae-grad none")


def test_what_is_logged_and_when(pictures, tmp_path, command):
    """PSNR and error of chroma of training images with every picture, whatever --log-steps; the latents' variance;
    --overwrite leaves nothing of the run before; without pictures nothing of them, and the last step's line."""
    flags = ["--data-dir", pictures, *SHORT, "--sampling-steps", "2"]
    command("train", *flags, "--log-steps", "3")
    exp = tmp_path / "exps/tiny"
    rows = {row.pop("step"): row for row in metrics_of(exp)}
    for name in ("train_psnr", "train_chroma_error"):
        assert {step: row.get(name, 0) > 0 for step, row in rows.items()} == {2: True, 3: False, 4: True}
    variance = load_tensors(exp / "checkpoints/0000004.pt")["model"]["bn.running_var"].mean().item()
    assert rows[4]["latent_variance"] == pytest.approx(variance, rel=1e-6) != rows[2]["latent_variance"]
    assert all(row["images_per_second"] > 0 for row in rows.values())
    net, _ = vae.load_vae(exp / "checkpoints/0000004.pt")
    x = to_float(torch.stack([read_image(file, 32) for file in list_images(pictures)]))
    with torch.no_grad():
        rec = net.decode(net.encode(x).mean)
    assert rows[4]["train_psnr"] == pytest.approx(vae.psnr(x, rec).mean().item(), abs=1e-3)
    assert rows[4]["train_chroma_error"] == pytest.approx(vae.chroma_error(x, rec).mean().item(), rel=1e-3)
    assert json.loads((exp / "args.json").read_text())["classes"] == ["one", "two words"]
    assert sorted(p.name for p in (exp / "pictures").iterdir()) == [
        f"{kind}-000000{step}.png" for kind in ("reconstructions", "samples") for step in (2, 4)]
    (exp / "evaluation-0000004.json").write_text("{}")
    out = command("train", *flags, "--log-steps", "2", "--max-train-steps", "2", "--vae-only", "--overwrite")
    assert "step 2: " in out and [row["step"] for row in metrics_of(exp)] == [2]
    assert sorted(p.name for p in exp.iterdir()) == [".lock", "args.json", "checkpoints", "metrics.jsonl", "pictures"]
    assert [p.name for p in (exp / "pictures").iterdir()] == ["reconstructions-0000002.png"]
    assert [p.name for p in checkpoints(exp)] == ["0000002.pt"]
    command("train", *flags, "--exp-name", "plain", "--vae-only", "--sampling-steps", "0", "--log-steps", "3")
    rows = metrics_of(tmp_path / "exps/plain")                                       # the last step's line stays
    assert [row["step"] for row in rows] == [3, 4] and not any("train_psnr" in row for row in rows)
    assert not (tmp_path / "exps/plain/pictures").exists() and len(checkpoints(tmp_path / "exps/plain")) == 1
    other = noise_pictures(tmp_path / "exps/mine", 2)  # a folder that no run made is not cleared
    command("train", *flags, "--exp-name", "mine", "--vae-only", "--overwrite")
    assert len(list(other.glob("*.png"))) == 2


def test_gradients_that_stay_wrong_end_the_run(pictures, tmp_path, command):
    """After 20 steps of NaN (100 of exact zeros), of which the alarm is told by the next line of the log."""
    flags = ["--data-dir", pictures, *SHORT, "--vae-only", "--max-train-steps", "60", "--checkpointing-steps", "10"]
    out = command("train", *flags, "--vae-learning-rate", "1e38", "--lr-warmup-steps", "0", "--log-steps", "9", code=2)
    one_line(out, "step 27: gradients not finite for 20 consecutive steps", "last good checkpoint: 0000020.pt")
    rows = metrics_of(tmp_path / "exps/tiny")
    assert [row["skipped_in_a_row"] for row in rows] == [8, 17, 20] and rows[-1]["skipped"] == 26
    yes, no = torch.tensor(True), torch.tensor(False)
    for before, happened, after in ((3, yes, 4), (3, no, 0), (19, yes, 20), (20, no, 20), (20, yes, 20)):
        assert train.in_a_row(torch.tensor(before), happened, train.SKIPPED) == after


def test_a_failed_grid_costs_no_checkpoint(pictures, tmp_path, command):
    """Also: one class and an average of few steps are named."""
    (tmp_path / "exps/tiny").mkdir(parents=True)
    (tmp_path / "exps/tiny/pictures").write_text("not a folder")
    out = command("train", "--data-dir", pictures / "one", *SHORT, "--sampling-steps", "4", "--ema-decay", "0.9999",
                  "--disc-weight", "0")
    assert "step 4: no images (cannot write" in out and len(checkpoints(tmp_path / "exps/tiny")) == 1
    assert "is one class" in out and "to 0.0% trained ones; sample.py --no-ema" in out


@pytest.mark.parametrize("workers", [0, 1])
def test_a_lost_disk_costs_no_step(tmp_path, workers):
    data = noise_pictures(tmp_path / "data/a", 12).parent
    flags = ["--data-dir", data, *SHORT, "--vae-only", "--max-train-steps", "2000", "--num-workers", workers]
    process = start(*flags, cwd=tmp_path, log=tmp_path / "log")
    wait_for_step(tmp_path / "exps/tiny", 3, process)
    shutil.rmtree(data)
    assert process.wait(60) == 2
    one_line((tmp_path / "log").read_text(), "none of 12 images tried is readable")
    found, rows = checkpoints(tmp_path / "exps/tiny"), metrics_of(tmp_path / "exps/tiny")
    assert [load_tensors(file)["steps"] for file in found] == [rows[-1]["step"]]


# --- Stopped, killed, resumed -----------------------------------------------------------------------------------------

def test_a_killed_run_resumes_where_it_was(pictures, short_run, command):
    whole = losses(short_run / "exps/a")
    shutil.copytree(short_run / "exps/a", short_run / "exps/b")
    (short_run / "exps/b/checkpoints/0000004.pt").unlink()  # killed after step 3: its line stays behind
    command("train", "--data-dir", pictures, "--exp-name", "b", "--disc-weight", "0", "--resume",
            "--checkpointing-steps", "2", *SHORT, cwd=short_run)
    assert losses(short_run / "exps/b") == whole
    a, b = (load_tensors(short_run / f"exps/{x}/checkpoints/0000004.pt") for x in "ab")
    for key in ("model", "ema", "vae", "discriminator"):
        assert all(torch.equal(v, b[key][k]) for k, v in a[key].items()), key
    assert set(a) == {"model", "ema", "vae", "discriminator", "opt", "opt_vae", "opt_disc", "args", "steps"}
    assert type(a["args"]) is dict and a["steps"] == 4


def start(*flags, cwd, log, processes=1):
    """A short training run in the background."""
    command = [*([sys.executable] if processes == 1 else torchrun(processes)), ROOT / "train.py", *flags]
    return subprocess.Popen([str(word) for word in command], cwd=cwd, stdout=open(log, "w"), stderr=subprocess.STDOUT,
                            start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for_step(folder, step, process):
    metrics, deadline = folder / "metrics.jsonl", time.time() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= step):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=slow)])
def test_sigterm_saves_and_resuming_goes_on(pictures, tmp_path, processes, command):
    flags = ["--data-dir", pictures, *SHORT, "--vae-only", "--max-train-steps", "2000", "--num-workers", "1"]
    process = start(*flags, cwd=tmp_path, log=tmp_path / "log", processes=processes)
    wait_for_step(tmp_path / "exps/tiny", 3, process)
    os.killpg(process.pid, signal.SIGTERM)                          # to the loader's workers too
    code = process.wait(60)
    assert code == 0 or processes == 2                              # torchrun itself reports the signal
    found = checkpoints(tmp_path / "exps/tiny")
    assert len(found) == 1 and "resume" in (tmp_path / "log").read_text()
    step = load_tensors(found[0])["steps"]
    flags[flags.index("2000")] = str(step + 1)
    command("train", *flags, "--resume")
    assert [row["step"] for row in losses(tmp_path / "exps/tiny")] == list(range(1, step + 2))


def test_a_crash_ends_its_loader_processes(pictures, tmp_path):
    """They ignore SIGTERM, and multiprocessing waits for its processes at exit."""
    (tmp_path / "crash.py").write_text("import train\ndef crash(*args):\n    raise RuntimeError('crash')\n"
                                       "train.run_step = crash\ntrain.main()\n")
    out = run(sys.executable, "crash.py", "--data-dir", pictures, *SHORT, "--num-workers", "2", cwd=tmp_path, code=1,
              timeout=60)
    assert "RuntimeError: crash" in out


@slow
def test_25_kills_change_nothing(pictures, tmp_path):
    flags = ["--data-dir", pictures, *SHORT, "--disc-weight", "0.1", "--disc-start", "0", "--max-train-steps", "150",
             "--checkpointing-steps", "3", "--resume"]
    run(sys.executable, ROOT / "train.py", *flags, "--exp-name", "whole", cwd=tmp_path)
    rng = np.random.default_rng(0)
    for _ in range(25):  # each within a second after the first step
        if any(int(path.stem) > 140 for path in checkpoints(tmp_path / "exps/killed")):
            break
        process = start(*flags, "--exp-name", "killed", cwd=tmp_path, log=tmp_path / "log")
        while "loss" not in (tmp_path / "log").read_text():
            assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 1))
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    run(sys.executable, ROOT / "train.py", *flags, "--exp-name", "killed", cwd=tmp_path)
    assert losses(tmp_path / "exps/whole") == losses(tmp_path / "exps/killed")
    a, b = (load_tensors(tmp_path / f"exps/{name}/checkpoints/0000150.pt") for name in ("whole", "killed"))
    for key in KEYS:
        for (name, x), (_, y) in zip(flatten(a[key]), flatten(b[key])):
            assert torch.equal(x, y), (key, name)
    assert not list(tmp_path.glob("exps/*/checkpoints/*.damaged"))


# --- Resuming with other settings -------------------------------------------------------------------------------------

OTHERWISE = dict(                                           # what no run goes on with: it would train something else
    model="SiT-S/2", vae="f4d32", resolution=64, num_classes=3, qk_norm=True, cfg_prob=0.2, path_type="cosine",
    enc_type="resnet18", projector="conv", projector_dim=64, encoder_depth=3, vae_grad="both", vae_only=True,
    latent_norm=False)


def test_resuming_with_other_settings(short_run):
    cfg = tiny_config("--num-classes", "2", "--resume", "--learning-rate", "1e-5", "--lr-warmup-steps", "50",
                      "--max-train-steps", "9")
    m, said, classes = train.build(cfg, CPU), [], ["one", "two words"]
    path = short_run / "exps/a/checkpoints/0000004.pt"
    assert train.resume(m, cfg, path, classes, said.append) == 4
    assert any("learning_rate: 0.002 -> 1e-05" in line for line in said)
    train.wrap(m, cfg, 1)
    batch = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.long), [""] * 4
    metrics = train.run_step(m, cfg, 4, batch, 0, 1)
    assert metrics["loss"].isfinite() and m.opt.param_groups[0]["lr"] == pytest.approx(1e-5 * 5 / 50)
    assert set(OTHERWISE) == set(train.FIXED)
    for name, value in OTHERWISE.items():
        before = getattr(cfg, name)
        setattr(cfg, name, value)
        option = name.replace("_", "-")
        with pytest.raises(UserError, match=f"trained with --{option} {before}; it cannot go on with {value}$"):
            train.resume(m, cfg, path, classes, said.append)
        setattr(cfg, name, before)


def test_a_run_is_not_overwritten(short_run, pictures, command):
    before = {p: p.stat().st_mtime for p in (short_run / "exps/a").rglob("*")}
    out = command("train", "--data-dir", pictures, "--exp-name", "a", "--device", "cpu", cwd=short_run, code=2)
    one_line(out, "holds checkpoints already", "--resume", "--overwrite")
    assert before == {p: p.stat().st_mtime for p in (short_run / "exps/a").rglob("*")}


def test_pictures_of_a_run_that_reads_latents_alone(pictures, frozen_vae, tmp_path, command):
    """Without alignment the data set gives no pixels, and without --val-dir the pictures shown are its own."""
    command("train", "--data-dir", pictures, *SHORT, "--vae-grad", "none", "--cache-latents", "--vae-ckpt", frozen_vae,
            "--proj-coeff", "0", "--max-train-steps", "1")
    assert metrics_of(tmp_path / "exps/tiny")[0]["train_psnr"] > 0
    with Image.open(tmp_path / "exps/tiny/pictures/reconstructions-0000001.png") as grid:
        assert len(np.unique(np.asarray(grid))) > 50                    # not white: the pictures are there


def test_overwriting_begins_once_everything_is_found_right(pictures, tmp_path, command):
    flags = ["--data-dir", pictures, *SHORT, "--max-train-steps", "1", "--vae-only"]
    command("train", *flags)
    before = sorted((tmp_path / "exps/tiny").rglob("*"))
    (tmp_path / "empty").mkdir()
    out = command("train", *flags, "--overwrite", "--val-dir", tmp_path / "empty", code=2)
    one_line(out, "no images in it")
    assert sorted((tmp_path / "exps/tiny").rglob("*")) == before
