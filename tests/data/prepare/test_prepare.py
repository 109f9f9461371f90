"""`python -m src.data.prepare`: every format to the COCO 2017 layout, and nothing where something is wrong."""

import json
import os
import sys

import pytest
from PIL import Image

from src.data.annotations.coco import locations, read_annotations
from src.data.annotations.dataset import read_dataset
from src.data.prepare.__main__ import main
from tests.helpers.datasets import write_image
from tests.helpers.label_folders import (
    SIZE,
    voc_text,
    write_cvat,
    write_labelme,
    write_single_coco,
    write_voc,
    write_yolo,
    yolo_line,
)

NAMES = ["dog", "traffic light"]
BOXES = {
    "a.jpg": [(0, 10, 20, 60, 90), (1, 100.5, 5, 150, 45)],
    "Müller am See.jpg": [(0, 0, 0, 200, 100)],
    "c.jpg": [(1, 30, 30, 50, 60)],
    "d.jpg": [(1, 10, 10, 20, 20), (0, 40, 40, 80, 80)],
    "e.jpg": [(0, 15, 25, 35, 75)],
}
WRITERS = [write_yolo, write_voc, write_cvat, write_labelme, write_single_coco]


def found_boxes(folder) -> dict[str, list[tuple]]:
    """By picture: category name and corners, of both parts."""
    training, validation = read_dataset(folder, evaluating=True, upright=False)
    found = {}
    for annotations in (training, validation):
        for index in range(len(annotations)):
            boxes, labels = annotations.targets(index)
            found[annotations.file_name(index)] = sorted(
                (annotations.categories[label - 1].name, *box)
                for label, box in zip(labels, boxes.round(2).tolist(), strict=True)
            )
    return found


def expected_boxes(boxes=BOXES) -> dict[str, list[tuple]]:
    return {name: sorted((NAMES[index], *box) for index, *box in own) for name, own in boxes.items()}


def faults(arguments, capsys) -> list[str]:
    """The lines of a run that must fail, without their beginning."""
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    begin = "python -m src.data.prepare: error: "
    assert lines
    assert all(line.startswith(begin) for line in lines)
    return [line.removeprefix(begin) for line in lines]


@pytest.mark.parametrize("write", WRITERS)
def test_every_format_gives_its_boxes(write, tmp_path):
    labels = write(tmp_path / "labels", BOXES, NAMES)
    assert main([str(labels), str(tmp_path / "data")]) == 0
    assert found_boxes(tmp_path / "data") == expected_boxes()


@pytest.mark.parametrize("name", ["yolo", "voc"])
def test_real_photographs_keep_their_939_boxes(name, tmp_path, coco128):
    truth = read_annotations(*locations(coco128, "train"))
    names = [category.name for category in truth.categories]
    labels = tmp_path / "labels"
    for folder in ("images", "labels"):
        (labels / folder).mkdir(parents=True)
    for index in range(len(truth)):
        path, size = truth.image_path(index), tuple(truth.sizes[index].tolist())
        os.symlink(path, labels / "images" / path.name)
        boxes, own = truth.targets(index)
        rows = [(label - 1, *box) for label, box in zip(own.tolist(), boxes.tolist(), strict=True)]
        if name == "yolo":
            text, suffix = "\n".join(yolo_line(row, size) for row in rows), ".txt"
        else:
            text, suffix = voc_text(path.name, rows, names, size), ".xml"
        (labels / "labels" / path.name).with_suffix(suffix).write_text(text)
    (labels / "classes.txt").write_text("\n".join(names))
    if name == "voc":
        (labels / "classes.txt").unlink()
    assert main([str(labels), str(tmp_path / "data")]) == 0
    found = found_boxes(tmp_path / "data")
    assert sum(map(len, found.values())) == 939
    for index in range(len(truth)):
        boxes, own = truth.targets(index)
        wanted = sorted((names[label - 1], *box) for label, box in zip(own, boxes.tolist(), strict=True))
        for (found_name, *found_box), (name, *box) in zip(found[truth.file_name(index)], wanted, strict=True):
            assert found_name == name
            assert found_box == pytest.approx(box, abs=0.02)


def test_a_coco_file_keeps_its_crowds_ids_and_other_fields(tmp_path):
    labels = write_single_coco(tmp_path / "labels", BOXES, NAMES)
    assert main([str(labels), str(tmp_path / "data")]) == 0
    given = json.loads((labels / "instances_default.json").read_text())
    parts = [json.loads(locations(tmp_path / "data", part)[0].read_text()) for part in ("train", "val")]
    for name in ("images", "annotations"):
        together = sorted((entry for part in parts for entry in part[name]), key=lambda entry: entry["id"])
        assert together == given[name]
    assert [part["categories"] for part in parts] == [given["categories"]] * 2


