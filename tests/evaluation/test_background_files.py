"""The files of an evaluation, made by another process while the run goes on."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from src.data.annotations.coco import Annotations, read_annotations
from src.evaluation import background_files
from src.evaluation.artifact_files import FILES
from src.evaluation.artifacts import leave_evaluation
from src.evaluation.background_files import BackgroundFiles
from src.evaluation.evaluate import Evaluation
from src.evaluation.scoring import Results, score
from src.report.plots import draw_training
from src.report.report import Report
from src.runtime.distributed import SigtermReceived
from tests.helpers.background_targets import be_killed, begin_in
from tests.helpers.datasets import annotation, write_coco
from tests.helpers.example_run import end_epoch, log_iteration


@pytest.fixture(scope="module")
def validation(tmp_path_factory) -> Annotations:
    boxes = [annotation(1, (10, 10, 60, 50)), annotation(2, (5, 40, 30, 60), 2), annotation(4, (70, 10, 80, 100))]
    folder = write_coco(tmp_path_factory.mktemp("data"), boxes)
    return read_annotations(folder / "annotations" / "instances_val2017.json", folder / "val2017")


@pytest.fixture(scope="module")
def found(validation) -> Evaluation:
    """One box is found, one is missed, one is found twice."""
    boxes = np.array([[10.0, 10, 60, 50], [70, 10, 80, 100], [60, 10, 80, 100]])
    results = Results(np.array([1, 4, 4]), np.array([1, 1, 1]), boxes, np.array([0.9, 0.8, 0.4]))
    return Evaluation(score(validation, results), results, 0, {})


@pytest.fixture
def report(tmp_path):
    """Of a run that has logged an iteration and told an evaluation."""
    report = Report(tmp_path / "run", append=False)
    log_iteration(report, 0)
    end_epoch(report, 0)
    report.evaluation(epoch=0, figures={"mAP": 0.5, "AP50": 0.6, "AP75": 0.4})
    yield report
    report.close()


def made(folder: Path) -> dict[str, bytes]:
    """Content of every file but the report's own, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".json", ".png", ".part")}


def test_the_files_are_those_that_the_run_itself_would_make(validation, found, report, tmp_path, capsys):
    with BackgroundFiles(tmp_path / "run", report) as files:
        leave_evaluation(found, validation, tmp_path / "expected", report)
        draw_training(tmp_path / "run" / "metrics.jsonl", tmp_path / "expected" / "training.png")
        files.start(found, validation)
        log_iteration(report, 20)  # training goes on
        files.finish()
        assert made(tmp_path / "run") == made(tmp_path / "expected")
        assert made(tmp_path / "run").keys() == set(FILES)
    assert capsys.readouterr().err == ""


def test_a_run_that_is_told_to_stop_waits_for_the_files(validation, found, report, tmp_path, monkeypatch):
    monkeypatch.setattr(background_files, "LAST_WAIT", 600)
    with pytest.raises(SigtermReceived), BackgroundFiles(tmp_path / "run", report) as files:
        files.start(found, validation)
        raise SigtermReceived
    assert made(tmp_path / "run").keys() == set(FILES)


def test_what_cannot_be_written_is_a_warning_that_names_it(validation, found, report, tmp_path, capsys):
    blocked = tmp_path / "run" / "detections.png"
    (blocked / "a folder").mkdir(parents=True)
    with BackgroundFiles(tmp_path / "run", report) as files:
        files.start(found, validation)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"main.py: warning: cannot write {blocked}: ")
    assert len(json.loads((tmp_path / "run" / "detections.json").read_text())) == 3
    assert {path.name for path in tmp_path.glob("run/*.png")} == {
        "detections.png",
        "precision_recall.png",
        "training.png",
    }
    assert not list(tmp_path.glob("run/.*"))


def test_a_folder_that_is_gone_is_a_warning(validation, found, report, tmp_path, capsys):
    shutil.rmtree(tmp_path / "run")
    with BackgroundFiles(tmp_path / "run", report) as files:
        files.start(found, validation)
    (line,) = capsys.readouterr().err.splitlines()
    assert "are not all of the last evaluation: " in line and "metrics.jsonl" in line


def test_a_maker_that_is_killed_is_a_warning_that_names_all(validation, found, report, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(background_files, "write_artifacts", be_killed)
    with BackgroundFiles(tmp_path / "run", report) as files:
        files.start(found, validation)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"main.py: warning: {', '.join(FILES)} in {tmp_path / 'run'} are not all of the last")
    assert line.endswith("killed by signal: Killed")


def test_an_image_that_is_gone_is_a_warning(validation, found, report, tmp_path, capsys):
    image = validation.image_path(0)
    image.rename(tmp_path / "elsewhere")
    try:
        with BackgroundFiles(tmp_path / "run", report) as files:
            files.start(found, validation)
    finally:
        (tmp_path / "elsewhere").rename(image)
    assert str(image) in capsys.readouterr().err


@pytest.mark.parametrize("end", [KeyboardInterrupt, SigtermReceived])
def test_what_is_not_whole_when_the_run_ends_is_not_there(
    end, validation, found, report, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(background_files, "LAST_WAIT", 0.01)
    monkeypatch.setattr(background_files, "write_artifacts", begin_in)
    with pytest.raises(end), BackgroundFiles(tmp_path / "run", report) as files:
        files.start(found, validation)
        while not list((tmp_path / "run").glob(".*.part")):
            time.sleep(0.01)
        raise end
    warned = capsys.readouterr().err
    assert warned == "" if end is KeyboardInterrupt else warned.endswith("they were not made in 0.01 s\n")
    assert made(tmp_path / "run") == {}
