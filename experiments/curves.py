"""curves.py: the losses of runs side by side.

    python experiments/curves.py RUN [RUN ...] [--metrics l1_loss grad_norm ...] [--table] [--out curves.png]

RUN is a run's folder or its metrics.jsonl. One panel per metric, one colour per run. --table prints each
run's values at five steps, as markdown, to compare another run with.
"""
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))                                 # the six modules are there
from experiments.figures import chart_file, load_matplotlib, run_colours, run_names, save_figure
from support.commands import Parser, require, run_command
from support.metrics import read_rows

NO_LOSSES = ("skipped", "zero_gradients", "images_per_second", "eval_seconds")       # only if asked for


def read_metrics(run):
    """{metric: {step: value}} of a run's folder or its metrics.jsonl, without values that are not finite.
    Raises UserError for a missing or empty file."""
    file = Path(run)
    if file.is_dir():
        file = file / "metrics.jsonl"
    require(file.is_file(), f"{file}: no such file; give folders of runs, e.g. exps/tiny")
    series = {}
    for row in read_rows(file):
        for name, value in row.items():
            if "step" in row and name != "step" and value is not None and math.isfinite(value):
                series.setdefault(name, {})[row["step"]] = value
    require(series, f"{file}: no metrics in it")
    return series


def print_table(series, metrics, rows=5):
    """A markdown table: a run's metrics at the logged steps closest to equal parts of the run."""
    logged = sorted({step for values in series.values() for step in values})
    chosen = [min(logged, key=lambda step: abs(step - logged[-1] * k / rows)) for k in range(1, rows + 1)]
    print("| step | " + " | ".join(metrics) + " |\n" + "|---" * (len(metrics) + 1) + "|")
    for step in dict.fromkeys(chosen):
        cells = [f"{series[metric][step]:.4g}" if step in series[metric] else "" for metric in metrics]
        print(f"| {step:,} | " + " | ".join(cells) + " |")


def wants_log_scale(values):
    """Whether a metric is easier to read on a logarithmic axis: all above 0, over more than a factor of
    20."""
    return min(values) > 0 and max(values) > 20 * min(values)


def draw_curves(runs, metrics, path):
    """runs: {name: series of `read_metrics`}; a panel for each of `metrics`, which at least one run has."""
    columns = min(4, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    figure = load_matplotlib()(figsize=(max(5, 3.2 * columns), 2.3 * rows + 0.5), layout="constrained")
    axes, colours = figure.subplots(rows, columns, squeeze=False).flatten(), run_colours(runs)
    for axis, metric in zip(axes, metrics, strict=False):       # the last row may have room for more
        for name, series in runs.items():
            values = series.get(metric, {})
            axis.plot(values.keys(), values.values(), color=colours[name], linewidth=1.2, markersize=3,
                      marker="o" if len(values) < 10 else None, label=name)
        axis.set(title=metric, xlabel="step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        if wants_log_scale([value for series in runs.values() for value in series.get(metric, {}).values()]):
            axis.set_yscale("log")
    for axis in axes[len(metrics):]:
        axis.set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=columns)
    save_figure(figure, path)


def main():
    parser = Parser(description="Draw the losses of runs side by side.")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs, or their metrics.jsonl")
    parser.add_argument("--metrics", metavar="NAME", nargs="+", help="panels (default: all losses and norms)")
    parser.add_argument("--table", action="store_true", help="print values at five steps, as markdown")
    parser.add_argument("--out", type=chart_file, default="curves.png", help="the chart (curves.png)")
    args = parser.parse_args()
    load_matplotlib()
    runs = {name: read_metrics(run) for name, run in zip(run_names(args.runs), args.runs, strict=True)}
    found = list(dict.fromkeys(name for series in runs.values() for name in series))
    for name in args.metrics or []:
        require(name in found,
                f"--metrics {name}: in none of these runs; choose from {', '.join(found)}")
    metrics = args.metrics or [name for name in found if name not in NO_LOSSES]
    draw_curves(runs, metrics, args.out)
    if args.table:
        for name, series in runs.items():
            print(f"{name}:\n")
            print_table(series, [metric for metric in metrics if metric in series])
            print()
    print(f"{len(runs)} runs, {len(metrics)} metrics -> {args.out}")


if __name__ == "__main__":
    run_command(main)
