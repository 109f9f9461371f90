"""The pictures of a run: training and precision-recall curves, detections, a training batch, a prediction.

Drawn with matplotlib's Figure objects alone: no display, no pyplot, whatever the user's matplotlib settings.  Same
input, same bytes.  Boxes are ltrb in pixels of the image that they lie in; names may be any text.  Each function writes
a PNG file, whole or not at all, gives the figure that it wrote, and raises UserError when it cannot write.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator

from src.report.drawing import (
    BLACK,
    BLUE,
    DPI,
    GREEN,
    MOST_BOXES,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    Panel,
    colours_of,
    grid,
    photograph,
    short,
)
from src.report.figures import add_remark, save, styled
from src.runtime.errors import UserError

BESIDE: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1), "borderaxespad": 0}  # of legends

LOSSES = {  # by name in metrics.jsonl: label, colour, line style
    "loss": ("loss", BLACK, "-"),
    "localisation_loss": ("localisation part", BLUE, "--"),
    "label_loss": ("label part", VERMILION, "-."),
}
ACCURACIES = {"mAP": (BLUE, "o"), "AP50": (ORANGE, "s"), "AP75": (GREEN, "^")}
SMOOTHED_FROM = 200  # logged iterations; so many are drawn faintly, below their running mean

MOST_CATEGORIES = 24  # so many are all listed; of more, half as many best and worst ones

MIN_SCORE = 0.3  # of the detections drawn: below it most are wrong, and they hide the picture
MOST_BATCH_IMAGES = 16


class Example(NamedTuple):
    """An image with what is in it and what was found in it, best first."""

    image: np.ndarray  # [H, W, 3] uint8
    truth_boxes: np.ndarray  # [G, 4]
    truth_names: Sequence[str]
    boxes: np.ndarray  # [D, 4]
    names: Sequence[str]
    scores: np.ndarray  # [D] in 0..1


# Training


@styled()
def draw_training(metrics_file: Path | str, path: Path | str, *, size: int | None = None) -> Figure:
    """Loss and its parts, learning rate and mAP over the iterations of a metrics.jsonl, which may be unfinished.

    size: bytes of the file to look at, all where left out.
    """
    entries = _read_metrics(Path(metrics_file), size)
    logged = entries["iteration"]
    iterations = _column(logged, "iteration")
    ends = {entry["epoch"]: entry["iteration"] for entry in entries["epoch"] if "iteration" in entry}
    epoch_length = _epoch_length(logged, ends)
    figure = Figure(figsize=(10.5, 9), layout="constrained", dpi=DPI)
    losses, rate, accuracy = figure.subplots(3, 1, sharex=True, height_ratios=(2, 1, 1.5))
    _draw_losses(losses, iterations, logged)
    _draw_validation_loss(losses, entries["evaluation"], ends, epoch_length)
    rate.plot(iterations, _column(logged, "learning_rate"), color=PURPLE, marker=_marker(iterations))
    rate.set(ylabel="learning rate", ylim=(0, None))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    _draw_accuracy(accuracy, entries["evaluation"], ends, epoch_length)
    accuracy.set(xlabel="iteration", xlim=(0, max(1, accuracy.get_xlim()[1])))
    epochs = losses.secondary_xaxis("top", functions=(lambda x: x / epoch_length, lambda x: x * epoch_length))
    epochs.set_xlabel("epochs done")
    epochs.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels()
    return save(figure, path)


def _read_metrics(path: Path, size: int | None) -> dict[str, list[dict]]:
    """The entries by kind; a line that is cut off is left out."""
    try:
        lines = path.read_bytes()[:size].splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    entries = defaultdict(list)
    for line in lines:
        try:
            entry = json.loads(line)
            entries[entry["kind"]].append(entry)
        except (ValueError, TypeError, KeyError):
            continue
    return entries


def _column(entries: list[dict], key: str) -> np.ndarray:
    """The numbers of that name, NaN where an entry has none."""
    return np.array([entry.get(key) for entry in entries], dtype=np.float64)


def _marker(values: np.ndarray) -> str | None:
    """A line needs two points to be seen."""
    return "." if len(values) < 2 else None


def _epoch_length(logged: list[dict], ends: dict[int, int]) -> float:
    """Iterations an epoch: of those that have ended, whose next iterations are `ends`.

    In the first one as closely as the logged iterations tell: those of epoch e are e to e + 1 times as many.
    """
    if ends:
        epoch = max(ends)
        return max(1.0, ends[epoch] / (epoch + 1))
    bounds = [entry["iteration"] // entry["epoch"] for entry in logged if entry["epoch"] > 0]
    return max(1, min(bounds)) if bounds else max((entry["iteration"] for entry in logged), default=0) + 1


def _draw_losses(axes: Axes, iterations: np.ndarray, logged: list[dict]) -> None:
    """Logarithmic where the losses allow: the first ones are many times the later ones."""
    for key, (label, colour, style) in LOSSES.items():
        values = _column(logged, key)
        if len(values) >= SMOOTHED_FROM:
            axes.plot(iterations, values, color=colour, linewidth=0.7, alpha=0.25)
            values = _running_mean(values, len(values) // 50)
        axes.plot(iterations, values, label=label, color=colour, linestyle=style, marker=_marker(values))
    if any((np.asarray(line.get_ydata()) > 0).any() for line in axes.lines):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_locator(LogLocator(subs=()))
    axes.set_ylabel("loss")
    if logged:
        axes.legend(**BESIDE)
    else:
        axes.set_ylim(0, 1)
        add_remark(axes, "nothing logged yet")


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the finite values in a window around each; NaN where there is none."""
    known = np.isfinite(values)
    total, count = (np.convolve(each, np.ones(window), mode="same") for each in (np.where(known, values, 0), known))
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def _places(evaluations: list[dict], ends: dict[int, int], epoch_length: float) -> list[float]:
    return [ends.get(entry["epoch"], (entry["epoch"] + 1) * epoch_length) for entry in evaluations]


