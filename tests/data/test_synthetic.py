"""The drawn data set: its layout, its pictures and annotations, and folders that it must not overwrite."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from src.data.synthetic import draw_dataset, main
from src.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
SPLITS = ("train", "val")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    draw_dataset(folder, images=64, val_images=32, seed=0)
    return folder


def content(folder: Path, split: str) -> dict:
    return json.loads((folder / "annotations" / f"instances_{split}2017.json").read_text())


def boxes_by_image(data: dict) -> dict[int, list[list[float]]]:
    boxes = {image["id"]: [] for image in data["images"]}
    for annotation in data["annotations"]:
        boxes[annotation["image_id"]].append(annotation["bbox"])
    return boxes


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def saturated(path: Path) -> np.ndarray:
    """The colourful pixels, bool [H, W]: those of objects, because backgrounds are muted."""
    pixels = np.asarray(Image.open(path).convert("HSV"))
    return (pixels[..., 1] > 150) & (pixels[..., 2] > 120)


@pytest.mark.parametrize("split", SPLITS)
def test_every_picture_has_the_size_that_the_annotations_give(drawn, split):
    data = content(drawn, split)
    for image in data["images"]:
        with Image.open(drawn / f"{split}2017" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])
            assert (picture.format, picture.mode) == ("JPEG", "RGB")
    assert {path.name for path in (drawn / f"{split}2017").iterdir()} == {
        image["file_name"] for image in data["images"]
    }


def test_the_data_set_is_varied(drawn):
    data = content(drawn, "train")
    assert set(data) == {"info", "licenses", "images", "annotations", "categories"}
    assert len({(image["width"], image["height"]) for image in data["images"]}) >= 5
    counts = [len(boxes) for boxes in boxes_by_image(data).values()]
    assert set(counts) == {0, 1, 2, 3}
    labels = [annotation["category_id"] for annotation in data["annotations"]]
    ids = [category["id"] for category in data["categories"]]
    assert set(labels) == set(ids)
    assert ids != list(range(1, len(ids) + 1)), "category ids have gaps, as COCO's have"
    assert min(labels.count(id_) for id_ in ids) > len(labels) / len(ids) / 2


def test_most_objects_span_a_fifth_to_two_thirds_of_the_network_input(drawn):
    data = content(drawn, "train")
    sizes = {image["id"]: (image["width"], image["height"]) for image in data["images"]}
    sides = np.array(
        [np.divide(annotation["bbox"][2:], sizes[annotation["image_id"]]) * 300 for annotation in data["annotations"]]
    )
    assert np.mean((sides > 50) & (sides < 200)) > 0.9
    assert sides.max() / sides.min() > 3


def test_the_splits_share_no_id_and_no_picture(drawn):
    ids = [{image["id"] for image in content(drawn, split)["images"]} for split in SPLITS]
    assert not ids[0] & ids[1]
    pictures = [{path.read_bytes() for path in (drawn / f"{split}2017").iterdir()} for split in SPLITS]
    assert [len(each) for each in pictures] == [64, 32]
    assert not pictures[0] & pictures[1]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own
@pytest.mark.parametrize("split", SPLITS)
def test_boxes_lie_inside_their_images_and_agree_with_pycocotools(drawn, split, capsys):
    coco = COCO(drawn / "annotations" / f"instances_{split}2017.json")
    for annotation in coco.loadAnns(coco.getAnnIds()):
        image = coco.imgs[annotation["image_id"]]
        x, y, width, height = annotation["bbox"]
        assert x >= 0 and y >= 0 and x + width <= image["width"] and y + height <= image["height"]
        assert width > 5 and height > 5 and annotation["iscrowd"] == 0
        mask = coco.annToMask(annotation)
        assert annotation["area"] == pytest.approx(mask.sum(), rel=0.05)
        rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
        assert (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) == pytest.approx(
            (x, y, x + width, y + height), abs=1.6
        )


@pytest.mark.parametrize("split", SPLITS)
def test_boxes_fit_tightly_around_the_drawn_pixels(drawn, split):
    """The colourful pixels reach the edges of the union of the boxes, and none is outside the boxes."""
    data = content(drawn, split)
    boxes_of = boxes_by_image(data)
    spans = 0
    for image in data["images"]:
        found = saturated(drawn / f"{split}2017" / image["file_name"])
        boxes = np.array(boxes_of[image["id"]])
        inside = np.zeros_like(found)
        for x, y, width, height in boxes:
            inside[int(y) : int(np.ceil(y + height)) + 1, int(x) : int(np.ceil(x + width)) + 1] = True
        assert not (found & ~inside).any()
        if len(boxes):
            rows, columns = found.any(axis=1).nonzero()[0], found.any(axis=0).nonzero()[0]
            expected = [*boxes[:, :2].min(axis=0), *(boxes[:, :2] + boxes[:, 2:]).max(axis=0)]
            assert (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) == pytest.approx(expected, abs=3)
            spans += 1
    assert spans >= 30


def test_equal_seeds_give_equal_bytes_and_other_seeds_other_pictures(drawn, tmp_path):
    draw_dataset(tmp_path / "again", images=64, val_images=32, seed=0)
    assert files(tmp_path / "again") == files(drawn)
    draw_dataset(tmp_path / "other", images=64, val_images=32, seed=1)
    before, after = files(drawn), files(tmp_path / "other")
    assert before.keys() == after.keys()
    assert not any(before[name] == after[name] for name in before)


def test_a_smaller_data_set_replaces_a_larger_one(tmp_path):
    draw_dataset(tmp_path / "set", images=5, val_images=2, seed=0)
    draw_dataset(tmp_path / "set", images=3, val_images=1, seed=0)
    draw_dataset(tmp_path / "fresh", images=3, val_images=1, seed=0)
    assert files(tmp_path / "set") == files(tmp_path / "fresh")


def test_an_interrupted_drawing_can_be_repeated(tmp_path):
    draw_dataset(tmp_path, images=2, val_images=1, seed=0)
    complete = files(tmp_path)
    for path in tmp_path.glob("annotations/*"):
        path.unlink()
    draw_dataset(tmp_path, images=2, val_images=1, seed=0)
    assert files(tmp_path) == complete


@pytest.mark.parametrize("name", ["photo.jpg", "train2017/000000000009.png", "annotations/instances_train2017.json"])
def test_a_folder_with_other_files_is_refused_and_unchanged(tmp_path, name):
    theirs = tmp_path / name
    theirs.parent.mkdir(parents=True, exist_ok=True)
    theirs.write_text("theirs")
    with pytest.raises(UserError, match=theirs.name):
        draw_dataset(tmp_path, images=2, val_images=1, seed=0)
    assert files(tmp_path) == {name: b"theirs"}


def test_a_file_added_to_a_drawn_folder_is_not_deleted(tmp_path):
    draw_dataset(tmp_path, images=2, val_images=1, seed=0)
    (tmp_path / "train2017" / "holiday.jpg").write_text("theirs")
    before = files(tmp_path)
    with pytest.raises(UserError, match=r"holiday\.jpg"):
        draw_dataset(tmp_path, images=1, val_images=1, seed=0)
    assert files(tmp_path) == before


def test_the_command_draws_into_a_new_folder(tmp_path):
    command = [
        sys.executable,
        "-m",
        "src.data.synthetic",
        str(tmp_path / "a" / "b"),
        "--images",
        "2",
        "--val-images",
        "1",
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    assert len(list((tmp_path / "a" / "b" / "train2017").iterdir())) == 2


@pytest.mark.parametrize(
    "flags", [["--images", "0"], ["--val-images", "0"], ["--seed", "-1"], []], ids=["images", "val", "seed", "a file"]
)
def test_the_command_prints_errors_in_one_line(tmp_path, capsys, flags):
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "new" if flags else tmp_path / "file"), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m src.data.synthetic: error: ") and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_the_annotation_reader_reads_the_drawn_files(drawn):
    coco = pytest.importorskip("src.data.annotations.coco")
    path = drawn / "annotations" / "instances_train2017.json"
    annotations = coco.read_annotations(path, drawn / "train2017")
    data = content(drawn, "train")
    assert (len(annotations), len(annotations.boxes)) == (len(data["images"]), len(data["annotations"]))
    assert annotations.warnings == ()
    assert [category.id for category in annotations.categories] == [category["id"] for category in data["categories"]]
