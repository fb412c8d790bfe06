"""support/: errors in one line, files and checkpoints that survive, metrics, grids."""
import argparse
import errno
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import CPU, one_line
from support import checkpoints, commands, files
from support.commands import UserError
from support.devices import Processes, start_processes
from support.files import load_tensors, write_atomic
from support.grids import pca_rgb, save_png, to_float, to_uint8
from support.metrics import BadSteps, read_rows, start_metrics


def exit_code(target):
    """The exit code of a forked process that calls target()."""
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join(60)
    process.kill()
    return process.exitcode


def fail(error):
    raise error


# --- Commands -----------------------------------------------------------------------------------------------

def test_names_that_are_not_utf8_are_printed(tmp_path, monkeypatch):
    name = os.fsdecode(b"caf\xe9.png")
    file = open(tmp_path / "stderr", "w", encoding="utf-8", errors="strict")    # noqa: SIM115 (for the test)
    monkeypatch.setattr(sys, "stderr", file)
    monkeypatch.setattr(sys, "__stderr__", file)
    with pytest.raises(SystemExit):
        commands.run_command(lambda: fail(UserError(name)))
    assert (tmp_path / "stderr").read_text() == "error: caf\\udce9.png\n"


CUDA = ("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.20 GiB is "
        "free. Including non-PyTorch memory, this process has 22.43 GiB memory in use.\nmore")
WORKER = "DataLoader worker (pid 77) is killed by signal: "
BUS_ERROR = RuntimeError("DataLoader worker (pid(s) 77) exited unexpectedly")     # PyTorch 2.6: see its cause
BUS_ERROR.__cause__ = RuntimeError(WORKER + "Bus error. It is possible that ... are out of shared memory.")


@pytest.mark.parametrize("error, words", [
    (UserError("a word"), "a word"),
    (OSError(errno.ENOSPC, "full"), "full"),
    (torch.OutOfMemoryError(CUDA),
     "CUDA out of memory: tried to allocate 2.50 GiB of 23.64 GiB total; try LESS"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "try LESS"),
    (RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GiB)"), "17.9 GiB); try LESS"),
    (BUS_ERROR, "shared memory: try --num-workers 0, or give it more (docker run --shm-size=8g)"),
    (RuntimeError(WORKER + "Killed. "), "out of memory: try a smaller --num-workers, or LESS")])
