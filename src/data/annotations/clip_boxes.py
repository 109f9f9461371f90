"""Boxes clipped to their images, and what is unusual about them.

Shapes: M boxes.
"""

from typing import NamedTuple

import numpy as np

LEAST_SIDE = 2**-22  # of the image's side; float32 fractions cannot tell the edges of a smaller box apart


class ClippedBoxes(NamedTuple):
    """Boxes after clipping; the flags are of the boxes as given."""

    boxes: np.ndarray  # float32 [M, 4] ltrb in pixels, inside the image
    has_area: np.ndarray  # bool [M]: it has an area inside the image
    degenerate: np.ndarray  # bool [M]: its width or height is not positive
    outside: np.ndarray  # bool [M]: it reaches more than a pixel outside the image
    looks_like_xyxy: np.ndarray  # bool [M]: read as x1, y1, x2, y2 it is a box inside the image
    looks_normalised: np.ndarray  # bool [M]: read as fractions of the image's sides it is a box inside the image


def clip_boxes(given: np.ndarray, sizes: np.ndarray) -> ClippedBoxes:
    """Clips boxes to their images.  given: float64 [M, 4] x, y, width, height in pixels; sizes [M, 2] width, height."""
    columns, count = given.T.copy(), len(given)
    boxes = np.empty((count, 4), np.float32)
    degenerate, outside = np.zeros((2, count), np.bool_)
    has_area, looks_like_xyxy, looks_normalised = np.ones((3, count), np.bool_)
    with np.errstate(over="ignore"):
        for axis in (0, 1):  # an axis at a time, as NumPy is slow on rows of two
            limit = sizes[:, axis].astype(np.float64)
            low, side = columns[axis], columns[axis + 2]
            high = low + side
            boxes[:, axis] = low.clip(0, limit)
            boxes[:, axis + 2] = high.clip(0, limit)
            has_area &= boxes[:, axis + 2] - boxes[:, axis] >= LEAST_SIDE * limit
            degenerate |= side < LEAST_SIDE * limit
            outside |= (low < -1) | (high > limit + 1)
            looks_like_xyxy &= (low < side) & (low >= -1) & (side <= limit + 1)
            looks_normalised &= (low >= 0) & (high <= 1.01)
    return ClippedBoxes(boxes, has_area, degenerate, outside, looks_like_xyxy, looks_normalised)
