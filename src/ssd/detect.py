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
IOU_THRESHOLD = 0.5  # above it non-maximum suppression removes a box
MAX_CANDIDATES = 200  # per class and image
MAX_DETECTIONS = 200  # per image
INITIAL_TOPK = 512  # on a CPU: the candidates of an image, over all classes, that are tried first
CANDIDATES_PER_BLOCK = 512  # on a GPU: the candidates of an image that one round of suppression takes
IMAGES_PER_OVERLAP = 32  # a float64 matrix of 32 images takes 130 MB, and a few exist at a time
ROUNDS_PER_CHECK = 8  # of suppression on a GPU: checking for convergence costs as much as 8 rounds
# Coordinates are clamped to +-64 image sizes, so that the shift per class cannot make two classes overlap.
MAX_BOX_COORDINATE = 64.0


class Detections(NamedTuple):
    """The detections of one image, best first."""

    boxes: Tensor  # [D, 4] float32 ltrb, fractions of the image, not clipped to 0..1
    labels: Tensor  # [D] int64, 1..K
    scores: Tensor  # [D] float32


class EndToEndDetector(nn.Module):
    """A detector with normalisation, network, decoding and suppression inside.

    `forward(images [N, 3, 300, 300] uint8 RGB)` gives boxes [N, 200, 4] float32 ltrb, labels [N, 200] int64 and scores
    [N, 200] float32, best first, padded with 0.
    """


def find_finite_boxes(offsets: Tensor, logits: Tensor) -> Tensor:
    """The default boxes whose outputs are all finite; [N, A] bool.

    offsets [N, 4, A], logits [N, C, A].  Checks sums, which is ten times as fast as checking each output; a sum of
    finite terms below 1e36 is finite.
    """
    return (logits.sum(dim=1, dtype=torch.float32) + offsets.sum(dim=1, dtype=torch.float32)).isfinite()


@torch.no_grad()
def detect(offsets: Tensor, logits: Tensor, *, valid: Tensor | None = None) -> list[Detections]:
    """The detections of each image, on the device of the outputs.

    offsets [N, 4, A] and logits [N, C, A] of any floating-point type; valid [N, A] bool: the default boxes that may
    detect something, `find_finite_boxes()` by default.
    Takes the best 200 scores above the threshold of each class, applies non-maximum suppression within the class, and
    keeps the best 200 of all classes.  Liu et al. 2016, section 2.2.
    """
    candidates = _find_candidates(offsets, logits, find_finite_boxes(offsets, logits) if valid is None else valid)
    # On a CPU torchvision's suppression, image by image, is fastest.  On a GPU each call of it makes the host wait.
    detect_all = _detect_each_image if offsets.device.type == "cpu" else _detect_batched
    return detect_all(offsets, candidates)


class _Candidates(NamedTuple):
    """The M scores above the threshold, image by image."""

    scores: Tensor  # [M]
    labels: Tensor  # [M] 1..K
    boxes: Tensor  # [M] index of the default box
    first: Tensor  # [N] index of each image's first candidate
    counts: list[int]  # [N] number of each image's candidates
    keys: Tensor  # [N, most candidates of an image] int64, see `_sort_keys`


def _find_candidates(offsets: Tensor, logits: Tensor, valid: Tensor) -> _Candidates:
    """The scores above the threshold.  valid [N, A]: other default boxes get a score of 0."""
    probabilities = logits.float().softmax(dim=1)[:, 1:]  # [N, K, A]
    image, label, box = (probabilities > SCORE_THRESHOLD).nonzero(as_tuple=True)  # [M] each, image by image
    scores = torch.where(valid[image, box], probabilities[image, label, box], 0)
    numbers = torch.arange(len(offsets), device=image.device)
    first, end = torch.searchsorted(image, numbers), torch.searchsorted(image, numbers, right=True)  # [N] each
    counts = (end - first).tolist()
    keys = _sort_keys(scores, image, first, (len(counts), max(counts, default=0)))
    return _Candidates(scores, label + 1, box, first, counts, keys)


