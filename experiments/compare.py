"""compare.py: the table and the curves from what compare.sh wrote.

    python experiments/compare.py [exps/compare] [--seeds 1 2 3] [--out exps/compare/comparison.png]

Prints a markdown table, mean (least to greatest of the seeds), and after how many steps REPA-E (and REPA over
its VAE) reaches what REPA and SiT end with, by a straight line between two points; draws the Frechet distance
by step, the seeds' spread as a band. The ablations, below the regimes, are runs of the first seed. Runs that
are not finished are left out and named.
"""
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))                       # the six modules are there
from experiments.figures import COLOURS, load_matplotlib, picture_file, save_figure
from support.commands import Parser, UserError, run_command

REGIMES = {"sit": "SiT", "repa": "REPA", "naive": "naive",
           "noalign": "REPA-E, no alignment in the VAE's pass", "repae": "REPA-E",
           "second": "REPA over REPA-E's frozen VAE",
           "control": "REPA over the VAE trained without alignment", "scratch": "REPA-E from random weights"}
ABLATIONS = {"weight": "REPA-E, alignment in the VAE's pass × 1.5, as in the paper",
             "lite0": "REPA-E, EfficientNet-Lite0 as teacher", "both": "diffusion and alignment into the VAE",
             "nonorm": "REPA-E, latent statistics fixed", "irepa": "REPA-E with iREPA's alignment",
             "float32": "REPA-E in float32"}


def read_json(file):
    try:
        return json.loads(file.read_text())
    except ValueError:
        raise UserError(f"{file}: damaged; delete it and start compare.sh again") from None


def read_run(run, settings):
    """{column: value} of a run's folder. Columns are the steps at which it was judged; 'to_reconstructions',
    the last distance to what its VAE makes of the pictures; 'cknna' of the aligned block; 'rfd' and 'psnr' of
    these reconstructions. settings: a set that takes (network, samples) of the distances."""
    row = {}
    if (run / "judged.json").is_file():
        record = read_json(run / "judged.json")
        row = {int(step): value for step, value in record["fd"].items()}
        settings.add((record["features"], record["samples"]))
        if "rfd" in record:
            row |= {"to_reconstructions": record["fd_to_reconstructions"], "rfd": record["rfd"],
                    "psnr": record["psnr"]}
    evaluations = sorted(run.glob("evaluation-*.json"))
    if evaluations and (run / "args.json").is_file():
        block = read_json(run / "args.json")["encoder_depth"]                               # counted from 1
        row["cknna"] = read_json(evaluations[-1])["cknna"][block - 1]
    return row


def read_runs(folder, seeds):
    """({regime: [row of each finished run]}, names of those only begun, (network, samples) of the distances).
    A run is finished once it has all columns of the one that has most. Raises UserError where there are none,
    or where the distances are not alike."""
    rows, settings = {}, set()
    for regime in REGIMES | ABLATIONS:
        for seed in seeds if regime in REGIMES else seeds[:1]:
            if (folder / f"{regime}-{seed}").is_dir():
                rows[regime, seed] = read_run(folder / f"{regime}-{seed}", settings)
    columns = max(rows.values(), key=len, default={}).keys()
    if not columns:
        raise UserError(f"{folder}: no results of runs in it; bash experiments/compare.sh makes them")
    if len(settings) > 1:
        raise UserError(f"{folder}: distances over different features or numbers of samples "
                        f"({sorted(settings)}) cannot be compared; delete the judged.json of one kind")
    finished, missing = {}, []
    for (regime, seed), row in rows.items():
        if row.keys() >= columns:
            finished.setdefault(regime, []).append({column: row[column] for column in columns})
        else:
            missing.append(f"{regime}-{seed}")
    return finished, missing, *settings


def spread(values, digits):
    """'mean (least to greatest)', or the value alone where all are shown alike."""
    mean, low, high = (f"{v:.{digits}f}" for v in (np.mean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


TITLES = {"to_reconstructions": ("to its VAE's reconstructions", 1), "cknna": ("CKNNA", 3),
          "rfd": ("FD of these reconstructions", 1), "psnr": ("their PSNR, dB", 2)}      # and digits behind


def points(finished):
    """The steps at which all runs were judged."""
    return sorted(column for column in next(iter(finished.values()))[0] if isinstance(column, int))


def table(finished):
    """The lines of the markdown table."""
    heads = {step: (f"FD, {step:,} steps", 1) for step in points(finished)}
    heads |= {column: title for column, title in TITLES.items() if column in next(iter(finished.values()))[0]}
    titles = [title for title, _ in heads.values()]
    lines = ["| | seeds | " + " | ".join(titles) + " |", "|---" * (len(heads) + 2) + "|"]
    for regime, runs in finished.items():
        cells = [spread([run[column] for run in runs], digits) for column, (_, digits) in heads.items()]
        title = f"{(REGIMES | ABLATIONS)[regime]} (`{regime}`)"
        lines.append(f"| {title} | {len(runs)} | " + " | ".join(cells) + " |")
    return lines


def curve(runs, steps):
    """The distances [runs, n] at these steps."""
    return np.array([[run[step] for step in steps] for run in runs])


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
    """Lines that say after how many steps REPA-E, and REPA over its VAE, reach what REPA and SiT end with
    (mean curves)."""
    lines, steps = [], points(finished)
    for regime in ("repa", "sit"):
        if regime not in finished:
            continue
        end = curve(finished[regime], steps).mean(0)[-1]
        line = f"{REGIMES[regime]} ends at {end:.0f} after {steps[-1]:,} steps."
        for other in ("repae", "second"):
            if other in finished:
                reached = steps_to_reach(end, steps, curve(finished[other], steps).mean(0))
                if reached is None:
                    line += f" {REGIMES[other]} does not reach it."
                else:
                    most = "at most " if reached == steps[0] else ""
                    line += f" {REGIMES[other]} reaches it after {most}{reached:,.0f}."
        lines.append(line)
    return lines


def draw_comparison(finished, path):
    """Frechet distance by step, both logarithmic: a line through the seeds' mean, a band from the least to
    the greatest."""
    figure = load_matplotlib()(figsize=(7, 4.6), layout="constrained")
    axis, steps = figure.subplots(), points(finished)
    axis.loglog()
    for regime, colour in zip(REGIMES, COLOURS):
        if regime in finished:
            values = curve(finished[regime], steps)
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
    parser = Parser(description="The table and the curves of experiments/compare.sh.")
    parser.add_argument("folder", metavar="DIR", nargs="?", default="exps/compare", help="compare.sh's OUT")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="(1 2 3)")
    parser.add_argument("--out", type=picture_file, help="the picture (DIR/comparison.png)")
    args = parser.parse_args()
    load_matplotlib()
    folder = Path(args.folder)
    finished, missing, (network, samples) = read_runs(folder, args.seeds)
    draw_comparison(finished, args.out or folder / "comparison.png")
    print(*table(finished), f"\nFD: the Frechet distance of {samples:,} samples over {network}.", sep="\n")
    for line in speed_ups(finished):
        print(f"\n{line}")
    if missing:
        print(f"\nNot finished, left out: {', '.join(missing)}.")


if __name__ == "__main__":
    run_command(main)
