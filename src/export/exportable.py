"""The detector as one module, from pixels to detections in tensor operations alone, so that `torch.export` takes it.

Shapes: N images, A = 8,732 default boxes, K categories, T = 200 candidates of a class, D = 200 detections.
"""

import torch
from torch import Tensor, nn

from src.data.pipelines.batch import IMAGENET_MEAN, IMAGENET_STD
from src.ssd.default_boxes import default_boxes
from src.ssd.detect import (
    IOU_THRESHOLD,
    MAX_CANDIDATES,
    MAX_DETECTIONS,
    SCORE_THRESHOLD,
    EndToEndDetector,
    decoded,
    finite_boxes,
)
from src.ssd.model import fold_batch_norms

PLACE = 2.0**-45  # a place among the default boxes behind a score; scores above the threshold lie 2^-28 apart


def fused(network: nn.Module) -> nn.Module:
    """A copy of the network for evaluation, in float32 on the CPU, its batch-norms folded into the convolutions."""
    return fold_batch_norms(network.to("cpu", torch.float32).eval()).to(memory_format=torch.contiguous_format)


class ExportableDetector(EndToEndDetector):
    """Finds what `normalise`, the network and `detect` find, without a Python branch or loop that depends on values."""

    scale: Tensor  # [3, 1, 1], as the next
    shift: Tensor
    defaults: Tensor  # [A, 4] cxcywh

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        self.register_buffer("scale", 1 / (255 * deviation))
        self.register_buffer("shift", mean / deviation)
        self.register_buffer("defaults", default_boxes().clone())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pixels = images.to(torch.float32, memory_format=torch.channels_last) * self.scale - self.shift
        offsets, logits = self.network(pixels)
        return select(*candidates(offsets, logits, self.defaults))


def candidates(offsets: Tensor, logits: Tensor, defaults: Tensor) -> tuple[Tensor, Tensor]:
    """The best 200 default boxes of each class, best first: boxes [N, K, T, 4] ltrb and scores [N, K, T].

    A score of 0 is none.  offsets [N, 4, A], logits [N, C, A], defaults [A, 4] cxcywh.
    """
    valid = finite_boxes(offsets, logits)[:, None]  # [N, 1, A]
    probabilities = torch.where(valid, logits.softmax(dim=1)[:, 1:], 0)  # [N, K, A]
    # Of equal scores the first default box is better, as for `detect`; topk alone gives any of them.
    place = torch.arange(probabilities.shape[2], device=logits.device) * PLACE
    box = (probabilities.double() - place).topk(MAX_CANDIDATES, dim=2).indices  # [N, K, T]
    scores = probabilities.gather(2, box)
    boxes = decoded(offsets, defaults, box.flatten(1)).unflatten(1, box.shape[1:])
    return boxes, torch.where(scores > SCORE_THRESHOLD, scores, 0)


def select(boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Non-maximum suppression within each class, one detection of every image a turn: boxes, labels, scores.

    The best candidate that is left is a detection, and takes those of its class that it overlaps with it.  Turns end
    when no image has a candidate left.  boxes [N, K, T, 4], scores [N, K, T], best first; gives [N, D, 4], [N, D]
    int64 and [N, D], best first, then 0.
    """
    images = torch.arange(scores.shape[0], device=scores.device)
    precise = boxes.double()  # as in `detect`
    turn = torch.zeros(1, dtype=torch.int64, device=scores.device)
    detections = scores.new_zeros(scores.shape[0], MAX_DETECTIONS)

    def goes_on(turn: Tensor, left: Tensor, best: Tensor, chosen: Tensor, detections: Tensor) -> Tensor:
        return ((turn < MAX_DETECTIONS) & (best > 0).any()).all()

    def take(turn: Tensor, left: Tensor, best: Tensor, chosen: Tensor, detections: Tensor) -> tuple[Tensor, ...]:
        score, category = best.max(dim=1, keepdim=True)  # [N, 1], the first of equals
        row = left[images, category[:, 0]]  # [N, T], the scores of its class
        place = row.argmax(dim=1, keepdim=True)
        boxes_of_class = precise[images, category[:, 0]]  # [N, T, 4]
        overlap = _iou(boxes_of_class, boxes_of_class[images, place[:, 0]][:, None])
        row = torch.where(overlap > IOU_THRESHOLD, 0, row).scatter(1, place, 0)
        return (
            turn + 1,
            left.index_put((images, category[:, 0]), row),
            best.scatter(1, category, row.amax(dim=1, keepdim=True)),
            chosen.scatter(1, turn.expand_as(category), category * left.shape[2] + place),
            detections.scatter(1, turn.expand_as(category), score),
        )

    start = (turn, scores, scores[:, :, 0].clone(), torch.zeros_like(detections, dtype=torch.int64), detections)
    _, _, _, chosen, detections = torch.while_loop(goes_on, take, start)
    found = detections > 0
    labels = torch.where(found, chosen // scores.shape[2] + 1, 0)
    return torch.where(found[..., None], boxes.flatten(1, 2)[images[:, None], chosen], 0), labels, detections


def _iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of boxes and others [..., 4] ltrb, pair by pair; NaN for two without area."""
    sides = torch.minimum(boxes[..., 2:], others[..., 2:]) - torch.maximum(boxes[..., :2], others[..., :2])
    intersection = sides.clamp(min=0).prod(dim=-1)
    areas = (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1) + (others[..., 2:] - others[..., :2]).prod(dim=-1)
    return intersection / (areas - intersection)