def test_errors_in_one_line(error, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        commands.run_command(lambda: fail(error), "LESS")
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.startswith("error: ") and err.endswith(f"{words}\n") and err.count("\n") == 1


def test_cpu_out_of_memory_in_one_line(capsys):
    with pytest.raises(SystemExit):
        commands.run_command(lambda: torch.empty(1 << 50))
    one_line(capsys.readouterr().err,
             "out of memory: tried to allocate 4194304.00 GiB; try a smaller --batch-size")


@pytest.mark.parametrize("error", [OSError("a bug"), RuntimeError(
    "No valid triton configs. OutOfResources: out of resource: shared memory, Required: 1, Hardware limit: 0")])
def test_bugs_keep_their_traceback(error):
    with pytest.raises(type(error), match=str(error)):
        commands.run_command(lambda: fail(error))


@pytest.mark.parametrize("kind, good, bad", [
    ("positive_int", "20", "0 1.5 x"), ("count", "0", "-1 nan"), ("seed_number", "5", f"-1 {2 ** 64}"),
    ("positive", "1e-4", "0 inf nan"), ("non_negative", "0", "-1e-9 inf nan"), ("fraction", "1", "-0.1 1.1"),
    ("below_one", "0", "1 -0.1"), ("existing_path", "~", "/nowhere"),
    ("existing_folder", "~", __file__), ("plain_name", "a b.c", "a/b a\\b C:a .. .hidden")])
def test_argument_types(kind, good, bad):
    parser = commands.Parser()
    parser.add_argument("--x", type=getattr(commands, kind))
    x = parser.parse_args([f"--x={good}"]).x
    assert x == (float(good) if good[0].isdigit() else os.path.expanduser(good))
    for text in bad.split():
        with pytest.raises(UserError, match="^argument --x: must be [^\n]*see --help.$"):
            parser.parse_args([f"--x={text}"])


@pytest.mark.parametrize("nohup, received", [(False, 4), (True, 2)])
def test_second_signal_ends_the_process(nohup, received):
    """Signals shortly after the first, as shell and torchrun forward them, are one request."""
    def child():
        commands.SAME_REQUEST = 0.3
        signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
        times = commands.catch_signals()
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
            time.sleep(0.01)
        assert len(times) == received
        time.sleep(0.4)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert exit_code(child) == 128 + signal.SIGINT


def test_output_without_a_reader_is_dropped(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)

    def main():
        for _ in range(2):
            print("x" * 100_000)
            print("x", file=sys.stderr, flush=True)
        (tmp_path / "done").touch()

    def child():
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(writer, number)
            setattr(sys, name, open(number, "w"))                      # noqa: SIM115 (until the end)
            setattr(sys, f"__{name}__", getattr(sys, name))
        commands.run_command(main)

    assert exit_code(child) == 0 and (tmp_path / "done").exists()
    os.close(writer)


# --- Metrics ------------------------------------------------------------------------------------------------

def test_metrics_are_json_and_cut_back(tmp_path, capsys):
    file = tmp_path / "metrics.jsonl"
    log = start_metrics(tmp_path, 0, "", "run", {})
    log(1, dict(loss=math.nan, psnr=-math.inf, skipped=1.0))
    log(2, dict(loss=1.23456))
    assert "step 1: loss nan, psnr -inf, skipped 1\nstep 2: loss 1.235\n" in capsys.readouterr().out
    first, second = file.read_text().splitlines()
    row = json.loads(first, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row == dict(step=1, loss=None, psnr=None, skipped=1) and json.loads(second) == dict(step=2,
                                                                                               loss=1.23456)
    with open(file, "a") as f:
        f.write('{"step": 3, "lo')                                      # killed
    start_metrics(tmp_path, 1, "", "run", {})(2, dict(loss=3.0))
    assert read_rows(file) == [row, dict(step=2, loss=3.0)] and read_rows(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("rows, problem", [
    ([(10, 9, 0), (30, 29, 0)], "not finite for 20 consecutive"), ([(19, 19, 0)], ""),
    ([(10, 10, 0), (11, 10, 0), (21, 20, 0)], ""),
    ([(99, 0, 99), (100, 0, 100)], "exactly zero for 100 consecutive")])
def test_consecutive_bad_steps_are_a_problem(rows, problem):
    bad_steps = BadSteps(1000)
    for step, skipped, zeros in rows:
        found = bad_steps.update(1000 + step, dict(skipped=skipped, zero_gradients=zeros))
    assert problem in found and bool(problem) == bool(found)


# --- Files --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", ["/proc/nowhere/out.png", "{tmp}/file/out.png", "{tmp}/folder"])
def test_files_that_cannot_be_written(path, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="^cannot write [^\n]*$"):
        write_atomic(path.format(tmp=tmp_path), lambda tmp: Path(tmp).write_text("x"))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]


def test_pipes_are_written_into(tmp_path):
    """Also an image, whose writer seeks."""
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE)
    save_png(Image.new("RGB", (2, 2)), tmp_path / "pipe")
    assert reader.communicate(timeout=20)[0][1:4] == b"PNG"
    assert [path.is_fifo() for path in tmp_path.iterdir()] == [True]


def test_file_that_stdout_goes_to_is_written_into(tmp_path):
    def child():
        os.dup2(os.open(tmp_path / "out.txt", os.O_WRONLY | os.O_CREAT), 1)
        os.write(1, b"before\n")
        write_atomic("/dev/stdout", lambda tmp: tmp.write_text("json\n"))
        os.write(1, b"after\n")

    assert exit_code(child) == 0 and (tmp_path / "out.txt").read_text() == "before\njson\nafter\n"


def test_target_of_a_link_is_written(tmp_path):
    target, link = tmp_path / "there/target", tmp_path / "link"
    link.symlink_to("there/target")
    for text in ("new", "replaced"):
        write_atomic(link, lambda tmp, text=text: tmp.write_text(text))
        assert link.is_symlink() and target.read_text() == text and len(list(target.parent.iterdir())) == 1
    commands.check_output(tmp_path / "other", [link])
    for inputs in (target, target.parent):
        with pytest.raises(UserError, match="link: refusing to overwrite an input file"):
            commands.check_output(link, [inputs])


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EIO])
def test_file_systems_without_fsync(tmp_path, monkeypatch, code):
    monkeypatch.setattr(os, "fsync", lambda descriptor: fail(OSError(code, "no")))
    try:
        write_atomic(tmp_path / "x", lambda tmp: tmp.write_text("x"))
    except UserError:
        assert code == errno.EIO
    assert [path.name for path in tmp_path.iterdir()] == ["x"] * (code == errno.ENOSYS)


