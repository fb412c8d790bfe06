"""Several processes, and two machines (each in a folder of its own with a copy of the images)."""
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import time

import numpy as np
import pytest
import torch

import repa
import vae
from conftest import ROOT, SHORT, flatten, losses, metrics_of, one_line, run, run_here, slow, torchrun
from data import images
from support import devices
from support.checkpoints import checkpoints
from support.commands import run_command
from support.files import load_tensors

TRAIN = ["--data-dir", "data", *SHORT, "--max-train-steps", "6", "--checkpointing-steps", "3",
         "--disc-weight", "0"]


def start(target, processes, *args, machines=1):
    """Start target(*args, rank) in `processes` processes with torchrun's environment. They are forked from
    one that has imported everything, which saves seconds per process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conftest"])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    jobs, local = [], processes // machines
    for rank in range(processes):
        env = dict(RANK=rank, WORLD_SIZE=processes, LOCAL_RANK=rank % local, LOCAL_WORLD_SIZE=local,
                   MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        jobs.append(context.Process(target=launch, args=(env, target, *args, rank)))
        jobs[-1].start()
    return jobs


def launch(env, target, *args):
    os.environ.update({name: str(value) for name, value in env.items()})
    torch.set_num_threads(1)
    target(*args)


def exit_codes(jobs):
    deadline = time.time() + 300
    try:
        for job in jobs:
            job.join(deadline - time.time())
    finally:
        for job in jobs:
            job.kill()
    return [job.exitcode for job in jobs]


def work(folder, processes, prepare, script, flags, rank):
    """A command of one process on machine rank // processes; prints to FOLDER/RANK.log."""
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    if prepare:
        prepare(rank)
    sys.exit(run_here(script, *flags, cwd=folder / f"node{rank // processes}"))


def two_machines(folder, script, *flags, processes=1, code=0, prepare=None):
    """A command by `processes` in folder/node0 and as many in folder/node1; returns what each has printed."""
    jobs = start(work, 2 * processes, folder, processes, prepare, script, flags, machines=2)
    codes = exit_codes(jobs)
    printed = [(folder / f"{rank}.log").read_text() for rank in range(len(jobs))]
    assert codes == [code] * len(jobs), "\n".join(printed)
    return printed


def one_process(folder, script, *flags):
    """The same by one process, this one, with as many threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert run_here(script, *flags, cwd=folder / "one") == 0
    torch.set_num_threads(threads)


def assert_near(run, other):
    """The losses of two runs are equal but for roundings, of which AdamW's first steps make much."""
    a, b = losses(run), losses(other)
    assert len(a) == len(b) > 0 and set(a[0]) == set(b[0])
    for x, y in zip(a, b, strict=True):
        assert y == pytest.approx(x, **(dict(rel=1e-3, abs=1e-4) if x["step"] < 3
                                        else dict(rel=1e-2, abs=3e-3)))


@pytest.fixture(scope="module")
def trained(image_dir, tmp_path_factory):
    """A folder with one/, node0/ and node1/: six steps by one process, and by two machines."""
    folder = tmp_path_factory.mktemp("machines")
    for name in ("one", "node0", "node1"):                  # with other times of change
        shutil.copytree(image_dir, folder / name / "data", copy_function=shutil.copy)
    one_process(folder, "train", "--exp-name", "a", *TRAIN)
    two_machines(folder, "train", "--exp-name", "a", *TRAIN)
    return folder


def test_two_machines_have_the_losses_of_one_process(trained):
    assert_near(trained / "one/exps/a", trained / "node0/exps/a")
    one, two = (metrics_of(trained / name / "exps/a") for name in ("one", "node0"))
    for name in ("grad_norm", "vae_grad_norm"):                      # of the mean gradient, not of each one's
        assert [row[name] for row in two[:2]] == pytest.approx([row[name] for row in one[:2]], rel=1e-3)
    assert [p.name for p in (trained / "node1").iterdir()] == ["data"]           # the first machine writes


def test_gradients_of_the_discriminator_are_averaged_over_processes(trained):
    """Its batch norm sees each process's images alone: as one process sees micro-batches."""
    flags = ["--exp-name", "gan", *TRAIN, "--disc-weight", "0.1", "--disc-start", "0", "--max-train-steps",
             "1"]
    one_process(trained, "train", *flags, "--gradient-accumulation-steps", "2")
    two_machines(trained, "train", *flags)
    (one,), (two,) = (metrics_of(trained / name / "exps/gan") for name in ("one", "node0"))
    for name in ("disc_loss", "gan_loss", "disc_grad_norm", "vae_grad_norm"):
        assert two[name] == pytest.approx(one[name], rel=1e-3), name


def test_resuming_needs_the_checkpoint_on_every_machine(trained):
    shutil.copytree(trained / "node0/exps/a", trained / "node0/exps/b")
    (trained / "node0/exps/b/checkpoints/0000006.pt").unlink()
    command = ["train", "--exp-name", "b", "--resume", *TRAIN]
    for printed in two_machines(trained, *command, code=2):
        one_line(printed, "exps/b/checkpoints/0000003.pt: not on every machine")
    shutil.copytree(trained / "node0/exps/b", trained / "node1/exps/b")
    two_machines(trained, *command)
    assert_near(trained / "one/exps/a", trained / "node0/exps/b")


