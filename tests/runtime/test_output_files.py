"""Atomic writes, and the lock of a run's folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from src.runtime.errors import UserError
from src.runtime.output_files import LOCK, atomic_write, lock_output_folder
from tests.helpers.launch import VARIABLES

NEEDS_LOCKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is locked and no worker forked on Windows")
# A run that locks its folder, writes a file and forks a worker, which outlives it; it waits to be killed.
RUN = """
import os, signal, sys
from pathlib import Path
from src.runtime.output_files import atomic_write, lock_output_folder
folder = Path(sys.argv[1])
with lock_output_folder(folder), atomic_write(folder / "last.pt") as file:
    file.write(b"part")
    worker = os.fork()
    if worker:
        print(worker, flush=True)
    signal.pause()
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_of_two_writers_of_one_file_the_last_to_finish_wins(tmp_path):
    with atomic_write(tmp_path / "a.json") as first:
        first.write(b"first")
        with atomic_write(tmp_path / "a.json") as second:
            second.write(b"second")
        assert (tmp_path / "a.json").read_bytes() == b"second"
    assert (tmp_path / "a.json").read_bytes() == b"first"
    assert names(tmp_path) == ["a.json"]


def test_an_error_leaves_the_older_file_alone(tmp_path):
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "a.json") as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert (tmp_path / "a.json").read_text() == "old"
    assert names(tmp_path) == ["a.json"]


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path):
    name = "名" * 85  # 255 bytes
    with atomic_write(tmp_path / name) as file:
        file.write(b"whole")
    assert names(tmp_path) == [name]


@NEEDS_LOCKS
def test_a_killed_run_frees_its_folder_and_the_next_removes_its_leftovers(tmp_path):
    line = [sys.executable, "-c", RUN, str(tmp_path)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, env={**os.environ, **VARIABLES}) as run:
        worker = int(run.stdout.readline())
        try:
            with pytest.raises(
                UserError, match=f"^{tmp_path} is in use by another run: give this one its own --output"
            ):
                lock_output_folder(tmp_path).__enter__()
            assert len(names(tmp_path)) == 2  # the lock and the other run's temporary file
            run.kill()
            run.wait()
            (tmp_path / ".lock.part").touch()  # no temporary file of ours
            with lock_output_folder(tmp_path):
                assert names(tmp_path) == [LOCK, ".lock.part"]
        finally:
            os.kill(worker, signal.SIGKILL)


def test_a_folder_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / LOCK).mkdir()
    with pytest.raises(UserError, match=f"^cannot write {tmp_path}: "), lock_output_folder(tmp_path):
        pass


def test_a_file_system_without_locks_refuses_no_run(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    left = tmp_path / ".last.pt.0123abcd.part"
    left.touch()
    with lock_output_folder(tmp_path):
        assert left.exists()  # another run may be writing it