def _draw_validation_loss(axes: Axes, evaluations: list[dict], ends: dict[int, int], epoch_length: float) -> None:
    values = _column(evaluations, "validation_loss")
    if np.isfinite(values).any():
        places = _places(evaluations, ends, epoch_length)
        axes.plot(places, values, label="validation loss", color=ORANGE, marker="o", markersize=5)
        axes.legend(**BESIDE)


def _draw_accuracy(axes: Axes, evaluations: list[dict], ends: dict[int, int], epoch_length: float) -> None:
    """Each evaluation stands where its epoch ended."""
    places = _places(evaluations, ends, epoch_length)
    for key, (colour, marker) in ACCURACIES.items():
        axes.plot(places, _column(evaluations, key), label=key, color=colour, marker=marker, markersize=5)
    axes.set_ylabel("average precision")
    scored = [entry for entry in evaluations if entry.get("mAP") is not None]
    if not scored:
        axes.set_ylim(0, 1)
        add_remark(axes, "mAP not defined: no ground truth" if evaluations else "no evaluation yet")
        return
    best = max(scored, key=lambda entry: entry["mAP"])
    axes.set_title(f"best: {best['mAP']:.4f} mAP after epoch {best['epoch']} (the first is epoch 0)")
    axes.set_ylim(0, None)
    axes.legend(**BESIDE)


# Precision and recall


