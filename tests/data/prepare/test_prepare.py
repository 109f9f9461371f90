"""`python -m src.data.prepare` on correct labels: every format becomes the COCO 2017 layout, with notes."""

import json
import os

import pytest
from PIL import Image

from src.data.annotations.coco import locations, read_annotations
from src.data.prepare.__main__ import main
from tests.helpers.datasets import write_image
from tests.helpers.label_folders import (
    voc_text,
    write_cvat,
    write_labelme,
    write_single_coco,
    write_voc,
    write_yolo,
    yolo_line,
)
from tests.helpers.prepare_runs import BOXES, NAMES, expected_boxes, found_boxes

WRITERS = [write_yolo, write_voc, write_cvat, write_labelme, write_single_coco]


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
        boxes, truth_labels = truth.targets(index)
        rows = [(label - 1, *box) for label, box in zip(truth_labels.tolist(), boxes.tolist(), strict=True)]
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
        boxes, truth_labels = truth.targets(index)
        expected = sorted((names[label - 1], *box) for label, box in zip(truth_labels, boxes.tolist(), strict=True))
        for (found_name, *found_box), (name, *box) in zip(found[truth.file_name(index)], expected, strict=True):
            assert found_name == name
            assert found_box == pytest.approx(box, abs=0.02)


def test_a_coco_file_keeps_its_crowds_ids_and_other_fields(tmp_path):
    labels = write_single_coco(tmp_path / "labels", BOXES, NAMES)
    assert main([str(labels), str(tmp_path / "data")]) == 0
    source = json.loads((labels / "instances_default.json").read_text())
    splits = [json.loads(locations(tmp_path / "data", split)[0].read_text()) for split in ("train", "val")]
    for name in ("images", "annotations"):
        written = sorted((entry for split in splits for entry in split[name]), key=lambda entry: entry["id"])
        assert written == source[name]
    assert [split["categories"] for split in splits] == [source["categories"]] * 2


def test_a_coco_file_that_names_paths_finds_its_pictures(tmp_path):
    labels = write_single_coco(tmp_path / "labels", BOXES, NAMES)
    file = labels / "instances_default.json"
    content = json.loads(file.read_text())
    for entry in content["images"]:
        entry["file_name"] = f"images/{entry['file_name']}"
    file.write_text(json.dumps(content))
    assert main([str(file), str(tmp_path / "data")]) == 0
    assert found_boxes(tmp_path / "data") == expected_boxes()


def test_boxes_outside_a_coco_files_pictures_are_written_and_warned_of(tmp_path, capsys):
    labels = write_single_coco(tmp_path / "labels", BOXES, NAMES)
    file = labels / "instances_default.json"
    content = json.loads(file.read_text())
    outside = {**content["annotations"][0], "id": 99, "bbox": [500, 500, 10, 10]}
    file.write_text(json.dumps({**content, "annotations": [*content["annotations"], outside]}))
    assert main([str(file), str(tmp_path / "data")]) == 0
    output = capsys.readouterr().out
    assert "5 pictures, 8 boxes" in output
    assert "boxes are written as the file has them; training on them gives these warnings:" in output
    assert "1 of 8 annotations left out: their `bbox` is outside the image (annotation ids 99)" in output
    written = [json.loads(locations(tmp_path / "data", split)[0].read_text()) for split in ("train", "val")]
    assert outside in [entry for split in written for entry in split["annotations"]]


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


def test_a_summary_and_the_training_command_are_printed(tmp_path, capsys):
    labels = write_yolo(tmp_path / "labels", BOXES | {"nothing.jpg": []}, [*NAMES, "cat"])
    (labels / "labels" / "gone.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    assert main([str(labels), str(tmp_path / "data")]) == 0
    output = capsys.readouterr().out
    assert "YOLO, 6 pictures, 7 boxes" in output
    assert "dog: 4 boxes" in output
    assert "categories without a box: 1 (cat)" in output
    assert "pictures without a label file: 1" in output
    assert f"labels without a picture: 1, left out: {labels / 'labels' / 'gone.txt'}" in output
    assert f"python main.py --data {tmp_path / 'data'} --epochs 400 --multistep 265 335 --warmup 300" in output


def test_other_shapes_and_rotated_boxes_are_counted(tmp_path, capsys):
    cvat = write_cvat(tmp_path / "cvat", BOXES, NAMES)
    file = cvat / "annotations.xml"
    rotated = file.read_text().replace('xbr="20"', 'xbr="20" rotation="30.0"')
    file.write_text(rotated.replace("</image>", '<polygon label="dog" points="1,2;3,4"></polygon></image>', 1))
    assert main([str(cvat), str(tmp_path / "data")]) == 0
    output = capsys.readouterr().out
    assert "shapes that are no boxes, left out: 1 polygon" in output
    assert f"rotated boxes: 1, taken without their rotation: {file}:13" in output


def test_labels_of_a_missing_picture_are_counted_and_left_out(tmp_path, capsys):
    labels = write_voc(tmp_path / "labels", BOXES, NAMES)
    (labels / "JPEGImages" / "a.jpg").unlink()
    assert main([str(labels), str(tmp_path / "data")]) == 0
    output = capsys.readouterr().out
    assert f"labels without a picture: 1, left out: {labels / 'Annotations' / 'a.xml'}: a.jpg" in output


def test_a_box_that_reaches_outside_its_picture_is_clipped(tmp_path, capsys):
    labels = write_voc(tmp_path / "labels", BOXES | {"a.jpg": [(0, -30, 20, 60, 90)]}, NAMES)
    assert main([str(labels), str(tmp_path / "data")]) == 0
    assert f"clipped to it: {labels / 'Annotations' / 'a.xml'}:4: box = -30 20 60 90" in capsys.readouterr().out
    assert found_boxes(tmp_path / "data")["a.jpg"] == [("dog", 0, 20, 60, 90)]


def test_byte_order_marks_and_windows_line_ends_are_read(tmp_path):
    labels = write_yolo(tmp_path / "labels", BOXES, NAMES)
    for file in (labels / "classes.txt", *(labels / "labels").glob("*.txt")):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert main([str(labels), str(tmp_path / "data")]) == 0
    assert found_boxes(tmp_path / "data") == expected_boxes()


# --- orientation -----------------------------------------------------------------------------------------------------


def write_rotated(path, size) -> None:
    """A picture stored in `size` with a tag that turns it by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    write_image(path, *size, exif=exif)


@pytest.mark.parametrize(("size", "upright"), [((100, 200), True), ((200, 100), False)])
def test_the_declared_size_says_whether_stored_or_upright_pictures_were_labelled(size, upright, tmp_path, capsys):
    labels = write_voc(tmp_path / "labels", BOXES, NAMES)
    write_rotated(labels / "JPEGImages" / "a.jpg", size)
    assert main([str(labels), str(tmp_path / "data")]) == 0
    assert ("--orientation upright" in capsys.readouterr().out) == upright
    assert found_boxes(tmp_path / "data") == expected_boxes()


def test_yolo_labels_describe_upright_pictures(tmp_path, capsys):
    labels = write_yolo(tmp_path / "labels", BOXES, NAMES)
    write_rotated(labels / "images" / "a.jpg", (100, 200))
    assert main([str(labels), str(tmp_path / "data")]) == 0
    assert "--orientation upright" in capsys.readouterr().out
    assert found_boxes(tmp_path / "data") == expected_boxes()