def test_pickled_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)
    torch.save(dict(args=Evil()), tmp_path / "evil.pt")
    with pytest.raises(UserError, match="it holds more than tensors, refused"):
        load_tensors(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()


def test_wrappers_prefixes_are_stripped():
    state = {"module.a.weight": 1, "b._orig_mod.c": 2, "_orig_mod.module.d": 3, "submodule.e": 4,
             "modules.f": 5}
    assert files.strip_wrappers(state) == {"a.weight": 1, "b.c": 2, "d": 3, "submodule.e": 4, "modules.f": 5}


def test_folder_in_use_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "checkpoints").mkdir()
    unfinished = tmp_path / "checkpoints/.0000002.pt.12.tmp"
    names = ("checkpoints/.cache.tmp", ".samples.npz.12.tmp")           # sample.py may be writing this one
    for name in (unfinished, *names):
        (tmp_path / name).touch()
    lock = ("import fcntl, sys\nf = open(sys.argv[1], 'w')\nfcntl.lockf(f, fcntl.LOCK_EX)\n"
            "print('held', flush=True)\ninput()")
    other = subprocess.Popen([sys.executable, "-c", lock, str(tmp_path / ".lock")], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another run is writing to it"), files.lock(tmp_path):
        pass
    assert unfinished.exists()
    other.communicate("\n")
    with files.lock(tmp_path):
        assert not unfinished.exists() and all((tmp_path / name).exists() for name in names)
    monkeypatch.setattr(files.fcntl, "lockf", lambda *args: fail(OSError(errno.ENOLCK, "No locks available")))
    with files.lock(tmp_path):
        assert "this file system has no locks (No locks available)" in capsys.readouterr().out


# --- Checkpoints --------------------------------------------------------------------------------------------

def test_damaged_checkpoints_are_renamed(tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    assert checkpoints.find_newest(tmp_path, Processes()) is None
    folder.mkdir()
    torch.save(dict(model=torch.zeros(1000)), folder / "0000002.pt")
    data = bytearray((folder / "0000002.pt").read_bytes())
    (folder / "0000006.pt").write_bytes(data[:1000])
    data[len(data) // 2] ^= 1                                       # one bit of one weight
    (folder / "0000004.pt").write_bytes(data)
    assert checkpoints.find_newest(tmp_path, Processes()) == folder / "0000002.pt"
    assert sorted(p.name for p in folder.iterdir()) == ["0000002.pt", "0000004.damaged", "0000006.damaged"]
    assert capsys.readouterr().out.count("is damaged: renamed") == 2


def test_checkpoints_that_are_kept(tmp_path, monkeypatch):
    parts = {key: torch.nn.Linear(2, 2) for key in ("model", "ema", "vae", "discriminator")}
    saver, folder = checkpoints.Saver(tmp_path, keep_every=4), tmp_path / "checkpoints"
    assert saver.newest() == "none yet"
    for step in range(1, 9):
        saver.save(step, parts, dict(seed=3))
    assert saver.newest() == "0000008.pt"
    saved = load_tensors(folder / "0000008.pt")
    assert all(torch.equal(net.weight, saved[key]["weight"]) for key, net in parts.items())
    assert saved["steps"] == 8 and saved["args"] == dict(seed=3)

    def full(state, file):
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="cannot write .*0000009.pt: .*No space left"):
        saver.save(9, parts, {})
    assert sorted(p.name for p in folder.iterdir()) == ["0000004.pt", "0000007.pt", "0000008.pt"]


def test_files_that_are_not_checkpoints(tmp_path):
    file, whole = tmp_path / "x.pt", dict(model={}, ema={}, args={}, steps=1)
    for wrong in ([1], whole | dict(args=[1]),
                  *({k: v for k, v in whole.items() if k != key} for key in whole)):
        torch.save(wrong, file)
        with pytest.raises(UserError, match="not a training checkpoint|no state dict in it"):
            checkpoints.read_checkpoint(file)
    torch.save(whole | dict(args=argparse.Namespace(cfg_prob=0.1, latent_norm=False)), file)
    assert checkpoints.read_checkpoint(file)["args"] == dict(cfg_prob=0.1, fixed_latent_stats=True)


# --- Processes ----------------------------------------------------------------------------------------------

def test_environment_of_torchrun(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")                              # some platforms set it without a group
    assert start_processes(CPU) == Processes(0, 1) and not torch.distributed.is_initialized()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match="WORLD_SIZE is above 1, but MASTER_ADDR, MASTER_PORT not set"):
        start_processes(CPU)


# --- Grids --------------------------------------------------------------------------------------------------

def test_pixels_round_trip_and_round():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(levels)), levels) and to_float(levels)[[0, 255]].tolist() == [-1, 1]
    assert to_uint8(torch.tensor([-3.0, 3.0, (200.6 / 127.5) - 1])).tolist() == [0, 255, 201]


def test_pca_rgb_is_the_principal_components():
    """Up to their sign; 2.5 standard deviations fill the range."""
    z = np.random.default_rng(0).normal(size=(3, 5, 4, 4)) * np.arange(1, 6).reshape(1, -1, 1, 1)
    flat = z.transpose(0, 2, 3, 1).reshape(-1, 5)
    values = (flat - flat.mean(0)) @ np.linalg.svd(flat - flat.mean(0), full_matrices=False)[2][:3].T
    expected = np.clip(values / (2.5 * values.std(0)), -1, 1)
    rgb = to_float(pca_rgb(torch.tensor(z), 2))
    found = rgb[:, :, ::2, ::2].permute(0, 2, 3, 1).reshape(-1, 3).numpy()
    assert np.abs(found * np.sign((found * expected).sum(0)) - expected).max() < 0.01
    assert torch.equal(rgb, rgb[:, :, ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert (pca_rgb(torch.tensor(z[:, :1]))[:, 1:] == 128).all()                # one channel: two are missing
