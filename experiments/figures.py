"""figures.py: what the charts of this folder share. matplotlib is needed here and nowhere else."""
from pathlib import Path

from support.commands import UserError, argument
from support.files import write_atomic

STYLE = {"font.size": 10, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
         "axes.grid": True, "grid.color": "#e4e4e4", "axes.axisbelow": True, "legend.frameon": False,
         "lines.linewidth": 1.6, "savefig.dpi": 144, "savefig.bbox": "tight", "svg.hashsalt": "repa-e"}
COLOURS = ("#1f6fb4", "#d9541e", "#2b9348", "#8e44ad", "#c9980a", "#4d4d4d", "#17a2b8", "#c2185b")
REGIMES = dict(sit=0, repa=1, naive=2, noalign=3, repae=4, second=5, control=6, scratch=7,
               nonorm=0, base=1, mine=5)                        # colours in all charts; repa's VAE is base's


def run_names(runs):
    """A name for each run's folder: the folder's own; the whole paths if two have the same."""
    names = [Path(run).resolve().name for run in runs]
    return names if len(set(names)) == len(names) else runs


def run_colours(names):
    """{name: colour} of a chart's runs ('repae', 'exps/compare/repae-1', 'repae 0000300'): a regime has the
    same colour in all charts, the others have those that are left."""
    regimes = [Path(name).name.replace("-", " ").split()[0] for name in names]
    left = [k for k in range(len(COLOURS)) if k not in [REGIMES.get(regime) for regime in regimes]] or [0]
    others = iter(left * len(names))
    return {name: COLOURS[REGIMES[regime] if regime in REGIMES else next(others)]
            for name, regime in zip(names, regimes, strict=True)}


def load_matplotlib():
    """The class matplotlib.figure.Figure, with this folder's style set. Commands call it before they measure
    anything. Raises UserError if matplotlib is not installed."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the charts need matplotlib: pip install matplotlib") from None
    matplotlib.rcParams.update(STYLE)
    return Figure


def draw_strip(axis, name, image):
    """A PIL image in an axis, its name on the left."""
    axis.imshow(image, interpolation="nearest")
    axis.set_ylabel(name, rotation=0, ha="right", va="center")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


chart_file = argument(Path, lambda path: path.suffix.lower() in (".png", ".svg", ".pdf"),
                      "a file name that ends in .png, .svg or .pdf")              # argparse's type of --out


def save_figure(figure, path):
    """Write a figure atomically, in the format of the name's ending."""
    path = Path(path)
    write_atomic(path, lambda tmp: figure.savefig(tmp, format=path.suffix[1:].lower()))
