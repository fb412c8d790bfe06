"""sample.py's files, labels and processes, on small checkpoints of random weights: python -m pytest tests"""
import argparse
import errno
import io
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from support import checkpoints, commands, devices
import sample
import vae
from sit import SiT


def save_checkpoint(file, num_classes=3, cfg_prob=0.1, prefix="", **args):
    """A training checkpoint of random weights, every gate open: 32 pixels, 8x8 latents."""
    torch.manual_seed(0)
    net, autoencoder = SiT("SiT-T/2", 8, 8, num_classes, cfg_prob, encoder_depth=1), vae.AutoencoderKL("f4d8")
    for name, p in net.named_parameters():
        if "adaLN" in name or "final_layer.linear" in name:
            torch.nn.init.normal_(p, 0, 0.05)
        elif "embedding_table" in name:
            torch.nn.init.normal_(p, 0, 1)                            # so that a label shows in the picture
    state = {prefix + name: tensor for name, tensor in net.state_dict().items()}
    args = dict(num_classes=num_classes, cfg_prob=cfg_prob, path_type="linear", data_dir="some/pictures") | args
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(model=state, ema=state, vae=autoencoder.state_dict(), args=args, steps=7), file)
    return file


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs sample.py here; returns (exit code, what it printed)."""
    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["sample.py", "--device", "cpu", "--num-steps", "2", *map(str, flags)])
        code = 0
        try:
            commands.run_command(sample.main)
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        return code, out + "".join(f"{line}\n" for line in err.splitlines() if line.strip() and "sampling" not in line)

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield run
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def arr_0(file):
    return np.load(file)["arr_0"]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(folder, *flags, **env):
    """sample.py, started in a folder of its own."""
    folder.mkdir(exist_ok=True)
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1") | env
    return subprocess.Popen([sys.executable, *map(str, flags)], cwd=folder, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.parametrize("out", ["x.npz", "x"])
def test_two_machines_write_what_one_process_writes(tmp_path, out):
    """11 images by batches of 4: the last round has 3 for two processes. Only the first machine gets files. (No batch
    is of one image: matrix products of one row are rounded otherwise, a level in a few pixels.)"""
    ckpt = save_checkpoint(tmp_path / "run/checkpoints/0000007.pt")
    flags = [ROOT / "sample.py", "--ckpt", ckpt, "--num-samples", 11, "--num-steps", 3, "--mode", "sde",
             "--batch-size", 4, "--device", "cpu", "--out", out]
    torchrun = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1",
                f"--master-port={free_port()}"]
    jobs = [launch(tmp_path / "one", *flags)]
    jobs += [launch(tmp_path / f"node{k}", *torchrun, f"--node-rank={k}", *flags) for k in (0, 1)]
    for job in jobs:
        printed, _ = job.communicate(timeout=300)
        assert job.returncode == 0, printed
    one, two = tmp_path / "one" / out, tmp_path / "node0" / out
    assert not list((tmp_path / "node1").iterdir())
    assert [p.name for p in (tmp_path / "node0").iterdir()] == [out]
    if out == "x.npz":
        assert arr_0(one).shape == (11, 32, 32, 3) and arr_0(one).dtype == np.uint8
        assert np.array_equal(arr_0(one), arr_0(two))
        assert len(np.unique(arr_0(one), axis=0)) == 11
    else:
        assert [p.name for p in sorted(two.iterdir())] == [f"{i:06d}.png" for i in range(11)]
        assert all((one / p.name).read_bytes() == p.read_bytes() for p in two.iterdir())


def test_the_three_kinds_of_output_hold_the_same_images(tmp_path, command):
    ckpt = save_checkpoint(tmp_path / "x.pt")
    for out in ("a/b/x.npz", "x.png", "folder"):
        code, printed = command("--ckpt", ckpt, "--num-samples", 6, "--batch-size", 4, "--out", tmp_path / out)
        assert code == 0 and f"6 samples (3 classes) of {ckpt}, step 7, trained on some/pictures" in printed
    images = arr_0(tmp_path / "a/b/x.npz")
    plain = io.BytesIO()
    np.savez(plain, arr_0=images)
    assert plain.getvalue() == (tmp_path / "a/b/x.npz").read_bytes()          # what np.savez would have written
    model = sample.load_checkpoint(ckpt)
    drawn = torch.cat([sample.sample_images(model, part, num_steps=2) for part in ([0, 1, 2, 3], [4, 5])])
    assert np.array_equal(images, drawn.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(images, np.stack([Image.open(tmp_path / f"folder/{i:06d}.png") for i in range(6)]))
    grid = np.array(Image.open(tmp_path / "x.png"))                    # 6 columns of 32 pixels, doubled; gap 2
    for i in range(6):
        assert np.array_equal(grid[:64:2, 68 * i:68 * i + 64:2], images[i])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "folder", "x.png", "x.pt"]
    assert [p.name for p in (tmp_path / "a/b").iterdir()] == ["x.npz"]
    for out in ("folder", "a"):                                         # pictures there; a folder, not a file
        code, printed = command("--ckpt", ckpt, "--out", tmp_path / (out if out == "folder" else "d.npz"))
        (tmp_path / "d.npz").unlink(missing_ok=True)
        assert code == (2 if out == "folder" else 0), printed
    (tmp_path / "e.npz").mkdir()
    code, printed = command("--ckpt", ckpt, "--out", tmp_path / "e.npz")
    assert code == 2 and "this folder exists" in printed and len(printed.splitlines()) == 1


def test_a_full_disk_shows_before_anything_is_drawn(tmp_path, command, monkeypatch):
    ckpt, asked = save_checkpoint(tmp_path / "x.pt"), []

    def full(descriptor, offset, size):
        asked.append(size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sample, "sample_images", None)
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    code, printed = command("--ckpt", ckpt, "--num-samples", 50, "--out", tmp_path / "x.npz")
    assert code == 2 and "No space left on device" in printed and len(printed.splitlines()) == 1
    assert asked[0] >= 50 * 32 * 32 * 3 and [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_a_failure_while_drawing_leaves_no_file_and_keeps_its_traceback(tmp_path, command, monkeypatch):
    ckpt, draw = save_checkpoint(tmp_path / "x.pt"), sample.sample_images

    def second_batch_fails(model, indices, labels, **settings):
        if 4 in indices:
            raise RuntimeError("a bug")
        return draw(model, indices, labels, **settings)

    monkeypatch.setattr(sample, "sample_images", second_batch_fails)
    for out in ("x.npz", "x.png"):
        with pytest.raises(RuntimeError, match="a bug"):
            command("--ckpt", ckpt, "--num-samples", 6, "--batch-size", 4, "--out", tmp_path / out)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_few_samples_are_spread_over_the_classes():
    labels = [sample.label_of(i, 0, range(1000), n=10) for i in range(10)]
    assert labels == list(range(0, 1000, 100))
    assert [sample.label_of(i, 0, [4, 2, 9], n=2) for i in range(2)] == [4, 2]
    assert [sample.label_of(i, 0, range(3), n=7) for i in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert [sample.label_of(i, 0, range(3), n=3) for i in range(3)] == [0, 1, 2]
    drawn = [sample.label_of(i, 5, range(3), "random") for i in range(600)]
    assert drawn == [sample.label_of(i, 5, range(3), "random", n=2) for i in range(600)]
    assert all(150 < drawn.count(label) < 250 for label in range(3))


def test_classes_are_taken_by_name_before_number(tmp_path, command):
    names = sorted(str(k) for k in range(12))                           # 0 1 10 11 2 3 ...: as folders sort
    ckpt = save_checkpoint(tmp_path / "x.pt", num_classes=12, classes=names)
    model = sample.load_checkpoint(ckpt)
    assert model.args["classes"] == names

    def drawn(classes, *flags):
        code, printed = command("--ckpt", ckpt, "--num-samples", 2, "--classes", classes, "--out", tmp_path / "y.npz")
        assert code == 0, printed
        return arr_0(tmp_path / "y.npz"), printed

    def expected(*labels):
        return sample.sample_images(model, [0, 1], labels, num_steps=2).permute(0, 2, 3, 1).numpy()

    assert not np.array_equal(expected(4, 4), expected(2, 2))
    images, printed = drawn("2")                                        # folder "2" is label 4
    assert np.array_equal(images, expected(4, 4)) and "2 samples (2) of" in printed
    images, printed = drawn("10,9")
    assert np.array_equal(images, expected(2, 11)) and "2 samples (10, 9) of" in printed

    ckpt = save_checkpoint(tmp_path / "x.pt", num_classes=3, classes=["cat", "dog", "zebra"])
    model = sample.load_checkpoint(ckpt)
    images, printed = drawn("zebra,0")
    assert np.array_equal(images, expected(2, 0)) and "(zebra, cat)" in printed
    for wrong in ("3", "cow", "-1", "cat;dog"):
        code, printed = command("--ckpt", ckpt, f"--classes={wrong}")
        assert code == 2 and wrong in printed and "cat, dog, zebra" in printed and len(printed.splitlines()) == 1

    ckpt = save_checkpoint(tmp_path / "x.pt", num_classes=3)            # an older one: numbers alone
    model = sample.load_checkpoint(ckpt)
    assert np.array_equal(drawn("2,1")[0], expected(2, 1))
    assert command("--ckpt", ckpt, "--classes", "cat")[0] == 2


def test_a_grid_says_which_column_is_which_class(tmp_path, command):
    ckpt = save_checkpoint(tmp_path / "run/checkpoints/0000007.pt", num_classes=3, classes=["cat", "dog", "ox"])
    code, printed = command("--ckpt", ckpt, "--batch-size", 5)
    assert code == 0 and "columns: cat, dog, ox, cat, dog, ox\n" in printed
    assert f"24 samples (3 classes) of {ckpt}" in printed
    grid = Image.open(tmp_path / "run/samples-0000007.png")
    assert grid.size == ((6 * 34 - 2) * 2, (4 * 34 - 2) * 2)
    code, printed = command("--ckpt", ckpt, "--classes", "ox", "--num-samples", 2)
    assert "columns: ox, ox\n" in printed and "2 samples (ox) of" in printed
    ckpt = save_checkpoint(tmp_path / "many.pt", num_classes=40)
    code, printed = command("--ckpt", ckpt, "--num-samples", 4, "--out", tmp_path / "few.png")
    assert "first row: 0, 10, 20, 30\n" in printed


def test_guidance_is_refused_where_there_is_nothing_to_guide_to(tmp_path, command):
    for num_classes, cfg_prob in ((1, 0.1), (3, 0.0)):
        ckpt = save_checkpoint(tmp_path / "x.pt", num_classes=num_classes, cfg_prob=cfg_prob)
        code, printed = command("--ckpt", ckpt, "--cfg-scale", 1.5, "--out", tmp_path / "x.npz")
        assert code == 2 and "--cfg-scale above 1" in printed and len(printed.splitlines()) == 1
        assert command("--ckpt", ckpt, "--num-samples", 2, "--out", tmp_path / "x.npz")[0] == 0
        (tmp_path / "x.npz").unlink()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_checkpoints_saved_from_under_ddp_or_compile_draw(tmp_path, prefix):
    bare = sample.load_checkpoint(save_checkpoint(tmp_path / "bare.pt"))
    ckpt = save_checkpoint(tmp_path / "wrapped.pt", prefix=prefix)
    images = [sample.sample_images(model, [0, 1], num_steps=2) for model in (bare, sample.load_checkpoint(ckpt))]
    assert torch.equal(*images)
    assert set(checkpoints.read_checkpoint(ckpt)["model"]) == set(bare.sit.state_dict())


def test_what_is_no_checkpoint_is_one_line(tmp_path):
    whole = dict(model={}, ema={}, args={}, steps=1)
    for wrong in ([1], {}, whole | dict(args=[1]), *({k: v for k, v in whole.items() if k != key} for key in whole)):
        torch.save(wrong, tmp_path / "x.pt")
        with pytest.raises(commands.UserError, match="not a training checkpoint|no state dict in it"):
            checkpoints.read_checkpoint(tmp_path / "x.pt")
    torch.save(whole | dict(args=argparse.Namespace(cfg_prob=0.1)), tmp_path / "x.pt")
    assert checkpoints.read_checkpoint(tmp_path / "x.pt")["args"] == dict(cfg_prob=0.1)


def test_sampling_uses_tf32_where_there_is_one(tmp_path, command):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    command("--ckpt", save_checkpoint(tmp_path / "x.pt"), "--num-samples", 1)
    assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("env, missing", [
    (dict(), None), (dict(WORLD_SIZE="1"), None), (dict(WORLD_SIZE="1", RANK="0"), None),
    (dict(WORLD_SIZE="2"), "RANK, MASTER_ADDR, MASTER_PORT"),
    (dict(WORLD_SIZE="4", RANK="1", MASTER_PORT="1"), "MASTER_ADDR")])
def test_environment_without_a_meeting_point(monkeypatch, env, missing):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    if missing is None:
        assert devices.start_processes(torch.device("cpu")) == (0, 1) and not torch.distributed.is_initialized()
    else:
        with pytest.raises(commands.UserError, match=f"WORLD_SIZE is above 1, but {missing} not set"):
            devices.start_processes(torch.device("cpu"))


@pytest.mark.parametrize("flags", ["--num-steps 0", "--num-samples 0", "--batch-size -1", "--seed -1",
                                   "--cfg-scale 0.5", "--cfg-scale nan", "--guidance-high 1.5", "--ckpt nowhere.pt",
                                   "--guidance-low 0.9 --guidance-high 0.1", "--mode sde --heun"])
def test_wrong_flags_are_one_line(command, flags):
    code, printed = command(*flags.split())
    assert code == 2 and flags.split()[0] in printed.replace("--heun", "--mode sde") and len(printed.splitlines()) == 1
