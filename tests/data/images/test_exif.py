"""`--orientation upright`: pictures turned by their EXIF tag, for annotation files that have the turned ones' sizes."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from src.data.annotations.coco import Annotations, read_annotations
from src.data.images.decode import decode, resize
from src.data.pipelines.image_reader import read_image
from src.data.pipelines.loader_config import LoaderConfig
from src.data.pipelines.torch_pipeline import EvaluationLoader
from src.runtime.errors import DataError
from tests.helpers.both_pipelines import CPU, train_loader
from tests.helpers.datasets import annotation, write_annotations, write_image
from tests.helpers.example_run import metrics
from tests.helpers.stopped_runs import flags, idle_run

KINDS = [*((tag, "jpg") for tag in range(1, 9)), (6, "png"), (8, "webp")]  # orientation tag and format


def write_turned(folder: Path, kinds=KINDS) -> Path:
    """Pictures with orientation tags; the annotation file has the sizes of the turned ones."""
    images = []
    for number, (tag, suffix) in enumerate(kinds, 1):
        exif = Image.Exif()
        exif[0x0112] = tag
        name = f"{tag}.{suffix}"
        for split in ("train", "val"):
            write_image(folder / f"{split}2017" / name, 160, 120, seed=number, exif=exif)
        width, height = (120, 160) if tag > 4 else (160, 120)
        images.append({"id": number, "file_name": name, "width": width, "height": height})
    boxes = [annotation(image["id"], (10, 20, 70, 90), 1 + image["id"] % 2, id=image["id"]) for image in images]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]}
    for split in ("train", "val"):
        write_annotations(folder, content, split)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_turned(tmp_path_factory.mktemp("turned"))


@pytest.fixture(scope="module")
def upright(data) -> Annotations:
    return read_annotations(data / "annotations/instances_train2017.json", data / "train2017", upright=True)


def pillows(path: Path) -> torch.Tensor:
    """The picture turned upright by Pillow, [3, H, W] uint8."""
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(ImageOps.exif_transpose(picture).convert("RGB"))).permute(2, 0, 1)


def test_both_pipelines_turn_pictures_and_not_boxes(pipeline, upright, data, tmp_path):
    """As if the pictures had been stored turned."""
    stored = replace(upright, upright=False, image_folder=tmp_path)
    for index in range(len(upright)):  # with little loss, so that the copies differ little
        Image.fromarray(pillows(upright.image_path(index)).permute(1, 2, 0).numpy()).save(
            tmp_path / stored.file_name(index), lossless=True, quality=100, subsampling=0
        )
    turned, expected = ([*train_loader(pipeline, annotations)] for annotations in (upright, stored))
    assert len(turned) == len(upright)
    for one, other in zip(turned, expected, strict=True):
        assert torch.equal(one.boxes, other.boxes) and torch.equal(one.labels, other.labels)
        assert (one.images - other.images).abs().max() < 0.1  # of JPEG's rounding; 1 is 58 grey levels


def test_dalis_windows_are_of_the_turned_picture(upright):
    pytest.importorskip("nvidia.dali")
    loader = train_loader("dali", upright, augment=True, batch_size=len(upright))
    pipeline = loader.build(("ids", "anchor", "shape", "resized"))
    smaller = 0
    for _ in range(6):
        ids, anchors, shapes, images = (output.as_array() for output in pipeline.run())
        for number, anchor, shape, image in zip(ids[:, 0], anchors, shapes, images, strict=True):
            index = int(loader.images[number])
            width, height = upright.sizes[index]
            left, top = np.round(anchor * (width, height)).astype(int)
            right, bottom = np.round((anchor + shape) * (width, height)).astype(int)
            window = pillows(upright.image_path(index))[:, top:bottom, left:right]
            assert (resize(window).permute(1, 2, 0).int() - torch.from_numpy(image)).abs().max() <= 3
            smaller += (bottom - top, right - left) != (height, width)
    assert smaller > 20


def test_the_evaluation_turns_pictures(upright):
    loader = EvaluationLoader(upright, LoaderConfig(batch_size=8, num_workers=0, device=CPU))
    seen = {int(index): image for images, indices in loader for image, index in zip(images, indices, strict=True)}
    assert len(seen) == len(upright)
    straight = EvaluationLoader(replace(upright, upright=False), LoaderConfig(batch_size=8, num_workers=0, device=CPU))
    with pytest.raises(DataError, match=r"--orientation upright reads$"):
        list(straight)


def test_a_size_that_only_the_other_orientation_has_is_told(upright, data, tmp_path):
    entries = json.loads(upright.path.read_text())
    for image in entries["images"]:
        image.update(width=160, height=120)
    path = write_annotations(tmp_path, entries)
    stored = read_annotations(path, data / "train2017")
    for index in range(len(stored)):
        assert torch.equal(read_image(stored, index), decode(stored.image_path(index)))
    index = len(stored) - 1
    with pytest.raises(DataError, match=r"8\.webp: the picture is 160 x 120, but .* width 120, height 160: it is the "
                                        "size of the picture turned by .* --orientation upright reads$"):  # fmt: skip
        read_image(replace(upright, upright=False), index)
    with pytest.raises(DataError, match=r"8\.webp: the picture is 120 x 160, but .* width 160, height 120: it is the "
                                        "stored picture's size, which --orientation stored reads$"):  # fmt: skip
        read_image(replace(stored, upright=True), index)


def test_a_damaged_tag_leaves_the_picture_as_it_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    Image.new("RGB", (80, 60), "red").save(stream, format="jpeg", exif=exif)
    content = stream.getvalue()
    path = tmp_path / "picture.jpg"
    for damaged in (content.replace(b"MM\0*", b"??\0*"), content.replace(b"\x01\x12\0\x03", b"\x01\x12\0\x02")):
        assert damaged != content
        path.write_bytes(damaged)
        assert decode(path, upright=True).shape == (3, 60, 80)


@pytest.mark.usefixtures("narrow")
def test_every_mode_heeds_it(tmp_path, capsys):
    data = write_turned(tmp_path, [(6, "jpg"), (8, "jpg")])
    assert idle_run(data, tmp_path, *flags("no_dali", False), "--evaluation") == (2, 0)
    assert capsys.readouterr().err.endswith("--orientation upright reads\n")
    upright = (*flags("no_dali", False), "--orientation", "upright")
    assert idle_run(data, tmp_path, *upright, "--evaluation", "0") == (0, 2)
    assert [entry["kind"] for entry in metrics(tmp_path)].count("evaluation") == 1
    assert idle_run(data, tmp_path / "check", *upright, "--mode", "check") == (0, 0)
