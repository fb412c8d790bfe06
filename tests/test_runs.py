"""Runs of one process: what they log and save; stopped, killed and resumed."""
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

import train
import vae
from conftest import (
    CPU,
    ROOT,
    SHORT,
    flatten,
    losses,
    metrics_of,
    noise_images,
    one_line,
    slow,
    tiny_config,
    torchrun,
)
from data.images import list_images, read_image
from support.checkpoints import checkpoints, newest_checkpoint, resume
from support.commands import UserError
from support.files import load_tensors
from support.grids import to_float


def newest(run):
    return load_tensors(checkpoints(run)[-1])


# --- Whole runs ---------------------------------------------------------------------------------------------

def test_frozen_regimes_train_on_a_vae_from_vae_only(image_dir, tmp_path, command):
    exps, common = tmp_path / "exps", ["--data-dir", image_dir, "--disc-weight", "0", *SHORT,
                                       "--max-train-steps", "2"]
    command("train", "--exp-name", "v", "--vae-only", *common)
    ckpt, first = exps / "v/checkpoints/0000002.pt", newest(exps / "v")
    assert set(first) == {"model", "ema", "vae", "opt_vae", "args", "steps"} and len(first["model"]) < 5
    for name, flags in dict(plain=["--sampling-steps", "2"], cached=["--cache-latents"], unaligned=[
            "--cache-latents", "--proj-coeff", "0", "--sampling-steps", "2"]).items():    # it reads no images
        command("train", "--exp-name", name, "--vae-grad", "none", "--vae-ckpt", ckpt, *common, *flags)
        last = newest(exps / name)
        assert all(torch.equal(t, last["vae"][key]) for key, t in first["vae"].items())
        for key in ("bn.running_mean", "bn.running_var"):              # fixed at those of the first run
            assert torch.allclose(last["ema"][key], first["ema"][key], rtol=1e-5, atol=1e-6)
    for a, b in zip(losses(exps / "plain"), losses(exps / "cached"), strict=True):         # float16 moments
        assert "vae_loss" not in a and a == pytest.approx(b, rel=5e-3, abs=1e-3)
    psnrs = [metrics_of(exps / name)[-1]["train_psnr"] for name in ("plain", "unaligned")]
    assert psnrs[0] == pytest.approx(psnrs[1], abs=1e-3)


def test_log_and_grids_of_a_run(image_dir, tmp_path, command):
    """PSNR of training images with every grid, whatever --log-steps is; the last step is always logged."""
    flags, exp = ["--data-dir", image_dir, *SHORT, "--log-steps", "3"], tmp_path / "exps/tiny"
    command("train", *flags, "--sampling-steps", "2")
    rows = {row.pop("step"): row for row in metrics_of(exp)}
    assert {step: row.get("train_psnr", 0) > 0 for step, row in rows.items()} == {2: True, 3: False, 4: True}
    variance = newest(exp)["model"]["bn.running_var"].mean().item()
    assert rows[4]["latent_variance"] == pytest.approx(variance, rel=1e-6) != rows[2]["latent_variance"]
    net, _ = vae.load_vae(exp / "checkpoints/0000004.pt")
    x = to_float(torch.stack([read_image(file, 32) for file in list_images(image_dir)]))
    with torch.no_grad():
        rec = net.decode(net.encode(x).mean)
    assert rows[4]["train_psnr"] == pytest.approx(vae.psnr(x, rec).mean().item(), abs=1e-3)
    assert json.loads((exp / "args.json").read_text())["classes"] == ["one", "two words"]
    assert len(list((exp / "images").iterdir())) == 4


def test_gradients_that_stay_bad_end_the_run(image_dir, tmp_path, command):
    out = command("train", "--data-dir", image_dir, *SHORT, "--vae-only", "--max-train-steps", "60",
                  "--log-steps", "3",
                  "--checkpointing-steps", "10", "--vae-learning-rate", "1e38", "--lr-warmup-steps", "0",
                  code=2)
    one_line(out, "step 24: gradients not finite for 21 consecutive steps",
             "last good checkpoint: 0000020.pt")
    assert [row["skipped"] for row in metrics_of(tmp_path / "exps/tiny")] == list(range(2, 24, 3))


