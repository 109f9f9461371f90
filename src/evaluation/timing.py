"""The time of an evaluation by phase."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

WORK_PHASES = ("loading", "network", "detections", "scoring")  # in these a rank does not wait for others
PHASES = (*WORK_PHASES, "gathering")


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Adds the duration of the block to the seconds of the phase."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


def summarise_ranks(ranks: Sequence[dict[str, float]]) -> dict[str, float]:
    """Seconds of an evaluation by phase, of the rank that took longest in each.

    ranks: each rank's seconds by phase, rank 0 first.
    gathering: of rank 0; it includes waiting for slower ranks.  waiting: the longest idle time of another rank.
    """
    seconds = {phase: max(rank.get(phase, 0.0) for rank in ranks) for phase in WORK_PHASES}
    seconds["gathering"] = ranks[0].get("gathering", 0.0)
    total = sum(ranks[0].get(phase, 0.0) for phase in PHASES)
    idle = [total - sum(rank.get(phase, 0.0) for phase in WORK_PHASES) for rank in ranks[1:]]
    # A rank that began before rank 0 may have worked for longer than rank 0 in total.
    seconds["waiting"] = max([0.0, *idle])
    return seconds
