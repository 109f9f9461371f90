"""The entries of `annotations` as arrays: matched to images and categories, clipped, without those of no use.

Shapes: I images, K categories, M entries of the file, B entries with a box in a known image.
"""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from pathlib import Path
from types import NoneType
from typing import NamedTuple

import msgspec
import numpy as np

from src.data.annotations.annotation_warnings import MAX_KEPT_IDS, AnnotationWarnings, join_first
from src.data.annotations.array_builders import Column, IndexLookup, field_array, first_repeated
from src.data.annotations.clip_boxes import clip_boxes
from src.data.annotations.coco_entries import NO_ATTRIBUTES, AnnotationEntry
from src.data.annotations.coco_errors import describe
from src.data.annotations.image_table import ImageTable
from src.runtime.errors import DataError

BLOCK = 2**16  # rows that are worked on at once, so that intermediate arrays stay small


class GroundTruth(NamedTuple):
    """Boxes as the validation file has them: every COCO scorer counts those without area or outside their image.

    Shapes: G entries of `annotations` that belong to an image.
    """

    image_index: np.ndarray  # int32 [G] among the file's images
    labels: np.ndarray  # int32 [G]
    boxes: np.ndarray  # float64 [G, 4] x, y, width, height in pixels
    areas: np.ndarray  # float64 [G] the file's `area`, else width x height
    crowd: np.ndarray  # bool [G]


@dataclass(frozen=True, eq=False)
class AnnotationTable:
    """The usable annotations of a file, in its order."""

    image_index: np.ndarray  # int32 [B] among the file's images
    labels: np.ndarray  # int32 [B] in 1..K
    boxes: np.ndarray  # float32 [B, 4] ltrb in pixels, inside the image, of positive area
    crowd: np.ndarray  # bool [B]
    count: int  # entries of the file, usable or not
    unknown_image_ids: Sequence[int]  # the first ones
    num_unknown: int  # entries whose image_id no image has
    warnings: tuple[str, ...]
    ground_truth: GroundTruth | None  # None unless the file is read for scoring


