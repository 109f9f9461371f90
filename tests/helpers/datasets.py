"""Small data sets in the COCO 2017 layout, made for one test each."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from src.data.annotations.coco import Annotations, locations, read_annotations

CATEGORIES = [{"id": 1, "name": "square"}, {"id": 2, "name": "disc"}]


def write_image(path: Path, width: int, height: int, seed: int = 0, **save) -> None:
    """A smooth random picture: coarse noise enlarged, so that JPEG and resizing change it little."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path, **save)


def annotation(image_id: int, bbox=(20, 20, 60, 50), category_id: int = 1, **fields) -> dict:
    return {"image_id": image_id, "category_id": category_id, "bbox": list(bbox), **fields}


def write_coco(
    folder: Path,
    annotations: list[dict],
    *,
    images: list[dict] | int = 4,
    categories=None,
    splits=("train", "val"),
    size=(160, 120),
) -> Path:
    """Writes `folder` in the COCO 2017 layout, the same images and annotations in each split; gives `folder`.

    `images`: COCO image entries, or how many to make (ids 1, 2, ..., files 000001.jpg, ...). A picture is
    drawn for each entry that has a file name, a width and a height. Annotations without an id get one.
    """
    if isinstance(images, int):
        images = [
            {"id": i, "file_name": f"{i:06d}.jpg", "width": size[0], "height": size[1]} for i in range(1, images + 1)
        ]
    content = {
        "images": images,
        "annotations": [{"id": number, **entry} for number, entry in enumerate(annotations, 1)],
        "categories": CATEGORIES if categories is None else categories,
    }
    for split in splits:
        for number, entry in enumerate(images):
            if {"file_name", "width", "height"} <= entry.keys() and entry["file_name"]:
                write_image(folder / f"{split}2017" / entry["file_name"], entry["width"], entry["height"], seed=number)
        write_annotations(folder, content, split)
    return folder


def write_small_coco(folder: Path, images: int, **options) -> Path:
    """`write_coco` with one box in each image, each at another place."""
    boxes = [annotation(image, (5 * image, 20, 60, 50), 1 + image % 2) for image in range(1, images + 1)]
    return write_coco(folder, boxes, images=images, **options)


def read(folder: Path, split: str = "train", **options) -> Annotations:
    """The annotations of one split."""
    return read_annotations(*locations(folder, split), **options)


def to_roboflow(folder: Path) -> Path:
    """Moves a data set in the COCO 2017 layout into that of Roboflow's COCO export, with its category 0."""
    for split, name in (("train", "train"), ("val", "valid")):
        images, file = folder / f"{split}2017", folder / "annotations" / f"instances_{split}2017.json"
        images.rename(folder / name)
        content = json.loads(file.read_text())
        content["categories"].insert(0, {"id": 0, "name": "shapes", "supercategory": "none"})
        (folder / name / "_annotations.coco.json").write_text(json.dumps(content))
        file.unlink()
    (folder / "annotations").rmdir()
    return folder


def write_annotations(folder: Path, content, split: str = "train") -> Path:
    path = folder / "annotations" / f"instances_{split}2017.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path
