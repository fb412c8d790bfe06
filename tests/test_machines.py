"""Two machines: two launchers on the loopback address, each in a folder of its own with its own copy of the pictures."""
import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

import repa
import vae
from conftest import ROOT, SHORT, losses, run, slow

TRAIN = ["--data-dir", "pictures", *SHORT, "--max-train-steps", "6", "--checkpointing-steps", "3",
         "--disc-weight", "0"]


def two_machines(folder, *command, processes=1, code=0):
    """Run `command` by a launcher in folder/node0 and one in folder/node1, check the exit codes; both outputs."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    jobs = []
    for k in range(2):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={k}",
                    f"--nproc-per-node={processes}", "--master-addr=127.0.0.1", f"--master-port={port}"]
        jobs.append(subprocess.Popen([*launcher, *map(str, command)], cwd=folder / f"node{k}", env=env, text=True,
                                     stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    printed = []
    try:
        for job in jobs:
            printed.append(job.communicate(timeout=300)[0])
    finally:
        for job in jobs:
            job.kill()
    assert all((job.returncode == 0) == (code == 0) for job in jobs), "\n".join(printed)
    return printed


def one_process(folder, *command):
    return run(sys.executable, *command, cwd=folder / "one", env={"OMP_NUM_THREADS": "1"})


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
    one_process(folder, ROOT / "train.py", "--exp-name", "a", *TRAIN)
    two_machines(folder, ROOT / "train.py", "--exp-name", "a", *TRAIN)
    return folder


def test_training_on_two_machines_has_the_losses_of_one_process(trained):
    near(losses(trained / "one/exps/a"), losses(trained / "node0/exps/a"))
    assert [p.name for p in (trained / "node1").iterdir()] == ["pictures"]       # the first machine writes


def test_resuming_needs_the_checkpoint_on_every_machine(trained):
    for name in ("one", "node0"):
        shutil.copytree(trained / "node0/exps/a", trained / name / "exps/b")
        (trained / name / "exps/b/checkpoints/0000006.pt").unlink()
    command = [ROOT / "train.py", "--exp-name", "b", "--resume", *TRAIN]
    for printed in two_machines(trained, *command, code=2):
        wrong = [line for line in printed.splitlines() if line.startswith(("error", "[rank"))]     # no process's traceback
        assert len(wrong) == 1 and "exps/b/checkpoints/0000003.pt: not on every machine" in wrong[0], printed
    shutil.copytree(trained / "node0/exps/b", trained / "node1/exps/b")
    two_machines(trained, *command)
    near(losses(trained / "one/exps/a"), losses(trained / "node0/exps/b"))


def test_sampling_and_evaluating_on_two_machines_give_one_process_s_numbers(trained):
    shutil.copytree(trained / "one/exps/a", trained / "same/exps/a")
    checkpoint = trained / "same/exps/a/checkpoints/0000006.pt"
    drawing = ["--ckpt", checkpoint, "--num-samples", 11, "--num-steps", 3, "--mode", "sde", "--device", "cpu",
               "--batch-size", 4]
    for out in ("x.npz", "x.json"):
        command = [ROOT / "sample.py", *drawing, "--out", out]
        if out == "x.json":
            command = [ROOT / "fid.py", *drawing, "--data-dir", "pictures", "--features", repa.EMBEDDED, "--json", out]
        one_process(trained, *command)
        two_machines(trained, *command)
        assert not (trained / "node1" / out).exists()
    one, two = (np.load(trained / name / "x.npz")["arr_0"] for name in ("one", "node0"))
    assert one.shape == (11, 32, 32, 3) and np.array_equal(one, two)
    one, two = (json.loads((trained / name / "x.json").read_text()) for name in ("one", "node0"))
    one["seconds"] = two["seconds"]
    assert len(one) > 5 and one == {name: pytest.approx(value) for name, value in two.items()}


@slow
def test_cached_latents_on_two_machines(trained):
    """Files of 8 images, so that there are three of them: made on one machine, they are missing on the other."""
    script = trained / "few.py"
    script.write_text("import train, vae\ntrain.CHUNK = 8\nvae.run_command(train.main)\n")
    command = [script, "--exp-name", "cached", "--cache-latents", "--vae-grad", "none", "--vae-ckpt",
               trained / "one/exps/a/checkpoints/0000006.pt", *TRAIN]
    one_process(trained, *command)
    two_machines(trained, *command)
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
    two_machines(tmp_path, ROOT / "train.py", *SHORT, "--num-classes", "0", "--max-train-steps", "1", processes=2)
    drawn = [sorted(p.name for p in (tmp_path / f"node{k}/data/openmoji-32").rglob("*.png")) for k in range(2)]
    assert drawn[0] == drawn[1] and len(drawn[0]) > 4000
