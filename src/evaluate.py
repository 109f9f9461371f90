"""From network output to detections, and detections scored as COCO does.

Shapes: N images of a batch, C labels with the background, A = 8,732 default boxes, D detections, K categories.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_convert, nms

from .default_boxes import decode, default_boxes

SCORE_THRESHOLD = 0.05
IOU_THRESHOLD = 0.5  # of the non-maximum suppression
MAX_CANDIDATES = 200  # a class and image, the best ones
MAX_DETECTIONS = 200  # an image
FIRST_TRIED = 512  # candidates of an image, over all classes; more only where too few of them are kept
REACH = 64.0  # images; no box is let reach further out than this, which keeps boxes of different classes apart


class Detections(NamedTuple):
    """What was found in one image, best first."""

    boxes: Tensor  # [D, 4] float32 ltrb, fractions of the image; they may reach beyond it
    labels: Tensor  # [D] int64, 1..K
    scores: Tensor  # [D] float32


def finite_boxes(offsets: Tensor, logits: Tensor) -> Tensor:
    """Which default boxes' outputs hold neither NaN nor infinity; [N, A] bool.

    offsets [N, 4, A], logits [N, C, A].  A sum is finite when all its terms are (and below 1e36, which no sound
    network reaches), and adding is ten times as fast as looking at each.
    """
    return (logits.sum(dim=1, dtype=torch.float32) + offsets.sum(dim=1, dtype=torch.float32)).isfinite()


@torch.no_grad()
def detect(
    offsets: Tensor,
    logits: Tensor,
    *,
    score_threshold: float = SCORE_THRESHOLD,
    iou_threshold: float = IOU_THRESHOLD,
    max_candidates: int = MAX_CANDIDATES,
    max_detections: int = MAX_DETECTIONS,
    defaults: Tensor | None = None,
    usable: Tensor | None = None,
) -> list[Detections]:
    """The detections of each image, on the device of the outputs.

    offsets [N, 4, A] and logits [N, C, A] of any floating-point type; defaults [A, 4] cxcywh, `default_boxes()` where
    not given; usable [N, A] bool, the default boxes that may detect anything, `finite_boxes()` where not given.
    Liu et al. 2016, section 2.2: of each class the best `max_candidates` scores above the threshold, non-maximum
    suppression within the class, then the best of all classes.
    """
    defaults = default_boxes().to(offsets.device) if defaults is None else defaults
    usable = finite_boxes(offsets, logits) if usable is None else usable
    probabilities = logits.float().softmax(dim=1)[:, 1:]  # [N, K, A]
    image, label, box = (probabilities > score_threshold).nonzero(as_tuple=True)  # in the order of images
    sound = usable[image, box]
    image, label, box = image[sound], label[sound], box[sound]
    scores = probabilities[image, label, box]
    bounds = torch.searchsorted(image, torch.arange(len(offsets) + 1, device=image.device)).tolist()
    parts = (torch.stack((label + 1, box)).tensor_split(bounds, dim=1)[1:-1], scores.tensor_split(bounds)[1:-1])
    return [
        _detect_image(*part, score, offset.float().T, defaults, iou_threshold, max_candidates, max_detections)
        for part, score, offset in zip(*parts, offsets, strict=True)
    ]


def _detect_image(
    labels: Tensor,
    box: Tensor,
    scores: Tensor,
    offsets: Tensor,
    defaults: Tensor,
    iou_threshold: float,
    max_candidates: int,
    max_detections: int,
) -> Detections:
    """Suppression in one image; labels, box (the default box) and scores [M] of its candidates, offsets [A, 4].

    A detection depends on better candidates alone, so only the best are looked at as long as they yield enough.
    """
    tried = FIRST_TRIED
    while True:
        best, order = scores.topk(min(tried, len(scores)))
        chosen = labels[order]
        within = _rank_in_class(chosen) < max_candidates
        best, order, chosen = best[within], order[within], chosen[within]
        index = box[order]
        boxes = box_convert(decode(offsets[index], defaults[index]), "cxcywh", "xyxy").clamp(-REACH, REACH)
        # Float64 holds boxes and shift with 30 bits below a pixel, so the overlaps within a class stay what they are.
        shifted = boxes.double() + (chosen * (2 * REACH + 1))[:, None]
        keep = nms(shifted, best.double(), iou_threshold)[:max_detections]
        if len(keep) == max_detections or tried >= len(scores):
            return Detections(boxes[keep], chosen[keep], best[keep])
        tried *= 4


def _rank_in_class(labels: Tensor) -> Tensor:
    """How many of the same label stand before each; [M]."""
    ordered, order = labels.sort(stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(labels), device=labels.device) - torch.searchsorted(ordered, ordered)
    return rank
