"""The files of a run that continues from a checkpoint."""

import io

import pytest

from src.report.report import Report
from tests.helpers.example_run import CONSTANTS, ITERATIONS, PER_EPOCH, end_epoch, log_iteration, play_run, stages, tags
from tests.helpers.small_runs import metrics


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
        (PER_EPOCH + 12, PER_EPOCH + 14),  # two iterations later; neither is logged
        (PER_EPOCH + 26, 2 * PER_EPOCH),  # only the end of the epoch was logged
        (2 * PER_EPOCH - 1, 2 * PER_EPOCH - 1),  # between an epoch and its evaluation
        (2 * PER_EPOCH - 1, 2 * PER_EPOCH),  # after the evaluation
        (2 * PER_EPOCH - 1, 3 * PER_EPOCH),
        (3 * PER_EPOCH, 3 * PER_EPOCH + 1),  # after the last epoch
    ],
)
def test_a_continued_run_writes_the_files_of_an_uninterrupted_one(tmp_path, checkpoint, killed):
    whole, continued = tmp_path / "whole", tmp_path / "continued"
    report = Report(whole, append=False, stream=io.StringIO())
    play_run(report)
    report.close()

    report = Report(continued, append=False, stream=io.StringIO())
    play_run(report, stop=killed)
    report.close()
    for file in ("metrics.jsonl", "mlperf.log"):  # a kill in the middle of a line
        with (continued / file).open("a") as lines:
            lines.write(
                ':::MLPv0.5.0 ssd 1.000000000 (src/report/mlperf.py:1) train_ep{"kind": "iteration", "epoch": 0, "ite'
            )
    report = Report(continued, append=True, stream=io.StringIO())
    stage = stages()[checkpoint]
    report.rewind(epoch=stage.epoch, iteration=stage.iteration)
    play_run(report, start=checkpoint)
    report.close()

    assert (continued / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert tags(continued) == tags(whole)


def test_a_completed_run_continues_to_more_epochs(tmp_path):
    report = Report(tmp_path, append=False, stream=io.StringIO())
    play_run(report)
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


def test_damaged_lines_are_dropped_when_a_run_continues(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'null\n7\n{"epoch": 0}\n\xff\xfe\n{"kind": "evaluation", "epoch": 0}')
    report = Report(tmp_path, append=True, stream=io.StringIO())
    report.rewind(epoch=1, iteration=ITERATIONS)
    end_epoch(report, 1)
    report.close()
    assert [(entry["kind"], entry["epoch"]) for entry in metrics(tmp_path)] == [("evaluation", 0), ("epoch", 1)]


def test_a_run_that_continues_without_files_starts_them(tmp_path):
    report = Report(tmp_path / "new", append=True, stream=io.StringIO())
    report.rewind(epoch=1, iteration=ITERATIONS)
    play_run(report, start=PER_EPOCH)
    report.close()
    assert metrics(tmp_path / "new")[0]["iteration"] == 40
    assert tags(tmp_path / "new")[0][0] == "run_start"


def test_a_continued_run_warns_of_damaged_and_missing_metrics(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    for damage, message in (
        (
            lambda lines: [*lines[:2], "{", *lines[2:], '{"kind": "iter'],
            "left out 2 damaged lines, the first is line 3",
        ),
        (lambda lines: lines[:2], "lacks 2 of the epochs before epoch 2, the first is 0"),
        (lambda lines: [], "lacks 2 of the epochs before epoch 2, the first is 0"),
        (None, "missing: it now starts at epoch 2, iteration 60"),
    ):
        report = Report(tmp_path, stream=io.StringIO())
        play_run(report)
        report.close()
        if damage:
            path.write_text("\n".join(damage(path.read_text().splitlines())))
        else:
            path.unlink()
        capsys.readouterr()
        Report(tmp_path, append=True, stream=io.StringIO()).rewind(epoch=2, iteration=2 * ITERATIONS)
        assert capsys.readouterr().err == f"main.py: warning: {path}: {message}\n"
