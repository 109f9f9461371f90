"""Where the time of an evaluation goes."""

import time
from collections.abc import Sequence

OWN = ("loading", "network", "detections", "scoring")  # a process's own work, in seconds
PARTS = (*OWN, "gathering")


class Stopwatch:
    """Seconds of each of the PARTS in one process."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """The time since the last lap was that part's."""
        now = time.perf_counter()
        self.seconds[part] += now - self._last
        self._last = now

    def own_work(self) -> float:
        return sum(self.seconds[part] for part in OWN)


def of_all_processes(watches: Sequence[Stopwatch]) -> dict[str, float]:
    """Seconds of an evaluation by part, of the process that had most of it; watches: rank 0's first.

    gathering: rank 0's, which waits in it for those that take longer, too.  waiting: the longest time in which
    another process had nothing to do; it began with rank 0.
    """
    seconds = {part: max(watch.seconds[part] for watch in watches) for part in OWN}
    seconds["gathering"] = watches[0].seconds["gathering"]
    total = sum(watches[0].seconds.values())
    seconds["waiting"] = max((total - watch.own_work() for watch in watches[1:]), default=0.0)
    return seconds
