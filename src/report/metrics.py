"""metrics.jsonl: its values, and cutting it at a checkpoint."""

import json
import math
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import NamedTuple, SupportsFloat


class IterationMetrics(NamedTuple):
    """The values that are logged for one iteration."""

    loss: float
    localisation_loss: float
    label_loss: float
    learning_rate: float
    images_per_second: float  # of all processes
    loss_scale: float = 1.0
    skipped_steps: int = 0  # optimizer steps that loss scaling skipped since the run's start


def to_json_values(value: object) -> object:
    """The value in JSON's types: numbers of any library become Python's, NaN and infinity None, paths text."""
    if isinstance(value, Mapping):
        return {str(key): to_json_values(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_values(part) for part in value]
    if isinstance(value, str | int) or value is None:
        return value
    return finite(value) if isinstance(value, Real) else str(value)


def finite(value: SupportsFloat | None) -> float | None:
    """The number; None if it is NaN or infinite."""
    return float(value) if value is not None and math.isfinite(value) else None


class RewoundMetrics(NamedTuple):
    """The content of a metrics.jsonl at a checkpoint."""

    text: str
    ended_epochs: set[int]  # epochs whose end is logged
    warnings: list[str]  # faults of the file


def rewind_metrics(path: Path, *, epoch: int, iteration: int) -> RewoundMetrics:
    """The file without damaged lines and without entries from a checkpoint's position on.

    epoch, iteration: the position, where the run continues; iterations count from the run's start.
    """
    entries, damaged = [], []
    for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1):
        entry = _parse(line)
        if entry is None:
            damaged.append(number)
        elif _is_before(entry, epoch, iteration):
            entries.append((line, entry))
    ended_epochs = {entry["epoch"] for _, entry in entries if entry["kind"] == "epoch"}
    warnings = []
    if damaged:
        warnings.append(f"{path}: left out {len(damaged)} damaged lines, the first is line {damaged[0]}")
    first = min((entry["epoch"] for _, entry in entries), default=0)  # above 0 if the run continued from another folder
    missing = sorted(set(range(first, epoch)) - ended_epochs)
    if missing:
        warnings.append(f"{path}: lacks {len(missing)} of the epochs before epoch {epoch}, the first is {missing[0]}")
    return RewoundMetrics("".join(f"{line}\n" for line, _ in entries), ended_epochs, warnings)


def _parse(line: str) -> dict | None:
    """The entry of a line; None if the line is damaged."""
    try:
        entry = json.loads(line)
        position = [entry["epoch"], *([] if entry["kind"] == "evaluation" else [entry["iteration"]])]
    except (ValueError, TypeError, KeyError):
        return None
    return entry if all(isinstance(number, int) for number in position) else None


def _is_before(entry: dict, epoch: int, iteration: int) -> bool:
    if entry["kind"] == "evaluation":
        return entry["epoch"] < epoch
    # An epoch's entry has the number of the next iteration.
    return entry["iteration"] < iteration + (entry["kind"] == "epoch")
