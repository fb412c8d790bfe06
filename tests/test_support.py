"""support/: files and checkpoints that survive, commands that say what was wrong, pictures for people."""
import argparse
import errno
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fid
import vae
from conftest import SHORT, one_line, run, slow
from data.images import list_images, read_image
from support import commands, files
from support.checkpoints import Saver, checkpoints, newest_complete, read_checkpoint
from support.commands import UserError
from support.devices import Processes, start_processes
from support.files import load_tensors, strip_wrappers, write_atomic
from support.pictures import image_grid, latents_in_colour, to_float, to_uint8


# --- Commands ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def strict(monkeypatch):
    """What a command of ours prints on strictly UTF-8 streams, and its exit code."""
    def run(main):
        streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict") for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        with pytest.raises(SystemExit) as e:
            commands.run_command(main)
        for stream in streams:
            stream.flush()
        return *(stream.buffer.getvalue().decode() for stream in streams), e.value.code
    return run


def test_names_that_are_no_utf8(tmp_path, strict):
    name = os.path.join(os.fsencode(tmp_path), b"caf\xe9.png")
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "a.tmp", format="PNG")
    os.rename(tmp_path / "a.tmp", name)
    (path,) = list_images(tmp_path)
    assert os.fsencode(path) == name and read_image(path).float().mean((1, 2)).tolist() == [1, 2, 3]

    def main():
        print(path)
        raise UserError(f"{path}: as it is")

    out, err, code = strict(main)
    assert out.endswith("caf\\udce9.png\n") and err.endswith("caf\\udce9.png: as it is\n") and code == 2


def test_which_errors_are_one_line(strict):
    for main, words in ((lambda: os.makedirs("/proc/nowhere/x"), "/proc/nowhere"),
                        (lambda: open("/nowhere"), "/nowhere")):
        out, err, code = strict(main)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and words in err

    def fail(*args):
        raise OSError(*args)

    out, err, code = strict(lambda: fail(errno.ENOSPC, "full"))
    assert code == 2 and err.count("\n") == 1 and "full" in err
    with pytest.raises(OSError, match="a bug"):
        commands.run_command(lambda: fail("a bug"))


@pytest.mark.parametrize("kind, good, bad", [
    ("positive_int", {"1": 1, "20": 20}, ["0", "-1", "1.5", "x", ""]),
    ("count", {"0": 0, "7": 7}, ["-1", "0.5", "nan"]),
    ("seed_number", {"0": 0, str(2 ** 64 - 1): 2 ** 64 - 1}, ["-1", str(2 ** 64), "0.5"]),
    ("path_name", {"a b": "a b", "~/x": os.path.expanduser("~") + "/x"}, []),
    ("positive", {"1e-4": 1e-4, "3": 3.0}, ["0", "-1", "inf", "nan", "x"]),
    ("non_negative", {"0": 0.0, "2.5": 2.5}, ["-1e-9", "inf", "nan", "x"]),
    ("fraction", {"0": 0.0, "1": 1.0, "0.1": 0.1}, ["-0.1", "1.1", "nan", "inf", ""]),
    ("existing_path", {"/": "/", __file__: __file__}, ["/nowhere", ""]),
    ("existing_folder", {"/": "/"}, ["/nowhere", __file__])])
def test_argument_types(kind, good, bad):
    parser = commands.Parser()
    parser.add_argument("--x", type=getattr(commands, kind))
    for text, value in good.items():
        x = parser.parse_args([f"--x={text}"]).x
        assert x == value and type(x) is type(value)
    for text in bad:
        with pytest.raises(UserError, match="^argument --x: must be [^\n]*see --help.$"):
            parser.parse_args([f"--x={text}"])


def test_a_first_signal_is_taken_and_a_second_ends_the_process(tmp_path):
    code = ("import os, signal\nfrom support.commands import catch_signals\nsignals = catch_signals()\n"
            "os.kill(os.getpid(), signal.SIGTERM)\nprint('taken', signals, flush=True)\n"
            "os.kill(os.getpid(), signal.SIGINT)\nprint('still here')")
    out = run(sys.executable, "-c", code, cwd=tmp_path, code=128 + signal.SIGINT)
    assert "taken [15]" in out and "still here" not in out


# --- Files ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", ["/proc/nowhere/out.png", "/dev/null/out.png", "{tmp}/file/out.png",
                                  "{tmp}/" + "n" * 300, "{tmp}/folder", "{tmp}"])