def _sort_keys(scores: Tensor, image: Tensor, first: Tensor, shape: tuple[int, int]) -> Tensor:
    """Integers that rank each image's candidates, the largest for the best, padded with 0; [N, most candidates].

    scores, image [M]; first [N].  A key is the score's bits followed by the inverted position, so keys are distinct
    and equal scores have the same order in every batch and on every device.
    """
    place = torch.arange(len(image), device=image.device) - first[image]
    keys = torch.zeros(shape, dtype=torch.int64, device=image.device)
    bits = scores.view(torch.int32).long()
    keys[image, place] = torch.where(scores > 0, (bits << 32) + (2**32 - 1 - place), 0)
    return keys


class _Ranked(NamedTuple):
    """The best candidates of each image, best first, padded with candidates of score 0; [N, T]."""

    scores: Tensor
    labels: Tensor  # 1..K
    boxes: Tensor  # index of the default box


def _rank(candidates: _Candidates, rows: Tensor | slice, tried: int) -> _Ranked:
    """The best `tried` candidates of each image of `rows`, and at most 200 of a class."""
    key, place = candidates.keys[rows].topk(min(tried, candidates.keys.shape[1]), dim=1)
    index = (candidates.first[rows, None] + place).clamp(max=len(candidates.scores) - 1)
    labels = candidates.labels[index]
    counted = (key > 0) & (_rank_in_class(labels) < MAX_CANDIDATES)
    scores, order = torch.where(counted, candidates.scores[index], 0).sort(dim=1, descending=True, stable=True)
    return _Ranked(scores, labels.gather(1, order), candidates.boxes[index].gather(1, order))


def _rank_in_class(labels: Tensor) -> Tensor:
    """The number of equal labels before each one in its row; [N, T]."""
    ordered, order = labels.sort(dim=1, stable=True)
    place = torch.arange(labels.shape[1], device=labels.device)
    return torch.empty_like(order).scatter_(1, order, place - torch.searchsorted(ordered, ordered))


def decode_boxes(offsets: Tensor, defaults: Tensor, box: Tensor) -> Tensor:
    """The boxes of the default boxes with indices `box` [N, T], ltrb and clamped; [N, T, 4].  offsets [N, 4, A]."""
    chosen = offsets.gather(2, box[:, None].expand(-1, 4, -1)).transpose(1, 2).float()
    return box_convert(decode(chosen, defaults[box]), "cxcywh", "xyxy").clamp(-MAX_BOX_COORDINATE, MAX_BOX_COORDINATE)


def _shift_by_class(boxes: Tensor, labels: Tensor) -> Tensor:
    """Boxes [..., 4] in float64, shifted so that boxes of different classes cannot overlap.  labels [...].

    Shifted float64 coordinates keep 30 bits below a pixel, so overlaps within a class do not change.
    """
    return boxes.double() + (labels * (2 * MAX_BOX_COORDINATE + 1))[..., None]


def _detect_each_image(offsets: Tensor, candidates: _Candidates) -> list[Detections]:
    """The detections of each image, image by image."""
    defaults = default_boxes()
    nothing = Detections(offsets.new_zeros(0, 4, dtype=torch.float32), candidates.labels[:0], candidates.scores[:0])
    found = [nothing] * len(offsets)
    # Suppression depends only on higher scores: try the best 512, and more only if too few survive.
    waiting, tried = [row for row, count in enumerate(candidates.counts) if count], INITIAL_TOPK
    while waiting:
        rows = torch.tensor(waiting)
        ranked = _rank(candidates, rows, tried)
        boxes = decode_boxes(offsets[rows], defaults, ranked.boxes)
        shifted, scores = _shift_by_class(boxes, ranked.labels), ranked.scores.double()
        for number, (row, count) in enumerate(zip(waiting, (scores > 0).sum(dim=1).tolist(), strict=True)):
            keep = nms(shifted[number, :count], scores[number, :count], IOU_THRESHOLD)[:MAX_DETECTIONS]
            found[row] = Detections(boxes[number, keep], ranked.labels[number, keep], ranked.scores[number, keep])
        waiting = [row for row in waiting if len(found[row].scores) < MAX_DETECTIONS and tried < candidates.counts[row]]
        tried *= 4
    return found


