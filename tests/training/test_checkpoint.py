"""Checkpoints of runs: what is written is whole, and read as it was."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from src.runtime.errors import UserError
from src.training.checkpoint import Checkpoint, Position, RunFingerprint, read_run, save_checkpoint, save_run
from src.weights.files import load_checkpoint

WEIGHTS = {"conf.0.bias": torch.arange(12.0), "loc.0.bias": torch.arange(16.0)}
SETTINGS = {"--batch-size": 4, "the number of processes": 2}
FINGERPRINT = RunFingerprint("resnet18", [[7, "square"], [9, "disc"]], 5, SETTINGS)
RUN = Checkpoint(
    model=WEIGHTS,
    optimizer={"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": []},
    scaler={},
    pipeline=[{"position": 3}, {"position": 4}],
    position=Position(
        epoch=2, iteration_in_epoch=3, iterations_per_epoch=8, iteration=19, best_map=0.5, last_map=0.25, evaluated=True
    ),
    fingerprint=FINGERPRINT,
)


def same_run(one: Checkpoint, other: Checkpoint) -> bool:
    plain = [(run.scaler, run.pipeline, run.position, run.fingerprint) for run in (one, other)]
    momentum = [run.optimizer["state"][0]["momentum_buffer"] for run in (one, other)]
    weights = all(torch.equal(one.model[name], other.model[name]) for name in WEIGHTS)
    return plain[0] == plain[1] and torch.equal(*momentum) and weights


def test_a_run_is_read_as_it_was_saved(tmp_path):
    save_run(tmp_path / "last.pt", RUN)
    assert same_run(read_run(tmp_path / "last.pt", FINGERPRINT), RUN)


def test_the_names_in_a_run_s_file_are_those_of_older_versions(tmp_path):
    save_run(tmp_path / "last.pt", RUN)
    names = (
        "model optimizer scaler pipeline epoch within length iteration best_map last_map evaluated backbone categories"
    )
    assert list(torch.load(tmp_path / "last.pt")) == [*names.split(), "seed", "settings"]


@pytest.mark.parametrize("missing", ["pipeline", "iteration", "settings", "optimizer"])
def test_a_file_that_lacks_a_part_holds_no_run(tmp_path, missing):
    save_run(tmp_path / "last.pt", RUN)
    state = torch.load(tmp_path / "last.pt")
    del state[missing]
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(UserError, match=rf"no run to continue \(no {missing}\): use --checkpoint"):
        read_run(tmp_path / "last.pt", FINGERPRINT)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epoch", "3"), ("epoch", -1), ("iteration", 2.0), ("within", True), ("within", 9), ("length", None),
        ("best_map", 7.0), ("last_map", float("nan")), ("evaluated", 1), ("seed", -1), ("pipeline", []),
        ("pipeline", [3]), ("optimizer", []), ("optimizer", {"state": {}}), ("scaler", None), ("settings", {}),
        ("backbone", "vgg16"), ("backbone", ["resnet18"]), ("categories", []), ("categories", {7: "square"}),
        ("categories", [{"id": 7, "name": "square"}]), ("categories", [["7", "square"]]),
        ("categories", [[7, "square"], [7, "disc"]]), ("model", {"a": torch.zeros(2, dtype=torch.complex64)}),
    ],
)  # fmt: skip
def test_a_field_of_another_kind_is_named(tmp_path, name, value):
    path = tmp_path / "last.pt"
    save_run(path, RUN)
    torch.save({**torch.load(path), name: value}, path)
    with pytest.raises(UserError, match=rf"^{path}: {name}\b[^\n]*: (expected|an id)"):
        read_run(path, FINGERPRINT)


def test_memory_that_runs_out_while_a_checkpoint_is_made_is_told_as_such(tmp_path, monkeypatch):
    def no_memory(*_):
        try:
            raise MemoryError
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")  # as torch's archive writer does

    monkeypatch.setattr(torch, "save", no_memory)
    with pytest.raises(MemoryError, match=r"last\.pt"):
        save_checkpoint(tmp_path / "last.pt", {"model": WEIGHTS})


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        (RunFingerprint("resnet34", FINGERPRINT.categories, 5), "is a run of --backbone resnet18, not resnet34"),
        (
            RunFingerprint("resnet18", [[7, "square"], [9, "cat"]], 5),
            r"label 2 is 'disc' \(id 9\) there and 'cat' \(id 9\) here",
        ),
    ],
)
def test_a_run_of_another_network_is_not_continued(tmp_path, ours, said):
    save_run(tmp_path / "last.pt", RUN)
    with pytest.raises(UserError, match=said):
        read_run(tmp_path / "last.pt", ours)


def test_what_is_saved_is_loaded(tmp_path):
    file = tmp_path / "last.pt"
    state = {"model": WEIGHTS, "epoch": 3, "best_map": None, "names": ["a"], "state": {"bytes": b"\0"}}
    save_checkpoint(file, {"model": {}})
    save_checkpoint(file, state)
    loaded = load_checkpoint(file)
    assert all(torch.equal(loaded["model"][name], tensor) for name, tensor in WEIGHTS.items())
    assert {**loaded, "model": None} == {**state, "model": None}
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


NUMBERS = 200_000  # of a checkpoint that is killed: writing it takes some milliseconds
KILLS = 60


def kill_writers(path: Path, connection) -> None:
    """Forks processes that save time and again, kills each at a random moment; sends what was found after each kill."""
    torch.set_num_threads(1)
    states = [{"model": {"a": torch.full((NUMBERS,), float(k)), "b": torch.full((9,), float(k))}} for k in range(3)]
    save_checkpoint(path, states[0])
    chance = random.Random(6)
    found = []
    for _ in range(KILLS):
        writer = os.fork()
        while writer == 0:
            for state in states:
                save_checkpoint(path, state)
        time.sleep(chance.uniform(0, 0.05))
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        weights = load_checkpoint(path)["model"]
        parts = list(path.parent.glob("*.part"))
        found.append((torch.cat([weights["a"], weights["b"]]).unique().tolist(), len(weights["a"]), bool(parts)))
        for part in parts:
            part.unlink()
    connection.send(found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_the_file_is_whole(tmp_path):
    context = torch.multiprocessing.get_context("spawn")  # a process without threads, to fork from
    ours, theirs = context.Pipe()
    process = context.Process(target=kill_writers, args=(tmp_path / "last.pt", theirs))
    process.start()
    assert ours.poll(100)
    found = ours.recv()
    process.join()
    assert len(found) == KILLS
    assert all(values in ([0.0], [1.0], [2.0]) and length == NUMBERS for values, length, _ in found)
    assert len({values[0] for values, _, _ in found}) > 1  # some were replaced
    assert any(while_writing for _, _, while_writing in found)


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_ended_before_its_last_moment_the_old_file_is_there(tmp_path, monkeypatch, moment):
    file = tmp_path / "last.pt"
    save_checkpoint(file, {"model": WEIGHTS, "epoch": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, moment, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(file, {"model": WEIGHTS, "epoch": 2})
    assert load_checkpoint(file)["epoch"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_a_full_disk_is_one_line_and_the_old_file_stays(tmp_path):
    resource = pytest.importorskip("resource")
    file = tmp_path / "last.pt"
    save_checkpoint(file, {"model": WEIGHTS})
    before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
        with pytest.raises(UserError, match=r"^cannot write [^\n]*last\.pt: File too large[^\n]*as it was$"):
            save_checkpoint(file, {"model": {"a": torch.zeros(2**16)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^cannot write [^\n]*last\.pt: No such file or directory"):
        save_checkpoint(tmp_path / "missing" / "last.pt", {"model": WEIGHTS})
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^cannot write [^\n]*last\.pt: a file is in its place"):
        save_checkpoint(tmp_path / "file" / "last.pt", {"model": WEIGHTS})
