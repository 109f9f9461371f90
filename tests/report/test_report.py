import io
import json
import os
import platform
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from src.report.report import Report
from src.report.run_folder import branch_off, set_aside_old_run
from src.runtime.errors import UserError
from tests.helpers.example_run import (
    CONSTANTS,
    ITERATIONS,
    PER_EPOCH,
    end_epoch,
    log_iteration,
    metrics,
    run,
    stages,
    tags,
    train_and_log,
)


def test_lines_have_the_documented_forms(tmp_path):
    stream = io.StringIO()
    report = Report(tmp_path, append=False, stream=stream)
    log_iteration(report, 20)
    end_epoch(report, 0)
    report.log_evaluation(epoch=3, metrics={"mAP": 0.07134})
    report.log_evaluation(epoch=12, metrics={"mAP": None})
    report.end_run(average_images_per_second=531.04, seconds=4021.66, accuracy=0.27118)
    report.end_run(average_images_per_second=531.04, seconds=4021.66, accuracy="not evaluated")
    report.close()
    assert stream.getvalue().splitlines() == [
        "Epoch:  0, Iteration: 20, Loss: 17.2031",
        "Epoch  0 finished. Time: 61.2 s, Speed: 523.1 img/sec, Average speed: 523.1",
        "Epoch  3, Accuracy: 0.0713 mAP",
        "Epoch 12, Accuracy: not defined",
        "Training end: Average speed: 531.0 img/sec, Total time: 4021.7 sec, Final accuracy: 0.2712 mAP",
        "Training end: Average speed: 531.0 img/sec, Total time: 4021.7 sec, Final accuracy: not evaluated",
    ]


def test_warnings_go_to_standard_error(capsys):
    Report(None, append=False).warn("the CPU has no bfloat16 arithmetic")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "main.py: warning: the CPU has no bfloat16 arithmetic\n")


def test_metrics_hold_what_was_logged_at_once(tmp_path):
    report = Report(tmp_path, append=False, stream=io.StringIO())
    train_and_log(report, 39)
    log_iteration(report, 40)
    end_epoch(report, 1)
    seconds = {"network": 1.5, "waiting": 0.0}
    report.log_evaluation(epoch=1, metrics={"mAP": np.float64(0.25), "AP small": None}, seconds=seconds)
    assert metrics(tmp_path) == [  # the report is not closed yet
        {
            "kind": "iteration",
            "epoch": 1,
            "iteration": 40,
            "loss": 17.20314,
            "localisation_loss": 2.5,
            "label_loss": 14.75,
            "learning_rate": 2.6e-3,
            "images_per_second": 523.1,
            "loss_scale": 65536.0,
            "skipped_steps": 3,
        },
        {
            "kind": "epoch",
            "epoch": 1,
            "iteration": 41,
            "seconds": 61.23,
            "images_per_second": 523.14,
            "average_images_per_second": 523.14,
        },
        {"kind": "evaluation", "epoch": 1, "mAP": 0.25, "AP small": None, "seconds": seconds},
    ]
    report.close()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -np.float32("inf")])
def test_numbers_that_are_not_finite_are_null(tmp_path, number):
    report = Report(tmp_path, append=False, stream=io.StringIO())
    log_iteration(report, 0, loss=number, label_loss=number)
    report.close()
    assert metrics(tmp_path)[0]["loss"] is None and metrics(tmp_path)[0]["label_loss"] is None


def test_a_new_run_starts_its_files_afresh(tmp_path):
    for _ in range(2):
        report = Report(tmp_path, append=False, stream=io.StringIO())
        run(report)
        report.close()
    assert len(metrics(tmp_path)) == 5 + 3 + 3  # 0, 20, ..., 80; epochs; evaluations
    assert [key for key, _ in tags(tmp_path)].count("run_start") == 1


