"""Runs that are killed, resumed, split over processes, damaged or mistyped."""
import argparse
import errno
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import images
from support import checkpoints, commands, devices, files
import fid
import train
import vae
from conftest import (CPU, ROOT, SHORT, flatten, losses, metrics_of, noise_pictures, one_line, run, slow,
                      tiny_config, torchrun)
from support.commands import UserError


@slow                                                                   # as it stands: test_machines.py
@pytest.mark.parametrize("flags", [["--gradient-checkpointing"], ["--compile"]])
def test_two_processes_give_the_losses_of_one(pictures, short_run, flags):
    run(*torchrun(2), ROOT / "train.py", "--data-dir", pictures, "--exp-name", "two", "--disc-weight", "0",
        "--overwrite", *flags, *SHORT, cwd=short_run)
    one, two = losses(short_run / "exps/a"), losses(short_run / "exps/two")
    assert [r["step"] for r in one] == [r["step"] for r in two] == [1, 2, 3, 4] and len(one[0]) > 5
    for a, b in zip(one, two):  # AdamW's first steps make much of roundings: they grow
        near = dict(rel=1e-3, abs=1e-4) if a["step"] < 3 else dict(rel=1e-2, abs=3e-3)
        assert "disc_loss" not in a and {k: b[k] for k in a} == pytest.approx(a, **near)


def test_a_killed_run_resumes_where_it_was(pictures, short_run, command):
    whole = losses(short_run / "exps/a")
    shutil.copytree(short_run / "exps/a", short_run / "exps/b")
    (short_run / "exps/b/checkpoints/0000004.pt").unlink()  # killed after step 3: its line stays behind
    command("train", "--data-dir", pictures, "--exp-name", "b", "--disc-weight", "0", "--resume",
            "--checkpointing-steps", "2", *SHORT, cwd=short_run)
    assert losses(short_run / "exps/b") == whole
    a, b = (files.load_tensors(short_run / f"exps/{x}/checkpoints/0000004.pt") for x in "ab")
    for key in ("model", "ema", "vae", "discriminator"):
        assert all(torch.equal(v, b[key][k]) for k, v in a[key].items()), key
    assert set(a) == {"model", "ema", "vae", "discriminator", "opt", "opt_vae", "opt_disc", "args", "steps"}
    assert type(a["args"]) is dict and a["steps"] == 4


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
    first = files.load_tensors(ckpt)
    last = files.load_tensors(tmp_path / "exps/cached/checkpoints/0000002.pt")
    assert all(torch.equal(t, last["vae"][name]) for name, t in first["vae"].items())
    for name in ("bn.running_mean", "bn.running_var"):                 # fixed at what the first run had
        assert torch.allclose(last["ema"][name], first["ema"][name], rtol=1e-5, atol=1e-6)
    out = command("train", "--exp-name", "plain", "--resume", *common, "--max-train-steps", "3", "--vae-ckpt", ckpt,
                  code=2)
    one_line(out, "was trained with --vae-grad none")


def test_what_is_logged_and_when(pictures, tmp_path, command):
    """PSNR and error of chroma with every picture, whatever --log-steps; the latents' variance is that of the norm;
    --overwrite leaves nothing of the run before."""
    flags = ["--data-dir", pictures, *SHORT, "--sampling-steps", "2"]
    command("train", *flags, "--log-steps", "3")
    exp = tmp_path / "exps/tiny"
    rows = {row.pop("step"): row for row in metrics_of(exp)}
    for name in ("val_psnr", "val_chroma_error"):
        assert {step: row.get(name, 0) > 0 for step, row in rows.items()} == {2: True, 3: False, 4: True}
    variance = files.load_tensors(exp / "checkpoints/0000004.pt")["model"]["bn.running_var"].mean().item()
    assert rows[4]["latent_variance"] == pytest.approx(variance, rel=1e-6) != rows[2]["latent_variance"]
    assert all(row["images_per_second"] > 0 and 0 < row["mfu"] < 1 for row in rows.values())
    assert sorted(p.name for p in (exp / "pictures").iterdir()) == [
        f"{kind}-000000{step}.png" for kind in ("reconstructions", "samples") for step in (2, 4)]
    (exp / "evaluation-0000004.json").write_text("{}")
    out = command("train", *flags, "--log-steps", "2", "--max-train-steps", "2", "--overwrite")
    assert "step 2: " in out and [row["step"] for row in metrics_of(exp)] == [2]
    assert sorted(p.name for p in exp.iterdir()) == [".lock", "args.json", "checkpoints", "metrics.jsonl", "pictures"]
    assert [p.name for p in checkpoints.checkpoints(exp)] == ["0000002.pt"]
    other = noise_pictures(tmp_path / "exps/mine", 2)  # a folder that no run made is not cleared
    command("train", *flags, "--exp-name", "mine", "--vae-only", "--overwrite")
    assert len(list(other.glob("*.png"))) == 2


