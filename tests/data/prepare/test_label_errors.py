"""`python -m src.data.prepare` on wrong labels: it names file, line and remedy, and writes nothing."""

import sys

import pytest
from PIL import Image

from src.data.prepare.__main__ import main
from tests.helpers.datasets import write_image
from tests.helpers.label_folders import SIZE, write_cvat, write_labelme, write_voc, write_yolo, yolo_line
from tests.helpers.prepare_runs import BOXES, NAMES, error_lines, expected_boxes, found_boxes


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("2 0.5 0.5 0.1 0.1", "category = 2: expected 0 to 1"),
        ("-1 0.5 0.5 0.1 0.1", "category = -1: expected 0 to 1"),
        ("0.5 0.5 0.5 0.1 0.1", "category = 0.5: expected 0 to 1"),
        ("0 0.5 0.5 0.1", "4 values: expected 5"),
        ("0 0.5 0.5 0.1 0.1 0.9", "6 values: expected 5"),
        ("0 0.5 0.5 a 0.1", "'0 0.5 0.5 a 0.1': expected numbers"),
        ("0 0.5 nan 0.1 0.1", "expected finite numbers"),
        ("0 1.5 0.5 0.1 0.1", "is outside, the picture is 200 x 100"),
        ("0 100 50 20 20", "is outside"),
        ("0 0.5 0.5 0 0.1", "has no area"),
        ("0 0.5 0.5 -0.1 0.1", "expected more than 0"),
    ],
)
def test_a_wrong_yolo_line_is_named_and_nothing_is_written(line, expected, tmp_path, capsys):
    labels = write_yolo(tmp_path / "labels", BOXES, NAMES)
    file = labels / "labels" / "d.txt"
    file.write_text(f"{yolo_line(BOXES['d.jpg'][0])}\n\n{line}\n")
    (error,) = error_lines([labels, tmp_path / "data"], capsys)
    assert error.startswith(f"{file}:3: ")
    assert expected in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels"]


@pytest.mark.parametrize(
    ("old", "new", "line", "expected"),
    [
        ("<xmax>20</xmax>", "<xmax>5</xmax>", 4, "expected a name and numbers with xmin < xmax"),
        ("<xmax>20</xmax>", "", 4, "xmax None"),
        ("<xmax>20</xmax>", "<xmax>wide</xmax>", 4, "xmax wide"),
        ("<xmin>10</xmin>", "<xmin>nan</xmin>", 4, "xmin nan"),
        (
            "<xmin>10</xmin><ymin>10</ymin><xmax>20</xmax>",
            "<xmin>210</xmin><ymin>10</ymin><xmax>220</xmax>",
            4,
            "outside",
        ),
        ("<name>traffic light</name>", "<name> </name>", 4, "the category's name is empty"),
        ("</annotation>", "", 12, "not well-formed XML"),
    ],
)
def test_a_wrong_voc_file_is_named_with_its_line(old, new, line, expected, tmp_path, capsys):
    labels = write_voc(tmp_path / "labels", BOXES, NAMES)
    file = labels / "Annotations" / "d.xml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))
    (error,) = error_lines([labels, tmp_path / "data"], capsys)
    assert error.startswith(f"{file}:{line}: ")
    assert expected in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels"]


def test_a_wrong_cvat_box_and_a_wrong_labelme_shape_are_named(tmp_path, capsys):
    cvat = write_cvat(tmp_path / "cvat", BOXES, NAMES)
    file = cvat / "annotations.xml"
    file.write_text(file.read_text().replace('xbr="20"', 'xbr="2"'))
    (error,) = error_lines([cvat, tmp_path / "data"], capsys)
    assert error.startswith(f"{file}:13: box label=")
    labelme = write_labelme(tmp_path / "labelme", BOXES, NAMES)
    file = labelme / "d.json"
    file.write_text(file.read_text().replace("[[20, 20], [10, 10]]", "[[20, 20], [10]]"))
    (error,) = error_lines([labelme, tmp_path / "data"], capsys)
    assert error.startswith(f"{file}: shapes[0]: ")


def test_twenty_faults_are_printed_and_the_others_counted(tmp_path, capsys):
    labels = write_yolo(tmp_path / "labels", BOXES, NAMES)
    (labels / "labels" / "a.txt").write_text("9 0.5 0.5 0.1 0.1\n" * 13)
    (labels / "labels" / "c.txt").write_text("0 0.5 0.5 0.1\n" * 13)
    errors = error_lines([labels, tmp_path / "data"], capsys)
    assert len(errors) == 21
    assert errors[-1] == "and 6 more faults"


