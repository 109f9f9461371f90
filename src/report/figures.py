"""The style of all matplotlib figures of a run, and writing them as PNG files.

Only matplotlib's Figure objects are used: no display, no pyplot.  The same input gives the same bytes.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from src.runtime.output_files import atomic_write

STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "lines.linewidth": 1.8,
    "legend.fontsize": 9,
    "axes.titlesize": 10,
}
LEGEND_RIGHT: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1), "borderaxespad": 0}  # of the axes
COMPRESSION = 2  # PNG's level in 0..9: a tenth larger than at the usual 6, in a third of the time


@contextmanager
def plot_style() -> Iterator[None]:
    """Inside, STYLE replaces the user's matplotlib settings, and characters that its font lacks cause no warning."""
    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


def save_figure(figure: Figure, path: Path | str) -> Figure:
    """Writes the figure as a PNG file and returns it.  An older file stays if that fails.  Raises UserError."""
    with atomic_write(Path(path)) as file:
        FigureCanvasAgg(figure).print_png(file, pil_kwargs={"compress_level": COMPRESSION})
    return figure


def add_note(axes: Axes, text: str) -> None:
    """Writes the text in the middle of axes that show no data."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="#555555")
