"""Moving an earlier run's files, and copying a run that continues from an earlier checkpoint."""

import os
import re
from pathlib import Path

import pytest

from src.report.run_folder import branch_off, set_aside_old_run
from src.runtime.errors import UserError


def write_old_run(folder: Path, generation: str = "first") -> dict[str, str]:
    """Writes the files of a run; their contents by name."""
    checkpoints, logs = ("last.pt", "best.pt"), ("metrics.jsonl", "flags.json", "mlperf.log", "detections.json")
    pictures = ("training.png", "precision_recall.png", "detections.png", "batch.png")
    names = (*checkpoints, *logs, *pictures, "tensorboard/events.out.tfevents.1.host.2.0")
    contents = {name: f"{generation} {name}" for name in names}
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return contents


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_an_old_run_is_moved_to_the_next_free_folder(tmp_path):
    first = write_old_run(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "tensorboard" / "notes.txt").write_text("mine")
    assert set_aside_old_run(tmp_path) == f"{tmp_path} held an earlier run: its files are now in {tmp_path}/run-001"
    assert contents(tmp_path / "run-001") == first
    second = write_old_run(tmp_path, "second")
    assert set_aside_old_run(tmp_path).endswith("run-002")
    assert contents(tmp_path / "run-002") == second
    assert contents(tmp_path / "run-001") == first
    assert (tmp_path / "notes.txt").read_text() == (tmp_path / "tensorboard" / "notes.txt").read_text() == "mine"


def test_without_an_old_run_nothing_is_moved(tmp_path):
    assert set_aside_old_run(tmp_path / "missing") is None
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "run-001").mkdir()
    assert set_aside_old_run(tmp_path) is None
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "run-001"]


@pytest.mark.parametrize("taken", ["run-007", "run-1234"])
def test_numbers_continue_from_the_greatest(tmp_path, taken):
    write_old_run(tmp_path)
    (tmp_path / taken).write_text("a file in the way")
    (tmp_path / "run-final").mkdir()
    number = int(taken.removeprefix("run-")) + 1
    assert set_aside_old_run(tmp_path).endswith(f"run-{number:03d}")
    assert (tmp_path / taken).read_text() == "a file in the way"


@pytest.mark.parametrize("moves", [0, 1, 5, 10])
def test_an_interruption_while_moving_loses_nothing(tmp_path, monkeypatch, moves):
    first = write_old_run(tmp_path)
    rename, done = os.rename, []

    def interrupted(*paths) -> None:
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(rename(*paths))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            set_aside_old_run(tmp_path)
    assert sorted(contents(tmp_path).values()) == sorted(first.values())
    set_aside_old_run(tmp_path)
    assert contents(tmp_path / "run-001") | contents(tmp_path / "run-002") == first


def test_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    write_old_run(tmp_path)

    def refuse(*_) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(UserError, match=re.escape(f"cannot write {tmp_path}: Permission denied")):
        set_aside_old_run(tmp_path)


def test_continuing_from_an_earlier_checkpoint_copies_the_run(tmp_path):
    first = write_old_run(tmp_path)
    line = branch_off(tmp_path, tmp_path / "best.pt")
    assert line.endswith(f"a copy of what it had reached is in {tmp_path / 'run-001'}")
    assert contents(tmp_path / "run-001") == first
    assert (tmp_path / "last.pt").read_text() == first["best.pt"]
    assert branch_off(tmp_path, tmp_path / "run-001" / ".." / "last.pt") is None


@pytest.mark.parametrize("moment", [0, 3, 10])
def test_an_interruption_while_branching_off_leaves_the_run_as_it_was(tmp_path, monkeypatch, moment):
    first, copied = write_old_run(tmp_path), []

    def interrupted(*paths) -> None:
        if len(copied) == moment:
            raise KeyboardInterrupt
        copied.append(paths)

    monkeypatch.setattr("shutil.copy2", interrupted)
    with pytest.raises(KeyboardInterrupt):
        branch_off(tmp_path, tmp_path / "best.pt")
    assert contents(tmp_path).items() >= first.items()
