"""Files that are replaced whole, by any number of programs."""

import os
import signal

import pytest

from src.runtime.output_files import PART, atomic_write


def parts(folder) -> list[str]:
    return [path.name for path in folder.iterdir() if PART.fullmatch(path.name)]


def test_two_that_write_one_file_both_do_and_the_last_one_counts(tmp_path):
    with atomic_write(tmp_path / "a.json") as first:
        first.write(b"first")
        with atomic_write(tmp_path / "a.json") as second:
            second.write(b"second")
        assert (tmp_path / "a.json").read_bytes() == b"second"
    assert (tmp_path / "a.json").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_name_may_be_as_long_as_the_file_system_has_them(tmp_path):
    name = "名" * 85  # 255 bytes
    with atomic_write(tmp_path / name) as file:
        file.write(b"whole")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def write_in_child(path) -> int:
    """Starts a process that never comes to the end of writing the file; its id."""
    ready, say = os.pipe()
    child = os.fork()
    if child == 0:
        with atomic_write(path) as file:
            file.write(b"part")
            os.write(say, b".")
            signal.pause()
    os.read(ready, 1)
    return child


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is locked on Windows")
def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    killed, living = (write_in_child(tmp_path / name) for name in ("killed.pt", "living.pt"))
    try:
        os.kill(killed, signal.SIGKILL)
        os.waitpid(killed, 0)
        assert len(parts(tmp_path)) == 2
        with atomic_write(tmp_path / "other.json") as file:
            file.write(b"[]")
        (left,) = parts(tmp_path)
        assert left.startswith(".living.pt.")
    finally:
        os.kill(living, signal.SIGKILL)
        os.waitpid(living, 0)
