"""Two figures measured in turns: machines drift within minutes, so only their ratio in the same minute counts."""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

CPU = torch.device("cpu")


class Pair(NamedTuple):
    """A figure of this program and its baseline."""

    ours: float  # median of the turns
    baseline: float  # median of the turns
    spread: float  # interquartile range of the turns' ratios, in units of their median; 0 for a single turn


def pair(ours: Sequence[float], baseline: Sequence[float]) -> Pair:
    """The pair of figures that were measured in turns."""
    ratios = [one / other for one, other in zip(ours, baseline, strict=True)]
    spread = 0.0
    if len(ratios) > 1:
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        spread = (high - low) / median
    return Pair(statistics.median(ours), statistics.median(baseline), spread)


def in_turns(ours: Callable[[], float], baseline: Callable[[], float], turns: int, *, warm_up: int = 1) -> Pair:
    """Calls both functions in turns; each returns its figure.  The first `warm_up` turns do not count."""
    figures = [(ours(), baseline()) for _ in range(warm_up + turns)][warm_up:]
    return pair(*zip(*figures, strict=True))


def seconds(function: Callable[[], object], device: torch.device = CPU) -> float:
    """Seconds that the function takes, until the device has finished."""
    _synchronise(device)
    start = time.perf_counter()
    function()
    _synchronise(device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cpu_seconds() -> float:
    """Processor seconds of this process and of its workers that still run (proc_pid_stat(5))."""
    workers = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        workers += int(fields[11]) + int(fields[12])
    return time.process_time() + workers / os.sysconf("SC_CLK_TCK")