def test_failed_grids_cost_no_checkpoint(image_dir, tmp_path, command):
    """One class and an EMA over too few steps are printed, too."""
    (tmp_path / "exps/tiny").mkdir(parents=True)
    (tmp_path / "exps/tiny/images").write_text("not a folder")
    out = command("train", "--data-dir", image_dir / "one", *SHORT, "--sampling-steps", "4", "--ema-decay",
                  "0.9999",
                  "--disc-weight", "0")
    assert "step 4: no images (cannot write" in out and len(checkpoints(tmp_path / "exps/tiny")) == 1
    assert "is one class" in out and "after 4 steps only 0.0% of the averaged weights" in out


# --- Stopped, killed, resumed -------------------------------------------------------------------------------

def wait_for_step(folder, step, alive):
    metrics, deadline = folder / "metrics.jsonl", time.time() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= step):
        assert alive() and time.time() < deadline
        time.sleep(0.05)


def test_lost_disk_costs_no_step(tmp_path, command):
    data, exp = noise_images(tmp_path / "data/a", 12).parent, tmp_path / "exps/tiny"

    def lose():
        wait_for_step(exp, 3, lambda: True)
        shutil.rmtree(data)

    thread = threading.Thread(target=lose)
    thread.start()
    out = command("train", "--data-dir", data, *SHORT, "--vae-only", "--max-train-steps", "2000",
                  "--num-workers", "1",
                  code=2)
    thread.join()
    one_line(out, "none of 12 images tried is readable")
    assert newest(exp)["steps"] == metrics_of(exp)[-1]["step"] and len(checkpoints(exp)) == 1


def assert_same(run, other):
    """The same losses, and the same tensors in the last checkpoint."""
    assert losses(run) == losses(other)
    for (name, x), (_, y) in zip(flatten(newest(run)), flatten(newest(other)), strict=True):
        assert torch.equal(x, y), name


def test_resume_is_exact(image_dir, short_run, command):
    a, b = short_run / "exps/a", short_run / "exps/b"
    shutil.copytree(a, b)
    (b / "checkpoints/0000004.pt").unlink()                    # killed after step 3: its line stays behind
    command("train", "--data-dir", image_dir, "--exp-name", "b", "--disc-weight", "0", "--resume", *SHORT,
            cwd=short_run)
    assert_same(a, b)
    assert set(newest(a)) == {"model", "ema", "vae", "opt", "opt_vae", "args", "steps"}
    assert type(newest(a)["args"]) is dict and newest(a)["steps"] == 4


def test_newest_checkpoint_is_the_last_of_the_newest_run(tmp_path):
    for file, age in (("a/checkpoints/0000009.pt", 9), ("a/checkpoints/0000010.pt", 8),
                       ("b/checkpoints/0000099.pt", 7)):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
        os.utime(tmp_path / file, (age, age))
    assert newest_checkpoint(tmp_path) == tmp_path / "a/checkpoints/0000010.pt"


