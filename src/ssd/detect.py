"""From network output to detections: decoding, the best candidates of each class, and suppression.

Shapes: N images of a batch, C labels with the background, A = 8,732 default boxes, D detections, K categories.
Source: Liu et al. 2016, section 2.2.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, nms

from src.ssd.default_boxes import decode, default_boxes

SCORE_THRESHOLD = 0.05
IOU_THRESHOLD = 0.5  # of the non-maximum suppression
MAX_CANDIDATES = 200  # a class and image, the best ones
MAX_DETECTIONS = 200  # an image
INITIAL_TOPK = 512  # candidates of an image, over all classes; more only where too few of them are kept
MAX_BOX_COORDINATE = (
    64.0  # images; no box is let reach further out than this, which keeps boxes of different classes apart
)


class Detections(NamedTuple):
    """What was found in one image, best first."""

    boxes: Tensor  # [D, 4] float32 ltrb, fractions of the image; they may reach beyond it
    labels: Tensor  # [D] int64, 1..K
    scores: Tensor  # [D] float32


class EndToEndDetector(nn.Module):
    """A detector that is handed images as they are, and has all that follows the network inside.

    `forward(images [N, 3, 300, 300] uint8 RGB)` gives boxes [N, 200, 4] float32 ltrb, labels [N, 200] int64 and scores
    [N, 200] float32, best first; boxes, labels and scores of 0 fill up what was not found.
    """


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
    valid: Tensor | None = None,
) -> list[Detections]:
    """The detections of each image, on the device of the outputs.

    offsets [N, 4, A] and logits [N, C, A] of any floating-point type; defaults [A, 4] cxcywh, `default_boxes()` where
    not given; valid [N, A] bool, the default boxes that may detect anything, `finite_boxes()` where not given.
    Liu et al. 2016, section 2.2: of each class the best `max_candidates` scores above the threshold, non-maximum
    suppression within the class, then the best of all classes.
    """
    defaults = default_boxes().to(offsets.device) if defaults is None else defaults
    valid = finite_boxes(offsets, logits) if valid is None else valid
    probabilities = logits.float().softmax(dim=1)[:, 1:]  # [N, K, A]
    image, label, box = (probabilities > score_threshold).nonzero(as_tuple=True)  # [M] each, image by image
    scores = torch.where(valid[image, box], probabilities[image, label, box], 0)
    counts = torch.bincount(image, minlength=len(offsets))
    first = counts.cumsum(0) - counts  # [N] of each image's candidates
    keys = _sort_keys(scores, image, first, counts)
    candidates = counts.tolist()
    found = [Detections(offsets.new_zeros(0, 4, dtype=torch.float32), label[:0], scores[:0])] * len(offsets)
    waiting, tried = [row for row, count in enumerate(candidates) if count], INITIAL_TOPK
    while waiting:  # a detection depends on better candidates alone: the best suffice as long as they yield enough
        rows = torch.tensor(waiting, device=offsets.device)
        chosen = _best(keys[rows], first[rows], scores, label, tried, max_candidates)
        boxes = decoded(offsets[rows], defaults, box[chosen.places])
        for row, detections in zip(waiting, _suppressed(boxes, chosen, iou_threshold), strict=True):
            found[row] = Detections(*(part[:max_detections] for part in detections))
        waiting = [row for row in waiting if len(found[row].scores) < max_detections and tried < candidates[row]]
        tried *= 4
    return found


def _sort_keys(scores: Tensor, image: Tensor, first: Tensor, counts: Tensor) -> Tensor:
    """Integers that order each image's candidates, best first, padded with 0; [N, most candidates].

    scores, image [M]; first, counts [N].  The score's bits, then the place: no two are alike, so equal scores do not
    stand in another order in another batch or on another device.
    """
    place = torch.arange(len(image), device=image.device) - first[image]
    keys = torch.zeros(len(counts), int(counts.max()) if len(counts) else 0, dtype=torch.int64, device=image.device)
    bits = scores.view(torch.int32).long()
    keys[image, place] = torch.where(scores > 0, (bits << 32) + (2**32 - 1 - place), 0)
    return keys


class _Candidates(NamedTuple):
    """The best candidates of each image, best first, then ones of score 0 that do not count; [N, T]."""

    scores: Tensor
    labels: Tensor  # 1..K
    places: Tensor  # among the batch's candidates


def _best(keys: Tensor, first: Tensor, scores: Tensor, label: Tensor, tried: int, max_candidates: int) -> _Candidates:
    """The best `tried` candidates of each image, and at most `max_candidates` of a class."""
    key, place = keys.topk(min(tried, keys.shape[1]), dim=1)
    index = (first[:, None] + place).clamp(max=len(scores) - 1)
    labels = label[index] + 1
    counted = (key > 0) & (_rank_in_class(labels) < max_candidates)
    ordered, order = torch.where(counted, scores[index], 0).sort(dim=1, descending=True, stable=True)
    return _Candidates(ordered, labels.gather(1, order), index.gather(1, order))


def _rank_in_class(labels: Tensor) -> Tensor:
    """How many of the same label stand before each in its row; [N, T]."""
    ordered, order = labels.sort(dim=1, stable=True)
    place = torch.arange(labels.shape[1], device=labels.device)
    return torch.empty_like(order).scatter_(1, order, place - torch.searchsorted(ordered, ordered))


def decoded(offsets: Tensor, defaults: Tensor, box: Tensor) -> Tensor:
    """Boxes ltrb of the default boxes `box` [N, T], within reach; [N, T, 4].  offsets [N, 4, A]."""
    chosen = offsets.gather(2, box[:, None].expand(-1, 4, -1)).transpose(1, 2).float()
    return box_convert(decode(chosen, defaults[box]), "cxcywh", "xyxy").clamp(-MAX_BOX_COORDINATE, MAX_BOX_COORDINATE)


def _suppressed(boxes: Tensor, candidates: _Candidates, iou_threshold: float) -> Iterator[Detections]:
    """What non-maximum suppression within each class leaves of each image's candidates; boxes [N, T, 4]."""
    # Float64 holds boxes and shift with 30 bits below a pixel, so the overlaps within a class stay what they are.
    shifted = boxes.double() + (candidates.labels * (2 * MAX_BOX_COORDINATE + 1))[..., None]
    scores = candidates.scores.double()
    for row, count in enumerate((candidates.scores > 0).sum(dim=1).tolist()):
        keep = nms(shifted[row, :count], scores[row, :count], iou_threshold)
        yield Detections(boxes[row, keep], candidates.labels[row, keep], candidates.scores[row, keep])


def strip_padding(boxes: Tensor, labels: Tensor, scores: Tensor) -> list[Detections]:
    """What a WholeDetector found in each image, without the rows of 0."""
    counts = (scores > 0).sum(dim=1).tolist()
    return [
        Detections(*(part[:count] for part in row)) for *row, count in zip(boxes, labels, scores, counts, strict=True)
    ]