@pytest.mark.parametrize(
    ("checkpoint", "killed"),
    [
        (0, 0),
        (0, 7),
        (1, PER_EPOCH + 5),
        (PER_EPOCH, PER_EPOCH),  # between an evaluation and the next epoch
        (PER_EPOCH, 2 * PER_EPOCH + 9),
        (PER_EPOCH + 1, PER_EPOCH + 1),
        (PER_EPOCH + 12, PER_EPOCH + 12),  # inside an epoch, in which the learning rate fell
        (PER_EPOCH + 12, PER_EPOCH + 14),  # two iterations on, nothing was logged
        (PER_EPOCH + 26, 2 * PER_EPOCH),  # nothing but the end of the epoch was logged
        (2 * PER_EPOCH - 1, 2 * PER_EPOCH - 1),  # between an epoch and its evaluation
        (2 * PER_EPOCH - 1, 2 * PER_EPOCH),  # after the evaluation
        (2 * PER_EPOCH - 1, 3 * PER_EPOCH),
        (3 * PER_EPOCH, 3 * PER_EPOCH + 1),  # when all was done
    ],
)
def test_a_continued_run_leaves_the_files_of_an_uninterrupted_one(tmp_path, checkpoint, killed):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    report = Report(whole, append=False, stream=io.StringIO())
    run(report)
    report.close()

    report = Report(parted, append=False, stream=io.StringIO())
    run(report, stop=killed)
    report.close()
    for file in ("metrics.jsonl", "mlperf.log"):  # the kill came in the middle of a line
        with (parted / file).open("a") as lines:
            lines.write(
                ':::MLPv0.5.0 ssd 1.000000000 (src/report/mlperf.py:1) train_ep{"kind": "iteration", "epoch": 0, "ite'
            )
    report = Report(parted, append=True, stream=io.StringIO())
    stage = stages()[checkpoint]
    report.rewind(epoch=stage.epoch, iteration=stage.iteration)
    run(report, start=checkpoint)
    report.close()

    assert (parted / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert tags(parted) == tags(whole)


def test_a_completed_run_goes_on_to_more_epochs(tmp_path):
    report = Report(tmp_path, append=False, stream=io.StringIO())
    run(report)
    report.close()
    before = metrics(tmp_path)
    report = Report(tmp_path, append=True, stream=io.StringIO())
    report.rewind(epoch=3, iteration=3 * ITERATIONS)
    report.begin_run(CONSTANTS)
    report.begin_epoch(3, ITERATIONS)
    log_iteration(report, 100)
    report.end_run(average_images_per_second=1, seconds=1, accuracy=0.1)
    report.close()
    assert metrics(tmp_path)[:-1] == before
    assert [key for key, _ in tags(tmp_path)][-4:] == ["eval_stop", "train_epoch", "run_stop", "run_final"]


def test_lines_that_are_none_of_ours_are_dropped_when_a_run_goes_on(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'null\n7\n{"epoch": 0}\n\xff\xfe\n{"kind": "evaluation", "epoch": 0}')
    report = Report(tmp_path, append=True, stream=io.StringIO())
    report.rewind(epoch=1, iteration=ITERATIONS)
    end_epoch(report, 1)
    report.close()
    assert [(entry["kind"], entry["epoch"]) for entry in metrics(tmp_path)] == [("evaluation", 0), ("epoch", 1)]


def test_going_on_where_there_are_no_files_starts_them(tmp_path):
    report = Report(tmp_path / "new", append=True, stream=io.StringIO())
    report.rewind(epoch=1, iteration=ITERATIONS)
    run(report, start=PER_EPOCH)
    report.close()
    assert metrics(tmp_path / "new")[0]["iteration"] == 40
    assert tags(tmp_path / "new")[0][0] == "run_start"


def test_flags_hold_the_flags_the_versions_and_the_facts(tmp_path):
    report = Report(tmp_path / "a" / "b", append=False)
    report.write_flags(
        {"data": Path("coco"), "evaluation": [3, 21], "target": None, "fp16": True}, seed=5, device="cpu"
    )
    content = json.loads((tmp_path / "a" / "b" / "flags.json").read_text())
    assert content["flags"] == {"data": "coco", "evaluation": [3, 21], "target": None, "fp16": True}
    assert content["seed"] == 5 and content["device"] == "cpu"
    assert content["versions"]["python"] == platform.python_version()
    assert torch.__version__.startswith(content["versions"]["torch"])
    assert content["versions"]["numpy"] == np.__version__
    assert os.listdir(tmp_path / "a" / "b") == ["flags.json"]


def test_a_report_without_a_folder_writes_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stream = io.StringIO()
    report = Report(None, append=False, stream=stream)
    report.write_flags({"seed": 0})
    run(report)
    report.rewind(epoch=0, iteration=0)
    report.mark_failed()
    report.close()
    assert "Epoch  2, Accuracy: 0.2857 mAP" in stream.getvalue()
    assert os.listdir(tmp_path) == []


# Errors


@pytest.mark.parametrize("file", ["metrics.jsonl", "mlperf.log"])
def test_a_full_disk_is_one_line_that_names_the_file(tmp_path, file, capfd):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs a device that is always full")
    (tmp_path / file).symlink_to("/dev/full")
    report = Report(tmp_path, append=False, stream=io.StringIO())
    with pytest.raises(UserError, match=re.escape(f"cannot write {tmp_path / file}: No space left on device")):
        run(report)
    report.close()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("write", [lambda report: report.write_flags({}), lambda report: log_iteration(report, 0)])
def test_a_folder_that_cannot_be_made_is_named(tmp_path, write):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "models"
    with pytest.raises(UserError, match=re.escape(f"cannot write {folder}: a file is in its place")):
        write(Report(folder, append=False, stream=io.StringIO()))


# An earlier run's files


def old_run(folder: Path, generation: str = "first") -> dict[str, str]:
    """Writes the files of a run and gives their contents by name."""
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
    first = old_run(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "tensorboard" / "notes.txt").write_text("mine")
    assert set_aside_old_run(tmp_path) == f"{tmp_path} held an earlier run: its files are now in {tmp_path}/run-001"
    assert contents(tmp_path / "run-001") == first
    second = old_run(tmp_path, "second")
    assert set_aside_old_run(tmp_path).endswith("run-002")
    assert contents(tmp_path / "run-002") == second
    assert contents(tmp_path / "run-001") == first
    assert (tmp_path / "notes.txt").read_text() == (tmp_path / "tensorboard" / "notes.txt").read_text() == "mine"


def test_nothing_is_moved_where_there_was_no_run(tmp_path):
    assert set_aside_old_run(tmp_path / "missing") is None
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "run-001").mkdir()
    assert set_aside_old_run(tmp_path) is None
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "run-001"]


