"""Faulty annotations and images in whole runs of both pipelines.  tests/data/annotations tests the reader alone."""

import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

import main
from src.data.pipelines.batch import denormalise
from src.runtime.errors import UserError
from tests.helpers.both_pipelines import train_loader
from tests.helpers.datasets import annotation, read, write_annotations, write_coco, write_image
from tests.helpers.small_runs import error_line, flags, metrics, run

pytestmark = pytest.mark.usefixtures("tiny_model")

# --- annotations -----------------------------------------------------------------------------------------------------

LARGEST = 2**63 - 1
IMAGES = [
    {"id": LARGEST, "file_name": "sub/folder/ünï 1.jpg", "width": 160, "height": 120},
    {"id": 0, "file_name": "2.png", "width": 160, "height": 120},
    {"id": 3, "file_name": "crowd.jpg", "width": 160, "height": 120},
    {"id": 4, "file_name": "nothing.jpg", "width": 160, "height": 120},
    {"id": 5, "file_name": "no use.jpg", "width": 160, "height": 120},
]
FAULTY = [
    annotation(LARGEST, (30, 20, 90, 80), 0),
    annotation(0, (-0.4, 5, 60, 115.3), 90),
    annotation(0, (100, 5, 900, 90), 90),  # 3: clipped
    annotation(3, (20, 20, 100, 90), 0, iscrowd=1),
    annotation(5, (5, 5, 0, 9), 0),  # 5: no width
    annotation(5, (5, 5, 9, -4), 0),  # 6: negative height
    annotation(5, (500, 500, 9, 9), 0),  # 7: outside
    annotation(77, (5, 5, 9, 9), 0),
]


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """Everything that is mended or passed over, and category ids with gaps from 0 in another order in each file."""
    folder = tmp_path_factory.mktemp("faulty")
    categories = [{"id": 90, "name": "kite"}, {"id": 0, "name": "zero"}]
    write_coco(folder, FAULTY, images=IMAGES, categories=categories)
    for split in ("train", "val"):
        path = folder / "annotations" / f"instances_{split}2017.json"
        content = json.loads(path.read_text())
        if split == "val":
            content["categories"].reverse()
        write_annotations(folder, "\ufeff" + json.dumps({"info": {"year": float("nan")}, **content}), split)
    return folder


def test_repaired_annotations_cause_warnings_and_are_trained_on_and_scored(pipeline, faulty, tmp_path, capsys):
    assert run(pipeline, faulty, tmp_path, "--evaluation", "0", "9") == 0
    printed = capsys.readouterr()
    for split in ("train", "val"):
        start = f"main.py: warning: {faulty}/annotations/instances_{split}2017.json: "
        lines = [line.removeprefix(start) for line in printed.err.splitlines() if line.startswith(start)]
        flat, outside = "the width or height of their `bbox` is not positive", "their `bbox` is outside the image"
        beyond = "their `bbox` reaches more than a pixel outside the image"
        expected = {
            "train": [
                f"2 of 8 annotations left out: {flat} (annotation ids 5, 6)",
                f"1 of 8 annotations left out: {outside} (annotation ids 7)",
                f"1 of 8 annotations clipped: {beyond} (annotation ids 3)",
            ],
            "val": [  # a negative area, as that of annotation 6, is ignored by the scorer
                f"1 of 8 annotations count as missed in the scoring: {flat} (annotation ids 5)",
                f"1 of 8 annotations left out: {flat} (annotation ids 6)",
                f"1 of 8 annotations count as missed in the scoring: {outside} (annotation ids 7)",
                f"1 of 8 annotations scored as they stand: {beyond} (annotation ids 3)",
            ],
        }
        assert lines == ["1 of 8 annotations left out: no image has their image_id (77)", *expected[split]]
    assert "warning: --evaluation 9: not reached, the epochs are 0 to 0" in printed.err
    assert "Training images: 3 with 4 boxes of 2 categories (2 without boxes left out)" in printed.out
    assert "Validation images: 5 with 4 boxes" in printed.out
    losses = [entry["loss"] for entry in metrics(tmp_path) if entry["kind"] == "iteration"]
    assert losses and all(np.isfinite(losses))
    found = json.loads((tmp_path / "detections.json").read_text())
    assert {entry["image_id"] for entry in found} <= {image["id"] for image in IMAGES}
    assert {entry["category_id"] for entry in found} <= {0, 90}


