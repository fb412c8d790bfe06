"""Several processes, and two machines (each in a folder of its own with a copy of the pictures)."""
import json
import math
import multiprocessing
import os
import shutil
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import repa
from conftest import ROOT, SHORT, flatten, losses, metrics_of, one_line, run, run_here, slow, torchrun
from data import images
from support.checkpoints import checkpoints
from support.files import load_tensors

TRAIN = ["--data-dir", "pictures", *SHORT, "--max-train-steps", "6", "--checkpointing-steps", "3",
         "--disc-weight", "0"]


def work(folder, env, script, *flags):
    """A process's whole life: a command in a folder, as torchrun would have started it; prints to FOLDER-RANK.log."""
    log = os.open(f"{folder}-{env['RANK']}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ.update(env)
    torch.set_num_threads(1)
    sys.exit(run_here(script, *flags, cwd=folder))


def work_in_small_files(*args):
    images.CHUNK = 8
    work(*args)


def two_machines(folder, script, *flags, processes=1, code=0, work=work):
    """A command by `processes` in folder/node0 and as many in folder/node1; their exit codes checked, what each has
    printed. They are forked from one that has imported everything, which saves seconds a process."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conftest"])
    jobs, logs = [], []
    for rank in range(2 * processes):
        machine = folder / f"node{rank // processes}"
        env = dict(RANK=rank, WORLD_SIZE=2 * processes, LOCAL_RANK=rank % processes, LOCAL_WORLD_SIZE=processes,
                   MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        env = {name: str(value) for name, value in env.items()}
        jobs.append(context.Process(target=work, args=(machine, env, script, *flags)))
        jobs[-1].start()
        logs.append(Path(f"{machine}-{rank}.log"))
    try:
        for job in jobs:
            job.join(300)
    finally:
        for job in jobs:
            job.kill()
    printed = [log.read_text() for log in logs]
    assert [job.exitcode for job in jobs] == [code] * len(jobs), "\n".join(printed)
    return printed


def one_process(folder, script, *flags):
    """The same by one process, this one, with as many threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert run_here(script, *flags, cwd=folder / "one") == 0
    torch.set_num_threads(threads)


def near(a, b):
    """Rows of losses, alike but for roundings, of which AdamW's first steps make much."""
    assert len(a) == len(b) > 0 and set(a[0]) == set(b[0])
    for x, y in zip(a, b):
        assert y == pytest.approx(x, **(dict(rel=1e-3, abs=1e-4) if x["step"] < 3 else dict(rel=1e-2, abs=3e-3)))


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """A folder with one/, node0/ and node1/: six steps by one process, and by two machines."""
    folder = tmp_path_factory.mktemp("machines")
    for name in ("one", "node0", "node1"):                  # other times, so that no name may come from them
        shutil.copytree(pictures, folder / name / "pictures", copy_function=shutil.copy)
    one_process(folder, "train", "--exp-name", "a", *TRAIN)
    two_machines(folder, "train", "--exp-name", "a", *TRAIN)
    return folder


def test_training_on_two_machines_has_the_losses_of_one_process(trained):
    near(losses(trained / "one/exps/a"), losses(trained / "node0/exps/a"))
    one, two = (metrics_of(trained / name / "exps/a") for name in ("one", "node0"))
    for name in ("grad_norm", "vae_grad_norm"):                        # of the mean gradient, not of each one's
        assert [row[name] for row in two[:2]] == pytest.approx([row[name] for row in one[:2]], rel=1e-3)
    assert [p.name for p in (trained / "node1").iterdir()] == ["pictures"]       # the first machine writes


def test_the_discriminators_gradient_is_the_mean_of_its_processes(trained):
    """Its batch norm sees each process's share alone: as one process sees the parts of a batch."""
    flags = ["--exp-name", "gan", *TRAIN, "--disc-weight", "0.1", "--disc-start", "0", "--max-train-steps", "1"]
    one_process(trained, "train", *flags, "--gradient-accumulation-steps", "2")
    two_machines(trained, "train", *flags)
    (one,), (two,) = (metrics_of(trained / name / "exps/gan") for name in ("one", "node0"))
    for name in ("disc_loss", "gan_loss", "disc_grad_norm", "vae_grad_norm"):
        assert two[name] == pytest.approx(one[name], rel=1e-3), name


def test_resuming_needs_the_checkpoint_on_every_machine(trained):
    for name in ("one", "node0"):
        shutil.copytree(trained / "node0/exps/a", trained / name / "exps/b")
        (trained / name / "exps/b/checkpoints/0000006.pt").unlink()
    command = ["train", "--exp-name", "b", "--resume", *TRAIN]
    for printed in two_machines(trained, *command, code=2):
        one_line(printed, "exps/b/checkpoints/0000003.pt: not on every machine")
    shutil.copytree(trained / "node0/exps/b", trained / "node1/exps/b")
    two_machines(trained, *command)
    near(losses(trained / "one/exps/a"), losses(trained / "node0/exps/b"))


def test_sampling_and_evaluating_on_two_machines_give_one_process_s_numbers(trained):
    """11 images by batches of 4: the last round has 3 for two processes. (No batch is of one image: matrix products of
    one row are rounded otherwise, a level in a few pixels.)"""
    shutil.copytree(trained / "one/exps/a", trained / "same/exps/a")
    checkpoint = trained / "same/exps/a/checkpoints/0000006.pt"
    drawing = ["--ckpt", checkpoint, "--num-samples", 11, "--num-steps", 3, "--mode", "sde", "--device", "cpu",
               "--batch-size", 4, "--mixed-precision", "no"]
    judging = ["--data-dir", "pictures", "--features", repa.LITE2, "--num-workers", 0]
    for out, command in (("x.npz", ["sample", *drawing, "--out"]), ("x.json", ["fid", *drawing, *judging, "--json"])):
        before = sorted(p.name for p in (trained / "node0").iterdir())
        one_process(trained, *command, out)
        two_machines(trained, *command, out)
        assert sorted(p.name for p in (trained / "node0").iterdir()) == sorted([*before, out])
        assert not (trained / "node1" / out).exists()
    one, two = (np.load(trained / name / "x.npz")["arr_0"] for name in ("one", "node0"))
    assert one.shape == (11, 32, 32, 3) and one.dtype == np.uint8 and np.array_equal(one, two)
    assert len(np.unique(one, axis=0)) == 11
    one, two = (json.loads((trained / name / "x.json").read_text()) for name in ("one", "node0"))
    one["seconds"] = two["seconds"]
    assert len(one) > 5 and one == {name: pytest.approx(value) for name, value in two.items()}


@slow
def test_cached_latents_on_two_machines(trained, monkeypatch):
    """Files of 8 images, so that there are three of them: made on one machine, they are missing on the other."""
    command = ["train", "--exp-name", "cached", "--cache-latents", "--vae-grad", "none", "--vae-ckpt",
               trained / "one/exps/a/checkpoints/0000006.pt", *TRAIN]
    monkeypatch.setattr(images, "CHUNK", 8)
    one_process(trained, *command)
    two_machines(trained, *command, work=work_in_small_files)
    near(losses(trained / "one/exps/cached"), losses(trained / "node0/exps/cached"))
    cached = [sorted((trained / name / "exps").glob("latents-*/*")) for name in ("one", "node0", "node1")]
    assert all([p.name for p in files] == [f"{k:06d}.pt" for k in range(3)] for files in cached)
    assert cached[1][0].parent.name == cached[2][0].parent.name
    for files in zip(*cached):
        one, *others = (torch.load(file, weights_only=True) for file in files)
        assert len(one) == 8 and one.isfinite().all() and all(torch.equal(one, other) for other in others)


@slow
def test_every_machine_draws_its_own_pictures(tmp_path):
    """Two processes a machine: the second of a machine waits for the first."""
    for k in range(2):
        (tmp_path / f"node{k}").mkdir()
    two_machines(tmp_path, "train", *SHORT, "--num-classes", "0", "--max-train-steps", "1", processes=2)
    drawn = [sorted(p.name for p in (tmp_path / f"node{k}/data/openmoji-32").rglob("*.png")) for k in range(2)]
    assert drawn[0] == drawn[1] and len(drawn[0]) > 4000


# --- Two processes of one machine -------------------------------------------------------------------------------------

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


TWO = """
import os, sys, time
sys.path.insert(0, {root!r})
import data.images, support.devices, train, vae
support.devices.TIMEOUT = support.devices.timedelta(seconds=15)
rank, batches, items = int(os.environ["RANK"]), 0, 0
encode, item = vae.Encoder.forward, data.images.ImageFolder.__getitem__

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

vae.Encoder.forward, data.images.ImageFolder.__getitem__ = disturbed, late
train.run_command(train.main)
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
    a, b, c = (load_tensors(path) for path in checkpoints(tmp_path / "exps/tiny"))
    for key in ("model", "ema", "vae", "discriminator", "opt", "opt_vae", "opt_disc"):
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