@pytest.mark.parametrize("taken", ["run-007", "run-1234"])
def test_numbers_count_on_from_the_greatest(tmp_path, taken):
    old_run(tmp_path)
    (tmp_path / taken).write_text("a file in the way")
    (tmp_path / "run-final").mkdir()
    number = int(taken.removeprefix("run-")) + 1
    assert set_aside_old_run(tmp_path).endswith(f"run-{number:03d}")
    assert (tmp_path / taken).read_text() == "a file in the way"


@pytest.mark.parametrize("moves", [0, 1, 5, 10])
def test_an_interruption_while_moving_loses_nothing(tmp_path, monkeypatch, moves):
    first = old_run(tmp_path)
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


def test_a_folder_that_cannot_be_moved_in_is_named(tmp_path, monkeypatch):
    old_run(tmp_path)

    def refuse(*_) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(UserError, match=re.escape(f"cannot write {tmp_path}: Permission denied")):
        set_aside_old_run(tmp_path)


# TensorBoard and the other ranks


def test_without_tensorboard_there_are_no_events(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it fails as when it is not installed
    report = Report(tmp_path, append=False, stream=io.StringIO())
    run(report)
    report.close()
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "mlperf.log"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_tensorboard_that_cannot_write_is_one_warning(tmp_path, capsys):
    """Python also prints the error of the writer's thread."""
    report = Report(tmp_path, append=False)
    log_iteration(report, 0)

    def no_space(_) -> None:
        raise OSError(28, "No space left on device")

    thread = report._tensorboard._get_file_writer().event_writer._async_writer._worker
    thread._record_writer.write = no_space
    log_iteration(report, 20)
    thread.join(60)
    log_iteration(report, 40)
    report.close()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("main.py")]
    assert line.startswith("main.py: warning: TensorBoard fails, so it gets no further events: ")


