"""The entries of `annotations` as columns: matched to images and categories, clipped, and what is wrong with them.

Shapes: I images, K categories, M entries.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from src.errors import DataError

from .coco_file import NO_ATTRIBUTES, AnnotationEntry, Box, describe

FIRST = 5  # how many a message lists
LARGEST_TABLE = 2**21  # entries; ids that span more are searched for, six times as slowly
# Boxes given as x1, y1, x2, y2: of COCO's photographs, four fifths reach outside when they are read as x, y, width,
# height, and every one is a box inside the image as it stands.
MANY = 0.25
NEARLY_ALL = 0.95
LEAST_SIDE = 2**-22  # of the image's; less is 0, because float32 fractions would not tell a box's edges apart


class Rows(NamedTuple):
    """The entries of `annotations` before any is left out, a column a field."""

    image: np.ndarray  # int64 [M] position among the images; -1 where none has the entry's image_id
    strange: np.ndarray  # int64: those image_ids
    labels: np.ndarray  # int64 [M]
    boxes: np.ndarray  # float32 [M, 4] ltrb, clipped to the image
    solid: np.ndarray  # bool [M]: has an area inside the image
    flat: np.ndarray  # bool [M]: the width or height was not positive
    outside: np.ndarray  # bool [M]: reached more than a pixel outside
    corners: np.ndarray  # bool [M]: would be a box inside the image if it were given as x1, y1, x2, y2
    fractions: np.ndarray  # bool [M]: would be a box inside the image if it were given as fractions of its sides
    areas: np.ndarray  # float64 [M]
    crowd: np.ndarray  # bool [M]
    rotated: np.ndarray  # bool [M]: CVAT's `attributes.rotation` is not 0
    ids: np.ndarray  # int64 [M]
    renumbered: bool  # the file's ids were missing or not unique


def read_rows(
    path: Path, entries: list[AnnotationEntry], *, image_ids: np.ndarray, sizes: np.ndarray, category_ids: list[int]
) -> Rows:
    """image_ids [I]; sizes [I, 2] width, height; category_ids: those of the labels 1, 2, ...

    Raises DataError for an entry of a category that is not among them.
    """
    wanted = _column(entries, "image_id", np.int64)
    image = _positions(wanted, image_ids)
    labels = 1 + _positions(_column(entries, "category_id", np.int64), np.array(category_ids))
    if not labels.all():
        first = int(np.argmin(labels != 0))
        raise DataError(
            f"{path}: {describe('annotations', first, {'id': entries[first].id})} has category_id "
            f"{entries[first].category_id}, which no entry of `categories` has (it has {listed(category_ids)})"
        )
    boxes, areas, solid, flat, outside, corners, fractions = _boxes(entries, sizes[image])
    given = _column(entries, "area", np.float64)  # NaN where there is none
    ids, renumbered = _annotation_ids(entries)
    return Rows(
        image=image,
        strange=wanted[image < 0],
        labels=labels,
        boxes=boxes,
        solid=solid,
        flat=flat,
        outside=outside,
        corners=corners,
        fractions=fractions,
        areas=np.where(np.isnan(given), areas, given),
        crowd=_column(entries, "iscrowd", np.bool_),
        rotated=_rotated(entries),
        ids=ids,
        renumbered=renumbered,
    )


def _column(entries: Sequence[AnnotationEntry | Box], field: str, dtype: type) -> np.ndarray:
    """One field of all entries; None becomes NaN or False."""
    return np.fromiter(map(attrgetter(field), entries), dtype, len(entries))


class _Attributes(msgspec.Struct):
    rotation: float = 0.0  # degrees


def _rotated(entries: list[AnnotationEntry]) -> np.ndarray:
    """Whether CVAT says of each entry's box that it is to be turned; bool [M]."""
    rotated = np.zeros(len(entries), np.bool_)
    given = list(map(attrgetter("attributes"), entries))
    if given.count(NO_ATTRIBUTES) < len(given):  # the quickest way to see that COCO has none
        for index, attributes in enumerate(given):
            with suppress(msgspec.MsgspecError):  # none, or another program's
                rotated[index] = msgspec.json.decode(attributes, type=_Attributes).rotation != 0
    return rotated


