"""The 8,732 default boxes of SSD300: matching ground truth to them, encoding and decoding box offsets.

Shapes: N images, A = 8,732 default boxes, T ground-truth boxes of all images.
Source: Liu et al. 2016, "SSD: Single Shot MultiBox Detector", sections 2.1 (default boxes) and 2.2 (matching).
"""

import math
from functools import lru_cache

import torch
from torch import Tensor
from torchvision.ops import box_convert

IMAGE_SIZE = 300  # pixels, both sides
FEATURE_SIZES = (38, 19, 10, 5, 3, 1)  # cells a side of the six feature maps
STEPS = (8, 16, 32, 64, 100, 300)  # pixels between the centres of neighbouring cells
SCALES = (21, 45, 99, 153, 207, 261, 315)  # pixels; map k has boxes of scale k and of the mean of k and k + 1
ASPECT_RATIOS = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))  # in addition to 1; each also as its inverse
BOXES_PER_CELL = tuple(2 + 2 * len(ratios) for ratios in ASPECT_RATIOS)  # 4, 6, 6, 6, 4, 4
NUM_DEFAULT_BOXES = sum(size * size * boxes for size, boxes in zip(FEATURE_SIZES, BOXES_PER_CELL, strict=True))
MATCH_THRESHOLD = 0.5  # a default box is matched if its IoU is above this
BOXES_IN_CACHE = 16  # rows of A floats that stay in a CPU's second-level cache
VARIANCES = (0.1, 0.2)  # of centre and size: the scale of the encoded offsets


@lru_cache
def default_boxes() -> Tensor:
    """The default boxes, [A, 4] float32, cxcywh as fractions of the image, clamped to 0..1.

    The order is that of the published model: map by map, shape by shape, row by row.
    """
    boxes = []
    for k, size in enumerate(FEATURE_SIZES):
        pitch = STEPS[k] / IMAGE_SIZE
        for width, height in _box_shapes(k):
            for row in range(size):
                for column in range(size):
                    boxes.append(((column + 0.5) * pitch, (row + 0.5) * pitch, width, height))
    return torch.tensor(boxes).clamp_(0, 1)


def _box_shapes(k: int) -> list[tuple[float, float]]:
    """Widths and heights of the default boxes of feature map k, as fractions of the image."""
    small, large = SCALES[k] / IMAGE_SIZE, SCALES[k + 1] / IMAGE_SIZE
    middle = math.sqrt(small * large)
    shapes = [(small, small), (middle, middle)]
    for ratio in ASPECT_RATIOS[k]:
        stretch = math.sqrt(ratio)
        shapes += [(small * stretch, small / stretch), (small / stretch, small * stretch)]
    return shapes


def match(
    boxes: Tensor, image_index: Tensor, num_images: int, defaults_ltrb: Tensor, threshold: float = MATCH_THRESHOLD
) -> Tensor:
    """Index of the ground-truth box matched to each default box of each image, -1 for background; [N, A] int64.

    boxes [T, 4] ltrb in 0..1 of all images, image_index [T] int64: the image of each box, num_images: N;
    defaults_ltrb [A, 4].  A default box is matched to the box with the largest IoU, if that is above `threshold`.  Each
    ground-truth box also claims its best default box (the first of equals); of several claims the last one wins.
    """
    total, num_default_boxes = len(boxes), len(defaults_ltrb)
    shape = (num_images, num_default_boxes)
    background = torch.full(shape, -1, device=boxes.device)
    if total == 0:
        return background
    overlap = _iou(boxes, defaults_ltrb)  # [T, A]
    number = torch.arange(total, dtype=torch.int32, device=boxes.device)
    row = image_index[:, None].expand_as(overlap)  # [T, A]
    best = overlap.new_zeros(shape).scatter_reduce_(0, row, overlap, "amax")  # [N, A]
    numbers = torch.where(overlap == best[image_index], number[:, None], total)  # [T, A]
    first = number.new_full(shape, total).scatter_reduce_(0, row, numbers, "amin")  # [N, A], of equals
    matched = torch.where(best > threshold, first, -1).long()
    claimed = image_index * num_default_boxes + overlap.argmax(dim=1)  # [T], in the flattened default boxes
    claims = background.flatten().scatter_reduce(0, claimed, number.long(), "amax").view(shape)
    return torch.where(claims >= 0, claims, matched)


def _iou(boxes: Tensor, defaults_ltrb: Tensor) -> Tensor:
    """IoU of boxes [T, 4] with default boxes [A, 4], ltrb; [T, A], equal to torchvision's box_iou bit for bit.

    Matching is the slowest step of a batch on a CPU.  Separate coordinates, and chunks that fit the cache, take an
    eighth of box_iou's time.
    """
    default_left, default_top, default_right, default_bottom = defaults_ltrb.t().contiguous()  # [A] each
    default_area = (default_right - default_left) * (default_bottom - default_top)
    overlap = boxes.new_empty(len(boxes), len(defaults_ltrb))
    chunk = BOXES_IN_CACHE if boxes.device.type == "cpu" else len(boxes)
    for part, done in zip(boxes.split(chunk), overlap.split(chunk), strict=True):
        left, top, right, bottom = part[..., None].unbind(dim=1)  # [chunk, 1] each
        width = (torch.minimum(right, default_right) - torch.maximum(left, default_left)).clamp_(min=0)
        height = (torch.minimum(bottom, default_bottom) - torch.maximum(top, default_top)).clamp_(min=0)
        intersection = width.mul_(height)
        area = (right - left) * (bottom - top)
        torch.div(intersection, area + default_area - intersection, out=done)
    return overlap


def encode(boxes: Tensor, defaults: Tensor) -> Tensor:
    """Offsets from default boxes to boxes; [..., 4].  Both are cxcywh in 0..1, [..., 4], with sizes above 0."""
    centre = (boxes[..., :2] - defaults[..., :2]) / (defaults[..., 2:] * VARIANCES[0])
    size = (boxes[..., 2:] / defaults[..., 2:]).log() / VARIANCES[1]
    return torch.cat((centre, size), dim=-1)


def decode(offsets: Tensor, defaults: Tensor) -> Tensor:
    """The boxes at `offsets` from the default boxes, cxcywh; [..., 4].  The inverse of `encode`."""
    centre = defaults[..., :2] + offsets[..., :2] * VARIANCES[0] * defaults[..., 2:]
    size = defaults[..., 2:] * (offsets[..., 2:] * VARIANCES[1]).exp()
    return torch.cat((centre, size), dim=-1)


def default_boxes_ltrb() -> Tensor:
    """`default_boxes()` as ltrb, [A, 4]."""
    return box_convert(default_boxes(), "cxcywh", "xyxy")