def test_tensorboard_gets_the_figures_of_metrics_jsonl(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report = Report(tmp_path, append=False, stream=io.StringIO())
    run(report)
    report.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("training/loss")]
    assert losses == [
        (entry["iteration"], pytest.approx(entry["loss"])) for entry in metrics(tmp_path) if "loss" in entry
    ]
    assert [(event.step, event.value) for event in events.Scalars("evaluation/mAP")][1] == (1, pytest.approx(1 / 7))
    set_aside_old_run(tmp_path)
    assert list((tmp_path / "run-001" / "tensorboard").iterdir())


def test_a_disabled_report_does_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    report = Report(tmp_path, enabled=False)
    report.note("a line")
    report.warn("a line")
    report.write_flags({}, seed=1)
    report.rewind(epoch=0, iteration=0)
    run(report)
    with report.progress(3, "Evaluation") as bar:
        bar.update()
    report.mark_failed()
    report.close()
    assert capfd.readouterr() == ("", "") and os.listdir(tmp_path) == []


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of every event, by tag, in the order of the files."""
    found = defaultdict(list)
    for file in sorted((folder / "tensorboard").iterdir()):
        for event in LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                found[value.tag].append((event.step, value.simple_value))
    return dict(found)


@pytest.mark.parametrize(
    ("checkpoint", "epoch", "iteration"),
    [(PER_EPOCH, 1, ITERATIONS), (PER_EPOCH + 26, 1, ITERATIONS + 25), (2 * PER_EPOCH - 1, 1, 2 * ITERATIONS)],
    ids=["between epochs", "inside an epoch", "before an evaluation"],
)
def test_events_of_abandoned_epochs_go(tmp_path, checkpoint, epoch, iteration):
    whole, returned = tmp_path / "whole", tmp_path / "returned"
    for folder in (whole, returned):
        report = Report(folder, stream=io.StringIO())
        run(report)
        report.close()
    report = Report(returned, append=True, stream=io.StringIO())
    report.rewind(epoch=epoch, iteration=iteration)
    run(report, start=checkpoint)
    report.close()
    assert len(list((returned / "tensorboard").iterdir())) == 2
    assert scalars(returned) == scalars(whole)
    assert [step for step, _ in scalars(returned)["evaluation/mAP"]] == [0, 1, 2]


def test_a_run_that_continues_warns_of_damaged_and_of_missing_metrics(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    for damage, said in (
        (
            lambda lines: [*lines[:2], "{", *lines[2:], '{"kind": "iter'],
            "left out 2 damaged lines, the first is line 3",
        ),
        (lambda lines: lines[:2], "lacks 2 of the epochs before epoch 2, the first is 0"),
        (lambda lines: [], "lacks 2 of the epochs before epoch 2, the first is 0"),
        (None, "missing: it now starts at epoch 2, iteration 60"),
    ):
        report = Report(tmp_path, stream=io.StringIO())
        run(report)
        report.close()
        if damage:
            path.write_text("\n".join(damage(path.read_text().splitlines())))
        else:
            path.unlink()
        capsys.readouterr()
        Report(tmp_path, append=True, stream=io.StringIO()).rewind(epoch=2, iteration=2 * ITERATIONS)
        assert capsys.readouterr().err == f"main.py: warning: {path}: {said}\n"


def test_going_back_to_an_earlier_checkpoint_keeps_a_copy_of_the_run(tmp_path):
    first = old_run(tmp_path)
    line = branch_off(tmp_path, tmp_path / "best.pt")
    assert line.endswith(f"a copy of what it had reached is in {tmp_path / 'run-001'}")
    assert contents(tmp_path / "run-001") == first
    assert (tmp_path / "last.pt").read_text() == first["best.pt"]
    assert branch_off(tmp_path, tmp_path / "run-001" / ".." / "last.pt") is None


@pytest.mark.parametrize("moment", [0, 3, 10])
def test_an_interruption_while_branching_off_leaves_the_run_as_it_was(tmp_path, monkeypatch, moment):
    first, copied = old_run(tmp_path), []

    def interrupted(*paths) -> None:
        if len(copied) == moment:
            raise KeyboardInterrupt
        copied.append(paths)

    monkeypatch.setattr("shutil.copy2", interrupted)
    with pytest.raises(KeyboardInterrupt):
        branch_off(tmp_path, tmp_path / "best.pt")
    assert contents(tmp_path).items() >= first.items()
