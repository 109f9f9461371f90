"""`python -m src.data.prepare` on labels that assign splits: data.yaml, folders, lists and CVAT's subsets."""

import pytest

from src.data.annotations.dataset import read_dataset
from src.data.prepare.__main__ import main
from tests.helpers.datasets import write_image
from tests.helpers.label_folders import SIZE, voc_text, write_cvat, write_voc, write_yolo, yolo_line
from tests.helpers.prepare_runs import BOXES, NAMES, error_lines, expected_boxes, found_boxes

# --- data.yaml -------------------------------------------------------------------------------------------------------


def write_splits(folder, yaml: str, splits=("train", "valid", "test")):
    for split in splits:
        write_image(folder / split / "images" / f"{split}.jpg", *SIZE)
        (folder / split / "labels").mkdir(parents=True)
        (folder / split / "labels" / f"{split}.txt").write_text(yolo_line((1, 10, 20, 60, 90)) + "\n")
    (folder / "data.yaml").write_text(yaml)
    return folder


ROBOFLOW = (
    "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 2\nnames: ['dog', 'traffic light']\n"
)
ULTRALYTICS = "path: .\ntrain: train/images\nval: [valid/images]\ntest:\nnames:\n  0: dog\n  1: traffic light\n"


@pytest.mark.parametrize("yaml", [ROBOFLOW, ULTRALYTICS])
def test_the_split_of_a_data_yaml_is_kept(yaml, tmp_path):
    labels = write_splits(tmp_path / "labels", yaml)
    assert main([str(labels), str(tmp_path / "data")]) == 0
    training, validation = read_dataset(tmp_path / "data", evaluating=True, upright=False)
    assert [training.file_names(range(len(training))), validation.file_names(range(len(validation)))] == [
        ["train.jpg"],
        ["valid.jpg"],
    ]
    assert [category.name for category in training.categories] == NAMES


def test_the_same_pictures_for_training_and_validation_are_split_anew(tmp_path, capsys):
    labels = write_yolo(tmp_path / "labels", BOXES, NAMES)
    (labels / "data.yaml").write_text("train: images\nval: images\nnames: [dog, traffic light]\n")
    assert main([str(labels), str(tmp_path / "data")]) == 0
    assert "split anew" in capsys.readouterr().out
    assert found_boxes(tmp_path / "data") == expected_boxes()


def test_a_data_yaml_may_name_lists_of_pictures(tmp_path):
    labels = write_yolo(tmp_path / "labels", BOXES, NAMES)
    (labels / "t.txt").write_text("./images/a.jpg\n./images/c.jpg\n./images/Müller am See.jpg\n")
    (labels / "v.txt").write_text("./images/d.jpg\n./images/e.jpg\n")
    (labels / "data.yaml").write_text("train: t.txt\nval: v.txt\nnames: [dog, traffic light]\n")
    assert main([str(labels), str(tmp_path / "data")]) == 0
    assert len(list((tmp_path / "data" / "val2017").iterdir())) == 2


# --- other splits ----------------------------------------------------------------------------------------------------


def test_folders_named_train_and_valid_are_a_split(tmp_path):
    for split, name in (("train", "a.jpg"), ("valid", "b.jpg"), ("test", "c.jpg")):
        write_image(tmp_path / "labels" / split / name, *SIZE)
        (tmp_path / "labels" / split / name).with_suffix(".xml").write_text(voc_text(name, BOXES["a.jpg"], NAMES))
    assert main([str(tmp_path / "labels"), str(tmp_path / "data")]) == 0
    assert sorted(path.name for path in (tmp_path / "data").glob("*/*.jpg")) == ["a.jpg", "b.jpg"]
    assert (tmp_path / "data" / "val2017" / "b.jpg").exists()


def test_vocs_image_sets_are_a_split(tmp_path):
    labels = write_voc(tmp_path / "labels", BOXES, NAMES)
    main_folder = labels / "ImageSets" / "Main"
    main_folder.mkdir(parents=True)
    (main_folder / "train.txt").write_text("a\nc\nd\n")
    (main_folder / "val.txt").write_text("e\nMüller am See\n")
    assert main([str(labels), str(tmp_path / "data")]) == 0
    assert sorted(path.name for path in (tmp_path / "data" / "val2017").iterdir()) == ["Müller am See.jpg", "e.jpg"]


def test_cvats_subsets_are_a_split(tmp_path):
    subset = {name: "Validation" if name == "c.jpg" else "Train" for name in BOXES}
    labels = write_cvat(tmp_path / "labels", BOXES, NAMES, subset)
    assert main([str(labels), str(tmp_path / "data")]) == 0
    assert [path.name for path in (tmp_path / "data" / "val2017").iterdir()] == ["c.jpg"]


def test_val_list_chooses_the_validation_pictures(tmp_path, capsys):
    labels = write_voc(tmp_path / "labels", BOXES, NAMES)
    (tmp_path / "val.txt").write_text("images/Müller am See.jpg\na\n\n")
    assert main([str(labels), str(tmp_path / "data"), "--val-list", str(tmp_path / "val.txt")]) == 0
    assert sorted(path.name for path in (tmp_path / "data" / "val2017").iterdir()) == ["Müller am See.jpg", "a.jpg"]
    (tmp_path / "val.txt").write_text("a\nnone.jpg\n")
    (line,) = error_lines([labels, tmp_path / "other", "--val-list", tmp_path / "val.txt"], capsys)
    assert line.startswith(f"{tmp_path / 'val.txt'}:2: 'none.jpg' names no labelled picture")
