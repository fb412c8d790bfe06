"""commands.py: what the command lines share: one-line errors, signals, types of arguments, settings."""
import argparse
import dataclasses
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


def require(condition, message):
    """Raises UserError(message) unless the condition is true."""
    if not condition:
        raise UserError(message)


def one_line(e):
    """The first line of an exception's message, at most 80 characters; its class name if it is empty."""
    return (str(e).splitlines() or [type(e).__name__])[0][:80]


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)                     # a full or failing disk


class Parser(argparse.ArgumentParser):
    """argparse that raises UserError, without the usage block."""

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def oom_message(e, less_memory):
    """The error line for an exception that means out of memory: of the GPU, the host, or the shared memory of
    loader processes; "" for other exceptions. less_memory: the flags that need less."""
    text = f"{e} {e.__cause__ or ''}"                # PyTorch 2.6 names a loader's signal only in the cause
    if re.search(r"Bus error|</torch_\d", text):
        return ("a loader process is out of shared memory: try --num-workers 0, or give it more (docker run "
                "--shm-size=8g)")
    if re.search(r"DataLoader worker.*(killed by signal: Killed|exited unexpectedly)", text):
        return ("a loader process was killed, most likely out of memory: try a smaller --num-workers, or "
                f"{less_memory}")
    cuda = isinstance(e, torch.OutOfMemoryError)
    if not cuda and not isinstance(e, MemoryError) and not re.search(
            r"MPS backend out of memory|STATUS_ALLOC_FAILED|you tried to allocate", text):
        return ""
    tried = re.search(r"[Tt]ried to allocate ([\d.]+) (\w+)", text)
    total = re.search(r"total capacity of ([\d.]+ \w+)", text)
    details = one_line(e)
    if tried:
        size, unit = tried.groups()
        if unit == "bytes":
            size, unit = f"{int(size) / 2 ** 30:.2f}", "GiB"
        details = f"tried to allocate {size} {unit}" + (f" of {total[1]} total" if total else "")
    return f"{'CUDA ' if cuda else ''}out of memory: {details}; try {less_memory}"


class Output(io.FileIO):
    """stdout or stderr. Once its reader is gone (`| head`, a closed terminal), it writes to /dev/null."""

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


def run_command(main, less_memory="a smaller --batch-size"):
    """Run `main()`. A UserError, an OSError about a file or a full disk, and out of memory (less_memory: the
    flags that need less) become one line on stderr and exit code 2; bugs keep their traceback. What stdout
    and stderr cannot encode is printed with backslashes; main() continues when their reader is gone."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream and stream is getattr(sys, f"__{name}__"):              # neither closed nor captured
            stream.flush()
            buffer = io.BufferedWriter(Output(stream.fileno(), "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, "backslashreplace",
                                                line_buffering=True))
    try:
        main()
    except (UserError, OSError, RuntimeError, MemoryError) as e:
        about_a_file = isinstance(e, OSError) and (e.filename is not None or e.errno in DISK_ERRORS)
        line = str(e) if about_a_file or isinstance(e, UserError) else oom_message(e, less_memory)
        if "gloo/transport" in str(e):
            line = "another process of this run ended or does not answer, see its output"
        if not line:
            raise
        rank = os.environ.get("RANK", "0")
        who = "error" if rank == "0" else f"error (rank {rank})"
        tqdm.write(f"{who}: {line}", file=sys.stderr)                          # above progress bars
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


# Signals that end a run after a checkpoint. Clusters often send SIGUSR1 before the time limit.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
                if hasattr(signal, name)]
SAME_REQUEST = 5                           # seconds: terminal, shell and torchrun each forward a signal


def catch_signals():
    """From now on STOP_SIGNALS end nothing; the list returned holds the time of each one received. One that
    comes more than SAME_REQUEST seconds after the first ends the process at once. SIGHUP stays ignored under
    nohup."""
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
    """Raises UserError if the file `out` is one of the inputs, or exists in a folder that is."""
    target = Path(os.path.realpath(out))
    for path in map(Path, map(os.path.realpath, inputs)):
        if target == path or os.path.exists(out) and target.is_relative_to(path):
            raise UserError(f"{out}: refusing to overwrite an input file; give another name")


# --- Types of arguments, for argparse -----------------------------------------------------------------------

def argument(convert, accepts, wanted):
    """A type= for argparse: convert(text) if `accepts` is true of it, else the error "must be `wanted`"."""
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
existing_path = argument(path_name, os.path.exists, "a file or folder that exists")
existing_folder = argument(path_name, os.path.isdir, "a folder that exists")
plain_name = argument(str, lambda name: PureWindowsPath(name).name == name != "" and not name.startswith("."),
                      "one plain name, without / or \\ and not hidden")


# --- Settings: a dataclass whose fields are flags -----------------------------------------------------------

def option(default, help, kind=str, choices=None):
    """A field of the dataclass; kind: its type for argparse."""
    return dataclasses.field(default=default, metadata=dict(help=help, type=kind, choices=choices))


def parse_settings(config_class, presets, description, argv=None):
    """(the settings, the set of names that were typed): flag > preset > default. The field `preset` names one
    of `presets`, {name: {field: value}}. Raises UserError."""
    parser = Parser(description=description)
    for f in dataclasses.fields(config_class):
        arguments = dict(f.metadata)
        if f.type is bool:
            arguments = dict(help=f.metadata["help"], action=argparse.BooleanOptionalAction)
        if f.default not in ("", None):
            arguments["help"] += f" ({f.default})"
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, **arguments)
    typed = vars(parser.parse_args(argv))
    preset = typed.get("preset", config_class.preset)
    require(preset in presets, f"--preset {preset}: unknown; take one of {', '.join(presets)}")
    return config_class(**(presets[preset] | typed)), set(typed)
