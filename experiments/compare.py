"""compare.py: the table and the curves from what compare.sh wrote.

    python experiments/compare.py [exps/compare] [--seeds 1 2 3] [--out exps/compare/comparison.png]

Prints a markdown table, mean (least to greatest of the seeds), and after how many steps REPA-E reaches the
distance that REPA and SiT end with; draws the Frechet distance by step, the seeds' spread as a band. The
ablations, below the regimes, are runs of the first seed. Runs that are missing or not finished are left out
and named.
"""
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))                       # the six modules are there
from experiments.figures import COLOURS, load_matplotlib, picture_file, save_figure
from support.commands import Parser, UserError, run_command

REGIMES = {"sit": "SiT", "repa": "REPA", "naive": "naive", "repae": "REPA-E",
           "second": "REPA over REPA-E's VAE, frozen", "scratch": "REPA-E from random weights"}
ABLATIONS = {"both": "diffusion and alignment into the VAE", "nonorm": "REPA-E, latent statistics fixed",
             "noalign": "REPA-E, no alignment in the VAE's pass", "irepa": "REPA-E with iREPA's alignment"}


def read_json(file):
    try:
        return json.loads(file.read_text())
    except ValueError:
        raise UserError(f"{file}: damaged; delete it and start compare.sh again") from None


def frechet_distance(file):
    """(name, value) of the Frechet distance in a file that fid.py wrote: 'fid', or 'fd_' and its network."""
    record = read_json(file)
    for name, value in record.items():
        if name == "fid" or name.startswith("fd_"):
            return name, value
    raise UserError(f"{file}: no Frechet distance in it")


def read_run(run, names):
    """{column: value} of a run's folder. Columns are ('fd', samples, step), 'cknna' of the aligned block, and
    'rfd' and 'psnr' of its VAE's reconstructions. names: a set that takes the names of the distances."""
    row = {}
    for file in run.glob("fd-*-*.json"):
        _, step, samples = file.stem.split("-")
        name, row["fd", int(samples), int(step)] = frechet_distance(file)
        names.add(name)
    if (run / "rfd.json").is_file():
        name, row["rfd"] = frechet_distance(run / "rfd.json")
        names.add(name)
        row["psnr"] = read_json(run / "rfd.json")["psnr"]
    evaluations = sorted(run.glob("evaluation-*.json"))
    if evaluations and (run / "args.json").is_file():
        block = read_json(run / "args.json")["encoder_depth"]                               # counted from 1
        row["cknna"] = read_json(evaluations[-1])["cknna"][block - 1]
    return row


def read_runs(folder, seeds):
    """({regime: [row of each finished run]}, names of the others). A run is finished once it has all columns
    of the one that has most. Raises UserError where there are none, or where the distances are not alike."""
    rows, names = {}, set()
    for regime in REGIMES | ABLATIONS:
        for seed in seeds if regime in REGIMES else seeds[:1]:
            rows[regime, seed] = read_run(folder / f"{regime}-{seed}", names)
    columns = max(rows.values(), key=len).keys()
    if not columns:
        raise UserError(f"{folder}: no results of runs in it; bash experiments/compare.sh makes them")
    if len(names) > 1:
        raise UserError(f"{folder}: distances over different features ({', '.join(sorted(names))}) cannot be "
                        "compared; delete the fd-*.json and rfd.json of one kind")
    finished, missing = {}, []
    for (regime, seed), row in rows.items():
        if row.keys() >= columns:
            finished.setdefault(regime, []).append({column: row[column] for column in columns})
        else:
            missing.append(f"{regime}-{seed}")
    return finished, missing


