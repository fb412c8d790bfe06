"""Machines that are not here: two of them (launchers on the loopback address, each in a folder of its own with a copy
of the pictures), a Mac, another device than the CPU; and the compiler's share of a step."""
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

from torch.utils._python_dispatch import TorchDispatchMode

from support import devices
import repa
import sample
import train
from conftest import ROOT, SHORT, losses, metrics_of, run, slow, tiny_config

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
    one, two = (metrics_of(trained / name / "exps/a") for name in ("one", "node0"))
    for name in ("grad_norm", "vae_grad_norm"):                        # of the mean gradient, not of each one's
        assert [row[name] for row in two[:2]] == pytest.approx([row[name] for row in one[:2]], rel=1e-3)
    assert [p.name for p in (trained / "node1").iterdir()] == ["pictures"]       # the first machine writes


def test_resuming_needs_the_checkpoint_on_every_machine(trained):
    for name in ("one", "node0"):
        shutil.copytree(trained / "node0/exps/a", trained / name / "exps/b")
        (trained / name / "exps/b/checkpoints/0000006.pt").unlink()
    command = [ROOT / "train.py", "--exp-name", "b", "--resume", *TRAIN]
    for printed in two_machines(trained, *command, code=2):
        wrong = [line for line in printed.splitlines() if line.startswith(("error", "[rank"))]        # or a traceback
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
            command = [ROOT / "fid.py", *drawing, "--data-dir", "pictures", "--features", repa.EMBEDDED,
                       "--json", out]
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


def unfused(m, cfg):
    """The networks of `build`, as it makes them on a Mac, whose fused AdamW takes found_inf and does not read it."""
    m.fused = False
    for name in ("opt", "opt_vae", "opt_disc"):
        group = getattr(m, name).param_groups[0]
        setattr(m, name, torch.optim.AdamW(group["params"], lr=group["lr"], betas=group["betas"], weight_decay=0.0,
                                           fused=False))
    m.trained = dict(vae_grad_norm=m.opt_vae, disc_grad_norm=m.opt_disc, grad_norm=m.opt)
    return m


def values(m):
    """Copies of all that a skipped step leaves as it was; the EMA goes on towards the same weights."""
    states = [getattr(m, name).state_dict() for key, name in train.STATE.items() if key != "ema"]
    return [t.clone() for t in torch.utils._pytree.tree_leaves(states) if isinstance(t, torch.Tensor)]


def test_a_mac_steps_as_the_fused_kernels_and_skips_what_is_not_finite(tiny):
    """Nothing in it is of float64 either, which a Mac does not have."""
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            dtypes.update(t.dtype for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    (fused, cfg, args), (mac, _, _) = tiny("--disc-start", "0"), tiny("--disc-start", "0")
    unfused(mac, cfg)
    train.train_step(fused, cfg, 0, *args)
    dtypes = set()
    with Watch():
        train.train_step(mac, cfg, 0, *args)
    assert torch.float32 in dtypes and torch.float64 not in dtypes
    for a, b in zip(fused.sit_params + fused.vae_params + fused.disc_params,
                    mac.sit_params + mac.vae_params + mac.disc_params):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(fused.ema_tensors, mac.ema_tensors):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)

    for m in (fused, mac):
        before = values(m)
        log = train.train_step(m, cfg, 1, args[0] * float("nan"), *args[1:])
        assert log["skipped"] == log["skipped_in_a_row"] == 1
        assert all(torch.equal(a, b) for a, b in zip(before, values(m), strict=True))
        assert all(t.isfinite().all() for t in m.ema_tensors)
        log = train.train_step(m, cfg, 2, *args)
        assert log["skipped"] == 1 and log["skipped_in_a_row"] == 0 and not torch.equal(before[-1], values(m)[-1])


@pytest.mark.parametrize("perceptual", ["encoder", "lpips"])
def test_a_step_and_sampling_keep_to_their_device(monkeypatch, perceptual):
    """All on the device "meta", where nothing is computed: a tensor left on the CPU ends in an error, and so does a
    value that is read back."""
    plain = torch.optim.AdamW, torch.Generator
    monkeypatch.setattr(torch.optim, "AdamW", lambda params, fused, **kwargs: plain[0](params, **kwargs))
    monkeypatch.setattr(torch, "Generator", lambda device: plain[1]())               # meta has neither of the three
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    cfg = tiny_config("--disc-start", "0", "--perceptual", perceptual, "--allow-random-weights")
    device = torch.device("meta")
    m = train.build(cfg, device)
    train.wrap(m, cfg, 1)
    x, y = torch.zeros(4, 3, 32, 32, device=device), torch.zeros(4, dtype=torch.long, device=device)

    def step():
        noise = train.draw_noise(cfg, 0, (8, 8, 8), 0, 1, device)
        return train.train_step(m, cfg, 0, x, y, None, *noise, last=False)

    assert len(step()) == 10
    assert {p.grad.device.type for p in m.sit_params + m.vae_params + m.disc_params} == {"meta"}
    model = sample.Model(m.ema, m.vae, dict(resolution=32), 0, device)
    for mode in ("ode", "sde"):
        images = sample.sample_images(model, [0, 1], num_steps=2, mode=mode, cfg_scale=2.0)
        assert images.device.type == "meta" and images.shape == (2, 3, 32, 32) and images.dtype == torch.uint8
    for module, name in ((m.encoders[0], "mean"), (m.sit.bn, "running_var"), (m.sit.t_embedder, "freqs")):
        kept = getattr(module, name)
        setattr(module, name, torch.ones(kept.shape))
        with pytest.raises(RuntimeError, match="device"):
            step()
        setattr(module, name, kept)


@slow
@pytest.mark.skipif(not devices.can_compile(torch.device("cpu")), reason="no C++ compiler")
def test_compiled_dinov2_and_lpips_break_no_graph_and_compile_once():
    """SiT and VAE stay eager here (tests/test_speed.py compiles them): the encoder's graph, LPIPS' with and without
    gradient."""
    def make(*flags):
        cfg = tiny_config("--enc-type", "dinov2-vit-s", "--perceptual", "lpips", "--allow-random-weights",
                          "--disc-weight", "0", *flags)
        m = train.build(cfg, torch.device("cpu"))
        m.sit.compile_blocks = m.vae.encoder.compile = m.vae.decoder.compile = lambda: None
        train.wrap(m, cfg, torch.device("cpu"), 1)
        noise = train.draw_noise(cfg, 0, (8, 8, 8), 0, 1, torch.device("cpu"))
        x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
        return m, cfg, (x, torch.arange(4), None, *noise)

    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    (compiled, cfg, args), (eager, _, _) = make("--compile"), make()
    for step in range(3):
        a, b = (train.train_step(m, cfg, step, *args) for m in (compiled, eager))
        for name in ("loss", "perceptual_loss", "proj_loss"):
            assert torch.allclose(a[name], b[name], rtol=1e-2, atol=1e-3)
        assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]


def test_no_library_s_notes_in_the_profile(pictures, tmp_path):
    printed = run(sys.executable, ROOT / "train.py", "--data-dir", pictures, *SHORT, "--profile", "1", cwd=tmp_path)
    assert "TFLOP an image" in printed
    assert not any(word in printed for word in ("USDT", "DeviceProperties", "CUDA runtime", "Warning"))
