"""Lines on the console and files of a run that is not interrupted."""

import io
import json
import os
import platform
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from src.report.report import Report
from src.runtime.errors import UserError
from tests.helpers.example_run import end_epoch, log_iteration, play_run, tags, train_and_log
from tests.helpers.small_runs import metrics


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


def test_a_new_run_overwrites_its_files(tmp_path):
    for _ in range(2):
        report = Report(tmp_path, append=False, stream=io.StringIO())
        play_run(report)
        report.close()
    assert len(metrics(tmp_path)) == 5 + 3 + 3  # 0, 20, ..., 80; epochs; evaluations
    assert [key for key, _ in tags(tmp_path)].count("run_start") == 1


def test_flags_json_holds_flags_versions_and_facts(tmp_path):
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
    play_run(report)
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
        play_run(report)
    report.close()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("write", [lambda report: report.write_flags({}), lambda report: log_iteration(report, 0)])
def test_a_folder_that_cannot_be_made_is_named(tmp_path, write):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "models"
    with pytest.raises(UserError, match=re.escape(f"cannot write {folder}: a file is in its place")):
        write(Report(folder, append=False, stream=io.StringIO()))


def test_a_disabled_report_does_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    report = Report(tmp_path, enabled=False)
    report.note("a line")
    report.warn("a line")
    report.write_flags({}, seed=1)
    report.rewind(epoch=0, iteration=0)
    play_run(report)
    with report.progress(3, "Evaluation") as bar:
        bar.update()
    report.mark_failed()
    report.close()
    assert capfd.readouterr() == ("", "") and os.listdir(tmp_path) == []