def _annotation_ids(entries: list[AnnotationEntry]) -> tuple[np.ndarray, bool]:
    """Their ids, or 1, 2, ... and True where one is missing or not unique."""
    numbers = np.arange(1, len(entries) + 1)
    try:
        ids = _column(entries, "id", np.int64)
    except TypeError:  # None
        return numbers, True
    in_order = np.sort(ids)
    repeated = (in_order[1:] == in_order[:-1]).any()
    return (numbers, True) if repeated else (ids, False)


def _positions(values: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Where each value stands in `among`, whose values differ; -1 where it does not."""
    least, greatest = int(among.min()), int(among.max())
    if greatest - least < LARGEST_TABLE:
        table = np.full(greatest - least + 2, -1)
        table[among - least] = np.arange(len(among))
        return table[np.where((values >= least) & (values <= greatest), values - least, -1)]
    order = np.argsort(among)
    nearest = order[np.searchsorted(among, values, sorter=order).clip(max=len(among) - 1)]
    return np.where(among[nearest] == values, nearest, -1)


def _boxes(entries: list[AnnotationEntry], sizes: np.ndarray) -> tuple[np.ndarray, ...]:
    """The clipped boxes [M, 4], areas [M], and Rows' columns from `solid` to `fractions`; sizes [M, 2].

    An axis at a time, because whole arrays of a million boxes would stay behind as holes in the heap.
    """
    given = [entry.bbox for entry in entries]
    boxes = np.empty((len(entries), 4), np.float32)
    areas = np.ones(len(entries))
    flat, outside = np.zeros((2, len(entries)), np.bool_)
    solid, corners, fractions = np.ones((3, len(entries)), np.bool_)
    with np.errstate(over="ignore"):
        for axis, (start, extent) in enumerate((("x", "width"), ("y", "height"))):
            limit = sizes[:, axis].astype(np.float64)
            low, side = _column(given, start, np.float64), _column(given, extent, np.float64)
            boxes[:, axis] = low.clip(0, limit)
            boxes[:, axis + 2] = (low + side).clip(0, limit)
            areas *= side.clip(0, limit)
            solid &= boxes[:, axis + 2] - boxes[:, axis] >= LEAST_SIDE * limit
            flat |= side < LEAST_SIDE * limit
            outside |= (low < -1) | (low + side > limit + 1)
            corners &= (low < side) & (low >= -1) & (side <= limit + 1)
            fractions &= (low >= 0) & (low + side <= 1.01)
    return boxes, areas, solid, flat, outside, corners, fractions


def warnings_of(rows: Rows, usable: np.ndarray) -> Iterator[str]:
    """A line for each kind of fault that was mended, and for boxes that are probably given in another form."""
    known = rows.image >= 0
    if len(rows.strange):
        strange = f"{len(rows.strange)} of {len(known)} annotations left out"
        yield f"{strange}: no image has their image_id ({listed(rows.strange.tolist())})"
    kinds = (
        (known & rows.flat, "left out: the width or height of their `bbox` is not positive"),
        (known & ~rows.flat & ~usable, "left out: their `bbox` is outside the image"),
        (usable & rows.rotated, "trained upright: their `attributes.rotation` is not 0, which boxes cannot have"),
        (usable & rows.outside, "clipped: their `bbox` reaches more than a pixel outside the image"),
    )
    for which, what in kinds:
        if which.any():
            yield f"{which.sum()} of {len(which)} annotations {what} (annotation ids {listed(rows.ids[which])})"
    if (rows.outside & known).sum() > MANY * known.sum() and rows.corners[known].mean() > NEARLY_ALL:
        yield "most `bbox` look like x1, y1, x2, y2: they must be x, y, width, height"
    if known.any() and rows.fractions[known].mean() > NEARLY_ALL:
        yield "most `bbox` look like fractions of the image: they must be in pixels"
    if rows.renumbered:
        yield "some annotations have no id of their own: all are numbered from 1 in the file's order"


def listed(values: Sequence) -> str:
    """The first few of the values."""
    return ", ".join(map(str, values[:FIRST])) + (", ..." if len(values) > FIRST else "")
