"""Work that another process does, and the ends that it and this one may come to."""

import os
import signal
import subprocess
import sys
import time

import pytest

from src.runtime.background_process import Errand, ErrandLostError
from tests.helpers.background_targets import begin_a_file, die, sorted_modules, take_time_to_end


def wait_for(condition) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to pass in a minute")


def test_the_answer_comes_back_and_what_is_not_needed_is_not_imported():
    with Errand(niceness=5) as errand:
        errand.send(sorted_modules, "torch")
        assert errand.answer() == []
    with Errand() as first, Errand() as second:
        first.send(os.path.join, "a", "b")
        second.send(os.path.join, "c", "d")
        assert (second.answer(), first.answer()) == ("c/d", "a/b")


def test_a_process_that_ends_early_is_told_of_with_its_signal_or_status(capfd):
    with Errand() as killed, Errand() as wrong:
        killed.send(die, signal.SIGKILL)
        wrong.send(os.listdir, "/no such folder")
        with pytest.raises(ErrandLostError, match="killed by signal: Killed"):
            killed.answer()
        with pytest.raises(ErrandLostError, match="ended with status 1"):
            wrong.answer()
    assert "/no such folder" in capfd.readouterr().err


def test_one_that_is_ending_is_left_to_end_in_silence(capfd):
    with Errand() as errand:
        errand.send(take_time_to_end)
        errand.answer()
    assert capfd.readouterr().err == ""


def test_a_notice_to_the_whole_job_does_not_end_it():
    with Errand() as errand:
        errand.send(die, signal.SIGTERM)
        assert errand.answer() is None


def test_what_is_stopped_leaves_no_part_of_a_file(tmp_path):
    with Errand() as errand:
        errand.send(begin_a_file, tmp_path / "file")
        wait_for(lambda: list(tmp_path.iterdir()))
    assert list(tmp_path.iterdir()) == []


def test_it_ends_when_the_process_that_waits_for_it_is_killed(tmp_path):
    program = (
        "from pathlib import Path; from src.runtime.background_process import Errand\n"
        "from tests.helpers.background_targets import begin_a_file\n"
        f"errand = Errand(); errand.send(begin_a_file, Path({str(tmp_path / 'file')!r})); errand.answer()"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    wait_for(lambda: list(tmp_path.iterdir()))
    parent.kill()
    parent.wait()
    wait_for(lambda: not list(tmp_path.iterdir()))


def test_one_that_has_got_no_work_yet_is_stopped():
    Errand().stop()
