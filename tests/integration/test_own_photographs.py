"""From labelled photographs to a detector: the layouts and commands that a user with own pictures goes through."""

import json
from pathlib import Path

import pytest
import torch

import main
from src.data.prepare.__main__ import main as prepare
from src.export.export import label_categories, read_pictures
from src.report.report import Report
from tests.helpers.datasets import annotation, to_roboflow, write_coco
from tests.helpers.label_folders import write_voc, write_yolo
from tests.helpers.small_runs import flags

NAMES = ["square", "disc", "star"]
BOXES = {f"Bild {n} größer.jpg": [(n % 2, 20, 20, 120, 80)] for n in range(10)}


@pytest.fixture(scope="module")
def roboflow(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("roboflow")
    annotations = [annotation(image, (30, 20, 90, 80), 1 + image % 2) for image in (1, 2, 3)]
    return to_roboflow(write_coco(folder, annotations, images=3))


def test_roboflows_layout_is_trained_checked_and_scored(roboflow, tiny_model, tmp_path, capsys):
    assert main.main(flags(roboflow, tmp_path)) == 0
    assert main.main(flags(roboflow, tmp_path / "check", "--mode", "check")) == 0
    checkpoint = ("--checkpoint", str(tmp_path / "best.pt"))
    assert main.main(flags(roboflow, tmp_path, "--mode", "evaluation", *checkpoint)) == 0
    assert main.main(flags(roboflow / "valid", tmp_path, "--mode", "prediction", *checkpoint)) == 0
    printed = capsys.readouterr().out
    assert f"{roboflow / 'train' / '_annotations.coco.json'}:\n  images: 3, 0 of them without boxes" in printed
    assert f"{roboflow / 'valid' / '_annotations.coco.json'}:\n  images: 3" in printed


@pytest.mark.parametrize("layout", [Path, to_roboflow])
def test_check_takes_a_data_set_without_a_validation_split(tmp_path, capsys, layout):
    data = write_coco(tmp_path / "data", [annotation(1)], images=2)
    layout(data)
    for path in (data / "annotations" / "instances_val2017.json", data / "valid" / "_annotations.coco.json"):
        path.unlink(missing_ok=True)
    assert main.main(flags(data, tmp_path / "out", "--mode", "check")) == 0
    printed = capsys.readouterr()
    assert f"{data}: no validation split" in printed.out and "--evaluation without epochs trains" in printed.out
    assert "images: 2" in printed.out and "nothing is wrong" in printed.out and printed.err == ""
    assert (tmp_path / "out" / "batch.png").exists()


def test_export_takes_roboflows_pictures_and_categories(roboflow):
    assert len(read_pictures(roboflow, Report.disabled())) == 3
    heads = {"conf.0.bias": torch.zeros(4 * 4)}  # 4 boxes a cell; background and 3 categories
    found = label_categories({"model": heads}, roboflow, source=Path("x"), report=Report.disabled())
    assert [category.name for category in found] == ["shapes", "square", "disc"]


def test_one_error_names_both_layouts(tmp_path, capsys):
    (tmp_path / "train").mkdir()
    assert main.main(flags(tmp_path, tmp_path / "run")) == 2
    (printed,) = capsys.readouterr().err.splitlines()
    assert "annotations/instances_train2017.json" in printed
    assert "train/_annotations.coco.json" in printed


@pytest.mark.parametrize("write", [write_yolo, write_voc])
def test_labels_become_a_data_set_that_is_checked_and_trained(write, tiny_model, tmp_path, capsys):
    labels = write(tmp_path / "labels", BOXES, NAMES)
    data, run = tmp_path / "Daten für alle", tmp_path / "run"
    assert prepare([str(labels), str(data)]) == 0
    assert main.main(flags(data, tmp_path / "check", "--mode", "check")) == 0
    assert main.main(flags(data, run)) == 0
    assert json.loads((run / "flags.json").read_text())["flags"]["data"] == str(data)
    assert "nothing is wrong" in capsys.readouterr().out


def test_prediction_from_the_scores_of_the_best_f1(tiny_model, tmp_path, capsys):
    """best.pt has them from its evaluation; here they are set, because this network detects nothing right."""
    data, run = write_coco(tmp_path / "data", [annotation(image) for image in (1, 2)], images=2), tmp_path / "run"
    assert main.main(flags(data, run)) == 0
    state = torch.load(run / "best.pt")
    assert state["score_thresholds"] == {"all": None, "by_label": [None, None]}
    predict = (*flags(data / "val2017", tmp_path / "found", "--mode", "prediction"), "--checkpoint")
    assert main.main([*predict, str(run / "best.pt"), "--score", "best"]) == 2
    assert "has no score thresholds" in capsys.readouterr().err
    state["model"]["conf.0.bias"][4:8] += 9  # category 1 everywhere in the first map
    for own, least in ((None, 0.2), (0.9, 0.9)):
        thresholds = {"all": 0.2, "by_label": [own, None]}
        torch.save({**state, "score_thresholds": thresholds}, run / "set.pt")
        assert main.main([*predict, str(run / "set.pt"), "--score", "best"]) == 0
        found = json.loads((tmp_path / "found" / "detections.json").read_text())
        assert all(entry["score"] >= least for entry in found if entry["category"] == "square")
    assert main.main([*predict, str(run / "set.pt"), "--score", "0.999999"]) == 0
    assert len(json.loads((tmp_path / "found" / "detections.json").read_text())) < len(found) or not found