def test_batch_must_divide_over_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="not divisible by 3, the processes"):
        train.parse_config(["--batch-size", "32"])


def test_a_run_is_not_overwritten(short_run, pictures, command):
    before = {p: p.stat().st_mtime for p in (short_run / "exps/a").rglob("*")}
    out = command("train", "--data-dir", pictures, "--exp-name", "a", "--device", "cpu", cwd=short_run, code=2)
    one_line(out, "holds checkpoints already", "--resume", "--overwrite")
    assert before == {p: p.stat().st_mtime for p in (short_run / "exps/a").rglob("*")}


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
    found = checkpoints.checkpoints(tmp_path / "exps/tiny")
    assert len(found) == 1 and "--resume goes on" in (tmp_path / "log").read_text()
    step = files.load_tensors(found[0])["steps"]
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
        if any(int(path.stem) > 140 for path in checkpoints.checkpoints(tmp_path / "exps/killed")):
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
    a, b = (files.load_tensors(tmp_path / f"exps/{name}/checkpoints/0000150.pt") for name in ("whole", "killed"))
    for key in train.STATE:
        for (name, x), (_, y) in zip(flatten(a[key]), flatten(b[key])):
            assert torch.equal(x, y), (key, name)
    assert not list(tmp_path.glob("exps/*/checkpoints/*.damaged"))


def test_damaged_checkpoints_are_set_aside(short_run, tmp_path, capsys):
    folder = tmp_path / "run/checkpoints"
    shutil.copytree(short_run / "exps/a/checkpoints", folder)
    data = bytearray((folder / "0000004.pt").read_bytes())
    data[len(data) // 2] ^= 1                                       # one bit of one weight
    (folder / "0000004.pt").write_bytes(data)
    (folder / "0000006.pt").write_bytes(data[:1000])
    assert checkpoints.newest_complete(tmp_path / "run").name == "0000002.pt"
    assert sorted(p.name for p in folder.iterdir()) == ["0000002.pt", "0000004.damaged", "0000006.damaged"]
    assert capsys.readouterr().out.count("set aside") == 2
    assert checkpoints.newest_complete(tmp_path / "nothing") is None


def test_old_checkpoints_go_but_for_the_newest_two_and_every_nth(tiny, tmp_path, monkeypatch):
    m, cfg, _ = tiny("--keep-every", "4")
    for step in range(1, 9):
        train.save_checkpoint(m, cfg, tmp_path, step, ["a"])
    assert [int(p.stem) for p in checkpoints.checkpoints(tmp_path)] == [4, 7, 8]
    saved = files.load_tensors(tmp_path / "checkpoints/0000008.pt")
    for key, net in (("model", m.sit), ("ema", m.ema), ("vae", m.vae), ("discriminator", m.disc)):  # all differ
        assert all(torch.equal(t, saved[key][name]) for name, t in net.state_dict().items())

    def full(state, file):
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="cannot write .*0000009.pt: .*No space left"):
        train.save_checkpoint(m, cfg, tmp_path, 9, ["a"])
    left = [p.name for p in sorted((tmp_path / "checkpoints").iterdir())]
    assert left == ["0000004.pt", "0000007.pt", "0000008.pt"]