def test_sampling_and_evaluating_do_not_depend_on_the_processes(trained):
    """11 images in batches of 4: the last round has 3 for two processes. (No batch is of one image: matrix
    products of one row are rounded otherwise, a level in a few pixels.)"""
    ckpt = ["--device", "cpu", "--batch-size", 4, "--ckpt", trained / "one/exps/a/checkpoints/0000006.pt"]
    for command in (["sample", *ckpt, "--num-samples", 11, "--num-steps", 3, "--mode", "sde", "--out",
                     "x.npz"],
                    ["fid", "data", *ckpt, "--reconstruct", "--metrics", "fid,kid,recall", "--features",
                     repa.LITE2,
                     "--num-workers", 0, "--json", "x.json"]):
        one_process(trained, *command)
        two_machines(trained, *command)
        assert not (trained / "node1" / command[-1]).exists()
    one, two = (np.load(trained / name / "x.npz")["arr_0"] for name in ("one", "node0"))
    assert one.shape == (11, 32, 32, 3) and np.array_equal(one, two) and len(np.unique(one, axis=0)) == 11
    one, two = (json.loads((trained / name / "x.json").read_text()) for name in ("one", "node0"))
    assert len(one) > 8 and one == {name: pytest.approx(value) for name, value in two.items()}


def small_chunks(rank):
    images.CHUNK = 8


@slow
def test_latents_are_cached_on_each_machine(trained, monkeypatch):
    """In three files of 8 images: made on one machine, they are missing on the other."""
    command = ["train", "--exp-name", "cached", "--cache-latents", "--vae-grad", "none", "--vae-ckpt",
               trained / "one/exps/a/checkpoints/0000006.pt", *TRAIN]
    monkeypatch.setattr(images, "CHUNK", 8)
    one_process(trained, *command)
    two_machines(trained, *command, prepare=small_chunks)
    assert_near(trained / "one/exps/cached", trained / "node0/exps/cached")
    cached = [sorted((trained / name / "exps").glob("latents-*/*")) for name in ("one", "node0", "node1")]
    assert cached[1][0].parent.name == cached[2][0].parent.name
    for files in zip(*cached, strict=True):
        one, *others = (torch.load(file, weights_only=True) for file in files)
        assert len(one) == 8 and one.isfinite().all() and all(torch.equal(one, other) for other in others)


@slow
@pytest.mark.parametrize("flag", ["--gradient-checkpointing", "--compile"])
def test_torchrun_gives_the_losses_of_one_process(image_dir, short_run, flag, tmp_path):
    run(*torchrun(2), ROOT / "train.py", "--data-dir", image_dir, "--disc-weight", "0", flag, *SHORT,
        cwd=tmp_path)
    assert_near(short_run / "exps/a", tmp_path / "exps/tiny")


def nan_in_step_2(rank):
    """Of the images of process 1."""
    encode, batches = vae.Encoder.forward, []

    def disturbed(self, x):
        if torch.is_grad_enabled():
            batches.append(x)
            if rank == 1 and len(batches) == 2:
                x[0, 0, 0, 0] = math.nan
        return encode(self, x)
    vae.Encoder.forward = disturbed


def test_nan_on_one_process_skips_the_step_on_both(trained):
    two_machines(trained, "train", "--exp-name", "nan", *TRAIN, "--max-train-steps", "3", "--disc-weight",
                 "0.1",
                 "--keep-every", "1", "--checkpointing-steps", "1", prepare=nan_in_step_2)
    rows = metrics_of(trained / "node0/exps/nan")
    assert [row["skipped"] for row in rows] == [0, 1, 1]
    assert rows[1]["loss"] is None and math.isfinite(rows[2]["loss"])
    first, second, third = (load_tensors(path) for path in checkpoints(trained / "node0/exps/nan"))
    for (name, x), (_, y), (_, z) in zip(*map(flatten, (first, second, third)), strict=True):
        same = torch.equal(x, y) or name.startswith(".ema")        # which moves on, towards unchanged weights
        assert same and y.isfinite().all() and z.isfinite().all(), name
    assert not torch.equal(second["vae"]["quant_conv.weight"], third["vae"]["quant_conv.weight"])


def test_machines_with_different_images_are_refused(trained):
    for k in range(2):
        shutil.copytree(trained / f"node{k}/data/one", trained / f"node{k}/few")
    (trained / "node1/few/000.png").unlink()
    for printed in two_machines(trained, "fid", "few", "data", "--features", repa.LITE2, "--device", "cpu",
                                "--num-workers", 0, code=2):
        one_line(printed, "the machines hold different images or weights")


def test_checkpoints_on_one_machine_end_a_new_run_on_both(trained):
    for printed in two_machines(trained, "train", "--exp-name", "a", *TRAIN, code=2):
        one_line(printed, "exps/a holds checkpoints: --resume resumes")


# --- Processes that are late, or dead -----------------------------------------------------------------------

def late_or_dead(folder, ready, rank):
    """The first of three processes is late once, the last is killed."""
    sys.stderr = open(folder / f"{rank}.log", "w", buffering=1)                 # noqa: SIM115 (until the end)
    devices.TIMEOUT = devices.timedelta(seconds=3)
    ready.wait()
    processes = devices.start_processes(torch.device("cpu"))

    def main():
        assert not processes.any(False)
        time.sleep(4 if rank == 0 else 0)                               # longer than TIMEOUT
        assert processes.any(rank == 0)
        if rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        processes.any(False)
    run_command(main)


def test_late_process_is_waited_for_and_dead_one_ends_the_others(tmp_path):
    ready = multiprocessing.get_context("forkserver").Barrier(3)
    codes = exit_codes(start(late_or_dead, 3, tmp_path, ready))
    printed = [(tmp_path / f"{rank}.log").read_text() for rank in range(3)]
    assert codes == [2, 2, -signal.SIGKILL], printed
    for out in printed[:2]:
        assert re.fullmatch(r"error( \(rank 1\))?: another process of this run ended.*\n", out), out