def test_files_that_cannot_be_written(path, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    path = path.format(tmp=tmp_path)
    with pytest.raises(UserError, match="^cannot write [^\n]*$"):
        write_atomic(path, lambda tmp: Path(tmp).write_text("x"))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]


def test_pipes_and_devices_are_written_into(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE)
        write_atomic(tmp_path / name, lambda tmp: np.savez(open(tmp, "wb"), a=np.arange(3)))
        assert np.load(io.BytesIO(reader.communicate(timeout=20)[0]))["a"].tolist() == [0, 1, 2]
        assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(UserError, match="cannot write /dev/full: No space left"):
        write_atomic("/dev/full", lambda tmp: tmp.write_text("x"))
    assert Path("/dev/full").is_char_device()


def test_the_file_that_stdout_goes_to_is_written_into(tmp_path):
    code = ("from support.files import write_atomic\nprint('before')\n"
            "write_atomic('/dev/stdout', lambda tmp: tmp.write_text('json\\n'))\nprint('after')")
    run("sh", "-c", f'"{sys.executable}" -c "{code}" > out.txt', cwd=tmp_path, env=dict(PYTHONUNBUFFERED=""))
    assert (tmp_path / "out.txt").read_text() == "before\njson\nafter\n"


def test_the_target_of_a_link_is_written_not_the_link(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/old").write_text("old")
    for name in ("old", "new"):
        (tmp_path / name).symlink_to(f"there/{name}")
        write_atomic(tmp_path / name, lambda tmp: tmp.write_text("x"))
        assert (tmp_path / name).is_symlink() and (tmp_path / "there" / name).read_text() == "x"
    assert len(list((tmp_path / "there").iterdir())) == 2
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="cannot write .*loop: Too many levels"):
        write_atomic(tmp_path / "loop", lambda tmp: tmp.write_text("x"))
    commands.check_output(tmp_path / "loop", [tmp_path / "old"])
    with pytest.raises(UserError, match="this file is read"):
        commands.check_output(tmp_path / "old", [tmp_path / "there/old"])


@pytest.mark.parametrize("code, written", [(errno.EOPNOTSUPP, True), (errno.EINVAL, True), (errno.ENOSYS, True),
                                           (errno.EIO, False)])
