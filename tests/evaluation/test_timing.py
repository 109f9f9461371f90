"""Where an evaluation's time went, of one process and of several."""

import pytest

from src.evaluation.timing import Stopwatch, of_all_processes


def watch(**seconds: float) -> Stopwatch:
    made = Stopwatch()
    made.seconds.update(seconds)
    return made


def test_a_lap_is_the_time_since_the_last(monkeypatch):
    times = iter([10.0, 11.0, 13.0, 16.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    made = Stopwatch()
    for part in ("loading", "network", "loading"):
        made.lap(part)
    assert made.seconds == {"loading": 4, "network": 2, "detections": 0, "scoring": 0, "gathering": 0}


def test_each_part_is_that_of_the_slowest_and_the_idlest_waited():
    first = watch(loading=1, network=2, detections=1, scoring=3, gathering=3)  # 10 s from begin to end
    second = watch(loading=4, network=1, detections=1, scoring=3, gathering=0.5)
    third = watch(loading=1, network=1, detections=1, scoring=1, gathering=5)
    assert of_all_processes([first, second, third]) == pytest.approx(
        {"loading": 4, "network": 2, "detections": 1, "scoring": 3, "gathering": 3, "waiting": 6}
    )
    assert of_all_processes([first])["waiting"] == 0