def test_crowds_are_trained_as_ordinary_boxes(pipeline, faulty):
    annotations = read(faulty)
    loader = train_loader(pipeline, annotations)
    assert loader.num_images == 3
    # Labels 1 and 2 are kite and zero, as the training file lists them; image 0 has two boxes, those of zero one each.
    seen = sorted(batch.labels.unique().tolist() for batch in loader)
    assert seen == [[0, 1], [0, 2], [0, 2]]


WRONG = {
    "bbox of three numbers": lambda content: content["annotations"][1].update(bbox=[1, 2, 3]),
    "no image_id": lambda content: content["annotations"][1].pop("image_id"),
    "unknown category": lambda content: content["annotations"][1].update(category_id=8),
    "fraction as id": lambda content: content["images"][1].update(id=1.5),
    "same id twice": lambda content: content["images"][1].update(id=1),
    "same file twice": lambda content: content["images"][1].update(file_name="000001.jpg"),
    "no width": lambda content: content["images"][1].pop("width"),
    "no usable box": lambda content: content.update(annotations=[annotation(50), annotation(51)]),
}
SAYS = {
    "bbox of three numbers": "bbox is [1, 2, 3] in annotations[1] (id 2): ",
    "no image_id": "annotations[1] (id 2) has no image_id",
    "unknown category": "annotations[1] (id 2) has category_id 8",
    "fraction as id": "id is 1.5 in images[1]",
    "same id twice": "images[0] and images[1] have the same id 1",
    "same file twice": "images[0] and images[1] have the same file_name '000001.jpg'",
    "no width": 'images[1] (id 2, file_name "000002.jpg") has no width',
    "no usable box": "0 of 2 images have a usable annotation (the first image_id that no image has is 50; images in ",
}


@pytest.mark.parametrize("fault", WRONG)
def test_annotations_that_cannot_be_repaired_end_the_run_at_the_start(tmp_path, capsys, fault):
    """Before there is a pipeline, so one stands for both."""
    data = write_coco(tmp_path / "data", [annotation(1), annotation(2)], images=2)
    path = data / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    WRONG[fault](content)
    write_annotations(data, content)
    assert run("no_dali", data, tmp_path / "output") == 2
    assert error_line(capsys).startswith(f"main.py: error: {path}: {SAYS[fault]}")
    assert main.main(flags(data, tmp_path / "output", "--mode", "check")) == 2
    assert f"{path}: {SAYS[fault]}" in capsys.readouterr().out


# --- images ----------------------------------------------------------------------------------------------------------

BROKEN = {
    "missing": (lambda path: path.unlink(), "no such image file"),
    "empty": (lambda path: path.write_bytes(b""), r"cannot be read as an image \(it is empty\)"),
    "cut in half": (lambda path: path.write_bytes(path.read_bytes()[:1000]), r"\(it is cut off\)"),
    "text": (lambda path: path.write_text("no picture " * 9), r"\(it is no JPEG, PNG or WebP file\)"),
    "of another size": (lambda path: write_image(path, 90, 70), "the picture is 90 x 70, but .* width 160, height 120"),
}


