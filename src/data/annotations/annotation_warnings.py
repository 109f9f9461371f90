"""Warnings about annotations: what reading leaves out or changes, and boxes that are probably in another format.

Shapes: M annotations of a chunk.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from src.data.annotations.clip_boxes import ClippedBoxes

LISTED = 5  # values that a message lists
MAX_KEPT_IDS = LISTED + 1  # one more, from which `join_first` sees that there are more
# COCO's boxes given as x1, y1, x2, y2: read as x, y, width, height, four fifths of them reach outside their image.
MANY_OUTSIDE = 0.25
NEARLY_ALL = 0.95
DEGENERATE = "the width or height of their `bbox` is not positive"
OUTSIDE = "their `bbox` is outside the image"
MISSED = "count as missed in the scoring"


def join_first(values: Sequence) -> str:
    """The first few values as text."""
    return ", ".join(map(str, values[:LISTED])) + (", ..." if len(values) > LISTED else "")


class _Kind:
    """How many annotations a warning is about, and the first of them."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.count = 0
        self.ids: list[int] = []
        self.indices: list[int] = []

    def add(self, which: np.ndarray, ids: np.ndarray, first_index: int) -> None:
        found = np.flatnonzero(which)
        self.count += len(found)
        kept = found[: MAX_KEPT_IDS - len(self.ids)]
        self.ids += ids[kept].tolist()
        self.indices += (first_index + kept).tolist()


class AnnotationWarnings:
    """Collects what is unusual about annotations, a chunk at a time."""

    def __init__(self, *, for_scoring: bool) -> None:
        used, changed = ("scored", "scored as they stand") if for_scoring else ("trained", "clipped")
        self._degenerate, self._missed_degenerate = _Kind(f"left out: {DEGENERATE}"), _Kind(f"{MISSED}: {DEGENERATE}")
        self._outside, self._missed_outside = _Kind(f"left out: {OUTSIDE}"), _Kind(f"{MISSED}: {OUTSIDE}")
        self._rotated = _Kind(f"{used} upright: their `attributes.rotation` is not 0, which boxes cannot have")
        self._clipped = _Kind(f"{changed}: their `bbox` reaches more than a pixel outside the image")
        self._count = self._num_with_image = self._num_outside = self._look_like_xyxy = self._look_normalised = 0

    def add(
        self,
        clipped: ClippedBoxes,
        ids: np.ndarray,
        *,
        has_image: np.ndarray,
        counts_in_scoring: np.ndarray,
        is_rotated: np.ndarray,
    ) -> None:
        """Adds a chunk.

        ids: int64 [M]; has_image (the annotation's image exists), counts_in_scoring, is_rotated: bool [M].
        """
        usable = has_image & clipped.has_area
        degenerate = has_image & clipped.degenerate
        without_area = has_image & ~clipped.degenerate & ~clipped.has_area
        for kind, which in (
            (self._missed_degenerate, degenerate & counts_in_scoring),
            (self._degenerate, degenerate & ~counts_in_scoring),
            (self._missed_outside, without_area & counts_in_scoring),
            (self._outside, without_area & ~counts_in_scoring),
            (self._rotated, usable & is_rotated),
            (self._clipped, usable & clipped.outside),
        ):
            kind.add(which, ids, self._count)
        self._count += len(ids)
        self._num_with_image += int(has_image.sum())
        self._num_outside += int((has_image & clipped.outside).sum())
        self._look_like_xyxy += int((has_image & clipped.looks_like_xyxy).sum())
        self._look_normalised += int((has_image & clipped.looks_normalised).sum())

    @property
    def num_unknown(self) -> int:
        """Annotations whose image_id no image has."""
        return self._count - self._num_with_image

    def lines(self, unknown_image_ids: Sequence[int], *, unique_ids: bool) -> Iterator[str]:
        """The warnings, one line for each kind.

        unique_ids: whether the annotations have ids that differ; otherwise the lines number them from 1.
        """
        if self.num_unknown:
            unknown = f"{self.num_unknown} of {self._count} annotations left out"
            yield f"{unknown}: no image has their image_id ({join_first(unknown_image_ids)})"
        for kind in (
            self._missed_degenerate, self._degenerate, self._missed_outside, self._outside, self._rotated,
            self._clipped,
        ):  # fmt: skip
            if kind.count:
                ids = kind.ids if unique_ids else [index + 1 for index in kind.indices]
                yield f"{kind.count} of {self._count} annotations {kind.text} (annotation ids {join_first(ids)})"
        nearly_all = NEARLY_ALL * self._num_with_image
        if self._num_outside > MANY_OUTSIDE * self._num_with_image and self._look_like_xyxy > nearly_all:
            yield "most `bbox` look like x1, y1, x2, y2: they must be x, y, width, height"
        if self._look_normalised > nearly_all:
            yield "most `bbox` look like fractions of the image: they must be in pixels"
        if not unique_ids:
            yield "some annotations have no id of their own: all are numbered from 1 in the file's order"