def test_labels_of_another_size_are_refused(tmp_path, capsys):
    labels = write_voc(tmp_path / "labels", BOXES, NAMES)
    write_image(labels / "JPEGImages" / "a.jpg", 400, 200)
    (error,) = error_lines([labels, tmp_path / "data"], capsys)
    assert error.startswith(
        f"{labels / 'JPEGImages' / 'a.jpg'}: the picture is 400 x 200, but its labels say 200 x 100"
    )


def test_two_pictures_of_one_name_are_refused(tmp_path, capsys):
    labels = write_yolo(tmp_path / "labels", BOXES, NAMES)
    write_image(labels / "images" / "a.png", *SIZE)
    (error,) = error_lines([labels, tmp_path / "data"], capsys)
    assert "two pictures are named 'a'" in error
    (labels / "images" / "a.png").unlink()
    write_image(labels / "more" / "images" / "a.jpg", *SIZE)
    (error,) = error_lines([labels, tmp_path / "data"], capsys)
    assert f"{labels / 'more' / 'images' / 'a.jpg'}: has the same name as {labels / 'images' / 'a.jpg'}" in error


def test_a_voc_file_that_matches_two_pictures_is_refused(tmp_path, capsys):
    labels = write_voc(tmp_path / "labels", BOXES, NAMES)
    write_image(labels / "more" / "a.jpg", *SIZE)
    (error,) = error_lines([labels, tmp_path / "data"], capsys)
    assert error.startswith(f"{labels / 'Annotations' / 'a.xml'}: two pictures are named 'a.jpg'")


def test_folders_without_labelled_pictures_are_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (error,) = error_lines([tmp_path / "empty", tmp_path / "data"], capsys)
    assert error.endswith("no image in this folder or below it")
    write_image(tmp_path / "only" / "a.jpg", *SIZE)
    (error,) = error_lines([tmp_path / "only", tmp_path / "data"], capsys)
    assert "1 pictures, but no labels" in error
    (error,) = error_lines([tmp_path / "none", tmp_path / "data"], capsys)
    assert "no such file or folder" in error


def test_pictures_that_cannot_be_trained_on_are_named(tmp_path, capsys):
    labels = write_yolo(tmp_path / "labels", BOXES, NAMES)
    Image.new("RGB", SIZE).save(labels / "images" / "a.jpg", format="BMP")
    (labels / "images" / "c.jpg").write_bytes(b"nothing")
    errors = sorted(error_lines([labels, tmp_path / "data"], capsys))
    assert errors[0].startswith(f"{labels / 'images' / 'a.jpg'}: a BMP picture cannot be trained on")
    assert errors[1].startswith(f"{labels / 'images' / 'c.jpg'}: cannot be read as a picture")


def test_a_target_folder_that_is_not_empty_is_refused(tmp_path, capsys):
    labels = write_yolo(tmp_path / "labels", BOXES, NAMES)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "note.txt").write_text("mine")
    (error,) = error_lines([labels, tmp_path / "data"], capsys)
    assert error == f"{tmp_path / 'data'}: is not empty; name a new folder"
    (tmp_path / "data" / "note.txt").unlink()
    assert main([str(labels), str(tmp_path / "data")]) == 0


def test_yolo_without_a_list_of_names_is_refused(tmp_path, capsys):
    labels = write_yolo(tmp_path / "labels", BOXES, NAMES)
    (labels / "classes.txt").rename(tmp_path / "names")
    (error,) = error_lines([labels, tmp_path / "data"], capsys)
    assert "give one: --names FILE" in error
    assert main([str(labels), str(tmp_path / "data"), "--names", str(tmp_path / "names")]) == 0
    assert found_boxes(tmp_path / "data") == expected_boxes()


def test_two_categories_of_one_name_are_refused(tmp_path, capsys):
    labels = write_yolo(tmp_path / "labels", BOXES, ["dog", "cat", "dog"])
    (error,) = error_lines([labels, tmp_path / "data"], capsys)
    assert error == f"{labels / 'classes.txt'}: categories 0 and 2 are both named 'dog'; rename one"
    (labels / "data.yaml").write_text("train: images\nval: images\nnames: {0: dog, 1: dog, 2: cat}\n")
    (error,) = error_lines([labels, tmp_path / "data"], capsys)
    assert error == f"{labels / 'data.yaml'}: categories 0 and 1 are both named 'dog'; rename one"


def test_a_missing_library_is_named(tmp_path, capsys, monkeypatch):
    labels = write_yolo(tmp_path / "labels", BOXES, NAMES)
    for name in [name for name in sys.modules if name.startswith("src.data.prepare") and "__main__" not in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "globox", None)
    (error,) = error_lines([labels, tmp_path / "data"], capsys)
    assert error == "reading label files needs globox: pip install globox pyyaml"
