"""The time of an evaluation by phase, of one rank and of several."""

import pytest

from src.evaluation.timing import summarise_ranks, timed


def test_a_block_adds_its_time_to_its_phase(monkeypatch):
    times = iter([10.0, 11.0, 13.0, 16.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    seconds = {}
    for _ in range(2):
        with timed(seconds, "network"):
            pass
    assert seconds == {"network": 4}


def test_each_phase_is_the_slowest_ranks_and_waiting_is_the_idlest_ranks():
    first = {"loading": 1, "network": 2, "detections": 1, "scoring": 3, "gathering": 3}  # 10 s from start to end
    second = {"loading": 4, "network": 1, "detections": 1, "scoring": 3, "gathering": 0.5}
    third = {"loading": 1, "network": 1, "detections": 1, "scoring": 1, "gathering": 5}
    assert summarise_ranks([first, second, third]) == pytest.approx(
        {"loading": 4, "network": 2, "detections": 1, "scoring": 3, "gathering": 3, "waiting": 6}
    )
    assert summarise_ranks([first])["waiting"] == 0


def test_a_rank_that_began_before_rank_0_has_not_waited_for_less_than_nothing():
    assert summarise_ranks([{"network": 2.0}, {"network": 2.5}])["waiting"] == 0
