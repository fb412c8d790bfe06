"""curves.py: the losses of any runs side by side.

    python experiments/curves.py RUN [RUN ...] [--metrics l1_loss grad_norm ...] [--table] [--out curves.png]

RUN is a run's folder or its metrics.jsonl. One panel a metric, one colour a run. --table prints each run's
values at five steps, as markdown, to hold another run against.
"""
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))                       # the six modules are there
from experiments.figures import COLOURS, load_matplotlib, picture_file, save_figure
from support.commands import Parser, UserError, run_command

NO_LOSSES = ("skipped", "skipped_in_a_row", "zero_gradients_in_a_row", "images_per_second", "mfu")  # if asked


def read_metrics(run):
    """{metric: ([steps], [values])} of a run's folder or its metrics.jsonl. Numbers that are not finite are
    left out. Raises UserError where the file is missing, damaged or empty."""
    file = Path(run)
    if file.is_dir():
        file = file / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"{file}: no such file; give folders of runs, e.g. exps/tiny")
    series = {}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            step = row.pop("step")
        except (ValueError, KeyError, AttributeError):
            raise UserError(f"{file}: line {number} is not a line of metrics") from None
        for name, value in row.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                steps, values = series.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
    if not series:
        raise UserError(f"{file}: no metrics in it yet")
    return series


def table(series, metrics, rows=5):
    """Lines of a markdown table: a run's metrics at the logged steps next to even parts of the run."""
    logged = sorted({step for steps, _ in series.values() for step in steps})
    chosen = [min(logged, key=lambda step: abs(step - logged[-1] * k / rows)) for k in range(1, rows + 1)]
    columns = [dict(zip(*series[metric])) for metric in metrics]
    lines = ["| step | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    for step in dict.fromkeys(chosen):
        cells = [f"{column[step]:.4g}" if step in column else "" for column in columns]
        lines.append(f"| {step:,} | " + " | ".join(cells) + " |")
    return lines


def wants_log_scale(values):
    """Whether a metric is easier to read on a logarithmic axis: all above 0, over more than a factor 20."""
    return min(values) > 0 and max(values) > 20 * min(values)


def draw_curves(runs, metrics, path):
    """runs: {name: what `read_metrics` gives}; a panel for each of `metrics` that a run has."""
    columns = min(4, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    figure = load_matplotlib()(figsize=(max(5, 3.2 * columns), 2.3 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).flatten()
    for axis, metric in zip(axes, metrics):
        everything = []
        for (name, series), colour in zip(runs.items(), COLOURS * len(runs)):
            steps, values = series.get(metric, ([], []))
            everything += values
            marker = "o" if len(steps) < 10 else None
            axis.plot(steps, values, color=colour, linewidth=1.2, marker=marker, markersize=3, label=name)
        axis.set_title(metric)
        axis.tick_params(labelbottom=True)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if wants_log_scale(everything):
            axis.set_yscale("log")
    for axis in axes[len(metrics):]:
        axis.set_visible(False)
    for axis in axes[max(0, len(metrics) - columns):len(metrics)]:
        axis.set_xlabel("step")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=columns)
    save_figure(figure, path)


def main():
    parser = Parser(description="Draw the losses of runs side by side.")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs, or their metrics.jsonl")
    parser.add_argument("--metrics", metavar="NAME", nargs="+", help="panels (default: all losses and norms)")
    parser.add_argument("--table", action="store_true", help="print values at five steps, as markdown")
    parser.add_argument("--out", type=picture_file, default="curves.png", help="the picture (curves.png)")
    args = parser.parse_args()
    load_matplotlib()
    names = [Path(run).resolve().name for run in args.runs]
    if len(set(names)) < len(names):                                  # equal names: told apart by their paths
        names = args.runs
    runs = {name: read_metrics(run) for name, run in zip(names, args.runs)}
    found = list(dict.fromkeys(name for series in runs.values() for name in series))
    unknown = [name for name in args.metrics or [] if name not in found]
    if unknown:
        raise UserError(f"--metrics {unknown[0]}: in none of these runs; there are {', '.join(found)}")
    metrics = args.metrics or [name for name in found if name not in NO_LOSSES]
    draw_curves(runs, metrics, args.out)
    for name, series in runs.items() if args.table else ():
        print("\n".join([f"{name}:", ""] + table(series, [m for m in metrics if m in series]) + [""]))
    print(f"{len(runs)} runs, {len(metrics)} metrics -> {args.out}")


if __name__ == "__main__":
    run_command(main)
