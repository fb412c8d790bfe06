"""compare.py: the table and the chart of the runs of compare.sh.

    python experiments/compare.py [exps/compare] [--seeds 1 2 3] [--out exps/compare/comparison.png]

Prints a markdown table, mean (min-max) over the seeds, and after how many steps REPA-E, and REPA with
REPA-E's VAE, reach the last values of REPA and SiT, by linear interpolation. Draws the Frechet distance (FD)
of REGIMES by step, with the seeds' min-max as a band. Unfinished runs are left out and listed.
"""
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))                                 # the six modules are there
from experiments.figures import chart_file, load_matplotlib, run_colours, save_figure
from support.commands import Parser, UserError, require, run_command

REGIMES = {"sit": "SiT", "repa": "REPA", "naive": "naive",
           "noalign": "REPA-E, no alignment in the VAE's pass", "repae": "REPA-E",
           "second": "REPA, VAE of REPA-E frozen",
           "control": "REPA, VAE trained without alignment frozen",
           "scratch": "REPA-E, VAE trained from scratch"}
ABLATIONS = {"weight": "REPA-E, alignment in the VAE's pass × 1.5, as in the paper",
             "lite0": "REPA-E, target encoder EfficientNet-Lite0",
             "both": "diffusion and alignment into the VAE",
             "nonorm": "REPA-E, latent statistics fixed", "irepa": "REPA-E with iREPA's alignment",
             "float32": "REPA-E in float32", "mine": "flags of MINE"}
OTHERS = {"fixed-noise": "naive, posterior's standard deviation fixed at 0.5",
          "fixed-noise-repae": "REPA-E, posterior's standard deviation fixed at 0.5",
          "gen-first": "naive with a weighted entropy, in two phases",
          "gen-first-repae": "REPA-E with a weighted entropy, in two phases",
          "gen-first-second": "REPA, VAE of gen-first frozen",
          "less-noise": "REPA, posterior noise scaled to that of REPA-E's VAE",
          "more-noise": "REPA, VAE of REPA-E frozen, posterior noise scaled to that of REPA's VAE",
          "repa-mse": "REPA, alignment by squared error", "mse": "REPA-E, alignment by squared error"}
COLUMNS = {"to_reconstructions": ("FD to reconstructions", 1), "cknna": ("CKNNA", 3), "rfd": ("rFD", 1),
           "psnr": ("rPSNR, dB", 2)}                                                # title, decimal places


def read_json(file):
    try:
        return json.loads(file.read_text())
    except ValueError:
        raise UserError(f"{file}: damaged; delete it and run compare.sh again") from None


def read_run(run, settings):
    """{column: value} of a run's folder: FD by step (int), and COLUMNS: FD of the last samples to the
    reconstructions by the run's VAE, CKNNA of the aligned block, rFD and PSNR of the reconstructions.
    settings: a set that takes (evaluation network, samples)."""
    row = {}
    if (run / "fd.json").is_file():                                          # of evaluate.py
        record = read_json(run / "fd.json")
        settings.add((record["features"], record["samples"]))
        row = {int(step): value for step, value in record["fd"].items()}
        if "rfd" in record:
            row |= {"to_reconstructions": record["fd_to_reconstructions"], "rfd": record["rfd"],
                    "psnr": record["psnr"]}
    evaluations = sorted(run.glob("evaluation-*.json"))
    if evaluations:
        block = read_json(run / "args.json")["encoder_depth"]                               # counted from 1
        row["cknna"] = read_json(evaluations[-1])["cknna"][block - 1]
    return row


def read_runs(folder, seeds):
    """({regime: [row of each finished run]}, names of unfinished runs, (evaluation network, samples)). A run
    is finished if it has all columns of the run that has most. Raises UserError if there are no results, or
    results that cannot be compared."""
    rows, settings, finished, unfinished = {}, set(), {}, []
    for regime in REGIMES | OTHERS | ABLATIONS:
        for seed in seeds:
            if (folder / f"{regime}-{seed}").is_dir():
                rows[regime, seed] = read_run(folder / f"{regime}-{seed}", settings)
    columns = max(rows.values(), key=len, default={}).keys()
    require(columns, f"{folder}: no results of runs; bash experiments/compare.sh makes them")
    require(len(settings) == 1, f"{folder}: FDs by different evaluation networks or numbers of samples "
            f"({sorted(settings)}) cannot be compared; delete the fd.json of one kind")
    for (regime, seed), row in rows.items():
        if row.keys() >= columns:
            finished.setdefault(regime, []).append(row)
        else:
            unfinished.append(f"{regime}-{seed}")
    return finished, unfinished, settings.pop()


