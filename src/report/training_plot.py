"""training.png: the curves of a training run."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator

from src.report.drawing import BLACK, BLUE, DPI, GREEN, ORANGE, PURPLE, VERMILION
from src.report.figures import LEGEND_RIGHT, add_note, plot_style, save_figure
from src.runtime.errors import UserError

LOSSES = {  # by name in metrics.jsonl: label, colour, line style
    "loss": ("loss", BLACK, "-"),
    "localisation_loss": ("localisation part", BLUE, "--"),
    "label_loss": ("label part", VERMILION, "-."),
}
ACCURACIES = {"mAP": (BLUE, "o"), "AP50": (ORANGE, "s"), "AP75": (GREEN, "^")}
SMOOTHED_FROM = 200  # logged iterations; from there on losses are drawn faintly, below their running mean


@plot_style()
def draw_training(metrics_file: Path | str, path: Path | str, *, size: int | None = None) -> Figure:
    """Draws losses, learning rate and mAP of a metrics.jsonl, which may be unfinished; the figure.

    size: bytes of the file to read, by default all.  Raises UserError.
    """
    entries = _read_metrics(Path(metrics_file), size)
    logged, evaluations = entries["iteration"], entries["evaluation"]
    iterations = _column(logged, "iteration")
    ends = {entry["epoch"]: entry["iteration"] for entry in entries["epoch"] if "iteration" in entry}
    epoch_length = _epoch_length(logged, ends)
    evaluated_at = [ends.get(entry["epoch"], (entry["epoch"] + 1) * epoch_length) for entry in evaluations]
    figure = Figure(figsize=(10.5, 9), layout="constrained", dpi=DPI)
    losses, rate, accuracy = figure.subplots(3, 1, sharex=True, height_ratios=(2, 1, 1.5))
    _draw_losses(losses, iterations, logged)
    _draw_validation_loss(losses, evaluated_at, evaluations)
    rate.plot(iterations, _column(logged, "learning_rate"), color=PURPLE, marker=_marker(iterations))
    rate.set(ylabel="learning rate", ylim=(0, None))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    _draw_accuracy(accuracy, evaluated_at, evaluations)
    accuracy.set(xlabel="iteration", xlim=(0, max(1, accuracy.get_xlim()[1])))
    epochs = losses.secondary_xaxis("top", functions=(lambda x: x / epoch_length, lambda x: x * epoch_length))
    epochs.set_xlabel("epochs done")
    epochs.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels()
    return save_figure(figure, path)


def _read_metrics(path: Path, size: int | None) -> dict[str, list[dict]]:
    """The file's entries by kind, without lines that are no entries, such as one that is cut off."""
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
    """The entries' values of that key, [E] float64; NaN for null and for a missing key."""
    return np.array([entry.get(key) for entry in entries], dtype=np.float64)


def _marker(values: np.ndarray) -> str | None:
    """A dot if there is a single point, because a line of one point is invisible."""
    return "." if len(values) < 2 else None


def _epoch_length(logged: list[dict], ends: dict[int, int]) -> float:
    """Iterations an epoch.  ends: by epoch that has ended, the number of iterations until then.

    Before any epoch has ended it is estimated: an iteration i of epoch e says that e epochs are at most i iterations.
    """
    if ends:
        epoch = max(ends)
        return max(1.0, ends[epoch] / (epoch + 1))
    bounds = [entry["iteration"] // entry["epoch"] for entry in logged if entry["epoch"] > 0]
    return max(1, min(bounds)) if bounds else max((entry["iteration"] for entry in logged), default=0) + 1


def _draw_losses(axes: Axes, iterations: np.ndarray, logged: list[dict]) -> None:
    """Draws the losses, on a logarithmic axis if any is above 0: the first are many times the last."""
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
        axes.legend(**LEGEND_RIGHT)
    else:
        axes.set_ylim(0, 1)
        add_note(axes, "nothing logged yet")


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the finite values in a window around each value; NaN if the window has none."""
    known = np.isfinite(values)
    total, count = (np.convolve(each, np.ones(window), mode="same") for each in (np.where(known, values, 0), known))
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def _draw_validation_loss(axes: Axes, evaluated_at: list[float], evaluations: list[dict]) -> None:
    values = _column(evaluations, "validation_loss")
    if np.isfinite(values).any():
        axes.plot(evaluated_at, values, label="validation loss", color=ORANGE, marker="o", markersize=5)
        axes.legend(**LEGEND_RIGHT)


def _draw_accuracy(axes: Axes, evaluated_at: list[float], evaluations: list[dict]) -> None:
    for key, (colour, marker) in ACCURACIES.items():
        axes.plot(evaluated_at, _column(evaluations, key), label=key, color=colour, marker=marker, markersize=5)
    axes.set_ylabel("average precision")
    scored = [entry for entry in evaluations if entry.get("mAP") is not None]
    if not scored:
        axes.set_ylim(0, 1)
        add_note(axes, "mAP not defined: no ground truth" if evaluations else "no evaluation yet")
        return
    best = max(scored, key=lambda entry: entry["mAP"])
    axes.set_title(f"best: {best['mAP']:.4f} mAP after epoch {best['epoch']} (the first is epoch 0)")
    axes.set_ylim(0, None)
    axes.legend(**LEGEND_RIGHT)
