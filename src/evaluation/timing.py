"""Where the time of an evaluation goes."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

OWN_WORK = ("loading", "network", "detections", "scoring")  # what a rank does without waiting for others
PARTS = (*OWN_WORK, "gathering")


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Adds the seconds that the block takes to those of the part."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - start


def summarise_ranks(ranks: Sequence[dict[str, float]]) -> dict[str, float]:
    """Seconds of an evaluation by part: of the rank that took longest.  ranks: seconds of the PARTS, rank 0 first.

    gathering: rank 0's, which includes its waiting for slower ranks.  waiting: the longest time that another rank had
    nothing to do between rank 0's start and end.
    """
    seconds = {part: max(rank.get(part, 0.0) for rank in ranks) for part in OWN_WORK}
    seconds["gathering"] = ranks[0].get("gathering", 0.0)
    total = sum(ranks[0].get(part, 0.0) for part in PARTS)
    idle = [total - sum(rank.get(part, 0.0) for part in OWN_WORK) for rank in ranks[1:]]
    seconds["waiting"] = max(idle, default=0.0)
    return seconds
