"""The files of an evaluation, written by another process while training continues."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from src.data.annotations.coco import Annotations, locations, read_annotations
from src.evaluation import background_files
from src.evaluation.artifacts import ARTIFACTS, collect_artifact_inputs, write_artifacts
from src.evaluation.background_files import ROOT, BackgroundFiles
from src.evaluation.evaluate import Evaluation
from src.evaluation.results import Results
from src.evaluation.scoring import score
from src.report.report import Report
from src.report.training_plot import draw_training
from src.runtime.errors import SigtermReceived
from tests.helpers.datasets import annotation, write_coco
from tests.helpers.example_run import end_epoch, log_iteration

UNFINISHED = "tests.helpers.unfinished_writer"
START_AND_WAIT = """
import pickle, subprocess, sys
writer = subprocess.Popen([sys.executable, "-m", sys.argv[1], sys.argv[2]], stdin=subprocess.PIPE)
pickle.dump("inputs", writer.stdin)
writer.stdin.flush()
writer.wait()
"""


@pytest.fixture(scope="module")
def validation(tmp_path_factory) -> Annotations:
    boxes = [annotation(1, (10, 10, 60, 50)), annotation(2, (5, 40, 30, 60), 2), annotation(4, (70, 10, 80, 100))]
    folder = write_coco(tmp_path_factory.mktemp("data"), boxes)
    return read_annotations(*locations(folder, "val"), for_scoring=True)


@pytest.fixture(scope="module")
def evaluation(validation) -> Evaluation:
    """One box is detected, one missed, one detected twice."""
    boxes = np.array([[10.0, 10, 60, 50], [70, 10, 80, 100], [60, 10, 80, 100]])
    results = Results(np.array([1, 4, 4]), np.array([1, 1, 1]), boxes, np.array([0.9, 0.8, 0.4]))
    return Evaluation(score(validation, results), results, 0, {})


@pytest.fixture
def report(tmp_path):
    """The report of a run that has logged an iteration, an epoch and an evaluation."""
    report = Report(tmp_path / "run", append=False)
    log_iteration(report, 0)
    end_epoch(report, 0)
    report.log_evaluation(epoch=0, metrics={"mAP": 0.5, "AP50": 0.6, "AP75": 0.4})
    yield report
    report.close()


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def has_unfinished_file(folder: Path) -> bool:
    return any(path.stat().st_size for path in folder.glob(".*.part"))


def read_files(folder: Path) -> dict[str, bytes]:
    """The content of the evaluation's files by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".json", ".png", ".part")}


def test_the_files_equal_those_written_in_the_same_process(validation, evaluation, report, tmp_path, capsys):
    expected = tmp_path / "expected"
    expected.mkdir()
    inputs = collect_artifact_inputs(evaluation.results, evaluation.coco_metrics, validation)
    assert write_artifacts(inputs, expected) == []
    draw_training(tmp_path / "run" / "metrics.jsonl", expected / "training.png")
    with BackgroundFiles(tmp_path / "run", report) as files:
        files.start(evaluation, validation)
        log_iteration(report, 20)  # training continues
        files.finish()
        assert read_files(tmp_path / "run") == read_files(expected)
        assert read_files(tmp_path / "run").keys() == set(ARTIFACTS)
    assert capsys.readouterr().err == ""


def test_a_run_waits_for_the_files_after_sigterm(validation, evaluation, report, tmp_path, monkeypatch):
    monkeypatch.setattr(background_files, "SIGTERM_WAIT", 600)
    with pytest.raises(SigtermReceived), BackgroundFiles(tmp_path / "run", report) as files:
        files.start(evaluation, validation)
        wait_for(lambda: files._inputs_sent)
        os.kill(files._process.pid, signal.SIGTERM)  # as schedulers send it to every process of a job
        raise SigtermReceived
    assert read_files(tmp_path / "run").keys() == set(ARTIFACTS)


def test_a_file_that_cannot_be_written_is_a_warning_that_names_it(validation, evaluation, report, tmp_path, capfd):
    blocked = tmp_path / "run" / "detections.png"
    (blocked / "a folder").mkdir(parents=True)
    with BackgroundFiles(tmp_path / "run", report) as files:
        files.start(evaluation, validation)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"main.py: warning: cannot write {blocked}: ")
    assert len(json.loads((tmp_path / "run" / "detections.json").read_text())) == 3
    assert {path.name for path in tmp_path.glob("run/*.png")} == {
        "confusion_matrix.png",
        "detections.png",
        "precision_recall.png",
        "training.png",
    }
    assert not list(tmp_path.glob("run/.*"))


def test_a_removed_folder_is_a_warning(validation, evaluation, report, tmp_path, capfd):
    shutil.rmtree(tmp_path / "run")
    with BackgroundFiles(tmp_path / "run", report) as files:
        files.start(evaluation, validation)
    (line,) = capfd.readouterr().err.splitlines()
    assert "may be older than the last evaluation: " in line and "metrics.jsonl" in line


def test_a_removed_image_is_a_warning(validation, evaluation, report, tmp_path, capfd):
    image = validation.image_path(0)
    image.rename(tmp_path / "elsewhere")
    try:
        with BackgroundFiles(tmp_path / "run", report) as files:
            files.start(evaluation, validation)
    finally:
        (tmp_path / "elsewhere").rename(image)
    (line,) = capfd.readouterr().err.splitlines()
    assert str(image) in line


def test_a_writer_that_is_killed_is_a_warning_that_names_all_files(validation, evaluation, report, tmp_path, capfd):
    with BackgroundFiles(tmp_path / "run", report) as files:
        files.start(evaluation, validation)
        os.kill(files._process.pid, signal.SIGKILL)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(
        f"main.py: warning: {', '.join(ARTIFACTS)} in {tmp_path / 'run'} may be older than the last evaluation: "
    )
    assert line.endswith("killed by signal: Killed")


@pytest.mark.parametrize("end", [KeyboardInterrupt, SigtermReceived])
def test_an_unfinished_file_is_removed_when_the_run_ends(
    end, validation, evaluation, report, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(background_files, "SIGTERM_WAIT", 0.01)
    monkeypatch.setattr(background_files, "PROGRAM", UNFINISHED)
    with pytest.raises(end), BackgroundFiles(tmp_path / "run", report) as files:
        files.start(evaluation, validation)
        wait_for(lambda: has_unfinished_file(tmp_path / "run"))
        raise end
    warned = capfd.readouterr().err
    assert warned == "" if end is KeyboardInterrupt else warned.endswith("they were not written within 0.01 s\n")
    assert read_files(tmp_path / "run") == {}


def test_a_run_that_is_interrupted_early_leaves_no_process(validation, evaluation, report, tmp_path, capfd):
    with pytest.raises(KeyboardInterrupt), BackgroundFiles(tmp_path / "run", report) as files:
        files.start(evaluation, validation)
        process = files._process
        raise KeyboardInterrupt
    assert process.poll() is not None
    assert read_files(tmp_path / "run") == {}
    assert capfd.readouterr().err == ""


def test_the_writing_process_ends_when_the_run_is_killed(tmp_path):
    run = subprocess.Popen([sys.executable, "-c", START_AND_WAIT, UNFINISHED, str(tmp_path)], cwd=ROOT)
    wait_for(lambda: has_unfinished_file(tmp_path))
    run.kill()
    run.wait()
    wait_for(lambda: not list(tmp_path.iterdir()))


def test_the_writing_process_does_not_import_torch():
    program = f"import sys, {background_files.PROGRAM}; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True) == "False\n"
