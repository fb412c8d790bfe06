"""commands.py: what every command line here shares: errors in one line, a parser, types for its arguments."""
import argparse
import errno
import io
import math
import os
import re
import signal
import sys
import time
from pathlib import Path, PureWindowsPath

import torch
from tqdm import tqdm


class UserError(Exception):
    """A mistake in a flag, a path or a file: the message says what was wrong and what to type instead."""


def one_line(e):
    """The first line of an exception's message, 80 characters at most; its class where it has none."""
    return (str(e).splitlines() or [type(e).__name__])[0][:80]


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EIO)                               # of a disk


class Parser(argparse.ArgumentParser):
    """argparse without the usage block: a bad flag is one line too."""

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def memory_ended(e, instead):
    """The line to print where an exception says that memory, or a loader's shared memory, is not enough; None
    for others. instead: the flags that need less."""
    text = str(e)
    ended = re.search(r"MPS backend out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED", text)
    if ended or isinstance(e, torch.OutOfMemoryError):
        tried = re.search(r"Tried to allocate ([\d.]+ \w+)", text)
        total = re.search(r"total capacity of ([\d.]+ \w+)", text)
        size = f"{tried[1]} more were asked for" if tried else one_line(e)
        if total:
            size += f", it has {total[1]}"
        return f"the GPU's memory is not enough ({size}): {instead}"
    asked = re.search(r"(can't allocate|not enough) memory: you tried to allocate (\d+) bytes", text)
    if asked or isinstance(e, MemoryError):
        size = f"{int(asked[2]) / 2 ** 30:.2f} GiB more were asked for" if asked else one_line(e)
        return f"memory is not enough ({size}): {instead}"
    if re.search(r"Bus error|shared memory object|shared memory\(shm\)|torch_shm|</torch_\d+", text):
        return ("a loader process has no shared memory left: --num-workers 0, or more of it (docker run "
                "--shm-size=8g)")
    if "DataLoader worker" in text and re.search(r"killed by signal: Killed|exited unexpectedly", text):
        return f"a loader process was killed, most likely for memory: a smaller --num-workers, or {instead}"
    return None


class Output(io.FileIO):
    """stdout or stderr, which may lose its reader (`| head`, a closed terminal): from then on it is
    /dev/null."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError as e:
            if e.errno not in (errno.EPIPE, errno.EIO):
                raise
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return super().write(data)


def keep_printing(stream):
    """The process's own stdout or stderr as an Output, with backslashes for what it cannot encode."""
    stream.flush()
    file = Output(stream.fileno(), "w", closefd=False)
    unbuffered = isinstance(stream.buffer, io.RawIOBase)                                     # python -u
    return io.TextIOWrapper(file if unbuffered else io.BufferedWriter(file), stream.encoding,
                            "backslashreplace", line_buffering=stream.line_buffering,
                            write_through=stream.write_through)


def run_command(main, less_memory="a smaller --batch-size"):
    """Run `main()`. A UserError, an OSError about a file or a full disk, or the end of memory (less_memory:
    the flags that need less) becomes one line on stderr and exit code 2; bugs keep their traceback. File
    names that are not UTF-8 print with backslashes. main() goes on when stdout or stderr loses its reader."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream and stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, keep_printing(stream))
        elif hasattr(stream, "reconfigure"):                              # tests capture what is printed
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except (UserError, OSError, RuntimeError, MemoryError) as e:
        of_a_file = isinstance(e, OSError) and (e.filename is not None or e.errno in NO_ROOM)
        line = str(e) if of_a_file or isinstance(e, UserError) else memory_ended(e, less_memory)
        if line is None:
            raise
        rank = os.environ.get("RANK", "0")
        who = "error" if rank == "0" else f"error (rank {rank})"
        tqdm.write(f"{who}: {line}", file=sys.stderr)                          # above progress bars
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


# How a person, a terminal that closes, or a cluster asks to stop: Ctrl-C, SIGTERM, SIGHUP, and often SIGUSR1.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
                if hasattr(signal, name)]
SAME_REQUEST = 5                           # seconds: terminal, shell and torchrun each pass a signal on


def catch_signals():
    """From now on STOP_SIGNALS end nothing: returns the list that takes when each came. One that comes more
    than SAME_REQUEST seconds after the first ends the process at once. nohup's SIGHUP stays ignored."""
    times = []

    def on_signal(number, frame):
        times.append(time.monotonic())
        if times[-1] - times[0] > SAME_REQUEST:
            os._exit(128 + number)

    for number in STOP_SIGNALS:
        if number != getattr(signal, "SIGHUP", None) or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, on_signal)
    return times


def check_output(out, inputs):
    """Raises UserError where a file to be written is one of those that are read, or in a folder of them."""
    target = Path(os.path.realpath(out))
    for path in map(Path, map(os.path.realpath, inputs)):
        if target == path or os.path.exists(out) and target.is_relative_to(path):
            raise UserError(f"{out}: this file is read, it is not written over; name another")


# --- Types for argparse: each says what it wants where it gets something else -------------------------------

def argument(convert, accepts, wanted):
    """A type= for argparse: convert(text) where `accepts` is true of it, else an error "must be `wanted`"."""
    def parse(text):
        try:
            value = convert(text)
            if accepts(value):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"must be {wanted}, not {text}")
    return parse


def path_name(text):
    """A path, with ~ expanded."""
    return os.path.expanduser(text)


positive_int = argument(int, lambda n: n > 0, "a whole number above 0")
count = argument(int, lambda n: n >= 0, "a whole number, 0 or more")
seed_number = argument(int, lambda n: 0 <= n < 2 ** 64, "a whole number from 0 to 2^64-1")
positive = argument(float, lambda x: 0 < x < math.inf, "a number above 0")
non_negative = argument(float, lambda x: 0 <= x < math.inf, "a number, 0 or more")
fraction = argument(float, lambda x: 0 <= x <= 1, "a number in [0, 1]")
below_one = argument(float, lambda x: 0 <= x < 1, "a number in [0, 1), below 1")
positive_fraction = argument(float, lambda x: 0 < x <= 1, "a number in (0, 1], above 0")
existing_path = argument(path_name, os.path.exists, "a file or folder that exists")
existing_folder = argument(path_name, os.path.isdir, "a folder that exists")
plain_name = argument(str, lambda name: PureWindowsPath(name).name == name != "" and not name.startswith("."),
                      "one plain name, without / or \\ and not hidden")


def path_name(text):
    """A path, with ~ expanded."""
    return os.path.expanduser(text)