def start(*flags, cwd, processes=1):
    """A short training run in the background, its output in cwd/log."""
    command = [*([sys.executable] if processes == 1 else torchrun(processes)), ROOT / "train.py", *flags]
    return subprocess.Popen([str(word) for word in command], cwd=cwd, start_new_session=True,
                            stdout=open(cwd / "log", "w"), stderr=subprocess.STDOUT,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("processes, name", [(1, "SIGUSR1"), pytest.param(2, "SIGHUP", marks=slow)])
def test_signal_saves_a_checkpoint_to_resume_from(image_dir, tmp_path, processes, name, command):
    """The signal also reaches the loader processes. torchrun sends SIGTERM after a SIGHUP."""
    flags, exp = ["--data-dir", image_dir, *SHORT, "--vae-only", "--max-train-steps"], tmp_path / "exps/tiny"
    process = start(*flags, 2000, "--num-workers", 1, cwd=tmp_path, processes=processes)
    wait_for_step(exp, 3, lambda: process.poll() is None)
    one_line(command("train", *flags, 2000, "--resume", code=2), "another run is writing to it")
    for _ in range(processes):                                     # as a shell does, and torchrun
        os.killpg(process.pid, getattr(signal, name))
        time.sleep(0.05)
    code = process.wait(60)
    assert code == 0 or processes == 2                              # torchrun itself reports the signal
    assert len(checkpoints(exp)) == 1 and "resume with" in (tmp_path / "log").read_text()
    step = newest(exp)["steps"]
    command("train", *flags, step + 1, "--resume")
    assert [row["step"] for row in losses(exp)] == list(range(1, step + 2))


@slow
def test_resume_is_exact_after_25_kills(image_dir, tmp_path):
    """Every process with one thread: with two, sums round in another order. A kill between a checkpoint and
    its row of the log costs that row."""
    whole, killed, rng = tmp_path / "exps/whole", tmp_path / "exps/killed", np.random.default_rng(0)
    flags = ["--data-dir", image_dir, *SHORT, "--disc-weight", "0.1", "--disc-start", "0",
             "--max-train-steps", "150",
             "--checkpointing-steps", "3", "--resume", "--exp-name"]
    assert start(*flags, "whole", cwd=tmp_path).wait() == 0
    for _ in range(25):                                            # each within a second after the first step
        if any(int(path.stem) > 140 for path in checkpoints(killed)):
            break
        process = start(*flags, "killed", cwd=tmp_path)
        while "loss" not in (tmp_path / "log").read_text():
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 1))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert start(*flags, "killed", cwd=tmp_path).wait() == 0
    rows = {row["step"]: row for row in losses(killed)}
    assert all(row["step"] % 3 == 0 or row["step"] in rows for row in losses(whole))
    assert all(row == rows.get(row["step"], row) for row in losses(whole))
    for (name, x), (_, y) in zip(flatten(newest(whole)), flatten(newest(killed)), strict=True):
        assert torch.equal(x, y), name
    assert not list(killed.glob("checkpoints/*.damaged"))


# --- Resuming with other settings ---------------------------------------------------------------------------

IMMUTABLE = dict(                                              # they would train something else
    model="SiT-S/2", vae="f4d32", resolution=64, num_classes=3, qk_norm=True, cfg_prob=0.2,
    path_type="cosine",
    enc_type="resnet18", projector="conv", projector_dim=64, encoder_depth=3, vae_grad="both", vae_only=True,
    fixed_latent_stats=True, posterior_std=0.5, align_loss="mse")


def test_resuming_with_other_settings(short_run):
    cfg = tiny_config("--num-classes", "2", "--learning-rate", "1e-5", "--disc-weight", "0")
    m, printed = train.build(cfg, CPU), []

    def load(**changed):
        return resume(short_run / "exps/a/checkpoints/0000004.pt", m.parts(), vars(cfg) | changed,
                      train.IMMUTABLE,
                      ["one", "two words"], printed.append)

    assert load() == 4 and "resuming with a changed learning_rate: 0.002 -> 1e-05" in printed
    train.set_learning_rates(m, cfg, cfg.lr_warmup_steps)
    assert m.optimizers["sit"].param_groups[0]["lr"] <= 1e-5
    assert set(IMMUTABLE) == set(train.IMMUTABLE)
    for name, value in IMMUTABLE.items():
        flag, before = name.replace("_", "-"), getattr(cfg, name)
        with pytest.raises(UserError,
                           match=f"trained with --{flag} {before}; it cannot be resumed with {value}$"):
            load(**{name: value})


def test_old_vae_only_checkpoints_are_resumed(short_run, tmp_path):
    """They hold a whole SiT, of which only the latent statistics are taken."""
    cfg = tiny_config("--vae-only", "--disc-weight", "0", "--num-classes", "2")
    m, ckpt = train.build(cfg, CPU), newest(short_run / "exps/a")
    ckpt["args"]["vae_only"] = True
    torch.save(ckpt, tmp_path / "old.pt")
    resume(tmp_path / "old.pt", m.parts(), vars(cfg), train.IMMUTABLE, ["one", "two words"], print)
    assert torch.equal(m.sit.bn.running_mean, ckpt["model"]["bn.running_mean"])


def test_run_is_not_overwritten(short_run, image_dir, command):
    before = {p: p.stat().st_mtime for p in (short_run / "exps/a").rglob("*")}
    out = command("train", "--data-dir", image_dir, "--exp-name", "a", "--device", "cpu", cwd=short_run,
                  code=2)
    one_line(out, "holds checkpoints: --resume resumes", "--exp-name NAME", "remove the folder")
    assert before == {p: p.stat().st_mtime for p in (short_run / "exps/a").rglob("*")}
