"""dry_run.py: runs, measures and checks the commands of dry_run.sh.

    python benchmarks/dry_run.py run [--stop-at FILE] NAME COMMAND...     its output goes to logs/NAME.log
    python benchmarks/dry_run.py CHECK WORD...                            one of CHECKS
    python benchmarks/dry_run.py table                                    of all commands, as markdown

--stop-at: training gets SIGUSR1 as soon as FILE, its metrics.jsonl, has a row. Results go to results.jsonl.
Memory is the peak of the command's largest process.
"""
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from argparse import REMAINDER
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))                                 # the six modules are there
from support.commands import Parser, UserError, require, run_command
from support.metrics import read_rows
from vae import load_vae

RESULTS = Path("results.jsonl")


def write_result(**row):
    with open(RESULTS, "a") as f:
        f.write(json.dumps(row) + "\n")


# --- A command ----------------------------------------------------------------------------------------------

def stop_training(pid):
    """Send SIGUSR1 to the processes that torchrun, process pid, has started, as a batch script does."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[1]
        except OSError:                                               # it has ended
            continue
        if int(parent) == pid:
            os.kill(int(folder.name), signal.SIGUSR1)


def run(name, command, stop_at=None):
    """Run and measure a command. Raises UserError if it fails, or was to be stopped after a step and was
    not."""
    start, log, stopped = time.time(), Path(f"logs/{name}.log"), False
    log.parent.mkdir(exist_ok=True)
    with open(log, "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        while process.poll() is None:
            if stop_at and not stopped and read_rows(Path(stop_at)):
                stop_training(process.pid)
                stopped = True
            time.sleep(0.1)
    seconds = time.time() - start
    if process.returncode:
        print(log.read_text()[-3000:])
        raise UserError(f"{name}: exit code {process.returncode}, see {log}")
    require(not stop_at or re.search("stopped after step [1-9]", log.read_text()),
            f"{name}: it was not stopped after a step, see {log}")
    written = sum(path.stat().st_size for path in Path(".").rglob("*")
                  if path.is_file() and path.stat().st_mtime >= start)
    memory = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    row = dict(name=name, seconds=seconds, memory=memory, written=written, command=" ".join(command))
    write_result(**row)
    print(cells(row))


def cells(row):
    """A row of the table."""
    gigabytes = [f"{row[name] / 1e9:.2f}" for name in ("memory", "written")]
    return f"| {row['name']} | {row['seconds']:.0f} | {' | '.join(gigabytes)} |"


def print_table():
    print("| | seconds | memory, GB | written, GB |\n|---|---|---|---|")
    print(*(cells(row) for row in read_rows(RESULTS) if "seconds" in row), sep="\n")


# --- Checks -------------------------------------------------------------------------------------------------

def check_losses(run, steps, other=None):
    """A run logged each of its steps, skipped none, and all values are finite; its losses equal the other
    run's."""
    rows = read_rows(Path(run) / "metrics.jsonl")
    logged = [row["step"] for row in rows]
    require(logged == list(range(1, int(steps) + 1)), f"{run}: logged steps {logged}, not 1 to {steps}")
    for row in rows:
        bad = [name for name, value in row.items() if value is None]
        require(not bad and not row["skipped"],
                f"{run}: step {row['step']}: not finite: {bad}; skipped: {row['skipped']:.0f}")
    others = read_rows(Path(other) / "metrics.jsonl") if other else rows
    require(len(others) >= len(rows), f"{other}: logged {len(others)} steps, fewer than {run}")
    for row, same in zip(rows, others, strict=False):           # others may have more
        for name, value in row.items():
            require("loss" not in name or math.isclose(value, same[name], rel_tol=1e-4, abs_tol=1e-6),
                    f"step {row['step']}: {name} is {value} in {run}, {same.get(name)} in {other}")


def check_batch(file, n, size):
    """An .npz as ADM's evaluator reads it: arr_0, uint8 [n, size, size, 3], without equal images."""
    images, shape = np.load(file)["arr_0"], (int(n), int(size), int(size), 3)
    require(images.shape == shape and images.dtype == np.uint8,
            f"{file}: arr_0 is {images.dtype} {images.shape}, not uint8 {shape}")
    require(len(np.unique(images, axis=0)) == len(images), f"{file}: two of its images are equal")


def check_scores(file, n):
    """The output of fid.py: all of Inception's metrics, finite, of n samples."""
    scores = json.loads(Path(file).read_text())
    for name in ("fid", "sfid", "is", "kid", "precision", "recall"):
        require(math.isfinite(scores.get(name, math.nan)), f"{file}: {name} is {scores.get(name)}")
    require((scores["n_samples"], scores["features"]) == (int(n), "inception"),
            f"{file}: {scores['n_samples']} samples, {scores['features']}; not {n}, inception")


def compare_vaes(a, b):
    """For each tensor of the VAEs in two files, whether they are equal, bit for bit."""
    a, b = (load_vae(file)[0].state_dict() for file in (a, b))
    return [tensor.equal(b[name]) for name, tensor in a.items()]


def check_same_vae(a, b):
    equal = compare_vaes(a, b)
    require(all(equal), f"{equal.count(False)} of the VAE's {len(equal)} tensors differ between {a} and {b}")


def check_trained_vae(a, b):
    equal = compare_vaes(a, b)
    require(not any(equal), f"{equal.count(True)} of the VAE's {len(equal)} tensors are equal in {a} and {b}")


CHECKS = dict(losses=check_losses, batch=check_batch, scores=check_scores, same_vae=check_same_vae,
              trained_vae=check_trained_vae)


def main():
    parser = Parser(description="Run, measure and check the commands of dry_run.sh.")
    parser.add_argument("what", choices=["run", "table", *CHECKS])
    parser.add_argument("words", nargs=REMAINDER)
    args = parser.parse_args()
    if args.what == "table":
        print_table()
    elif args.what == "run":
        stop_at = None
        if args.words[0] == "--stop-at":
            _, stop_at, *args.words = args.words
        run(args.words[0], args.words[1:], stop_at)
    else:
        CHECKS[args.what](*args.words)
        name = " ".join([args.what, *args.words])
        write_result(name=name)
        print(f"passed: {name}")


if __name__ == "__main__":
    run_command(main)
