"""precision_recall.png: precision over recall, F1 over score, and the average precision of the categories."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from src.report.drawing import BLACK, BLUE, DPI, SKY, VERMILION, shorten
from src.report.figures import LEGEND_RIGHT, add_note, plot_style, save_figure

MAX_LISTED = 24  # categories; if there are more, the best 12 and the worst 12 are listed


@plot_style()
def draw_precision_recall(
    precision: np.ndarray,
    iou_thresholds: Sequence[float],
    recalls: Sequence[float],
    names: Sequence[str],
    path: Path | str,
    *,
    f1: tuple[np.ndarray, np.ndarray] | None = None,
) -> Figure:
    """Draws precision over recall, F1 over score, and the categories by average precision; the figure.

    precision: [T, R, K] in 0..1, -1: not defined.  iou_thresholds: [T].  recalls: [R].  names: of the K categories.
    f1: scores [N], and the F1 [N, K] of the detections with each score or more, at the first IoU threshold.
    Raises UserError.
    """
    precision = np.where(np.asarray(precision) < 0, np.nan, precision)
    scored = np.flatnonzero(~np.isnan(precision).all(axis=(0, 1)))  # [S]: the categories that have ground truth
    half = MAX_LISTED // 2
    height = 7.0 if len(scored) < 14 else 1.6 + 0.27 * min(len(scored), MAX_LISTED)
    figure = Figure(figsize=(14, height), layout="constrained", dpi=DPI)
    axes = figure.subplot_mosaic([["curves", "bars"], ["f1" if f1 else "curves", "bars"]], width_ratios=(1.3, 1))
    curves, bars = axes["curves"], axes["bars"]
    curves.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title="mean over the categories")
    if not len(scored):
        add_note(curves, "no ground truth")
        for others in axes.keys() - {"curves"}:
            axes[others].set_axis_off()
        return save_figure(figure, path)
    precision = precision[:, :, scored]  # [T, R, S]
    _draw_curves(curves, precision, recalls, iou_thresholds)
    if f1:
        _draw_f1(axes["f1"], f1[0], f1[1][:, scored], iou_thresholds[0])
    average = np.nanmean(precision, axis=(0, 1))  # [S]
    order = (-average).argsort(kind="stable")
    listed = order if len(order) <= MAX_LISTED else np.concatenate((order[:half], order[-half:]))
    at_first = np.nanmean(precision[0][:, listed], axis=0)
    _draw_bars(bars, [names[i] for i in scored[listed]], average[listed], at_first, iou_thresholds)
    title = f"{half} best and {half} worst of " if len(listed) < len(order) else ""
    title += f"{len(order)} {'categories' if len(order) > 1 else 'category'}, mAP {average.mean():.3f}"
    missing = len(names) - len(scored)
    bars.set_title(title + (f"\nwithout ground truth, so not defined: {missing} more" if missing else ""))
    if len(listed) < len(order):
        bars.axhline(half - 0.5, color=BLACK, linewidth=1, linestyle=":")
    return save_figure(figure, path)


def _draw_curves(axes: Axes, precision: np.ndarray, recalls: Sequence[float], iou_thresholds: Sequence[float]) -> None:
    """Precision over recall for each IoU threshold.  precision: [T, R, S], NaN: not defined."""
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(iou_thresholds)))
    for threshold, values, colour in zip(iou_thresholds, precision, colours, strict=True):
        label = f"{threshold:.2f}: {np.nanmean(values):.3f}"
        axes.plot(recalls, np.nanmean(values, axis=1), color=colour, label=label)
    axes.legend(**LEGEND_RIGHT, title="IoU: AP")


def _draw_f1(axes: Axes, scores: np.ndarray, f1: np.ndarray, iou_threshold: float) -> None:
    """F1 over the least score, and the score with the best mean.  scores: [N].  f1: [N, S]."""
    mean = f1.mean(axis=1)
    best = int(np.flatnonzero(mean == mean.max())[-1])  # as in `find_best_thresholds`
    if f1.shape[1] > 1:
        axes.plot(scores, f1, color=SKY, linewidth=0.8, alpha=0.5)
    axes.plot(scores, mean, color=BLUE)
    axes.set_title(f"best mean: {mean[best]:.3f} from score {scores[best]:.2f} on")
    axes.axvline(scores[best], color=BLACK, linewidth=1, linestyle=":")
    axes.set(xlabel="least score", ylabel=f"F1 at IoU {iou_threshold:.2f}", xlim=(0, 1), ylim=(0, 1.02))


def _draw_bars(
    axes: Axes, names: list[str], average: np.ndarray, at_first: np.ndarray, iou_thresholds: Sequence[float]
) -> None:
    """A bar for each category, the first on top, with a mark at its average precision at the first IoU threshold.

    average, at_first: [L], the mean over all IoU thresholds and the value at the first.
    """
    rows = np.arange(len(names))
    low, high = iou_thresholds[0], iou_thresholds[-1]
    axes.barh(rows, average, color=SKY, height=0.7, label=f"IoU {low:.2f} to {high:.2f}")
    axes.plot(at_first, rows, linestyle="none", marker="D", markersize=5, color=VERMILION, label=f"IoU {low:.2f}")
    for row, value in enumerate(average):
        axes.text(0.016, row, f"{value:.3f}", va="center", fontsize=8)
    axes.set_yticks(rows, [shorten(name) for name in names], parse_math=False)
    axes.set(xlabel="average precision", xlim=(0, 1.02), ylim=(len(names) - 0.4, -0.6))
    axes.grid(visible=False, axis="y")
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower right", ncols=2)