def test_a_folder_in_use_is_refused(pictures, tmp_path, command, monkeypatch, capsys):
    (tmp_path / "exps/tiny").mkdir(parents=True)
    lock = ("import fcntl, sys\nf = open(sys.argv[1], 'w')\nfcntl.lockf(f, fcntl.LOCK_EX)\n"
            "print('held', flush=True)\ninput()")
    other = subprocess.Popen([sys.executable, "-c", lock, str(tmp_path / "exps/tiny/.lock")],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    one_line(command("train", "--data-dir", pictures, *SHORT, code=2), "another run is writing to it")
    other.communicate("\n")
    files.lock(tmp_path / "exps/tiny").close()

    def lockf(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "lockf", lockf)
    files.lock(tmp_path / "exps/tiny").close()  # a file system without locks: told, and on
    assert "no locks on this file system (No locks available)" in capsys.readouterr().out


def test_resuming_with_other_settings(short_run):
    cfg = tiny_config("--num-classes", "2", "--resume", "--learning-rate", "1e-5", "--lr-warmup-steps", "50",
                      "--max-train-steps", "9")
    m, said, classes = train.build(cfg, CPU), [], ["one", "two words"]
    path = short_run / "exps/a/checkpoints/0000004.pt"
    assert train.load_run(m, cfg, path, classes, said.append) == 4
    assert any("learning_rate: 0.002 -> 1e-05" in line for line in said)
    train.wrap(m, cfg, 1)
    batch = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.long), [""] * 4
    metrics = train.run_step(m, cfg, 4, batch, 0, 1)
    assert metrics["loss"].isfinite() and m.opt.param_groups[0]["lr"] == pytest.approx(1e-5 * 5 / 50)
    cfg.projector_dim = 64
    with pytest.raises(UserError, match="trained with --projector-dim 32; it cannot go on with 64"):
        train.load_run(m, cfg, path, classes, said.append)


TWO = """
import os, sys, time
sys.path.insert(0, {root!r})
import train, vae
devices.TIMEOUT = train.timedelta(seconds=15)
rank, batches, items = int(os.environ["RANK"]), 0, 0
encode, item = vae.Encoder.forward, images.ImageFolder.__getitem__

def disturbed(self, x):
    global batches
    training = train.torch.is_grad_enabled() and len(x) > 1  # not the one image that FLOPs are counted on
    batches += training
    if rank == 1 and batches == 2 and training:
        {inside}
    return encode(self, x)

def late(self, index):
    global items
    items += batches > 0
    if rank == 1 and items == 1:
        {between}
    return item(self, index)

vae.Encoder.forward, images.ImageFolder.__getitem__ = disturbed, late
commands.run_command(train.main)
"""


def start_two(pictures, folder, *flags, inside="pass", between="pass", code=0):
    """Two processes, of which the second does `inside` to its second batch x, or `between` before that."""
    (folder / "two.py").write_text(TWO.format(root=str(ROOT), inside=inside, between=between))
    return run(*torchrun(2), "two.py", "--data-dir", pictures, *SHORT, "--max-train-steps", "3", *flags, cwd=folder,
               code=code)


def test_a_nan_on_one_process_skips_the_step_of_both(pictures, tmp_path):
    start_two(pictures, tmp_path, "--disc-weight", "0.1", "--keep-every", "1", "--checkpointing-steps", "1",
              inside="x[0, 0, 0, 0] = float('nan')")
    rows = metrics_of(tmp_path / "exps/tiny")
    assert [row["skipped"] for row in rows] == [0, 1, 1]
    assert not math.isfinite(rows[1]["loss"]) and math.isfinite(rows[2]["loss"])
    a, b, c = (files.load_tensors(path) for path in checkpoints.checkpoints(tmp_path / "exps/tiny"))
    for key in train.STATE:
        for (name, x), (_, y), (_, z) in zip(*(flatten(ckpt[key]) for ckpt in (a, b, c))):
            same = torch.equal(x, y) or key == "ema"  # which moves on, towards unchanged weights
            assert same and y.isfinite().all() and z.isfinite().all(), (key, name)
    assert not torch.equal(b["vae"]["quant_conv.weight"], c["vae"]["quant_conv.weight"])