def mean_and_range(values, digits):
    """'mean (min-max)', or the value alone if all look the same."""
    mean, low, high = (f"{v:.{digits}f}" for v in (np.mean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low}-{high})"


def find_steps(finished):
    """The steps at which all runs were evaluated."""
    return sorted(column for column in next(iter(finished.values()))[0] if isinstance(column, int))


def print_table(finished):
    columns = {step: (f"FD, {step:,} steps", 1) for step in find_steps(finished)} | COLUMNS
    columns = {column: columns[column] for column in columns if column in next(iter(finished.values()))[0]}
    print("| | seeds | " + " | ".join(title for title, _ in columns.values()) + " |")
    print("|---" * (len(columns) + 2) + "|")
    for regime, runs in finished.items():
        cells = [mean_and_range([run[c] for run in runs], digits) for c, (_, digits) in columns.items()]
        title = (REGIMES | OTHERS | ABLATIONS)[regime]
        print(f"| {title} (`{regime}`) | {len(runs)} | {' | '.join(cells)} |")


def fd_curves(runs, steps):
    """FD [runs, steps]."""
    return np.array([[run[step] for step in steps] for run in runs])


def steps_to_reach(distance, steps, curve):
    """The first step at which a curve is down to this distance, by linear interpolation; None if it never
    is."""
    for k, value in enumerate(curve):
        if value <= distance:
            before = max(0, k - 1)
            return np.interp(distance, [value, curve[before]], [steps[k], steps[before]])
    return None


def print_speed_ups(finished):
    """After how many steps REPA-E, and REPA with its VAE, reach the last values of REPA and SiT (mean
    curves)."""
    steps = find_steps(finished)
    curves = {regime: fd_curves(runs, steps).mean(0) for regime, runs in finished.items()}
    for regime in [regime for regime in ("repa", "sit") if regime in curves]:
        end = curves[regime][-1]
        line = f"{REGIMES[regime]} ends at {end:.0f} after {steps[-1]:,} steps."
        for other in [other for other in ("repae", "second") if other in curves]:
            reached = steps_to_reach(end, steps, curves[other])
            if reached is None:
                line += f" {REGIMES[other]} does not reach it."
            else:
                most = "at most " if reached == steps[0] else ""
                line += f" {REGIMES[other]} reaches it after {most}{reached:,.0f}."
        print(f"\n{line}")


def draw_comparison(finished, path):
    """FD by step, both logarithmic: a line for the seeds' mean, a band for their min-max."""
    figure = load_matplotlib()(figsize=(7, 4.6), layout="constrained")
    axis, steps, colours = figure.subplots(), find_steps(finished), run_colours(REGIMES)
    axis.loglog()
    for regime in [regime for regime in REGIMES if regime in finished]:
        values, colour = fd_curves(finished[regime], steps), colours[regime]
        axis.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
        axis.plot(steps, values.mean(0), "o-", color=colour, markersize=4, label=REGIMES[regime])
    axis.set_xticks(steps, [f"{step:,}" for step in steps])
    axis.minorticks_off()
    low, high = axis.get_ylim()
    ticks = np.geomspace(low * 1.02, high / 1.02, 5)
    axis.set_yticks(ticks, [f"{tick:.0f}" for tick in ticks])
    axis.set(xlabel="SiT steps", ylabel="Frechet distance (lower is better)")
    figure.legend(loc="outside upper center", ncols=2)
    save_figure(figure, path)


def main():
    parser = Parser(description="The table and the chart of experiments/compare.sh.")
    parser.add_argument("folder", metavar="DIR", nargs="?", default="exps/compare", help="compare.sh's OUT")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="(1 2 3)")
    parser.add_argument("--out", type=chart_file, help="the chart (DIR/comparison.png)")
    args = parser.parse_args()
    load_matplotlib()
    folder = Path(args.folder)
    finished, unfinished, (network, samples) = read_runs(folder, args.seeds)
    draw_comparison(finished, args.out or folder / "comparison.png")
    print_table(finished)
    print(f"\nFD: Frechet distance of {samples:,} samples over {network}.")
    print_speed_ups(finished)
    if unfinished:
        print(f"\nUnfinished, left out: {', '.join(unfinished)}.")


if __name__ == "__main__":
    run_command(main)
