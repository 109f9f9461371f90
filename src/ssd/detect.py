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
CANDIDATES_PER_BLOCK = 512  # on a GPU: candidates of an image, over all classes, that are added per block
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


def finite_box_mask(offsets: Tensor, logits: Tensor) -> Tensor:
    """True for the default boxes whose outputs are all finite; [N, A] bool.

    offsets [N, 4, A], logits [N, C, A].  Checks sums, which is ten times as fast as checking each output; a sum of
    finite terms below 1e36 is finite.
    """
    return (logits.sum(dim=1, dtype=torch.float32) + offsets.sum(dim=1, dtype=torch.float32)).isfinite()


@torch.no_grad()
def detect(offsets: Tensor, logits: Tensor, *, valid: Tensor | None = None) -> list[Detections]:
    """The detections of each image, on the device of the outputs.

    offsets [N, 4, A] and logits [N, C, A] of any floating-point type; valid [N, A] bool: the default boxes that may
    detect something, `finite_box_mask()` by default.
    Takes the best 200 scores above the threshold of each class, applies non-maximum suppression within the class, and
    keeps the best 200 of all classes.  Liu et al. 2016, section 2.2.
    """
    candidates = _find_candidates(offsets, logits, finite_box_mask(offsets, logits) if valid is None else valid)
    # On a CPU torchvision's suppression, image by image, is fastest.  On a GPU each call of it makes the host wait.
    detect_all = _detect_each_image if offsets.device.type == "cpu" else _detect_batched
    return detect_all(offsets, candidates)


class _Candidates(NamedTuple):
    """The M scores above the threshold, image by image."""

    scores: Tensor  # [M]
    labels: Tensor  # [M] 1..K
    box_indices: Tensor  # [M] of the default boxes
    image_starts: Tensor  # [N] index of each image's first candidate
    counts: list[int]  # [N] number of each image's candidates
    keys: Tensor  # [N, most candidates of an image] int64, see `_sort_keys`


def _find_candidates(offsets: Tensor, logits: Tensor, valid: Tensor) -> _Candidates:
    """The scores above the threshold.  valid [N, A]: other default boxes get a score of 0."""
    probabilities = logits.float().softmax(dim=1)[:, 1:]  # [N, K, A]
    # [M] each, image by image
    image_indices, category_indices, box_indices = (probabilities > SCORE_THRESHOLD).nonzero(as_tuple=True)
    found_scores = probabilities[image_indices, category_indices, box_indices]
    scores = torch.where(valid[image_indices, box_indices], found_scores, 0)
    images = torch.arange(len(offsets), device=image_indices.device)
    image_starts = torch.searchsorted(image_indices, images)  # [N]
    counts = (torch.searchsorted(image_indices, images, right=True) - image_starts).tolist()
    keys = _sort_keys(scores, image_indices, image_starts, (len(counts), max(counts, default=0)))
    return _Candidates(scores, category_indices + 1, box_indices, image_starts, counts, keys)


def _sort_keys(scores: Tensor, image_indices: Tensor, image_starts: Tensor, shape: tuple[int, int]) -> Tensor:
    """Integers that rank each image's candidates, the largest for the best, padded with 0; [N, most candidates].

    scores, image_indices [M]; image_starts [N].  A key is the score's bits followed by the inverted position in the
    image, so keys are distinct and equal scores have the same order in every batch and on every device.
    """
    device = image_indices.device
    position_in_image = torch.arange(len(scores), device=device) - image_starts[image_indices]
    keys = torch.zeros(shape, dtype=torch.int64, device=device)
    bits = scores.view(torch.int32).long()
    keys_of_all = (bits << 32) + (2**32 - 1 - position_in_image)
    keys[image_indices, position_in_image] = torch.where(scores > 0, keys_of_all, 0)
    return keys


class _TopCandidates(NamedTuple):
    """The best candidates of each image, best first, padded with candidates of score 0; [N, T]."""

    scores: Tensor
    labels: Tensor  # 1..K
    box_indices: Tensor  # of the default boxes


def _select_top(candidates: _Candidates, rows: Tensor | slice, k: int) -> _TopCandidates:
    """The best `k` candidates of each image of `rows`, and at most 200 of a class."""
    keys, position_in_image = candidates.keys[rows].topk(min(k, candidates.keys.shape[1]), dim=1)
    index = (candidates.image_starts[rows, None] + position_in_image).clamp(max=len(candidates.scores) - 1)
    labels = candidates.labels[index]
    is_valid = (keys > 0) & (_rank_in_class(labels) < MAX_CANDIDATES)
    scores, order = torch.where(is_valid, candidates.scores[index], 0).sort(dim=1, descending=True, stable=True)
    return _TopCandidates(scores, labels.gather(1, order), candidates.box_indices[index].gather(1, order))