@slow
@pytest.mark.parametrize("what, reason", [("time.sleep(100)", "Ranks 1 failed to pass"), ("os._exit(9)", "error: ")])
def test_a_process_that_hangs_or_dies_ends_the_run(what, reason, pictures, tmp_path):
    started = time.time()
    out = start_two(pictures, tmp_path, between=what, code=1)
    assert "the processes lost each other: " in out and reason in out and time.time() - started < 95


BAD_COMMANDS = [
    ("train", "--preset huge", "unknown; take one of tiny"),
    ("train", "--model SiT-Q/2", "write SiT-SIZE/PATCH"),
    ("train", "--model SiT-T/3", "does not divide"),
    ("train", "--vae f9d9", "take one of f8d4"),
    ("train", "--enc-type resnet999", "not a timm model"),
    ("train", "--enc-type mocov3-vit-b", "no MoCo-v3 weights"),
    ("train", "--resolution 30", "not divisible by the VAE's stride 4"),
    ("train", "--resolution zero", "must be a whole number above 0"),
    ("train", "--encoder-depth 9", "has blocks 1 to 6"),
    ("train", "--batch-size 0", "must be a whole number above 0"),
    ("train", "--batch-size 6 --gradient-accumulation-steps 4", "not divisible by 4"),
    ("train", "--ema-decay 1.5", "must be a number in [0, 1]"),
    ("train", "--cfg-prob nan", "must be a number in [0, 1]"),
    ("train", "--cfg-prob 0", "needs labels dropped"),
    ("train", "--seed -1", "must be a whole number, 0 or more"),
    ("train", "--learning-rate nan", "must be a number above 0"),
    ("train", "--learning-rate inf", "must be a number above 0"),
    ("train", "--kl-weight -1", "must be a number, 0 or more"),
    ("train", "--data-dir nowhere", "must be a folder that exists"),
    ("train", "--data-dir notes.pt", "must be a folder that exists"),
    ("train", "--data-dir empty", "no images in it"),
    ("train", "--data-dir hollow", "no images in it"),
    ("train", "--data-dir few --num-classes 12", "few has 1"),
    ("train", "--val-dir nowhere", "must be a folder that exists"),
    ("train", "--vae-ckpt nowhere.pt --data-dir few", "no such file"),
    ("train", "--init-from nowhere.pt", "must be a file or folder that exists"),
    ("train", "--init-from good.pt --data-dir few", "not a training checkpoint"),
    ("train", "--vae-ckpt notes.pt --data-dir few", "not a readable weights file"),
    ("train", "--vae-ckpt other.pt --data-dir few", "no VAEs in it"),
    ("train", "--preset sdvae-xl2", "needs --data-dir"),
    ("train", "--preset sdvae-xl2 --data-dir few", "--vae-ckpt FILE, or --vae-from-scratch"),
    ("train", "--mixed-precision fp16", "invalid choice"),
    ("train", "--no-such-flag", "unrecognized"),
    ("train", "--resume --overwrite", "exclude each other"),
    ("train", "--vae-grad none", "give a trained one by --vae-ckpt"),
    ("train", "--vae-grad none --vae-ckpt other.pt --data-dir few", "no VAEs in it"),
    ("train", "--proj-coeff 0", "no alignment for the VAE"),
    ("train", "--vae-only --vae-grad diffusion", "drop it or --vae-grad"),
    ("train", "--cache-latents", "latents that stay"),
    ("train", "--cache-latents --flip --vae-grad none --vae-ckpt good.pt", "no --flip"),
    ("train", "--device abacus", "no such device"),
    ("sample", "", "no checkpoint under exps"),
    ("sample", "--ckpt notes.pt", "not a readable weights file"),
    ("sample", "--ckpt other.pt", "not a training checkpoint"),
    ("sample", "--ckpt evil.pt", "refused"),
    ("sample", "--mode euler", "invalid choice"),
    ("fid", "few", "SAMPLES is missing"),
    ("fid", "few nowhere", "must be a file or folder that exists"),
    ("fid", "few empty", "no images in it"),
    ("fid", "few junk.npz", "not a readable .npz"),
    ("fid", "few few --metrics fdi", "unknown"),
    ("fid", "few few --features vit_of_no_one", "not a timm model"),
    ("fid", "few few --batch-size 0", "must be a whole number above 0"),
    ("vae", "export notes.pt out", "not a readable weights file"),
    ("vae", "export good.pt out", "no latent statistics"),
    ("vae", "export other.pt out", "no VAEs in it"),
    ("vae", "polish good.pt", "invalid choice")]


