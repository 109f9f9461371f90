"""SSD's augmentation: the constants of both pipelines, and the random choices of the one without DALI.

Boxes are NumPy arrays: an image has few, for which calling torch or torchvision costs more than the arithmetic.
Sources: Liu et al. 2016, section 2.2 (the crop); DALI's `hsv` and `brightness_contrast` (the colours).
"""

import math

import numpy as np
from torch import Tensor

NO_CROP = None
# One is chosen with equal probability: no crop, or a window whose IoU with every box exceeds the number.
CROP_MIN_IOU = (NO_CROP, 0.1, 0.3, 0.5, 0.7, 0.9, -math.inf)
CROP_SIDE = (0.3, 1.0)  # a window's width and height, as fractions of the image's
CROP_ASPECT = (0.5, 2.0)  # the ratio of those fractions
FLIP_PROBABILITY = 0.5
BRIGHTNESS = (0.875, 1.125)  # factor
CONTRAST = (0.5, 1.5)  # factor, about CONTRAST_CENTRE
CONTRAST_CENTRE = 128.0  # of 0..255
SATURATION = (0.5, 1.5)  # factor
HUE = (-18.0, 18.0)  # degrees
COLOUR = (BRIGHTNESS, CONTRAST, SATURATION, HUE)  # ranges of `colour_matrix`'s arguments, each drawn uniformly
NO_COLOUR = np.eye(3, 4, dtype=np.float32)  # the matrix that changes nothing

RGB_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
YIQ_TO_RGB = np.array([[1.0, 0.956, 0.621], [1.0, -0.272, -0.647], [1.0, -1.107, 1.705]])


def colour_matrix(
    brightness: float | np.ndarray,
    contrast: float | np.ndarray,
    saturation: float | np.ndarray,
    hue: float | np.ndarray,
) -> np.ndarray:
    """The change of colours as one affine map of RGB in 0..255: [3, 4] float32, whose last column is added.

    Hue (degrees) and saturation (factor) act in YIQ, then brightness x (contrast x (v - 128) + 128).  For arguments of
    shape [N] the result is [N, 3, 4].
    """
    angle = np.radians(hue, dtype=np.float64)
    cosine, sine = saturation * np.cos(angle), saturation * np.sin(angle)
    rotation = np.zeros((*angle.shape, 3, 3))
    rotation[..., 0, 0] = 1
    rotation[..., 1, 1] = rotation[..., 2, 2] = cosine
    rotation[..., 1, 2], rotation[..., 2, 1] = sine, -sine
    result = np.empty((*angle.shape, 3, 4), np.float32)
    result[..., :3] = np.asarray(brightness * contrast)[..., None, None] * (YIQ_TO_RGB @ rotation @ RGB_TO_YIQ)
    result[..., 3] = np.asarray(brightness * CONTRAST_CENTRE * (1 - contrast))[..., None]
    return result


def random_colour_matrix(random: np.random.Generator) -> np.ndarray:
    """`colour_matrix` of random parameters; [3, 4]."""
    return colour_matrix(*(random.uniform(*limits) for limits in COLOUR))


def random_crop(
    image: Tensor, boxes: np.ndarray, labels: np.ndarray, random: np.random.Generator
) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """The image, boxes and labels cropped to a random window, or unchanged; boxes whose centre is outside are dropped.

    image [3, H, W]; boxes [G, 4] ltrb in pixels, labels [G], G at least 1; at least one box remains.
    """
    height, width = image.shape[1:]
    window, kept = draw_window(boxes, width, height, random)
    if window is None:
        return image, boxes, labels
    left, top, right, bottom = window
    corner, far_corner = np.array([left, top], np.float32), np.array([right, bottom], np.float32)
    corners = boxes[kept].reshape(-1, 2, 2).clip(corner, far_corner) - corner
    return image[:, top:bottom, left:right], corners.reshape(-1, 4), labels[kept]


def draw_window(
    boxes: np.ndarray, width: int, height: int, random: np.random.Generator
) -> tuple[tuple[int, int, int, int] | None, np.ndarray | None]:
    """A random window (left, top, right, bottom) in pixels and which boxes it keeps, [G] bool; (None, None): no crop.

    boxes [G, 4] ltrb in pixels.  Chooses a condition and draws one window; repeats both until the window satisfies it.
    """
    left, top, right, bottom = (boxes / (width, height, width, height)).T  # [G] each
    area = (right - left) * (bottom - top)
    centres = (boxes[:, :2].astype(np.float64) + boxes[:, 2:]) / 2  # in pixels
    while True:
        min_iou = CROP_MIN_IOU[random.integers(len(CROP_MIN_IOU))]
        if min_iou is NO_CROP:
            return None, None
        sides = random.uniform(*CROP_SIDE), random.uniform(*CROP_SIDE)
        if not CROP_ASPECT[0] <= sides[0] / sides[1] <= CROP_ASPECT[1]:
            continue
        x, y = random.uniform(0, 1 - sides[0]), random.uniform(0, 1 - sides[1])
        far_x, far_y = x + sides[0], y + sides[1]
        if min_iou >= 0:
            overlap_width = np.minimum(right, far_x) - np.maximum(left, x)
            overlap_height = np.minimum(bottom, far_y) - np.maximum(top, y)
            overlap = overlap_width.clip(0) * overlap_height.clip(0)
            if not (overlap > min_iou * (area + sides[0] * sides[1] - overlap)).all():
                continue
        # Test the centres against whole pixels: clipping would leave nothing of a small box beyond the rounded edge.
        window = _in_pixels((x, y, far_x, far_y), width, height)
        kept = ((window[:2] < centres) & (centres < window[2:])).all(axis=1)
        if kept.any():
            return window, kept


def _in_pixels(window: tuple[float, ...], width: int, height: int) -> tuple[int, int, int, int]:
    """The window in whole pixels, at least one each way."""
    left, top = int(window[0] * width), int(window[1] * height)
    return left, top, max(left + 1, int(window[2] * width)), max(top + 1, int(window[3] * height))