class AnnotationTableBuilder:
    """Collects the entries of `annotations`, a chunk at a time, and leaves out those of no use."""

    def __init__(self, images: ImageTable, *, for_scoring: bool) -> None:
        """for_scoring: also keep the entries as the file has them."""
        self._images = images
        self._find_image = IndexLookup(images.ids).find
        self._for_scoring = for_scoring
        self._image_index, self._boxes, self._crowd = Column(np.int32), Column(np.float32, 4), Column(np.bool_)
        self._usable = Column(np.bool_)
        self._ids, self._category_ids = Column(np.int64), Column(np.int64)
        self._all_have_ids = True
        self._has_image = Column(np.bool_)
        self._truth_image_index, self._truth_boxes = Column(np.int32), Column(np.float64, 4)
        self._truth_areas, self._truth_crowd = Column(np.float64), Column(np.bool_)
        self._unknown_image_ids: list[int] = []
        self._warnings = AnnotationWarnings(for_scoring=for_scoring)

    def add(self, entries: list[AnnotationEntry]) -> None:
        image_ids = field_array(entries, "image_id", np.int64)
        image_index = self._find_image(image_ids)  # -1: no image has the id
        has_image = image_index >= 0
        self._unknown_image_ids += image_ids[~has_image][: MAX_KEPT_IDS - len(self._unknown_image_ids)].tolist()
        sizes = self._images.sizes[image_index] if len(self._images.sizes) else np.ones((len(entries), 2), np.int32)
        numbers = chain.from_iterable(map(attrgetter("bbox"), entries))
        file_boxes = np.fromiter(numbers, np.float64, 4 * len(entries)).reshape(-1, 4)  # x, y, width, height
        clipped = clip_boxes(file_boxes, sizes)
        crowd = field_array(entries, "iscrowd", np.bool_)
        counts_in_scoring = np.zeros(len(entries), np.bool_)
        if self._for_scoring:
            areas = _areas(entries)
            areas = np.where(np.isnan(areas), file_boxes[:, 2] * file_boxes[:, 3], areas)
            counts_in_scoring = ~crowd & (areas >= 0)  # COCO's scorer ignores crowds and negative areas
            self._has_image.extend(has_image)
            self._truth_image_index.extend(image_index[has_image])
            self._truth_boxes.extend(file_boxes[has_image])
            self._truth_areas.extend(areas[has_image])
            self._truth_crowd.extend(crowd[has_image])
        ids = _ids(entries)
        if ids is None:
            self._all_have_ids = False
            ids = np.zeros(len(entries), np.int64)
        self._warnings.add(
            clipped, ids, has_image=has_image, counts_in_scoring=counts_in_scoring, is_rotated=_find_rotated(entries)
        )
        usable = has_image & clipped.has_area
        self._usable.extend(usable)
        self._ids.extend(ids)
        self._category_ids.extend(field_array(entries, "category_id", np.int64))
        self._image_index.extend(image_index[usable])
        self._boxes.extend(clipped.boxes[usable])
        self._crowd.extend(crowd[usable])

    def build(self, path: Path, category_ids: list[int]) -> AnnotationTable:
        """The table.  Raises DataError if an entry has a category id that is not in `category_ids`.

        category_ids: the ids of the labels 1 to K, in this order.
        """
        labels = self._labels(path, category_ids)
        unique_ids = self._all_have_ids and first_repeated(self._ids.array()) is None
        return AnnotationTable(
            image_index=self._image_index.array(),
            labels=labels[self._usable.array()],
            boxes=self._boxes.array(),
            crowd=self._crowd.array(),
            count=len(labels),
            unknown_image_ids=self._unknown_image_ids,
            num_unknown=self._warnings.num_unknown,
            warnings=tuple(self._warnings.lines(self._unknown_image_ids, unique_ids=unique_ids)),
            ground_truth=self._ground_truth(labels) if self._for_scoring else None,
        )

    def _ground_truth(self, labels: np.ndarray) -> GroundTruth:
        return GroundTruth(
            image_index=self._truth_image_index.array(),
            labels=labels[self._has_image.array()],
            boxes=self._truth_boxes.array(),
            areas=self._truth_areas.array(),
            crowd=self._truth_crowd.array(),
        )

    def _labels(self, path: Path, category_ids: list[int]) -> np.ndarray:
        """int32 [M]."""
        ids_in_file = self._category_ids.array()
        labels = np.empty(len(ids_in_file), np.int32)
        find_category = IndexLookup(np.array(category_ids, np.int64)).find
        for start in range(0, len(ids_in_file), BLOCK):
            block = ids_in_file[start : start + BLOCK]
            found = find_category(block)
            if (found < 0).any():
                first = int(np.argmin(found))
                entry = {"id": int(self._ids.array()[start + first])} if self._all_have_ids else {}
                raise DataError(
                    f"{path}: {describe('annotations', start + first, entry)} has category_id {block[first]}, "
                    f"which is not in `categories` (ids there: {join_first(category_ids)})"
                )
            labels[start : start + BLOCK] = found + 1
        return labels


def _areas(entries: list[AnnotationEntry]) -> np.ndarray:
    """float64 [M] `area`; NaN where it is no number."""
    if {type(entry.area) for entry in entries} <= {float, int, NoneType}:
        return field_array(entries, "area", np.float64)
    numbers = (entry.area if type(entry.area) in (float, int) else math.nan for entry in entries)
    return np.fromiter(numbers, np.float64, len(entries))


def _ids(entries: list[AnnotationEntry]) -> np.ndarray | None:
    """int64 [M] `id`; None if any entry lacks an id that fits int64."""
    if {type(entry.id) for entry in entries} <= {int}:
        with suppress(OverflowError):
            return field_array(entries, "id", np.int64)
    return None


class _Attributes(msgspec.Struct):
    rotation: float = 0.0  # degrees


def _find_rotated(entries: list[AnnotationEntry]) -> np.ndarray:
    """bool [M]: CVAT's attributes say that the box is rotated."""
    is_rotated = np.zeros(len(entries), np.bool_)
    attributes = list(map(attrgetter("attributes"), entries))
    # count() is the quickest way to see that no entry has attributes, as in COCO's files.
    if attributes.count(NO_ATTRIBUTES) < len(attributes):
        for index, text in enumerate(attributes):
            with suppress(msgspec.MsgspecError):  # no attributes, or another program's
                is_rotated[index] = msgspec.json.decode(text, type=_Attributes).rotation != 0
    return is_rotated
