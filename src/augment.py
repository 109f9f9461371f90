"""SSD's augmentation: its constants, once for both pipelines, and its transforms for torchvision.

Sources: Liu et al. 2016, section 2.2 (the crop); the colour formula is that of DALI's `hsv` and `brightness_contrast`.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes, Image

NO_CROP = None
# One is picked with equal chance: the whole image, or a window whose IoU with every box exceeds the number.
CROP_MIN_IOU = (NO_CROP, 0.1, 0.3, 0.5, 0.7, 0.9, -math.inf)
CROP_SIDE = (0.3, 1.0)  # a window's sides, as fractions of the image's
CROP_ASPECT = (0.5, 2.0)  # the ratio of those fractions
FLIP_PROBABILITY = 0.5
BRIGHTNESS = (0.875, 1.125)  # factor
CONTRAST = (0.5, 1.5)  # factor, about CONTRAST_CENTRE
CONTRAST_CENTRE = 128.0  # of 0..255
SATURATION = (0.5, 1.5)  # factor
HUE = (-18.0, 18.0)  # degrees

RGB_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
YIQ_TO_RGB = np.array([[1.0, 0.956, 0.621], [1.0, -0.272, -0.647], [1.0, -1.107, 1.705]])


def uniform(low: float, high: float) -> float:
    """A number from low..high drawn from torch's generator, which the pipeline seeds for each sample."""
    return low + (high - low) * torch.rand(()).item()


def colour_matrix(brightness: float, contrast: float, saturation: float, hue: float) -> np.ndarray:
    """The colour step as one affine map of RGB in 0..255; [3, 4] float64, the last column is added.

    Hue (degrees) and saturation (factor) act in YIQ, then brightness x (contrast x (v - 128) + 128).
    """
    angle = math.radians(hue)
    cosine, sine = saturation * math.cos(angle), saturation * math.sin(angle)
    rotation = np.array([[1, 0, 0], [0, cosine, sine], [0, -sine, cosine]])
    linear = brightness * contrast * (YIQ_TO_RGB @ rotation @ RGB_TO_YIQ)
    offset = brightness * CONTRAST_CENTRE * (1 - contrast)
    return np.column_stack((linear, np.full(3, offset)))


def random_colour_matrix() -> Tensor:
    """`colour_matrix` of random parameters; [3, 4] float32."""
    matrix = colour_matrix(uniform(*BRIGHTNESS), uniform(*CONTRAST), uniform(*SATURATION), uniform(*HUE))
    return torch.from_numpy(matrix).float()


class RandomWindowCrop(v2.Transform):
    """Crops a random window in which objects stay recognisable, or nothing; boxes are kept by their centres."""

    def forward(self, image: Image, boxes: BoundingBoxes, labels: Tensor) -> tuple[Image, BoundingBoxes, Tensor]:
        """image [3, H, W]; boxes [G, 4] ltrb in pixels, G at least 1; labels [G].  At least one box remains."""
        params = self.make_params([image, boxes])
        if params["window"] is None:
            return image, boxes, labels
        kept = params["kept"]
        boxes = BoundingBoxes(boxes[kept], format="XYXY", canvas_size=image.shape[-2:])
        return self.transform(image, params), self.transform(boxes, params), labels[kept]

    def make_params(self, flat_inputs: list) -> dict:
        """The window (left, top, right, bottom in pixels, or None for no crop) and which boxes it keeps, [G] bool."""
        image, boxes = flat_inputs
        height, width = image.shape[-2:]
        return dict(zip(("window", "kept"), draw_window(boxes.as_subclass(Tensor), width, height), strict=True))

    def transform(self, inpt, params: dict):
        left, top, right, bottom = params["window"]
        return F.crop(inpt, top, left, bottom - top, right - left)  # clips boxes too


def draw_window(boxes: Tensor, width: int, height: int) -> tuple[tuple[int, int, int, int] | None, Tensor | None]:
    """A random window (left, top, right, bottom) in pixels and the boxes it keeps, [G] bool; (None, None): no crop.

    boxes [G, 4] ltrb in pixels.  A condition is picked, one window tried for it, and another picked until one fits.
    """
    fractions = boxes / boxes.new_tensor([width, height, width, height])
    centres = (fractions[:, :2] + fractions[:, 2:]) / 2
    while True:
        min_iou = CROP_MIN_IOU[int(torch.randint(len(CROP_MIN_IOU), ()))]
        if min_iou is NO_CROP:
            return None, None
        window_width, window_height = uniform(*CROP_SIDE), uniform(*CROP_SIDE)
        if not CROP_ASPECT[0] <= window_width / window_height <= CROP_ASPECT[1]:
            continue
        left, top = uniform(0, 1 - window_width), uniform(0, 1 - window_height)
        window = boxes.new_tensor([[left, top, left + window_width, top + window_height]])
        if min_iou >= 0 and not bool((box_iou(fractions, window) > min_iou).all()):
            continue
        kept = ((centres > window[:, :2]) & (centres < window[:, 2:])).all(dim=1)
        if bool(kept.any()):
            return _in_pixels(window[0].tolist(), width, height), kept


def _in_pixels(window: list[float], width: int, height: int) -> tuple[int, int, int, int]:
    """The window in whole pixels, at least one each way."""
    left, top = int(window[0] * width), int(window[1] * height)
    return left, top, max(left + 1, int(window[2] * width)), max(top + 1, int(window[3] * height))