@styled()
def draw_precision_recall(
    precision: np.ndarray,
    iou_thresholds: Sequence[float],
    recalls: Sequence[float],
    names: Sequence[str],
    path: Path | str,
    *,
    f1: tuple[np.ndarray, np.ndarray] | None = None,
) -> Figure:
    """Precision over recall for each IoU threshold, F1 over score, and the categories by average precision.

    precision [T, R, K] in 0..1, -1 where not defined; iou_thresholds [T]; recalls [R]; names of the K categories.
    f1: scores [S] and F1 from each on at the first IoU threshold, [S, K].
    """
    precision = np.where(np.asarray(precision) < 0, np.nan, precision)
    scored = np.flatnonzero(~np.isnan(precision).all(axis=(0, 1)))  # [S]: there is ground truth of them
    half = MOST_CATEGORIES // 2
    height = 7.0 if len(scored) < 14 else 1.6 + 0.27 * min(len(scored), MOST_CATEGORIES)
    figure = Figure(figsize=(14, height), layout="constrained", dpi=DPI)
    axes = figure.subplot_mosaic([["curves", "bars"], ["f1" if f1 else "curves", "bars"]], width_ratios=(1.3, 1))
    curves, bars = axes["curves"], axes["bars"]
    curves.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title="mean over the categories")
    if not len(scored):
        add_remark(curves, "no ground truth")
        for others in axes.keys() - {"curves"}:
            axes[others].set_axis_off()
        return save(figure, path)
    precision = precision[:, :, scored]  # [T, R, S]
    _draw_curves(curves, precision, recalls, iou_thresholds)
    if f1:
        _draw_f1(axes["f1"], f1[0], f1[1][:, scored], iou_thresholds[0])
    average = np.nanmean(precision, axis=(0, 1))  # [S]
    order = (-average).argsort(kind="stable")
    listed = order if len(order) <= MOST_CATEGORIES else np.concatenate((order[:half], order[-half:]))
    at_first = np.nanmean(precision[0][:, listed], axis=0)
    _draw_bars(bars, [names[i] for i in scored[listed]], average[listed], at_first, iou_thresholds)
    title = f"{half} best and {half} worst of " if len(listed) < len(order) else ""
    title += f"{len(order)} {'categories' if len(order) > 1 else 'category'}, mAP {average.mean():.3f}"
    missing = len(names) - len(scored)
    bars.set_title(title + (f"\nwithout ground truth, so not defined: {missing} more" if missing else ""))
    if len(listed) < len(order):
        bars.axhline(half - 0.5, color=BLACK, linewidth=1, linestyle=":")
    return save(figure, path)


def _draw_curves(axes: Axes, precision: np.ndarray, recalls: Sequence[float], iou_thresholds: Sequence[float]) -> None:
    """precision [T, R, S], NaN where not defined."""
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(iou_thresholds)))
    for threshold, values, colour in zip(iou_thresholds, precision, colours, strict=True):
        label = f"{threshold:.2f}: {np.nanmean(values):.3f}"
        axes.plot(recalls, np.nanmean(values, axis=1), color=colour, label=label)
    axes.legend(**BESIDE, title="IoU: AP")


def _draw_f1(axes: Axes, scores: np.ndarray, f1: np.ndarray, iou_threshold: float) -> None:
    """F1 of the detections from each score on, [S, S'], and the score where the mean is best."""
    mean = f1.mean(axis=1)
    best = int(np.flatnonzero(mean == mean.max())[-1])  # as in `best_thresholds`
    if f1.shape[1] > 1:
        axes.plot(scores, f1, color=SKY, linewidth=0.8, alpha=0.5)
    axes.plot(scores, mean, color=BLUE)
    axes.set_title(f"best mean: {mean[best]:.3f} from score {scores[best]:.2f} on")
    axes.axvline(scores[best], color=BLACK, linewidth=1, linestyle=":")
    axes.set(xlabel="least score", ylabel=f"F1 at IoU {iou_threshold:.2f}", xlim=(0, 1), ylim=(0, 1.02))


