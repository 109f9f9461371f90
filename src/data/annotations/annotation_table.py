"""The entries of `annotations` as columns: matched to images and categories, clipped, and what is wrong with them.

Shapes: I images, K categories, M entries.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from src.data.annotations.array_builders import Column, Positions, field, first_repeated
from src.data.annotations.coco_errors import describe
from src.data.annotations.coco_json import NO_ATTRIBUTES, AnnotationEntry
from src.data.annotations.image_table import Images
from src.runtime.errors import DataError

BLOCK = 2**16  # rows that are worked on together
FIRST = 5  # how many a message lists
# Boxes given as x1, y1, x2, y2: of COCO's photographs, four fifths reach outside when they are read as x, y, width,
# height, and every one is a box inside the image as it stands.
MANY = 0.25
NEARLY_ALL = 0.95
LEAST_SIDE = 2**-22  # of the image's; less is 0, because float32 fractions would not tell a box's edges apart

# What is known of an entry, a bit each.
HAS_AREA = 1  # its box has an area inside the image
DEGENERATE = 2  # its width or height was not positive
OUTSIDE = 4  # it reached more than a pixel outside
LOOKS_LIKE_XYXY = 8  # it would be a box inside the image if it were given as x1, y1, x2, y2
LOOKS_NORMALISED = 16  # it would be a box inside the image if it were given as fractions of its sides
CROWD = 32
NAMELESS = 64  # it has no id
ROTATED = 128  # CVAT's `attributes.rotation` is not 0


class GroundTruth(NamedTuple):
    """Boxes as they stand in a validation file: those without area or outside their image count in every COCO scorer.

    Shapes: M entries of `annotations` that belong to an image.
    """

    image_index: np.ndarray  # int32 [M] among the file's images
    labels: np.ndarray  # int32 [M]
    boxes: np.ndarray  # float64 [M, 4] x, y, width, height in pixels
    areas: np.ndarray  # float64 [M] the file's `area`, else width x height
    crowd: np.ndarray  # bool [M]


class AnnotationTable:
    """The entries of `annotations` before any is left out, a column a field; `finish` is to be called last."""

    image: np.ndarray  # int32 [M] position among the images; -1 where none has the entry's image_id
    labels: np.ndarray  # int32 [M]
    boxes: np.ndarray  # float32 [M, 4] ltrb, clipped to the image
    areas: np.ndarray  # float64 [M]
    ids: np.ndarray  # int64 [M]
    flags: np.ndarray  # uint8 [M]: SOLID and so on
    count: int  # M
    renumbered: bool  # the file's ids were missing or not unique

    def __init__(self, images: Images, *, for_scoring: bool) -> None:
        """for_scoring: the entries are kept as they stand in the file, too."""
        self._images = images
        self.for_scoring = for_scoring
        self._raw = Column(np.float64, 4), Column(np.float64)
        self._image, self._category_ids, self._ids = Column(np.int32), Column(np.int64), Column(np.int64)
        self._boxes, self._areas, self._flags = Column(np.float32, 4), Column(np.float64), Column(np.uint8)
        self.strange: list[int] = []  # the first image_ids that no image has
        self.num_strange = 0

    def add(self, entries: list[AnnotationEntry]) -> None:
        wanted = field(entries, "image_id", np.int64)
        image = self._images.position(wanted)
        strange = wanted[image < 0]
        self.num_strange += len(strange)
        self.strange += strange[: FIRST + 1 - len(self.strange)].tolist()
        sizes = self._images.sizes[image] if len(self._images.sizes) else np.ones((len(entries), 2), np.int32)
        numbers = chain.from_iterable(map(attrgetter("bbox"), entries))
        raw = np.fromiter(numbers, np.float64, 4 * len(entries)).reshape(-1, 4)  # x, y, width, height
        boxes, areas, flags = _boxes(raw, sizes)
        given = np.fromiter((_number(entry.area) for entry in entries), np.float64, len(entries))
        if self.for_scoring:
            self._raw[0].extend(raw)
            self._raw[1].extend(np.where(np.isnan(given), raw[:, 2] * raw[:, 3], given))
        flags[field(entries, "iscrowd", np.bool_)] |= CROWD
        flags[_rotated(entries)] |= ROTATED
        if {type(entry.id) for entry in entries} == {int}:
            try:
                ids = field(entries, "id", np.int64)
            except OverflowError:
                ids = np.zeros(len(entries), np.int64)
                flags |= NAMELESS
        else:
            ids = np.zeros(len(entries), np.int64)
            flags |= NAMELESS
        self._image.extend(image)
        self._category_ids.extend(field(entries, "category_id", np.int64))
        self._boxes.extend(boxes)
        self._areas.extend(np.where(np.isnan(given), areas, given))
        self._flags.extend(flags)
        self._ids.extend(ids)

    def finish(self, path: Path, category_ids: list[int]) -> None:
        """Makes the arrays.  category_ids: those of the labels 1, 2, ...

        Raises DataError for an entry of a category that is not among them.
        """
        self.image, self.boxes, self.areas = self._image.array(), self._boxes.array(), self._areas.array()
        self.flags, self.ids = self._flags.array(), self._ids.array()
        self.count = len(self.image)
        self.labels = self._labels(path, category_ids)
        del self._category_ids  # before ids are compared, in a copy
        self.renumbered = bool(self.has(NAMELESS).any()) or first_repeated(self.ids) is not None
        if self.renumbered:
            self.ids = np.arange(1, len(self.ids) + 1)
        del self._image, self._boxes, self._areas, self._flags, self._ids

    def ground_truth(self) -> GroundTruth | None:
        """The entries of known images as they stand in the file, after `finish`; None unless they are for scoring."""
        if not self.for_scoring:
            return None
        known = self.image >= 0
        boxes, areas = (column.array()[known] for column in self._raw)
        return GroundTruth(self.image[known], self.labels[known], boxes, areas, self.has(CROWD)[known])

    def raw_areas(self) -> np.ndarray:
        return self._raw[1].array()

    def _labels(self, path: Path, category_ids: list[int]) -> np.ndarray:
        given = self._category_ids.array()
        labels = np.empty(len(given), np.int32)
        position = Positions(np.array(category_ids, np.int64)).of
        for start in range(0, len(given), BLOCK):
            block = given[start : start + BLOCK]
            found = position(block)
            if (found < 0).any():
                first = int(np.argmin(found))
                known = {"id": None if self.has(NAMELESS)[start + first] else int(self.ids[start + first])}
                raise DataError(
                    f"{path}: {describe('annotations', start + first, known)} has category_id {block[first]}, "
                    f"which no entry of `categories` has (it has {listed(category_ids)})"
                )
            labels[start : start + BLOCK] = found + 1
        return labels

    def has(self, flag: int) -> np.ndarray:
        """Which entries this is known of; bool [M]."""
        return (self.flags & flag) != 0


def _number(area: Any) -> float:
    """The area where it is a number, else NaN."""
    return area if type(area) in (float, int) else math.nan


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


def _boxes(raw: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The clipped boxes [M, 4], their areas [M] and flags [M].  raw [M, 4] x, y, width, height; sizes [M, 2]."""
    given, count = raw.T.copy(), len(raw)
    boxes = np.empty((count, 4), np.float32)
    areas = np.ones(count)
    flat, outside = np.zeros((2, count), np.bool_)
    solid, corners, fractions = np.ones((3, count), np.bool_)
    with np.errstate(over="ignore"):
        for axis in (0, 1):  # one after the other, as NumPy is slow on rows of two
            limit = sizes[:, axis].astype(np.float64)
            low, side = given[axis], given[axis + 2]
            high = low + side
            boxes[:, axis] = low.clip(0, limit)
            boxes[:, axis + 2] = high.clip(0, limit)
            areas *= side.clip(0, limit)
            solid &= boxes[:, axis + 2] - boxes[:, axis] >= LEAST_SIDE * limit
            flat |= side < LEAST_SIDE * limit
            outside |= (low < -1) | (high > limit + 1)
            corners &= (low < side) & (low >= -1) & (side <= limit + 1)
            fractions &= (low >= 0) & (high <= 1.01)
    flags = np.zeros(count, np.uint8)
    for flag, which in zip(
        (HAS_AREA, DEGENERATE, OUTSIDE, LOOKS_LIKE_XYXY, LOOKS_NORMALISED),
        (solid, flat, outside, corners, fractions),
        strict=True,
    ):
        flags[which] |= flag
    return boxes, areas, flags


