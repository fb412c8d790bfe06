"""dry_run.py: runs, measures and checks the commands of dry_run.sh.

    python benchmarks/dry_run.py run STOP_AT NAME COMMAND...         its output goes to logs/NAME.log
    python benchmarks/dry_run.py CHECK WORD...                       one of COMMANDS
    python benchmarks/dry_run.py table                               of all commands, as markdown

STOP_AT: "", or training gets SIGUSR1 as soon as this file, its metrics.jsonl, has a row. Results go to
results.jsonl. Memory is the peak of the command's largest process.
"""
import json
import math
import re
import resource
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

def run(stop_at, name, *command):
    """Run and measure a command. Raises UserError if it fails, or was to be stopped after a step and was
    not."""
    start, log, waiting = time.time(), Path(f"logs/{name}.log"), stop_at
    with open(log, "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        while process.poll() is None:
            if waiting and read_rows(Path(stop_at)):
                subprocess.run(["pkill", "-USR1", "-P", str(process.pid)])             # torchrun's processes
                waiting = False
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
    write_result(name=name, seconds=seconds, memory=memory, written=written, command=" ".join(command))
    print(f"{name}: {seconds:.0f} s")


def print_table():
    print("| | seconds | memory, GB | written, GB |\n|---|---|---|---|")
    for row in read_rows(RESULTS):
        if "seconds" in row:
            gigabytes = f"{row['memory'] / 1e9:.2f} | {row['written'] / 1e9:.2f}"
            print(f"| {row['name']} | {row['seconds']:.0f} | {gigabytes} |")


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
    others = read_rows(Path(other or run) / "metrics.jsonl")
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
    for name in "fid sfid is kid precision recall".split():
        require(math.isfinite(scores.get(name, math.nan)), f"{file}: {name} is {scores.get(name)}")
    require((scores["n_samples"], scores["features"]) == (int(n), "inception"),
            f"{file}: {scores['n_samples']} samples, {scores['features']}; not {n}, inception")


def check_vae(relation, a, b):
    """The VAEs in two files are the "same", bit for bit, or one was "trained": all its tensors differ."""
    first, second = (load_vae(file)[0].state_dict() for file in (a, b))
    equal = [tensor.equal(second[name]) for name, tensor in first.items()]
    require(all(equal) if relation == "same" else not any(equal), f"{a}, {b}: the VAEs are not {relation}, "
            f"{equal.count(True)} of {len(equal)} tensors are equal")


COMMANDS = dict(run=run, table=print_table, losses=check_losses, batch=check_batch, scores=check_scores,
                vae=check_vae)


def main():
    parser = Parser(description="Run, measure and check the commands of dry_run.sh.")
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("words", nargs=REMAINDER)
    args = parser.parse_args()
    COMMANDS[args.what](*args.words)
    if args.what not in ("run", "table"):
        name = " ".join([args.what, *args.words])
        write_result(name=name)
        print(f"passed: {name}")


if __name__ == "__main__":
    run_command(main)
