"""figures.py: what the charts of this folder share. matplotlib is needed here and nowhere else."""
import argparse
from pathlib import Path

from support.commands import UserError
from support.files import write_atomic

FORMATS = (".png", ".svg", ".pdf")
STYLE = {"font.size": 10, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
         "axes.grid": True, "grid.color": "#e4e4e4", "axes.axisbelow": True, "legend.frameon": False,
         "lines.linewidth": 1.6, "savefig.dpi": 144, "savefig.bbox": "tight", "svg.hashsalt": "repa-e"}
COLOURS = ("#1f6fb4", "#d9541e", "#2b9348", "#8e44ad", "#c9980a", "#4d4d4d", "#17a2b8", "#c2185b")


def load_matplotlib():
    """The class matplotlib.figure.Figure, with this folder's style set. Commands call it before they measure
    anything. Raises UserError where matplotlib is not installed."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the charts need matplotlib: pip install matplotlib") from None
    matplotlib.rcParams.update(STYLE)
    return Figure


def picture_file(text):
    """argparse's type of --out: a file name that ends in .png, .svg or .pdf."""
    if Path(text).suffix.lower() not in FORMATS:
        raise argparse.ArgumentTypeError(f"{text}: the name must end in {', '.join(FORMATS)}")
    return Path(text)


def save_figure(figure, path):
    """Write a figure whole or not at all, in the format that the name's ending says."""
    path = Path(path)
    write_atomic(path, lambda tmp: figure.savefig(tmp, format=path.suffix[1:].lower()))