def test_a_coco_file_that_names_paths_finds_its_pictures(tmp_path):
    labels = write_single_coco(tmp_path / "labels", BOXES, NAMES)
    file = labels / "instances_default.json"
    content = json.loads(file.read_text())
    for entry in content["images"]:
        entry["file_name"] = f"images/{entry['file_name']}"
    file.write_text(json.dumps(content))
    assert main([str(file), str(tmp_path / "data")]) == 0
    assert found_boxes(tmp_path / "data") == expected_boxes()


def test_pictures_are_hard_links_or_copies(tmp_path, monkeypatch, capsys):
    labels = write_yolo(tmp_path / "labels", BOXES, NAMES)
    assert main([str(labels), str(tmp_path / "linked")]) == 0
    (linked,) = (tmp_path / "linked").glob("*2017/a.jpg")
    assert linked.samefile(labels / "images" / "a.jpg")

    def refuse(*_):
        raise OSError("cross-device link")

    monkeypatch.setattr("os.link", refuse)
    assert main([str(labels), str(tmp_path / "copied")]) == 0
    (copied,) = (tmp_path / "copied").glob("*2017/a.jpg")
    assert not copied.samefile(labels / "images" / "a.jpg")
    assert copied.read_bytes() == (labels / "images" / "a.jpg").read_bytes()
    assert "copied because the disk cannot link them" in capsys.readouterr().out


