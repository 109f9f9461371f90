"""confusion_matrix.png: which categories are detected as which."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from src.report.drawing import DPI, shorten
from src.report.figures import plot_style, save_figure

MAX_CATEGORIES = 80  # those with the most boxes
# With more rows than this a count is written only in the background's row and in cells of a tenth of their row or more.
MAX_ROWS_WITH_ALL_COUNTS = 24
BACKGROUND = "background"


@plot_style()
def draw_confusion(matrix: np.ndarray, names: Sequence[str], path: Path | str) -> Figure:
    """Draws counts [K + 1, K + 1], coloured by their fraction of the row, and returns the figure.

    matrix: rows are the ground truth, columns the detections, the last of each is the background.  names: of the K
    categories.  Raises UserError.
    """
    present = np.flatnonzero(matrix[:-1].sum(axis=1) + matrix[:, :-1].sum(axis=0))  # with ground truth or detections
    largest = present[np.argsort(-matrix[present].sum(axis=1), kind="stable")[:MAX_CATEGORIES]]
    shown = np.append(np.sort(largest), len(names))
    counts = matrix[np.ix_(shown, shown)]
    labels = [*(shorten(names[index]) for index in shown[:-1]), BACKGROUND]
    side = 4 + max(3, 0.17 * len(labels) if len(labels) > MAX_ROWS_WITH_ALL_COUNTS else 0.42 * len(labels))
    figure = Figure(figsize=(side + 1, side), layout="constrained", dpi=DPI)
    axes = figure.subplots()
    fraction = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    picture = axes.imshow(fraction, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, label="share of the row", shrink=0.6)
    _draw_counts(axes, counts, fraction)
    size = 9 if len(labels) <= MAX_ROWS_WITH_ALL_COUNTS else 7
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=size, parse_math=False)
    axes.set_yticks(range(len(labels)), labels, fontsize=size, parse_math=False)
    axes.set(xlabel="detected", ylabel="ground truth")
    axes.grid(visible=False)
    for edge in (axes.axhline, axes.axvline):
        edge(len(labels) - 1.5, color="black", linewidth=0.8)
    left_out = len(present) - len(largest)
    suffix = f"; {left_out} smaller categories left out" if left_out else ""
    axes.set_title(f"Detections from the best score on, IoU 0.5 or more{suffix}")
    return save_figure(figure, path)


def _draw_counts(axes: Axes, counts: np.ndarray, fraction: np.ndarray) -> None:
    few_rows = len(counts) <= MAX_ROWS_WITH_ALL_COUNTS
    for row, column in np.argwhere(counts > 0).tolist():
        if few_rows or fraction[row, column] >= 0.1 or row == len(counts) - 1:
            colour = "white" if fraction[row, column] > 0.5 else "black"
            text, size = str(counts[row, column]), 8 if few_rows else 4.5
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=size)