def spread(values, digits):
    """'mean (least to greatest)', or the value alone where all are shown alike."""
    mean, low, high = (f"{v:.{digits}f}" for v in (np.mean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def table(finished):
    """The lines of the markdown table."""
    columns = next(iter(finished.values()))[0]                                       # all rows have the same
    points = sorted((column for column in columns if isinstance(column, tuple)), key=lambda point: point[1:])
    heads = {point: f"FD, {point[2]:,} steps, {point[1]:,} samples" for point in points}
    digits = dict.fromkeys(points, 0)
    for column, title, places in (("cknna", "CKNNA", 3), ("rfd", "FD of its VAE's reconstructions", 1),
                                  ("psnr", "their PSNR, dB", 2)):
        if column in columns:
            heads[column] = title
            digits[column] = places
    lines = ["| | " + " | ".join(heads.values()) + " |", "|---" * (len(heads) + 1) + "|"]
    for regime, runs in finished.items():
        cells = [spread([run[column] for run in runs], digits[column]) for column in heads]
        lines.append(f"| {(REGIMES | ABLATIONS)[regime]} (`{regime}`) | " + " | ".join(cells) + " |")
    return lines


def curve(runs):
    """(steps [n], distances [runs, n]) at the number of samples that was drawn at most points."""
    points = [column for column in runs[0] if isinstance(column, tuple)]
    counts = [samples for _, samples, _ in points]
    samples = max(sorted(set(counts)), key=counts.count)
    steps = sorted(step for _, count, step in points if count == samples)
    return steps, np.array([[run["fd", samples, step] for step in steps] for run in runs])


def steps_to_reach(distance, steps, curve):
    """The step at which a falling curve first has that distance, by straight lines between its points; None
    where it never has."""
    for k, value in enumerate(curve):
        if value <= distance:
            if k == 0:
                return steps[0]
            share = (curve[k - 1] - distance) / (curve[k - 1] - value)
            return steps[k - 1] + share * (steps[k] - steps[k - 1])
    return None


def speed_ups(finished):
    """Lines that say after how many steps REPA-E reaches what REPA and SiT end with (mean curves)."""
    lines = []
    for regime in ("repa", "sit"):
        if regime in finished and "repae" in finished:
            steps, theirs = curve(finished[regime])
            _, ours = curve(finished["repae"])
            end = theirs.mean(0)[-1]
            reached = steps_to_reach(end, steps, ours.mean(0))
            if reached is None:
                outcome = "REPA-E does not reach it."
            else:
                most = "at most " if reached == steps[0] else ""
                outcome = f"REPA-E reaches it after {most}{reached:,.0f}."
            lines.append(f"{REGIMES[regime]} ends at {end:.0f} after {steps[-1]:,} steps. {outcome}")
    return lines


def draw_comparison(finished, path):
    """Frechet distance by step: a line through the seeds' mean, a band from the least to the greatest."""
    figure = load_matplotlib()(figsize=(7, 4.6), layout="constrained")
    axis = figure.subplots()
    for regime, colour in zip(REGIMES, COLOURS):
        if regime in finished:
            steps, values = curve(finished[regime])
            axis.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
            axis.plot(steps, values.mean(0), "o-", color=colour, markersize=4, label=REGIMES[regime])
            axis.set_xticks(steps)
    axis.set(xlabel="SiT steps", ylabel="Frechet distance (lower is better)")
    figure.legend(loc="outside upper center", ncols=2)
    save_figure(figure, path)


def main():
    parser = Parser(description="The table and the curves of experiments/compare.sh.")
    parser.add_argument("folder", metavar="DIR", nargs="?", default="exps/compare", help="compare.sh's OUT")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="(1 2 3)")
    parser.add_argument("--out", type=picture_file, help="the picture (DIR/comparison.png)")
    args = parser.parse_args()
    load_matplotlib()
    folder = Path(args.folder)
    finished, missing = read_runs(folder, args.seeds)
    draw_comparison(finished, args.out or folder / "comparison.png")
    print("\n".join(table(finished)))
    for line in speed_ups(finished):
        print(f"\n{line}")
    if missing:
        print(f"\nMissing or not finished, left out: {', '.join(missing)}.")


if __name__ == "__main__":
    run_command(main)
