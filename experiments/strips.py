"""strips.py: samples of runs below each other.

    python experiments/strips.py RUN [RUN ...] [--out samples.png]

RUN is a run's folder. Its strip is the top quarter of its last sample grid (RUN/images/samples-STEP.png):
two rows of small images, one of large ones. The samples of a column have one class, and those at the same
place in two strips start from the same noise.
"""
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))                                 # the six modules are there
from experiments.figures import chart_file, draw_strip, load_matplotlib, run_names, save_figure
from support.commands import Parser, require, run_command


def top_of_last_grid(run):
    """The top quarter of a run's last sample grid, a PIL image. Raises UserError if it has none."""
    files = sorted(Path(run).glob("images/samples-*.png"))
    require(files, f"{run}: no images/samples-*.png; give folders of runs with a SiT, e.g. exps/tour/repa")
    grid = Image.open(files[-1])
    return grid.crop((0, 0, grid.width, grid.height // 4))


def main():
    parser = Parser(description="Draw samples of runs below each other.")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs")
    parser.add_argument("--out", type=chart_file, default="samples.png", help="the image (samples.png)")
    args = parser.parse_args()
    new_figure = load_matplotlib()
    strips = {name: top_of_last_grid(run) for name, run in zip(run_names(args.runs), args.runs, strict=True)}
    height = sum(8.2 * strip.height / strip.width for strip in strips.values())                    # inches
    figure = new_figure(figsize=(10, 1.1 * height), layout="constrained")
    axes = figure.subplots(len(strips), 1, squeeze=False).flatten()
    for axis, (name, strip) in zip(axes, strips.items(), strict=True):
        draw_strip(axis, name, strip)
    save_figure(figure, args.out)
    print(f"samples of {len(strips)} runs -> {args.out}")


if __name__ == "__main__":
    run_command(main)