def warnings_of(rows: AnnotationTable, usable: np.ndarray) -> Iterator[str]:
    """A line for each kind of fault that was mended, and for boxes that are probably given in another form."""
    known = rows.image >= 0
    flat, outside = rows.has(DEGENERATE), rows.has(OUTSIDE)
    if rows.num_strange:
        strange = f"{rows.num_strange} of {len(known)} annotations left out"
        yield f"{strange}: no image has their image_id ({listed(rows.strange)})"
    missed, verb, clipped = np.zeros(len(known), np.bool_), "trained", "clipped"
    if rows.for_scoring:  # COCO's scorer ignores crowds and negative areas
        missed, verb, clipped = ~rows.has(CROWD) & (rows.raw_areas() >= 0), "scored", "scored as they stand"
    flat_kind = "the width or height of their `bbox` is not positive"
    outside_kind = "their `bbox` is outside the image"
    kinds = (
        (known & flat & missed, f"count as missed in the scoring: {flat_kind}"),
        (known & flat & ~missed, f"left out: {flat_kind}"),
        (known & ~flat & ~usable & missed, f"count as missed in the scoring: {outside_kind}"),
        (known & ~flat & ~usable & ~missed, f"left out: {outside_kind}"),
        (usable & rows.has(ROTATED), f"{verb} upright: their `attributes.rotation` is not 0, which boxes cannot have"),
        (usable & outside, f"{clipped}: their `bbox` reaches more than a pixel outside the image"),
    )
    for which, what in kinds:
        if which.any():
            yield f"{which.sum()} of {len(which)} annotations {what} (annotation ids {listed(rows.ids[which])})"
    if (outside & known).sum() > MANY * known.sum() and rows.has(LOOKS_LIKE_XYXY)[known].mean() > NEARLY_ALL:
        yield "most `bbox` look like x1, y1, x2, y2: they must be x, y, width, height"
    if known.any() and rows.has(LOOKS_NORMALISED)[known].mean() > NEARLY_ALL:
        yield "most `bbox` look like fractions of the image: they must be in pixels"
    if rows.renumbered:
        yield "some annotations have no id of their own: all are numbered from 1 in the file's order"


def listed(values: Sequence) -> str:
    """The first few of the values."""
    return ", ".join(map(str, values[:FIRST])) + (", ..." if len(values) > FIRST else "")