def test_file_systems_without_fsync(tmp_path, monkeypatch, code, written):
    def fsync(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    try:
        write_atomic(tmp_path / "x", lambda tmp: tmp.write_text("x"))
    except UserError:
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["x"] * written


def test_pickled_code_is_refused_and_namespace_is_not(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'owned'}",)
    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="refused"):
        load_tensors(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()
    torch.save({"args": argparse.Namespace(model="SiT-B/2")}, tmp_path / "fine.pt")
    assert load_tensors(tmp_path / "fine.pt")["args"].model == "SiT-B/2"


def test_wrappers_go_wherever_they_stand():
    state = {"module.a.weight": 1, "b._orig_mod.c": 2, "_orig_mod.module.d": 3, "submodule.e": 4, "modules.f": 5}
    assert strip_wrappers(state) == {"a.weight": 1, "b.c": 2, "d": 3, "submodule.e": 4, "modules.f": 5}


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

    readers = {path: reader for pattern, reader in (("a.???", read_image), ("a.webp", read_image),
               ("a.npz", npz), ("a.pt", load_tensors), ("a.safetensors", load_tensors))
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


# --- Checkpoints ------------------------------------------------------------------------------------------------------

def test_damaged_checkpoints_are_set_aside(short_run, tmp_path, capsys):
    folder = tmp_path / "run/checkpoints"
    shutil.copytree(short_run / "exps/a/checkpoints", folder)
    data = bytearray((folder / "0000004.pt").read_bytes())
    data[len(data) // 2] ^= 1                                       # one bit of one weight
    (folder / "0000004.pt").write_bytes(data)
    (folder / "0000006.pt").write_bytes(data[:1000])
    assert newest_complete(tmp_path / "run").name == "0000002.pt"
    assert sorted(p.name for p in folder.iterdir()) == ["0000002.pt", "0000004.damaged", "0000006.damaged"]
    assert capsys.readouterr().out.count("set aside") == 2
    assert newest_complete(tmp_path / "nothing") is None


def test_old_checkpoints_go_but_for_the_newest_two_and_every_nth(tiny, tmp_path, monkeypatch):
    m, cfg, _ = tiny()
    saver = Saver(tmp_path, keep_every=4)
    for step in range(1, 9):
        saver.save(step, m.parts(), vars(cfg))
    assert [int(p.stem) for p in checkpoints(tmp_path)] == [4, 7, 8]
    saved = load_tensors(tmp_path / "checkpoints/0000008.pt")
    for key, net in (("model", m.sit), ("ema", m.ema), ("vae", m.vae), ("discriminator", m.disc)):  # all differ
        assert all(torch.equal(t, saved[key][name]) for name, t in net.state_dict().items())

    def full(state, file):
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="cannot write .*0000009.pt: .*No space left"):
        saver.save(9, m.parts(), vars(cfg))
    left = [p.name for p in sorted((tmp_path / "checkpoints").iterdir())]
    assert left == ["0000004.pt", "0000007.pt", "0000008.pt"]


def test_what_is_no_checkpoint_is_one_line(tmp_path):
    whole = dict(model={}, ema={}, args={}, steps=1)
    for wrong in ([1], {}, whole | dict(args=[1]), *({k: v for k, v in whole.items() if k != key} for key in whole)):
        torch.save(wrong, tmp_path / "x.pt")
        with pytest.raises(UserError, match="not a training checkpoint|no state dict in it"):
            read_checkpoint(tmp_path / "x.pt")
    torch.save(whole | dict(args=argparse.Namespace(cfg_prob=0.1)), tmp_path / "x.pt")
    assert read_checkpoint(tmp_path / "x.pt")["args"] == dict(cfg_prob=0.1)


# --- Processes --------------------------------------------------------------------------------------------------------

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
        assert start_processes(torch.device("cpu")) == Processes(0, 1) and not torch.distributed.is_initialized()
    else:
        with pytest.raises(UserError, match=f"WORLD_SIZE is above 1, but {missing} not set"):
            start_processes(torch.device("cpu"))


# --- Pictures ---------------------------------------------------------------------------------------------------------

def test_pixels_round_trip_and_round():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(levels)), levels)
    assert torch.equal(to_float(torch.tensor([0, 255], dtype=torch.uint8)), torch.tensor([-1.0, 1.0]))
    assert to_uint8(torch.tensor([-3.0, 3.0, (200.6 / 127.5) - 1])).tolist() == [0, 255, 201]


@pytest.mark.parametrize("n, columns, scale, size", [(5, 3, 1, (28, 18)), (1, 4, 2, (76, 16)), (6, 3, 2, (56, 36))])
def test_image_grid(n, columns, scale, size):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (n, 3, 8, 8), np.uint8))
    grid = image_grid(images, columns, scale)
    assert grid.size == size
    pixels, white = np.asarray(grid)[::scale, ::scale], np.ones((size[1] // scale, size[0] // scale), bool)
    for i, image in enumerate(images):
        top, left = i // columns * 10, i % columns * 10
        assert np.array_equal(pixels[top:top + 8, left:left + 8], image.permute(1, 2, 0))
        white[top:top + 8, left:left + 8] = False
    assert (pixels[white] == 255).all()


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_latents_in_colour_are_their_principal_components(channels):
    """Of one and two channels, the components that are missing are grey; of one, red is the latent itself."""
    rng = np.random.default_rng(0)
    z = torch.tensor(rng.normal(size=(3, channels, 4, 4)) * np.arange(1, channels + 1).reshape(1, -1, 1, 1))
    flat = z.permute(0, 2, 3, 1).reshape(-1, channels).numpy()
    flat = flat - flat.mean(0)
    axes = np.linalg.svd(flat, full_matrices=False)[2][:3]
    axes *= np.sign([axis[np.abs(axis).argmax()] for axis in axes])[:, None]
    values = flat @ axes.T
    if channels == 1:
        assert np.allclose(values, flat)
    expected = np.clip(127.5 * (1 + values / (2.5 * values.std(0))), 0, 255)
    expected = np.pad(expected, ((0, 0), (0, 3 - len(axes))), constant_values=127.5).reshape(3, 4, 4, 3)
    colour = latents_in_colour(z, 2)
    assert colour.shape == (3, 3, 8, 8) and torch.equal(colour[:, :, ::2, ::2], colour[:, :, 1::2, 1::2])
    assert np.abs(colour[:, :, ::2, ::2].permute(0, 2, 3, 1).numpy() - expected).max() < 0.6