def _detect_batched(offsets: Tensor, candidates: _Candidates) -> list[Detections]:
    """The detections of each image, all images at once; equal to those of `_detect_each_image`, bit for bit.

    Suppression takes the boxes kept so far and the next CANDIDATES_PER_BLOCK candidates, best first, until all images
    have MAX_DETECTIONS or no more candidates.
    """
    ranked = _rank(candidates, slice(None), candidates.keys.shape[1])
    counts = (ranked.scores > 0).sum(dim=1)  # [N]
    defaults = _default_boxes_on(offsets.device)
    none = offsets.new_zeros(len(offsets), 0, 4, dtype=torch.float32)
    kept = Detections(none, ranked.labels[:, :0], ranked.scores[:, :0])  # padded: [N, D, ...]
    for start in range(0, ranked.scores.shape[1], CANDIDATES_PER_BLOCK):
        if start and not ((counts > start) & (kept.scores[:, -1] == 0)).any():  # no image needs more
            break
        block = _Ranked(*(part[:, start : start + CANDIDATES_PER_BLOCK] for part in ranked))
        following = Detections(decode_boxes(offsets, defaults, block.boxes), block.labels, block.scores)
        tried = Detections(*(torch.cat(parts, dim=1) for parts in zip(kept, following, strict=True)))
        keep = _suppress(_shift_by_class(tried.boxes, tried.labels), tried.scores > 0)
        order = keep.int().argsort(dim=1, descending=True, stable=True)[:, :MAX_DETECTIONS]  # kept ones first
        kept = Detections(
            tried.boxes.gather(1, order[..., None].expand(-1, -1, 4)),
            tried.labels.gather(1, order),
            torch.where(keep, tried.scores, 0).gather(1, order),
        )
    return strip_padding(*kept)


@lru_cache
def _default_boxes_on(device: torch.device) -> Tensor:
    """`default_boxes()` on a device; cached, because copying to a GPU makes the host wait."""
    return default_boxes().to(device)


def _suppress(shifted: Tensor, valid: Tensor) -> Tensor:
    """The boxes that greedy non-maximum suppression keeps; [N, T] bool.

    shifted [N, T, 4] ltrb float64, best first; valid [N, T] bool: other boxes are not kept and suppress nothing.
    A box is kept if no better kept box overlaps it.  Starting with all boxes kept, each round applies this rule to the
    previous round's result.  After round k the first k boxes are final, so the rounds converge to the greedy result,
    after as many rounds as the longest chain of boxes that depend on each other.
    Source: Zheng et al. 2020, "Enhancing Geometric Factors in Model Learning and Inference" (Cluster-NMS).
    """
    # [N, T, T]: the row's box suppresses the column's, if it is kept itself.
    suppresses = torch.cat([_overlap(images) for images in shifted.split(IMAGES_PER_OVERLAP)]).triu(diagonal=1)
    keep = valid
    while True:
        for _ in range(ROUNDS_PER_CHECK):
            before, keep = keep, valid & ~(suppresses & keep[:, :, None]).any(dim=1)
        if torch.equal(before, keep):
            return keep


def _overlap(boxes: Tensor) -> Tensor:
    """The pairs of boxes of an image whose IoU is above the threshold; [N, T, T] bool.  boxes [N, T, 4] ltrb.

    The same operations in the same order as in torchvision's `nms`, so that the results are equal.
    """
    left, top, right, bottom = boxes.unbind(dim=2)  # [N, T] each
    area = (right - left) * (bottom - top)
    width = torch.minimum(right[:, :, None], right[:, None]) - torch.maximum(left[:, :, None], left[:, None])
    height = torch.minimum(bottom[:, :, None], bottom[:, None]) - torch.maximum(top[:, :, None], top[:, None])
    intersection = width.clamp_(min=0).mul_(height.clamp_(min=0))
    return intersection / (area[:, :, None] + area[:, None] - intersection) > IOU_THRESHOLD


def strip_padding(boxes: Tensor, labels: Tensor, scores: Tensor) -> list[Detections]:
    """The detections of each image without the padding of score 0.

    boxes [N, D, 4], labels and scores [N, D], as an EndToEndDetector returns them.
    """
    counts = (scores > 0).sum(dim=1).tolist()
    return [
        Detections(*(part[:count] for part in row)) for *row, count in zip(boxes, labels, scores, counts, strict=True)
    ]