def test_it_prints_what_it_found_and_the_command_to_copy(tmp_path, capsys):
    labels = write_yolo(tmp_path / "labels", BOXES | {"nothing.jpg": []}, [*NAMES, "cat"])
    (labels / "labels" / "gone.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    assert main([str(labels), str(tmp_path / "data")]) == 0
    told = capsys.readouterr().out
    assert "YOLO, 6 pictures, 7 boxes" in told
    assert "dog: 4 boxes" in told
    assert "categories without a box: 1 (cat)" in told
    assert "pictures without a label file: 1" in told
    assert f"labels without a picture: 1, left out: {labels / 'labels' / 'gone.txt'}" in told
    assert f"python main.py --data {tmp_path / 'data'} --epochs 400 --multistep 265 335 --warmup 300" in told


# --- data.yaml -------------------------------------------------------------------------------------------------------


def write_parts(folder, yaml: str, parts=("train", "valid", "test")):
    for part in parts:
        write_image(folder / part / "images" / f"{part}.jpg", *SIZE)
        (folder / part / "labels").mkdir(parents=True)
        (folder / part / "labels" / f"{part}.txt").write_text(yolo_line((1, 10, 20, 60, 90)) + "\n")
    (folder / "data.yaml").write_text(yaml)
    return folder


ROBOFLOW = (
    "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 2\nnames: ['dog', 'traffic light']\n"
)
ULTRALYTICS = "path: .\ntrain: train/images\nval: [valid/images]\ntest:\nnames:\n  0: dog\n  1: traffic light\n"


@pytest.mark.parametrize("yaml", [ROBOFLOW, ULTRALYTICS])
def test_a_data_yaml_brings_its_split(yaml, tmp_path):
    labels = write_parts(tmp_path / "labels", yaml)
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
    for part, name in (("train", "a.jpg"), ("valid", "b.jpg"), ("test", "c.jpg")):
        write_image(tmp_path / "labels" / part / name, *SIZE)
        (tmp_path / "labels" / part / name).with_suffix(".xml").write_text(voc_text(name, BOXES["a.jpg"], NAMES))
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


def test_a_list_of_validation_pictures(tmp_path, capsys):
    labels = write_voc(tmp_path / "labels", BOXES, NAMES)
    (tmp_path / "val.txt").write_text("images/Müller am See.jpg\na\n\n")
    assert main([str(labels), str(tmp_path / "data"), "--val-list", str(tmp_path / "val.txt")]) == 0
    assert sorted(path.name for path in (tmp_path / "data" / "val2017").iterdir()) == ["Müller am See.jpg", "a.jpg"]
    (tmp_path / "val.txt").write_text("a\nnone.jpg\n")
    (line,) = faults([labels, tmp_path / "other", "--val-list", tmp_path / "val.txt"], capsys)
    assert line.startswith(f"{tmp_path / 'val.txt'}:2: 'none.jpg' names no labelled picture")


# --- orientation -----------------------------------------------------------------------------------------------------


def write_turned(path, size) -> None:
    """A picture stored in `size` with a tag that turns it by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    write_image(path, *size, exif=exif)


@pytest.mark.parametrize(("size", "upright"), [((100, 200), True), ((200, 100), False)])
def test_the_labels_size_tells_which_pictures_they_are_of(size, upright, tmp_path, capsys):
    labels = write_voc(tmp_path / "labels", BOXES, NAMES)
    write_turned(labels / "JPEGImages" / "a.jpg", size)
    assert main([str(labels), str(tmp_path / "data")]) == 0
    assert ("--orientation upright" in capsys.readouterr().out) == upright
    assert found_boxes(tmp_path / "data") == expected_boxes()


def test_yolo_labels_are_of_upright_pictures(tmp_path, capsys):
    labels = write_yolo(tmp_path / "labels", BOXES, NAMES)
    write_turned(labels / "images" / "a.jpg", (100, 200))
    assert main([str(labels), str(tmp_path / "data")]) == 0
    assert "--orientation upright" in capsys.readouterr().out
    assert found_boxes(tmp_path / "data") == expected_boxes()


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
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
def test_a_wrong_yolo_line_is_named_and_nothing_is_written(line, said, tmp_path, capsys):
    labels = write_yolo(tmp_path / "labels", BOXES, NAMES)
    file = labels / "labels" / "d.txt"
    file.write_text(f"{yolo_line(BOXES['d.jpg'][0])}\n\n{line}\n")
    (told,) = faults([labels, tmp_path / "data"], capsys)
    assert told.startswith(f"{file}:3: ")
    assert said in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels"]


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
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
def test_a_wrong_voc_file_is_named_with_its_line(old, new, line, said, tmp_path, capsys):
    labels = write_voc(tmp_path / "labels", BOXES, NAMES)
    file = labels / "Annotations" / "d.xml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))
    (told,) = faults([labels, tmp_path / "data"], capsys)
    assert told.startswith(f"{file}:{line}: ")
    assert said in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels"]


def test_a_wrong_cvat_box_and_a_wrong_labelme_shape_are_named(tmp_path, capsys):
    cvat = write_cvat(tmp_path / "cvat", BOXES, NAMES)
    file = cvat / "annotations.xml"
    file.write_text(file.read_text().replace('xbr="20"', 'xbr="2"'))
    (told,) = faults([cvat, tmp_path / "data"], capsys)
    assert told.startswith(f"{file}:13: box label=")
    labelme = write_labelme(tmp_path / "labelme", BOXES, NAMES)
    file = labelme / "d.json"
    file.write_text(file.read_text().replace("[[20, 20], [10, 10]]", "[[20, 20], [10]]"))
    (told,) = faults([labelme, tmp_path / "data"], capsys)
    assert told.startswith(f"{file}: shapes[0]: ")


def test_shapes_that_are_no_boxes_and_turned_boxes_are_counted(tmp_path, capsys):
    cvat = write_cvat(tmp_path / "cvat", BOXES, NAMES)
    file = cvat / "annotations.xml"
    turned = file.read_text().replace('xbr="20"', 'xbr="20" rotation="30.0"')
    file.write_text(turned.replace("</image>", '<polygon label="dog" points="1,2;3,4"></polygon></image>', 1))
    assert main([str(cvat), str(tmp_path / "data")]) == 0
    told = capsys.readouterr().out
    assert "shapes that are no boxes, left out: 1 polygon" in told
    assert f"rotated boxes: 1, taken without their rotation: {file}:13" in told


def test_all_faults_are_told_up_to_twenty(tmp_path, capsys):
    labels = write_yolo(tmp_path / "labels", BOXES, NAMES)
    (labels / "labels" / "a.txt").write_text("9 0.5 0.5 0.1 0.1\n" * 13)
    (labels / "labels" / "c.txt").write_text("0 0.5 0.5 0.1\n" * 13)
    told = faults([labels, tmp_path / "data"], capsys)
    assert len(told) == 21
    assert told[-1] == "and 6 more faults"


def test_labels_of_another_size_are_refused(tmp_path, capsys):
    labels = write_voc(tmp_path / "labels", BOXES, NAMES)
    write_image(labels / "JPEGImages" / "a.jpg", 400, 200)
    (told,) = faults([labels, tmp_path / "data"], capsys)
    assert told.startswith(f"{labels / 'JPEGImages' / 'a.jpg'}: the picture is 400 x 200, but its labels say 200 x 100")


def test_two_pictures_of_one_name(tmp_path, capsys):
    labels = write_yolo(tmp_path / "labels", BOXES, NAMES)
    write_image(labels / "images" / "a.png", *SIZE)
    (told,) = faults([labels, tmp_path / "data"], capsys)
    assert "two pictures are named 'a'" in told
    (labels / "images" / "a.png").unlink()
    write_image(labels / "more" / "images" / "a.jpg", *SIZE)
    (told,) = faults([labels, tmp_path / "data"], capsys)
    assert f"{labels / 'more' / 'images' / 'a.jpg'}: has the same name as {labels / 'images' / 'a.jpg'}" in told


def test_two_pictures_that_a_voc_file_could_mean(tmp_path, capsys):
    labels = write_voc(tmp_path / "labels", BOXES, NAMES)
    write_image(labels / "more" / "a.jpg", *SIZE)
    (told,) = faults([labels, tmp_path / "data"], capsys)
    assert told.startswith(f"{labels / 'Annotations' / 'a.xml'}: two pictures are named 'a.jpg'")


def test_a_missing_picture_is_told_and_left_out(tmp_path, capsys):
    labels = write_voc(tmp_path / "labels", BOXES, NAMES)
    (labels / "JPEGImages" / "a.jpg").unlink()
    assert main([str(labels), str(tmp_path / "data")]) == 0
    told = capsys.readouterr().out
    assert f"labels without a picture: 1, left out: {labels / 'Annotations' / 'a.xml'}: a.jpg" in told


def test_a_box_that_reaches_beyond_its_picture_is_cut_off(tmp_path, capsys):
    labels = write_voc(tmp_path / "labels", BOXES | {"a.jpg": [(0, -30, 20, 60, 90)]}, NAMES)
    assert main([str(labels), str(tmp_path / "data")]) == 0
    assert f"clipped to it: {labels / 'Annotations' / 'a.xml'}:4: box = -30 20 60 90" in capsys.readouterr().out
    assert found_boxes(tmp_path / "data")["a.jpg"] == [("dog", 0, 20, 60, 90)]


def test_folders_that_hold_no_labelled_pictures(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (told,) = faults([tmp_path / "empty", tmp_path / "data"], capsys)
    assert "no image in this folder" in told
    write_image(tmp_path / "only" / "a.jpg", *SIZE)
    (told,) = faults([tmp_path / "only", tmp_path / "data"], capsys)
    assert "1 pictures, but no labels" in told
    (told,) = faults([tmp_path / "none", tmp_path / "data"], capsys)
    assert "no such file or folder" in told


def test_pictures_that_cannot_be_trained_on(tmp_path, capsys):
    labels = write_yolo(tmp_path / "labels", BOXES, NAMES)
    Image.new("RGB", SIZE).save(labels / "images" / "a.jpg", format="BMP")
    (labels / "images" / "c.jpg").write_bytes(b"nothing")
    told = sorted(faults([labels, tmp_path / "data"], capsys))
    assert told[0].startswith(f"{labels / 'images' / 'a.jpg'}: a BMP picture cannot be trained on")
    assert told[1].startswith(f"{labels / 'images' / 'c.jpg'}: cannot be read as a picture")


def test_a_folder_that_holds_something_is_left_alone(tmp_path, capsys):
    labels = write_yolo(tmp_path / "labels", BOXES, NAMES)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "note.txt").write_text("mine")
    (told,) = faults([labels, tmp_path / "data"], capsys)
    assert told == f"{tmp_path / 'data'}: is not empty; name a new folder"
    (tmp_path / "data" / "note.txt").unlink()
    assert main([str(labels), str(tmp_path / "data")]) == 0


def test_a_list_of_names_is_needed(tmp_path, capsys):
    labels = write_yolo(tmp_path / "labels", BOXES, NAMES)
    (labels / "classes.txt").rename(tmp_path / "names")
    (told,) = faults([labels, tmp_path / "data"], capsys)
    assert "give one: --names FILE" in told
    assert main([str(labels), str(tmp_path / "data"), "--names", str(tmp_path / "names")]) == 0
    assert found_boxes(tmp_path / "data") == expected_boxes()


def test_two_categories_of_one_name(tmp_path, capsys):
    labels = write_yolo(tmp_path / "labels", BOXES, ["dog", "cat", "dog"])
    (told,) = faults([labels, tmp_path / "data"], capsys)
    assert told == f"{labels / 'classes.txt'}: categories 0 and 2 are both named 'dog'; rename one"
    (labels / "data.yaml").write_text("train: images\nval: images\nnames: {0: dog, 1: dog, 2: cat}\n")
    (told,) = faults([labels, tmp_path / "data"], capsys)
    assert told == f"{labels / 'data.yaml'}: categories 0 and 1 are both named 'dog'; rename one"


def test_label_files_of_windows_programs(tmp_path):
    labels = write_yolo(tmp_path / "labels", BOXES, NAMES)
    for file in (labels / "classes.txt", *(labels / "labels").glob("*.txt")):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert main([str(labels), str(tmp_path / "data")]) == 0
    assert found_boxes(tmp_path / "data") == expected_boxes()


def test_a_missing_library_is_named(tmp_path, capsys, monkeypatch):
    labels = write_yolo(tmp_path / "labels", BOXES, NAMES)
    for name in [name for name in sys.modules if name.startswith("src.data.prepare") and "__main__" not in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "globox", None)
    (told,) = faults([labels, tmp_path / "data"], capsys)
    assert told == "reading label files needs globox: pip install globox pyyaml"