@pytest.mark.parametrize(
    "pipeline", ["no_dali", "dali", pytest.param("dali", marks=pytest.mark.gpu, id="dali on a GPU")], indirect=True
)
@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_image_ends_the_run_with_its_full_path(pipeline, tmp_path, capsys, fault):
    data = write_coco(tmp_path / "data", [annotation(1)], images=1)
    path = data / "train2017" / "000001.jpg"
    spoil, said = BROKEN[fault]
    spoil(path)
    assert run(pipeline, data, tmp_path / "output", "--evaluation") == 2
    line = error_line(capsys)
    assert re.match(rf"main\.py: error: {path}: .*{said}", line)
    assert ".cpp" not in line
    assert (tmp_path / "output").exists() == (fault != "missing")


def kinds() -> dict:
    """Pictures of every kind that both pipelines read: file name -> what to save and how."""
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    colours = Image.fromarray(coarse).resize((160, 120), Image.Resampling.BICUBIC)
    grey, transparent = colours.convert("L"), colours.convert("RGBA")
    transparent.putalpha(grey)
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "colours.jpg": (colours, {}),
        "progressive.jpg": (colours, {"progressive": True}),
        "grey.jpg": (grey, {}),
        "cmyk.jpg": (colours.convert("CMYK"), {}),
        "turned.jpg": (colours, {"exif": turned}),
        "colours.png": (colours, {}),
        "grey.png": (grey, {}),
        "grey 16 bits.png": (Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), {}),
        "transparent.png": (transparent, {}),
        "palette.png": (colours.convert("P"), {}),
        "transparent palette.png": (colours.convert("P"), {"transparency": 3}),
        "black and white.png": (colours.convert("1"), {}),
        "colours.webp": (colours, {}),
    }


@pytest.mark.parametrize(
    ("device", "difference"), [("cpu", 2), pytest.param("cuda:0", 16, marks=pytest.mark.gpu)], ids=["cpu", "gpu"]
)
def test_every_kind_of_picture_is_the_same_in_both_pipelines(tmp_path, device, difference):
    pytest.importorskip("nvidia.dali")
    pictures = kinds()
    (tmp_path / "train2017").mkdir()
    for name, (picture, options) in pictures.items():
        picture.save(tmp_path / "train2017" / name, **options)
    names = dict(enumerate(pictures, 1))
    content = {
        "images": [{"id": i, "file_name": name, "width": 160, "height": 120} for i, name in names.items()],
        "annotations": [annotation(i, (20, 20, 90, 60), i, id=i) for i in names],
        "categories": [{"id": i, "name": name} for i, name in names.items()],
    }
    write_annotations(tmp_path, content)
    seen = [
        {names[int(batch.labels.max())]: denormalise(batch.images.cpu())[0] for batch in loader}
        for loader in (
            train_loader("no_dali", read(tmp_path)),
            train_loader("dali", read(tmp_path), device=torch.device(device)),
        )
    ]
    for name in pictures:
        assert (seen[0][name] - seen[1][name]).abs().max() <= difference, name
        assert (seen[0][name] - seen[1][name]).abs().mean() <= 2, name
        assert (name.startswith(("grey", "black"))) == bool((seen[0][name].std(dim=0) < 1).all()), name


@pytest.mark.parametrize("size", [(1, 1), (2000, 1)])
def test_pictures_of_extreme_sizes(pipeline, tmp_path, size):
    images = [{"id": i, "file_name": f"{i}.png", "width": size[0], "height": size[1]} for i in (1, 2)]
    data = write_coco(tmp_path, [annotation(i, (0, 0, *size)) for i in (1, 2)], images=images, splits=("train",))
    for batch in train_loader(pipeline, read(data), augment=True, batch_size=2):
        assert batch.images.isfinite().all() and (batch.labels > 0).any()


def test_a_folder_whose_name_is_not_utf_8(pipeline, tmp_path):
    folder = tmp_path / os.fsdecode(b"lat\xe9")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system knows only UTF-8 names")
    annotations = read(write_coco(folder, [annotation(1)], images=1))
    with pytest.raises(UserError, match="its path is not UTF-8 text"):
        next(iter(train_loader(pipeline, annotations)))