def _rank_in_class(labels: Tensor) -> Tensor:
    """The number of equal labels before each one in its row; [N, T]."""
    ordered, order = labels.sort(dim=1, stable=True)
    position_in_row = torch.arange(labels.shape[1], device=labels.device)
    return torch.empty_like(order).scatter_(1, order, position_in_row - torch.searchsorted(ordered, ordered))


def decode_boxes(offsets: Tensor, defaults: Tensor, box_indices: Tensor) -> Tensor:
    """Decodes the default boxes with indices `box_indices` [N, T]; returns boxes [N, T, 4] ltrb, clamped.

    offsets [N, 4, A]; defaults [A, 4] cxcywh.
    """
    chosen = offsets.gather(2, box_indices[:, None].expand(-1, 4, -1)).transpose(1, 2).float()
    boxes = box_convert(decode(chosen, defaults[box_indices]), "cxcywh", "xyxy")
    return boxes.clamp(-MAX_BOX_COORDINATE, MAX_BOX_COORDINATE)


def _shift_by_class(boxes: Tensor, labels: Tensor) -> Tensor:
    """Boxes [..., 4] in float64, shifted so that boxes of different classes cannot overlap.  labels [...].

    With 80 classes a shifted float64 coordinate is exact to 2**-30 pixels, so overlaps within a class do not change.
    """
    return boxes.double() + (labels * (2 * MAX_BOX_COORDINATE + 1))[..., None]


def _detect_each_image(offsets: Tensor, candidates: _Candidates) -> list[Detections]:
    """The detections of each image, image by image."""
    defaults = default_boxes()
    nothing = Detections(offsets.new_zeros(0, 4, dtype=torch.float32), candidates.labels[:0], candidates.scores[:0])
    found = [nothing] * len(offsets)
    # Suppression depends only on higher scores: try the best 512, and more only if too few survive.
    waiting, k = [row for row, count in enumerate(candidates.counts) if count], INITIAL_TOPK
    while waiting:
        rows = torch.tensor(waiting)
        top = _select_top(candidates, rows, k)
        boxes = decode_boxes(offsets[rows], defaults, top.box_indices)
        shifted, scores = _shift_by_class(boxes, top.labels), top.scores.double()
        for number, (row, count) in enumerate(zip(waiting, (scores > 0).sum(dim=1).tolist(), strict=True)):
            keep = nms(shifted[number, :count], scores[number, :count], IOU_THRESHOLD)[:MAX_DETECTIONS]
            found[row] = Detections(boxes[number, keep], top.labels[number, keep], top.scores[number, keep])
        waiting = [row for row in waiting if len(found[row].scores) < MAX_DETECTIONS and k < candidates.counts[row]]
        k *= 4
    return found


def _detect_batched(offsets: Tensor, candidates: _Candidates) -> list[Detections]:
    """The detections of each image, all images at once; equal to those of `_detect_each_image`, bit for bit.

    Suppression takes the boxes kept so far and the next CANDIDATES_PER_BLOCK candidates, best first, until all images
    have MAX_DETECTIONS or no more candidates.
    """
    top = _select_top(candidates, slice(None), candidates.keys.shape[1])
    counts = (top.scores > 0).sum(dim=1)  # [N]
    defaults = _default_boxes_on(offsets.device)
    none = offsets.new_zeros(len(offsets), 0, 4, dtype=torch.float32)
    kept = Detections(none, top.labels[:, :0], top.scores[:, :0])  # padded: [N, D, ...]
    for start in range(0, top.scores.shape[1], CANDIDATES_PER_BLOCK):
        if start and not ((counts > start) & (kept.scores[:, -1] == 0)).any():  # no image needs more
            break
        block = _TopCandidates(*(part[:, start : start + CANDIDATES_PER_BLOCK] for part in top))
        following = Detections(decode_boxes(offsets, defaults, block.box_indices), block.labels, block.scores)
        pool = Detections(*(torch.cat(parts, dim=1) for parts in zip(kept, following, strict=True)))
        keep = _suppress(_shift_by_class(pool.boxes, pool.labels), pool.scores > 0)
        order = keep.int().argsort(dim=1, descending=True, stable=True)[:, :MAX_DETECTIONS]  # kept ones first
        kept = Detections(
            pool.boxes.gather(1, order[..., None].expand(-1, -1, 4)),
            pool.labels.gather(1, order),
            torch.where(keep, pool.scores, 0).gather(1, order),
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
            previous, keep = keep, valid & ~(suppresses & keep[:, :, None]).any(dim=1)
        if torch.equal(previous, keep):
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
