"""rehearse.py: commands measured, what they left checked, and the table, for rehearse.sh.

    python experiments/rehearse.py run NAME COMMAND...         its output goes to logs/NAME.log
    python experiments/rehearse.py stop NAME FILE COMMAND...   asked to stop as soon as FILE is there
    python experiments/rehearse.py CHECK WORD...               one of CHECKS
    python experiments/rehearse.py table                       of all that was run, as markdown

What is done is noted in rehearsal.jsonl. Memory is the most that all processes of a command were seen to hold
together, looking every other second: anonymous and shared memory in /proc/PID/smaps_rollup, where a page that
several processes have counts once. Pages of files (a checkpoint that is read) are left out: the system can
take them back.
"""
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from argparse import REMAINDER
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))                       # the six modules are there
from support.commands import Parser, UserError, run_command
from vae import load_vae

NOTES = Path("rehearsal.jsonl")


def read_rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def note(**row):
    with open(NOTES, "a") as f:
        f.write(json.dumps(row) + "\n")


# --- A command ----------------------------------------------------------------------------------------------

def family(pid):
    """The ids of a process and of all that it has started, at any depth."""
    children = defaultdict(list)
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdecimal():
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                children[int(parent)].append(int(folder.name))
        except OSError:
            pass                                                      # it has ended
    found = [pid]
    for parent in found:                                              # which grows meanwhile
        found += children[parent]
    return found


def memory(pids):
    """Bytes that these processes hold together, as the head of this file says."""
    kilobytes = 0
    for pid in pids:
        try:
            pages = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue                                                  # it has ended
        kilobytes += sum(int(n) for n in re.findall(r"^Pss_(?:Anon|Shmem): +(\d+)", pages, re.MULTILINE))
    return 1024 * kilobytes


def ask_to_stop(pids):
    """Send SIGUSR1 to train.py as torchrun has started it, as a batch script does."""
    for pid in pids:
        try:
            if b"\0-u\0train.py\0" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGUSR1)
        except OSError:
            pass                                                      # it has ended


def files_here():
    """{name: (size, time of change)} of what commands may have written below this folder."""
    found = {}
    for path in Path(".").rglob("*"):
        hidden = path.name.startswith(".") or path.is_symlink() or path.parts[0] == "logs" or path == NOTES
        if path.is_file() and not hidden:
            stat = path.stat()
            found[str(path)] = stat.st_size, stat.st_mtime_ns
    return found


