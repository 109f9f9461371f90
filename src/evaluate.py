"""From network output to detections, gathered from all processes and scored.

Shapes: N images of a batch, C labels with the background, A = 8,732 default boxes, D detections, K categories.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, nms

from .coco import Annotations
from .default_boxes import decode, default_boxes
from .distributed import Processes
from .report import NullReport
from .scoring import DECIMALS, Results, Scores, join_results, score
from .train import autocast

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


class Evaluation(NamedTuple):
    """What `evaluate` found out."""

    scores: Scores  # on every rank
    results: Results | None  # on rank 0
    non_finite: int  # default boxes of all images whose output was NaN or infinite; they detect nothing


def to_results(detections: list[Detections], indices: np.ndarray, annotations: Annotations) -> Results:
    """Detections of the images at `indices` [N] of the annotations, best first within an image."""
    counts = [len(found.scores) for found in detections]
    image = np.repeat(indices, counts)
    boxes, labels, scores = (_on_host(parts) for parts in zip(*detections, strict=True))
    corners = boxes.astype(np.float64) * np.tile(annotations.sizes[image], 2)
    corners[:, 2:] -= corners[:, :2]
    category_ids = np.array([category.id for category in annotations.categories], np.int64)
    return Results(
        annotations.image_ids[image], category_ids[labels - 1], corners.round(DECIMALS), scores.astype(np.float64)
    )


def _on_host(parts: tuple[Tensor, ...]) -> np.ndarray:
    return torch.cat(parts).cpu().numpy()


def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    annotations: Annotations,
    *,
    device: torch.device,
    half: bool = False,
    dist: Processes | None = None,
    progress: Callable[[int, str], AbstractContextManager] | None = None,
) -> Evaluation:
    """Detects in every image of every rank's loader and scores all together, on rank 0.

    model: without the wrapper of several processes; its batch-norm buffers must be the same on all ranks.
    loader: gives images [N, 3, 300, 300] on the device and their indices [N] in the annotations.  half: autocast, as
    in training.  progress: `Report.progress` or the like.  All ranks must call this, and get the same scores.
    """
    dist = dist or Processes(0, 1, device, None)
    progress = progress or NullReport().progress
    with evaluating(model), torch.inference_mode(), progress(len(loader), "Evaluation") as bar:
        results, non_finite = _detect_all(model, loader, annotations, device=device, half=half, bar=bar)
    gathered = dist.gather_arrays([*results, np.array(non_finite)])
    if gathered is None:
        return Evaluation(*dist.broadcast_object())
    results = join_results((Results(*arrays) for *arrays, _ in gathered), annotations)
    non_finite = sum(int(count) for *_, count in gathered)
    scores = score(annotations, results)
    dist.broadcast_object((scores, None, non_finite))
    return Evaluation(scores, results, non_finite)


def _detect_all(
    model: nn.Module, loader: Iterable, annotations: Annotations, *, device: torch.device, half: bool, bar
) -> tuple[Results, int]:
    """This rank's results, and how many default boxes' outputs were not finite."""
    defaults = default_boxes().to(device)
    broken = torch.zeros((), dtype=torch.int64, device=device)
    parts = []
    for images, indices in loader:
        with autocast(device, half):
            offsets, logits = model(images)
        usable = finite_boxes(offsets, logits)
        broken += (~usable).sum()
        found = detect(offsets, logits, defaults=defaults, usable=usable)
        parts.append(to_results(found, indices.cpu().numpy(), annotations))
        bar.update()
    return join_results(parts, annotations), int(broken)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
