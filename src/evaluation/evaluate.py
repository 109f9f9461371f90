"""The detections of all images, gathered from all processes and scored.

Shapes: N images of a batch.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from src.data.annotations.coco import Annotations
from src.data.pipelines.loaders import EvaluationLoader
from src.evaluation.scoring import DECIMALS, Results, Scores, deal, join_results, merge_shards, score, score_share
from src.evaluation.timing import Stopwatch, of_all_processes
from src.report.progress import Bar, NullBar
from src.report.report import NullReport
from src.runtime.distributed import Processes
from src.runtime.precision import autocast, half_is_fast
from src.ssd.detect import Detections, EndToEndDetector, detect, finite_boxes, strip_padding
from src.ssd.model import fold_batch_norms


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How a process runs the network over images."""

    batch_size: int  # images a step of this process
    num_workers: int  # worker processes
    amp: bool  # half precision


@torch.no_grad()
def find(
    model: nn.Module,
    images: Tensor,
    *,
    device: torch.device,
    half: bool = False,
    watch: Stopwatch | None = None,
) -> tuple[list[Detections], int]:
    """The detections of each image, and how many default boxes' outputs were not finite.

    model: a network, for which the images [N, 3, 300, 300] on the device are normalised, or a WholeDetector, for which
    they are uint8; that one does not tell of its outputs, so they count as finite.
    """
    watch = watch or Stopwatch()
    if isinstance(model, EndToEndDetector):
        found = strip_padding(*model(images))
        watch.lap("network")
        return found, 0
    with autocast(device, half):
        offsets, logits = model(images)
    valid = finite_boxes(offsets, logits)
    broken = int((~valid).sum())  # waits for a GPU, so that the network's time is told apart
    watch.lap("network")
    return detect(offsets, logits, valid=valid), broken


def prepare_for_inference(model: nn.Module, *, device: torch.device, half: bool) -> nn.Module:
    """The model, in evaluation mode, as it is fastest: folded, but for half precision.

    The rounding of folded weights to float16 would move detections.
    """
    return model if half and half_is_fast(device) else fold_batch_norms(model)


class Evaluation(NamedTuple):
    """What `evaluate` found out."""

    scores: Scores  # on every rank
    results: Results | None  # on rank 0
    non_finite: int  # default boxes of all images whose output was NaN or infinite; they detect nothing
    seconds: dict[str, float]  # where the time went, see `of_all_processes`; on rank 0, elsewhere empty


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
    loader: EvaluationLoader,
    annotations: Annotations,
    *,
    device: torch.device,
    half: bool = False,
    dist: Processes | None = None,
    progress: Callable[[int, str], AbstractContextManager] | None = None,
    helpers: int = 0,
) -> Evaluation:
    """Detects in every image of every rank's loader and scores all together, each rank some of the categories.

    model: without the wrapper of several processes; its batch-norm buffers must be the same on all ranks.
    loader: gives images [N, 3, 300, 300] as `find` wants them and their indices [N] in the annotations.
    half: autocast, as in training.  progress: `Report.progress` or the like.
    helpers: processes that may score beside a lone one.
    All ranks must call this, and get the same scores.
    """
    dist = dist or Processes.single(device)
    progress = progress or NullReport().progress
    watch = Stopwatch()
    with evaluating(model), torch.inference_mode(), progress(len(loader), "Evaluation") as bar:
        network = prepare_for_inference(model, device=device, half=half)
        results, non_finite = _detect_all(network, loader, annotations, device=device, half=half, bar=bar, watch=watch)
    return score_distributed(dist, annotations, results, non_finite, watch=watch, helpers=helpers)


def _detect_all(
    model: nn.Module,
    loader: EvaluationLoader,
    annotations: Annotations,
    *,
    device: torch.device,
    half: bool,
    bar: Bar | NullBar,
    watch: Stopwatch,
) -> tuple[Results, int]:
    """This rank's results, and how many default boxes' outputs were not finite."""
    broken = 0
    parts = []
    for images, indices in loader:
        watch.lap("loading")
        found, not_finite = find(model, images, device=device, half=half, watch=watch)
        broken += not_finite
        parts.append(to_results(found, indices.cpu().numpy(), annotations))
        bar.update()
        watch.lap("detections")
    watch.lap("loading")
    results = join_results(parts, annotations)
    watch.lap("detections")
    return results, broken


def score_distributed(
    dist: Processes, annotations: Annotations, results: Results, non_finite: int, *, watch: Stopwatch, helpers: int = 0
) -> Evaluation:
    """Scores what all ranks have found; results, non_finite: this rank's.  All ranks must call this."""
    gathered = dist.gather_arrays((results, non_finite))
    shares = None
    if gathered is not None:
        results = join_results((part for part, _ in gathered), annotations)
        non_finite = sum(count for _, count in gathered)
        watch.lap("gathering")
        if dist.world_size == 1:
            scores = score(annotations, results, helpers=helpers)
            watch.lap("scoring")
            return Evaluation(scores, results, non_finite, of_all_processes([watch]))
        shares = deal(annotations, results, dist.world_size)
    share = dist.scatter(shares)
    watch.lap("gathering")
    part = score_share(share)
    watch.lap("scoring")
    gathered = dist.gather_arrays((part, watch))
    if gathered is None:
        return Evaluation(*dist.broadcast_object())
    parts, watches = zip(*gathered, strict=True)
    scores = merge_shards(annotations, parts)
    watch.lap("gathering")
    dist.broadcast_object((scores, None, non_finite, {}))
    return Evaluation(scores, results, non_finite, of_all_processes([watch, *watches[1:]]))


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