def run(name, *command, stop=None):
    """A command, measured. stop: a file; once it is there, training is asked to stop. Raises UserError."""
    before, start, peak, log = files_here(), time.time(), 0, Path(f"logs/{name}.log")
    asked = False
    log.parent.mkdir(exist_ok=True)
    with open(log, "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        while process.poll() is None:
            pids = family(process.pid)
            peak = max(peak, memory(pids))
            if stop and not asked and Path(stop).exists():
                ask_to_stop(pids)
                asked = True
            time.sleep(0.1 if stop and not asked else 2)          # to look at many takes its time, too
    seconds = time.time() - start
    if process.returncode:
        print(log.read_text()[-3000:])
        raise UserError(f"{name}: ended with {process.returncode}, see {log}")
    if stop and "stopped after step" not in log.read_text():
        raise UserError(f"{name}: it ended before it was stopped, see {log}")
    written = {file: stat[0] for file, stat in files_here().items() if before.get(file) != stat}
    row = dict(name=name, seconds=seconds, memory=peak, written=written, command=" ".join(command))
    note(**row)
    print(cells(row))


def cells(row):
    """A row of the table; of the files that a command wrote, those of 0.1 MB and more by name."""
    written = row["written"]
    large = {file: size for file, size in written.items() if size >= 1e5}
    files = [f"{file} {size / 1e6:,.1f} MB" for file, size in large.items()]
    if len(large) < len(written):
        size = sum(written.values()) - sum(large.values())
        files.append(f"{len(written) - len(large)} small ones {size / 1e6:.1f} MB")
    return f"| {row['name']} | {row['seconds']:.0f} | {row['memory'] / 1e9:.2f} | {', '.join(files)} |"


# --- What must hold afterwards ------------------------------------------------------------------------------

def check_losses(run, steps, other=None):
    """A run logged each of its steps, skipped none, and all is finite; its losses are the other run's."""
    rows = read_rows(Path(run) / "metrics.jsonl")
    found = [row["step"] for row in rows]
    if found != list(range(1, int(steps) + 1)):
        raise UserError(f"{run}: logged steps {found}, not 1 to {steps}")
    for row in rows:
        bad = [name for name, value in row.items() if not math.isfinite(value)]
        if bad or row["skipped"]:
            raise UserError(f"{run}: step {row['step']}: not finite: {bad}; skipped: {row['skipped']:.0f}")
    others = read_rows(Path(other) / "metrics.jsonl") if other else rows
    if len(others) < len(rows):
        raise UserError(f"{other}: logged {len(others)} steps, fewer than {run}")
    for row, same in zip(rows, others):
        for name, value in row.items():
            if "loss" in name and not math.isclose(value, same[name], rel_tol=1e-4, abs_tol=1e-6):
                raise UserError(f"step {row['step']}: {name} is {value} in {run}, {same[name]} in {other}")


def check_batch(file, n, size):
    """An .npz as ADM's evaluator reads it: arr_0, uint8 [n, size, size, 3], and no two images alike."""
    images = np.load(file)["arr_0"]
    n, size = int(n), int(size)
    if images.shape != (n, size, size, 3) or images.dtype != np.uint8:
        raise UserError(f"{file}: arr_0 is {images.dtype} {images.shape}, not uint8 {(n, size, size, 3)}")
    if len(np.unique(images.reshape(n, -1), axis=0)) < n:
        raise UserError(f"{file}: two of its images are alike")


def check_scores(file, n):
    """What fid.py wrote: all of Inception's metrics, finite, of n samples."""
    scores = json.loads(Path(file).read_text())
    for name in ("fid", "sfid", "is", "kid", "precision", "recall"):
        if not math.isfinite(scores.get(name, math.nan)):
            raise UserError(f"{file}: {name} is {scores.get(name)}")
    if (scores["n_samples"], scores["features"]) != (int(n), "inception"):
        raise UserError(f"{file}: {scores['n_samples']} samples, {scores['features']}; not {n}, inception")


def differing(a, b):
    """The names of the tensors that differ between the VAEs of two files, and how many there are."""
    a, b = (load_vae(file)[0].state_dict() for file in (a, b))
    return [name for name, tensor in a.items() if not tensor.equal(b[name])], len(a)


def check_same_vae(a, b):
    """Bit for bit."""
    names, n = differing(a, b)
    if names:
        raise UserError(f"{len(names)} of the VAE's {n} tensors differ between {a} and {b}, as {names[0]}")


def check_trained_vae(a, b):
    """Encoder and decoder: no tensor is as it was."""
    names, n = differing(a, b)
    if len(names) < n:
        raise UserError(f"{n - len(names)} of the VAE's {n} tensors are alike in {a} and {b}")


CHECKS = dict(losses=check_losses, batch=check_batch, scores=check_scores, same_vae=check_same_vae,
              trained_vae=check_trained_vae)


def main():
    parser = Parser(description="Run, measure and check, for rehearse.sh.")
    parser.add_argument("what", choices=["run", "stop", "table", *CHECKS])
    parser.add_argument("words", nargs=REMAINDER)
    args = parser.parse_args()
    if args.what == "table":
        print("| | seconds | memory, GB | written |\n|---|---|---|---|")
        print(*(cells(row) for row in read_rows(NOTES) if "seconds" in row), sep="\n")
    elif args.what in CHECKS:
        CHECKS[args.what](*args.words)
        name = " ".join([args.what, *args.words])
        note(name=name)
        print(f"holds: {name}")
    elif args.what == "stop":
        name, stop, *command = args.words
        run(name, *command, stop=stop)
    else:
        run(*args.words)


if __name__ == "__main__":
    run_command(main)
