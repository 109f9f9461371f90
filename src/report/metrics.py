"""metrics.jsonl: its values, and the file as it was at a checkpoint."""

import json
import math
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import NamedTuple, SupportsFloat


class IterationMetrics(NamedTuple):
    """What is logged of an iteration."""

    loss: float
    localisation_loss: float
    label_loss: float
    learning_rate: float
    images_per_second: float  # of all processes
    loss_scale: float = 1.0
    skipped_steps: int = 0  # that loss scaling left out since the run's start


def to_json_values(value: object) -> object:
    """The value in JSON's types: numbers of any library become Python's, paths text, and NaN and infinity None."""
    if isinstance(value, Mapping):
        return {str(key): to_json_values(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_values(part) for part in value]
    if isinstance(value, str | int) or value is None:
        return value
    return finite(value) if isinstance(value, Real) else str(value)


def finite(value: SupportsFloat | None) -> float | None:
    """The number, None if it is NaN or infinite."""
    return float(value) if value is not None and math.isfinite(value) else None


class RewoundMetrics(NamedTuple):
    """A metrics.jsonl as it was at a checkpoint."""

    text: str
    epochs_over: set[int]  # whose last iteration is in it
    warnings: list[str]  # what is wrong with the file


def rewind_metrics(path: Path, *, epoch: int, iteration: int) -> RewoundMetrics:
    """The file without what was logged from a checkpoint's position on, and without damaged lines.

    epoch, iteration: the ones to continue with; iterations count from the run's start.
    """
    entries, damaged = [], []
    for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1):
        entry = _read(line)
        if entry is None:
            damaged.append(number)
        elif _is_before(entry, epoch, iteration):
            entries.append((line, entry))
    epochs_over = {entry["epoch"] for _, entry in entries if entry["kind"] == "epoch"}
    warnings = []
    if damaged:
        warnings.append(f"{path}: left out {len(damaged)} damaged lines, the first is line {damaged[0]}")
    first = min((entry["epoch"] for _, entry in entries), default=0)  # above 0 after continuing in another folder
    missing = sorted(set(range(first, epoch)) - epochs_over)
    if missing:
        warnings.append(f"{path}: lacks {len(missing)} of the epochs before epoch {epoch}, the first is {missing[0]}")
    return RewoundMetrics("".join(f"{line}\n" for line, _ in entries), epochs_over, warnings)


def _read(line: str) -> dict | None:
    """The entry in a line, None if it is none of ours or cut off."""
    try:
        entry = json.loads(line)
        counts = [entry["epoch"], *([] if entry["kind"] == "evaluation" else [entry["iteration"]])]
    except (ValueError, TypeError, KeyError):
        return None
    return entry if all(isinstance(count, int) for count in counts) else None


def _is_before(entry: dict, epoch: int, iteration: int) -> bool:
    if entry["kind"] == "evaluation":
        return entry["epoch"] < epoch
    # An epoch's entry has the iteration that comes next.
    return entry["iteration"] < iteration + (entry["kind"] == "epoch")