@pytest.fixture(scope="session")
def bad_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    for name in ("empty", "few/a", "hollow/a"):
        (folder / name).mkdir(parents=True)
    noise_pictures(folder / "few/a", 2)
    (folder / "notes.pt").write_text("hello")
    (folder / "junk.npz").write_bytes(b"PK junk")
    torch.save({"weights": torch.zeros(3)}, folder / "other.pt")
    torch.save({"model": Evil()}, folder / "evil.pt")
    torch.save(vae.AutoencoderKL("f4d8").state_dict(), folder / "good.pt")
    return folder


class Evil:
    def __reduce__(self):
        return os.system, ("touch owned",)


@pytest.mark.parametrize("script, flags, message", BAD_COMMANDS)
def test_bad_commands_end_in_one_line(script, flags, message, bad_folder, command):
    def contents():
        return sorted((str(p), p.stat().st_size) for p in bad_folder.rglob("*"))

    before = contents()
    one_line(command(script, *flags.split(), cwd=bad_folder, code=2), message)
    if (bad_folder / "exps").exists():  # an empty run's folder with its lock at most
        assert all(p.name == ".lock" for p in (bad_folder / "exps").rglob("*") if p.is_file())
        shutil.rmtree(bad_folder / "exps")
    assert contents() == before


@slow
def test_mutated_files_crash_nothing(tmp_path, short_run):
    """3,000 mutated files through the readers: an error of ours or a result, no crash, no hang, no GBs."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8))
    for suffix in ("png", "jpg", "gif", "webp", "bmp", "tif"):
        picture.save(tmp_path / f"a.{suffix}")
    np.savez_compressed(tmp_path / "a.npz", arr_0=np.zeros((3, 8, 8, 3), np.uint8), mu=np.zeros(4), sigma=np.eye(4))
    torch.save({"a": torch.zeros(50), "args": argparse.Namespace(x=1)}, tmp_path / "a.pt")
    vae.save_file({"a": torch.zeros(50)}, tmp_path / "a.safetensors")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/config.json").write_text(json.dumps(dict(latent_channels=8, scaling_factor=0.2,
                                                                 latents_mean=[0.0] * 8, latents_std=[1.0] * 8)))
    vae.save_file({"a": torch.zeros(50)}, tmp_path / "folder" / vae.WEIGHTS[0])

    def npz(path):
        source = fid.ImageSet(path)
        list(source.batches(range(source.n), 2))

    readers = {path: reader for pattern, reader in (("a.???", images.read_image), ("a.webp", images.read_image),
               ("a.npz", npz), ("a.pt", files.load_tensors), ("a.safetensors", files.load_tensors))
               for path in tmp_path.glob(pattern)}
    readers[tmp_path / "folder/config.json"] = lambda p: vae.load_vae(p.parent)
    refused, total = 0, 0
    for path, reader in readers.items():
        good = path.read_bytes()
        target = path if path.name == "config.json" else path.with_name("mutated" + path.suffix)
        for _ in range(3000 // len(readers)):
            data = bytearray(good)
            for _ in range(rng.integers(1, 6)):
                data[rng.integers(len(data))] = rng.integers(256)
            target.write_bytes(bytes(data[:rng.integers(1, len(data))] if rng.random() < 0.3 else data))
            total += 1
            try:
                reader(target)
            except UserError:
                refused += 1
        path.write_bytes(good)
    assert refused > total / 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 6e6   # KB: torch, the fixtures, and no more
