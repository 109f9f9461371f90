"""Detections in COCO's results format: as arrays, and as the JSON file that every COCO scorer reads.

Shapes: D detections.
"""

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import ArrayLike

from src.data.annotations.coco import Annotations
from src.runtime.output_files import atomic_write

DECIMALS = 3  # of boxes in pixels; they are rounded before scoring, so that files and scores agree
ROWS_PER_WRITE = 50_000


class Results(NamedTuple):
    """Detections of any number of images."""

    image_ids: np.ndarray  # int64 [D] of the annotation file
    category_ids: np.ndarray  # int64 [D] of the annotation file
    boxes: np.ndarray  # float64 [D, 4] left, top, width, height in pixels of the original image
    scores: np.ndarray  # float64 [D] in 0..1


def join_results(parts: Iterable[Results], annotations: Annotations) -> Results:
    """All parts concatenated, in the order of the annotation file's images."""
    empty = Results(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0))
    joined = Results(*(np.concatenate(columns) for columns in zip(empty, *parts, strict=True)))
    order = np.argsort(index_of(joined.image_ids, annotations.image_ids), kind="stable")
    return Results(*(column[order] for column in joined))


def index_of(values: ArrayLike, among: ArrayLike) -> np.ndarray:
    """The index of each value in `among`, int64 [D]; -1: missing.  The values of `among` must be unique."""
    values, among = np.asarray(values, np.int64), np.asarray(among, np.int64)
    order = np.argsort(among)
    nearest = order[np.searchsorted(among, values, sorter=order).clip(max=len(among) - 1)]
    return np.where(among[nearest] == values, nearest, -1)


def scale_boxes(boxes: np.ndarray, scale: ArrayLike) -> np.ndarray:
    """Boxes [D, 4] with coordinates x, y, x, y times `scale`, [D, 2] or [2]: a picture's size, for example; float64."""
    return boxes.astype(np.float64) * np.tile(scale, 2)


class _Result(msgspec.Struct):
    image_id: int
    category_id: int
    bbox: list[float]
    score: float


def write_results(path: Path, results: Results) -> None:
    """Writes the results as a JSON list.  Raises UserError."""
    write_json_list(path, _chunks(results))


def _chunks(results: Results) -> Iterator[list[_Result]]:
    for start in range(0, len(results.scores), ROWS_PER_WRITE):
        columns = (column[start : start + ROWS_PER_WRITE].tolist() for column in results)
        yield [_Result(*row) for row in zip(*columns, strict=True)]


def write_json_list(path: Path, chunks: Iterable[Sequence[msgspec.Struct]]) -> None:
    """Writes a JSON list with one object a line, in place of an older file.  Raises UserError."""
    encoder = msgspec.json.Encoder()
    with atomic_write(path) as file, garbage_collector_paused():
        before = b"["
        for chunk in chunks:
            file.write(before + encoder.encode_lines(chunk).rstrip().replace(b"\n", b",\n"))
            before = b",\n"
        file.write(b"[]" if before == b"[" else b"]")


@contextmanager
def garbage_collector_paused() -> Iterator[None]:
    """Inside, Python collects no garbage: searching millions of new objects again and again takes long."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