def _draw_bars(
    axes: Axes, names: list[str], average: np.ndarray, at_first: np.ndarray, iou_thresholds: Sequence[float]
) -> None:
    """A bar for each category, the first on top, with a mark at its average precision at the first threshold."""
    rows = np.arange(len(names))
    low, high = iou_thresholds[0], iou_thresholds[-1]
    axes.barh(rows, average, color=SKY, height=0.7, label=f"IoU {low:.2f} to {high:.2f}")
    axes.plot(at_first, rows, linestyle="none", marker="D", markersize=5, color=VERMILION, label=f"IoU {low:.2f}")
    for row, value in enumerate(average):
        axes.text(0.016, row, f"{value:.3f}", va="center", fontsize=8)
    axes.set_yticks(rows, [short(name) for name in names], parse_math=False)
    axes.set(xlabel="average precision", xlim=(0, 1.02), ylim=(len(names) - 0.4, -0.6))
    axes.grid(visible=False, axis="y")
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower right", ncols=2)


# Images


@styled()
def draw_detections(examples: Iterable[Example], path: Path | str, *, min_score: float = MIN_SCORE) -> Figure:
    """A grid of images, each twice: with its ground truth, and with the detections of `min_score` or more.

    examples: `Example`s or tuples of the same six.
    """
    panels = []
    for image, truth_boxes, truth_names, boxes, names, scores in examples:
        panels.append(Panel(f"ground truth: {len(truth_names)}", image, *_largest_first(truth_boxes, truth_names)))
        likely = _likely(boxes, names, scores, min_score)
        title = f"detections (score ≥ {min_score:g}): {len(likely[0])} of {len(names)}"
        panels.append(Panel(title, image, *likely))
    # The ground truth gives its colours, so that they do not depend on what was found.
    colours = colours_of(name for panel in panels[::2] + panels[1::2] for name in panel.names)
    return save(grid(panels, colours, columns=4), path)


@styled()
def draw_batch(
    images: np.ndarray, boxes: Sequence[np.ndarray], names: Sequence[Sequence[str]], path: Path | str
) -> Figure:
    """The images of a batch with their boxes, the first 16; images [N, 3, H, W] in 0..255, boxes and names of each."""
    shown = slice(MOST_BATCH_IMAGES)
    pixels = np.asarray(images[shown]).clip(0, 255).round().astype(np.uint8).transpose(0, 2, 3, 1)  # [N, H, W, 3]
    panels = [
        Panel(f"image {number}, boxes: {len(its_names)}", image, *_largest_first(its_boxes, its_names))
        for number, (image, its_boxes, its_names) in enumerate(zip(pixels, boxes[shown], names[shown], strict=True))
    ]
    return save(grid(panels, colours_of(name for each in names[shown] for name in each), columns=4), path)


@styled()
def draw_prediction(
    image: np.ndarray,
    boxes: np.ndarray,
    names: Sequence[str],
    scores: np.ndarray,
    path: Path | str,
    *,
    min_score: float = MIN_SCORE,
) -> Figure:
    """The image [H, W, 3] uint8, pixel for pixel, with the detections of `min_score` or more drawn on it."""
    panel = Panel("", image, *_likely(boxes, names, scores, min_score))
    return save(photograph(panel, colours_of(panel.names)), path)


def _largest_first(boxes: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, Sequence[str]]:
    """The boxes [B, 4] and names of an image; of more than are drawn the largest come first, in their order."""
    if len(boxes) <= MOST_BOXES:
        return boxes, names
    order = (-(boxes[:, 2:] - boxes[:, :2]).prod(axis=1)).argsort(kind="stable")
    order = np.concatenate((np.sort(order[:MOST_BOXES]), order[MOST_BOXES:]))
    return boxes[order], [names[i] for i in order]


def _likely(
    boxes: np.ndarray, names: Sequence[str], scores: np.ndarray, min_score: float
) -> tuple[np.ndarray, list[str], np.ndarray]:
    """The boxes [L, 4], names and scores of the detections that score at least `min_score`, best first."""
    scores = np.asarray(scores)
    kept = [i for i in (-scores).argsort(kind="stable") if scores[i] >= min_score]
    return np.asarray(boxes).reshape(-1, 4)[kept], [names[i] for i in kept], scores[kept]
