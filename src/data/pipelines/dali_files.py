"""The cleaned annotations as DALI's reader takes them: files of plain numbers, or a COCO file where those cannot do.

Shapes: I images, B boxes.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np

from src.data.annotations.coco import Annotations

BLOCK = 2**16  # entries that are written together
WHITE_SPACE = np.frombuffer(b" \t\n\v\f\r", np.uint8)  # ends a name in `filenames.dat`


def write_reader_files(annotations: Annotations, order: np.ndarray, folder: Path) -> bool:
    """Writes what the reader's `preprocessed_annotations` takes, the images in the given order; whether it can be done.

    order: indices of images that have boxes, perhaps repeated.  An image's id is its position in `with_boxes()`.
    The files are those that the reader's `save_preprocessed_annotations` writes for ltrb and ratio.
    """
    if np.isin(annotations.names, WHITE_SPACE).any():
        return False
    counts = np.diff(annotations.first_box)[order]
    offsets = np.cumsum(counts) - counts
    chosen = np.repeat(annotations.first_box[order] - offsets, counts)  # the boxes, an image after another
    chosen += np.arange(len(chosen))
    with (folder / "filenames.dat").open("wb") as file:
        for start in range(0, len(order), BLOCK):
            file.write(annotations.packed_names(order[start : start + BLOCK], b"\n"))
    ids = np.searchsorted(annotations.with_boxes(), order)
    for name, values in (("offsets", offsets), ("counts", counts), ("original_ids", ids)):
        _write(folder / f"{name}.dat", values, np.int32)
    _write(folder / "labels.dat", annotations.labels[chosen], np.int32)
    _write(folder / "boxes.dat", _fractions(annotations, np.repeat(order, counts), chosen), np.float32)
    return True


def _fractions(annotations: Annotations, image_index: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The chosen boxes as fractions of their images; float32 [B, 4] ltrb.

    From a COCO file the reader computes right and bottom as left + width and top + height, in float32.  So do these
    files: of coco128's 939 boxes, 14 would differ in their last bit otherwise.
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
    iscrowd: int = 0  # crowds are trained as ordinary boxes


def write_clean_file(annotations: Annotations, path: Path | str) -> None:
    """Writes a COCO file of the images that have boxes, for a parser that need not cope with anything.

    An image's id is its position in `with_boxes()`, a category's the label.
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
    while block := list(islice(entries, BLOCK)):
        file.write(comma + msgspec.json.encode(block)[1:-1])
        comma = b","


def _clean_images(annotations: Annotations, chosen: np.ndarray) -> Iterator[_CleanImage]:
    for number, index in enumerate(chosen):
        yield _CleanImage(number, annotations.file_name(index), *annotations.sizes[index].tolist())


def _clean_annotations(annotations: Annotations, chosen: np.ndarray) -> Iterator[_CleanAnnotation]:
    owners = np.repeat(np.arange(len(chosen)), np.diff(annotations.first_box)[chosen])
    for start in range(0, len(owners), BLOCK):
        block = slice(start, start + BLOCK)
        boxes = annotations.boxes[block].astype(np.float64)  # so that left + width is right again in float32
        boxes[:, 2:] -= boxes[:, :2]
        numbers = np.arange(start + 1, start + 1 + len(boxes))
        columns = (numbers, owners[block], annotations.labels[block], boxes, boxes[:, 2] * boxes[:, 3])
        yield from map(_CleanAnnotation, *(column.tolist() for column in columns))
