"""The cleaned annotations in files for DALI's reader: arrays, or a COCO file if a file name has white space.

Shapes: I images, B boxes.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np

from src.data.annotations.coco import Annotations

ENTRIES_PER_WRITE = 2**16
WHITE_SPACE = np.frombuffer(b" \t\n\v\f\r", np.uint8)  # separates the names in `filenames.dat`


def try_write_reader_files(annotations: Annotations, order: np.ndarray, folder: Path) -> bool:
    """Writes files for the reader's `preprocessed_annotations`, the images in `order`; returns False if it cannot.

    It cannot write file names with white space.  order: indices of images that have boxes, perhaps repeated.  An
    image's id is its position in `with_boxes()`.  The reader's `save_preprocessed_annotations` writes the same files
    for ltrb and ratio.
    """
    if np.isin(annotations.names, WHITE_SPACE).any():
        return False
    counts = np.diff(annotations.first_box)[order]
    offsets = np.cumsum(counts) - counts
    chosen = np.repeat(annotations.first_box[order] - offsets, counts)  # of the boxes, image by image
    chosen += np.arange(len(chosen))
    with (folder / "filenames.dat").open("wb") as file:
        for start in range(0, len(order), ENTRIES_PER_WRITE):
            file.write(annotations.packed_names(order[start : start + ENTRIES_PER_WRITE], b"\n"))
    ids = np.searchsorted(annotations.with_boxes(), order)
    for name, values in (("offsets", offsets), ("counts", counts), ("original_ids", ids)):
        _write(folder / f"{name}.dat", values, np.int32)
    _write(folder / "labels.dat", annotations.labels[chosen], np.int32)
    _write(folder / "boxes.dat", _fractions(annotations, np.repeat(order, counts), chosen), np.float32)
    return True


def _fractions(annotations: Annotations, image_index: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The chosen boxes as fractions of their images; float32 [B, 4] ltrb.

    Right and bottom are left + width and top + height in float32, as the reader computes them from a COCO file.
    Otherwise 14 of coco128's 939 boxes would differ from that file's in their last bit.
    """
    boxes = annotations.boxes[chosen]
    low, high = boxes[:, :2], boxes[:, 2:]
    high[:] = low + (high.astype(np.float64) - low).astype(np.float32)
    sides = annotations.sizes.astype(np.float32)[image_index]
    low /= sides
    high /= sides
    return boxes


def _write(path: Path, values: np.ndarray, dtype: type[np.number]) -> None:
    with path.open("wb") as file:
        file.write(np.int32(values.size).tobytes())
        file.write(np.ascontiguousarray(values, dtype).data)


class _CleanImage(msgspec.Struct, gc=False):
    id: int
    file_name: str
    width: int
    height: int


class _CleanAnnotation(msgspec.Struct, gc=False):
    id: int
    image_id: int
    category_id: int
    bbox: list[float]
    area: float
    iscrowd: int = 0  # training treats crowds as ordinary boxes


def write_clean_file(annotations: Annotations, path: Path | str) -> None:
    """Writes a COCO file of the images that have boxes, with cleaned values only.

    An image's id is its position in `with_boxes()`, a category's id the label.
    """
    chosen = annotations.with_boxes()
    categories = [{"id": k, "name": category.name} for k, category in enumerate(annotations.categories, 1)]
    with Path(path).open("wb") as file:
        file.write(b'{"images":[')
        _write_list(file, _clean_images(annotations, chosen))
        file.write(b'],"annotations":[')
        _write_list(file, _clean_annotations(annotations, chosen))
        file.write(b'],"categories":' + msgspec.json.encode(categories) + b"}")


def _write_list(file: BinaryIO, entries: Iterator[msgspec.Struct]) -> None:
    comma = b""
    while chunk := list(islice(entries, ENTRIES_PER_WRITE)):
        file.write(comma + msgspec.json.encode(chunk)[1:-1])
        comma = b","


def _clean_images(annotations: Annotations, chosen: np.ndarray) -> Iterator[_CleanImage]:
    for number, index in enumerate(chosen):
        yield _CleanImage(number, annotations.file_name(index), *annotations.sizes[index].tolist())


def _clean_annotations(annotations: Annotations, chosen: np.ndarray) -> Iterator[_CleanAnnotation]:
    image_index = np.repeat(np.arange(len(chosen)), np.diff(annotations.first_box)[chosen])
    for start in range(0, len(image_index), ENTRIES_PER_WRITE):
        chunk = slice(start, start + ENTRIES_PER_WRITE)
        boxes = annotations.boxes[chunk].astype(np.float64)  # left + width in float32 must give right
        boxes[:, 2:] -= boxes[:, :2]
        numbers = np.arange(start + 1, start + 1 + len(boxes))
        columns = (numbers, image_index[chunk], annotations.labels[chunk], boxes, boxes[:, 2] * boxes[:, 3])
        yield from map(_CleanAnnotation, *(column.tolist() for column in columns))
