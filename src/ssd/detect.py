"""From network output to detections: decoding, the best candidates of each class, and suppression.

Shapes: N images of a batch, C labels with the background, A = 8,732 default boxes, D detections, K categories.
Source: Liu et al. 2016, section 2.2.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, nms

from src.ssd.default_boxes import decode, default_boxes

SCORE_THRESHOLD = 0.05
IOU_THRESHOLD = 0.5  # of the non-maximum suppression
MAX_CANDIDATES = 200  # a class and image, the best ones
MAX_DETECTIONS = 200  # an image
INITIAL_TOPK = 512  # candidates of an image that are tried first on a CPU, over all classes
BLOCK = 512  # candidates of an image that are suppressed at once on a GPU
IMAGES_PER_OVERLAP = 32  # at once: matrices of 130 MB, some of them at the same time
ROUNDS_PER_CHECK = 8  # of suppression on a GPU: reading whether it has settled costs as much as 8 rounds
# Coordinates are clamped to +-64 image sizes, so that the shift per class cannot make two classes overlap.
MAX_BOX_COORDINATE = 64.0


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
def detect(offsets: Tensor, logits: Tensor, *, valid: Tensor | None = None) -> list[Detections]:
    """The detections of each image, on the device of the outputs.

    offsets [N, 4, A] and logits [N, C, A] of any floating-point type; valid [N, A] bool: the default boxes that may
    detect anything, `finite_boxes()` where not given.
    Liu et al. 2016, section 2.2: of each class the best 200 scores above the threshold, non-maximum suppression within
    the class, then the best 200 of all classes.
    """
    candidates = _candidates(offsets, logits, finite_boxes(offsets, logits) if valid is None else valid)
    # On a CPU torchvision's suppression of one image at a time is fastest.  On a GPU each call of it waits for the GPU.
    return _detect_each(offsets, candidates) if offsets.device.type == "cpu" else _detect_together(offsets, candidates)


class _Candidates(NamedTuple):
    """All scores above the threshold, image by image: M of them."""

    scores: Tensor  # [M]
    labels: Tensor  # [M] 1..K
    boxes: Tensor  # [M] default box
    first: Tensor  # [N] place of each image's first candidate
    counts: list[int]  # [N] of each image's candidates
    keys: Tensor  # [N, most candidates of an image] int64, see `_sort_keys`


def _candidates(offsets: Tensor, logits: Tensor, valid: Tensor) -> _Candidates:
    """The scores above the threshold.  valid [N, A]: the others get a score of 0."""
    probabilities = logits.float().softmax(dim=1)[:, 1:]  # [N, K, A]
    image, label, box = (probabilities > SCORE_THRESHOLD).nonzero(as_tuple=True)  # [M] each, image by image
    scores = torch.where(valid[image, box], probabilities[image, label, box], 0)
    numbers = torch.arange(len(offsets), device=image.device)
    first, end = torch.searchsorted(image, numbers), torch.searchsorted(image, numbers, right=True)  # [N] each
    counts = (end - first).tolist()
    keys = _sort_keys(scores, image, first, (len(counts), max(counts, default=0)))
    return _Candidates(scores, label + 1, box, first, counts, keys)


def _sort_keys(scores: Tensor, image: Tensor, first: Tensor, shape: tuple[int, int]) -> Tensor:
    """Integers that order each image's candidates, best first, padded with 0; [N, most candidates].

    scores, image [M]; first [N].  The score's bits, then the place: no two are alike, so equal scores do not
    stand in another order in another batch or on another device.
    """
    place = torch.arange(len(image), device=image.device) - first[image]
    keys = torch.zeros(shape, dtype=torch.int64, device=image.device)
    bits = scores.view(torch.int32).long()
    keys[image, place] = torch.where(scores > 0, (bits << 32) + (2**32 - 1 - place), 0)
    return keys


class _Ranked(NamedTuple):
    """The best candidates of each image, best first, then ones of score 0 that do not count; [N, T]."""

    scores: Tensor
    labels: Tensor  # 1..K
    boxes: Tensor  # default box


def _rank(candidates: _Candidates, rows: Tensor | slice, tried: int) -> _Ranked:
    """The best `tried` candidates of each image of `rows`, and at most 200 of a class."""
    key, place = candidates.keys[rows].topk(min(tried, candidates.keys.shape[1]), dim=1)
    index = (candidates.first[rows, None] + place).clamp(max=len(candidates.scores) - 1)
    labels = candidates.labels[index]
    counted = (key > 0) & (_rank_in_class(labels) < MAX_CANDIDATES)
    scores, order = torch.where(counted, candidates.scores[index], 0).sort(dim=1, descending=True, stable=True)
    return _Ranked(scores, labels.gather(1, order), candidates.boxes[index].gather(1, order))


def _rank_in_class(labels: Tensor) -> Tensor:
    """How many of the same label stand before each in its row; [N, T]."""
    ordered, order = labels.sort(dim=1, stable=True)
    place = torch.arange(labels.shape[1], device=labels.device)
    return torch.empty_like(order).scatter_(1, order, place - torch.searchsorted(ordered, ordered))


def decoded(offsets: Tensor, defaults: Tensor, box: Tensor) -> Tensor:
    """Boxes ltrb of the default boxes `box` [N, T], within reach; [N, T, 4].  offsets [N, 4, A]."""
    chosen = offsets.gather(2, box[:, None].expand(-1, 4, -1)).transpose(1, 2).float()
    return box_convert(decode(chosen, defaults[box]), "cxcywh", "xyxy").clamp(-MAX_BOX_COORDINATE, MAX_BOX_COORDINATE)


def _shift_by_class(boxes: Tensor, labels: Tensor) -> Tensor:
    """Boxes [..., 4] in float64, those of two classes so far apart that they cannot overlap.  labels [...].

    Float64 holds boxes and shift with 30 bits below a pixel, so the overlaps within a class stay what they are.
    """
    return boxes.double() + (labels * (2 * MAX_BOX_COORDINATE + 1))[..., None]


def _detect_each(offsets: Tensor, candidates: _Candidates) -> list[Detections]:
    """The detections of each image, an image at a time."""
    defaults = default_boxes()
    nothing = Detections(offsets.new_zeros(0, 4, dtype=torch.float32), candidates.labels[:0], candidates.scores[:0])
    found = [nothing] * len(offsets)
    # Suppression depends only on higher scores: try the best 512, and more only if too few survive.
    waiting, tried = [row for row, count in enumerate(candidates.counts) if count], INITIAL_TOPK
    while waiting:
        rows = torch.tensor(waiting)
        ranked = _rank(candidates, rows, tried)
        boxes = decoded(offsets[rows], defaults, ranked.boxes)
        shifted, scores = _shift_by_class(boxes, ranked.labels), ranked.scores.double()
        for number, (row, count) in enumerate(zip(waiting, (scores > 0).sum(dim=1).tolist(), strict=True)):
            keep = nms(shifted[number, :count], scores[number, :count], IOU_THRESHOLD)[:MAX_DETECTIONS]
            found[row] = Detections(boxes[number, keep], ranked.labels[number, keep], ranked.scores[number, keep])
        waiting = [row for row in waiting if len(found[row].scores) < MAX_DETECTIONS and tried < candidates.counts[row]]
        tried *= 4
    return found


def _detect_together(offsets: Tensor, candidates: _Candidates) -> list[Detections]:
    """The detections of each image, all images at once; equal to those of `_detect_each`, bit for bit.

    The candidates are taken BLOCK at a time, best first, behind the boxes that were kept of earlier blocks.
    """
    ranked = _rank(candidates, slice(None), candidates.keys.shape[1])
    counts = (ranked.scores > 0).sum(dim=1)  # [N]
    defaults = _default_boxes_on(offsets.device)
    none = offsets.new_zeros(len(offsets), 0, 4, dtype=torch.float32)
    kept = Detections(none, ranked.labels[:, :0], ranked.scores[:, :0])  # of each image, padded: [N, D, ...]
    for start in range(0, ranked.scores.shape[1], BLOCK):
        if start and not ((counts > start) & (kept.scores[:, -1] == 0)).any():  # each image is done
            break
        block = _Ranked(*(part[:, start : start + BLOCK] for part in ranked))
        following = Detections(decoded(offsets, defaults, block.boxes), block.labels, block.scores)
        tried = Detections(*(torch.cat(parts, dim=1) for parts in zip(kept, following, strict=True)))
        keep = _suppress(_shift_by_class(tried.boxes, tried.labels), tried.scores > 0)
        order = keep.int().argsort(dim=1, descending=True, stable=True)[:, :MAX_DETECTIONS]  # those that are kept first
        kept = Detections(
            tried.boxes.gather(1, order[..., None].expand(-1, -1, 4)),
            tried.labels.gather(1, order),
            torch.where(keep, tried.scores, 0).gather(1, order),
        )
    return strip_padding(*kept)


@lru_cache
def _default_boxes_on(device: torch.device) -> Tensor:
    """`default_boxes()` on a device; copied to a GPU once, because that waits for it."""
    return default_boxes().to(device)


def _suppress(shifted: Tensor, valid: Tensor) -> Tensor:
    """Which boxes greedy non-maximum suppression keeps; [N, T] bool.

    shifted [N, T, 4] ltrb float64, best first; valid [N, T] bool: the others neither stay nor suppress.
    A box is kept if no better box that is kept overlaps it.  Starting from all boxes, each round applies this rule to
    the last round's answer.  After round k the first k boxes are right, so the rounds end with greedy suppression's
    answer; they end when nothing changes, after as many rounds as the longest chain of boxes that decide on each other.
    Source: Zheng et al. 2020, "Enhancing Geometric Factors in Model Learning and Inference" (Cluster-NMS).
    """
    # [N, T, T]: the row's box, if it is kept, suppresses the column's.
    suppresses = torch.cat([_overlap(images) for images in shifted.split(IMAGES_PER_OVERLAP)]).triu(diagonal=1)
    keep = valid
    while True:
        for _ in range(ROUNDS_PER_CHECK):
            before, keep = keep, valid & ~(suppresses & keep[:, :, None]).any(dim=1)
        if torch.equal(before, keep):
            return keep


def _overlap(boxes: Tensor) -> Tensor:
    """Which boxes of an image have an IoU above the threshold; [N, T, T] bool.  boxes [N, T, 4] ltrb.

    The arithmetic, in its order, is that of torchvision's `nms`, so that the answers are the same.
    """
    left, top, right, bottom = boxes.unbind(dim=2)  # [N, T] each
    area = (right - left) * (bottom - top)
    width = torch.minimum(right[:, :, None], right[:, None]) - torch.maximum(left[:, :, None], left[:, None])
    height = torch.minimum(bottom[:, :, None], bottom[:, None]) - torch.maximum(top[:, :, None], top[:, None])
    intersection = width.clamp_(min=0).mul_(height.clamp_(min=0))
    return intersection / (area[:, :, None] + area[:, None] - intersection) > IOU_THRESHOLD


def strip_padding(boxes: Tensor, labels: Tensor, scores: Tensor) -> list[Detections]:
    """The detections of each image without the rows of score 0 behind them.

    boxes [N, D, 4], labels and scores [N, D], as an EndToEndDetector gives them.
    """
    counts = (scores > 0).sum(dim=1).tolist()
    return [
        Detections(*(part[:count] for part in row)) for *row, count in zip(boxes, labels, scores, counts, strict=True)
    ]
