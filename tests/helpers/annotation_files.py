"""Small annotation files made for one test each, and what the reader makes of them."""

from pathlib import Path

import pytest

from src.data.annotations.coco import Annotations, read_annotations
from src.runtime.errors import DataError
from tests.helpers.datasets import CATEGORIES, annotation, write_annotations

LARGEST_ID = 2**63 - 1
IMAGES = [{"id": i, "file_name": f"{i}.jpg", "width": 160, "height": 120} for i in (1, 2, 3, 4)]


def content(annotations=None, images=None, categories=None, **fields) -> dict:
    """An annotation file's content: four images of 160 x 120, one annotation; annotations get the ids 1, 2, ..."""
    annotations = [annotation(1)] if annotations is None else annotations
    return {
        "images": IMAGES if images is None else images,
        "annotations": [{"id": number, **entry} for number, entry in enumerate(annotations, 1)],
        "categories": CATEGORIES if categories is None else categories,
        **fields,
    }


def without(entry: dict, field: str) -> dict:
    return {key: value for key, value in entry.items() if key != field}


def read(folder: Path, what, **options) -> Annotations:
    """The Annotations of a file with that content, a dict or text."""
    return read_annotations(write_annotations(folder, what), folder / "train2017", **options)


def error_of(folder: Path, what, **options) -> str:
    """The message of the DataError, a line that names the file."""
    with pytest.raises(DataError) as caught:
        read(folder, what, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder / "annotations" / "instances_train2017.json") in message
    return message
