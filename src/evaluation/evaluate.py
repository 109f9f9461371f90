"""Detections on all images, collected from all ranks and scored.

Shapes: N images of a batch, D detections of a batch.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from src.data.annotations.coco import Annotations
from src.data.pipelines.loaders import EvaluationLoader
from src.evaluation.results import DECIMALS, Results, join_results, scale_boxes
from src.evaluation.scoring import CocoMetrics, merge_shards, score_shard, shard_categories
from src.evaluation.timing import summarise_ranks, timed
from src.evaluation.validation_loss import ValidationLoss, mean_losses
from src.report.progress import Bar, NullBar
from src.report.report import Report
from src.runtime.distributed import Processes
from src.runtime.precision import autocast, half_is_fast
from src.ssd.detect import Detections, EndToEndDetector, detect, finite_box_mask, strip_padding
from src.ssd.model import fold_batch_norms

Progress = Callable[[int, str], AbstractContextManager[Bar | NullBar]]  # `Report.progress`


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How each process runs the network over images."""

    batch_size: int  # of one process
    num_workers: int  # worker processes
    amp: bool  # half precision


class Evaluation(NamedTuple):
    """The outcome of `evaluate`."""

    coco_metrics: CocoMetrics  # on every rank
    results: Results | None  # on rank 0
    non_finite: int  # default boxes of all images whose output was NaN or infinite; they detect nothing
    seconds: dict[str, float]  # where the time went, see `summarise_ranks`; on rank 0, elsewhere empty
    losses: dict[str, float | None] | None = None  # see `mean_losses`; None for an exported file


def evaluate(
    model: nn.Module,
    loader: EvaluationLoader,
    annotations: Annotations,
    *,
    processes: Processes,
    amp: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """The scores of the model's detections on the images of all ranks' loaders.

    model: without DDP's wrapper; its batch-norm buffers must be equal on all ranks.
    loader: yields images [N, 3, 300, 300] as `detect_batch` takes them, and their indices [N] in the annotations.
    amp: autocast, as in training.
    All ranks must call this.  Each detects on its own images and scores some of the categories; all get all scores.
    """
    seconds: dict[str, float] = {}
    bar_context = progress(len(loader), "Evaluation") if progress else NullBar()
    with evaluating(model), torch.inference_mode(), bar_context as bar:
        network = prepare_for_inference(model, device=processes.device, amp=amp)
        loss = None if isinstance(model, EndToEndDetector) else ValidationLoss(annotations, processes.device)
        start = time.perf_counter()
        non_finite = 0
        batches = []
        for images, indices in loader:
            observe = partial(loss.add, indices=indices.cpu().numpy()) if loss else None
            detections, not_finite = detect_batch(network, images, amp=amp, seconds=seconds, observe=observe)
            non_finite += not_finite
            with timed(seconds, "detections"):
                batches.append(to_results(detections, indices.cpu().numpy(), annotations))
            bar.update()
        total = time.perf_counter() - start
    seconds["loading"] = total - seconds.get("network", 0.0) - seconds.get("detections", 0.0)
    own = RankResults(join_results(batches, annotations), non_finite, loss.sums() if loss else None)
    return score_distributed(processes, annotations, own, seconds)


@torch.no_grad()
def detect_batch(
    model: nn.Module,
    images: Tensor,
    *,
    amp: bool = False,
    seconds: dict[str, float] | None = None,
    observe: Callable[[Tensor, Tensor], None] | None = None,
) -> tuple[list[Detections], int]:
    """The detections in each image, and the number of default boxes whose outputs were not finite.

    model: a network, which takes normalised images [N, 3, 300, 300], or an EndToEndDetector, which takes uint8 images
    and returns detections alone, so that all its outputs count as finite.
    seconds: the time is added to its entries "network" and "detections".
    observe: is called with the network's offsets and logits; its time counts as "detections".
    """
    seconds = {} if seconds is None else seconds
    with timed(seconds, "network"):
        if isinstance(model, EndToEndDetector):
            return strip_padding(*model(images)), 0
        with autocast(images.device, amp):
            offsets, logits = model(images)
        valid = finite_box_mask(offsets, logits)
        non_finite = int((~valid).sum())  # waits for the GPU, so that its time counts as "network"
    with timed(seconds, "detections"):
        if observe:
            observe(offsets, logits)
        return detect(offsets, logits, valid=valid), non_finite


def prepare_for_inference(model: nn.Module, *, device: torch.device, amp: bool) -> nn.Module:
    """The model with its batch-norms folded into the convolutions, which is faster; in bfloat16 the model itself.

    The weights are folded in float32; autocast rounds them later.
    """
    # On the 16 photographs that a ResNet-18 was trained on (mAP 0.558), folding moved mAP by 5e-6 in emulated float16,
    # but by 1e-4 in emulated bfloat16 and by 5e-3 in a CPU's own bfloat16.
    in_bfloat16 = amp and device.type == "cpu" and half_is_fast(device)
    return model if in_bfloat16 else fold_batch_norms(model)


def to_results(detections: list[Detections], indices: np.ndarray, annotations: Annotations) -> Results:
    """The detections as results, best first within an image.  indices: [N], of the images in the annotations."""
    counts = [len(image.scores) for image in detections]
    image = np.repeat(indices, counts)  # [D]
    boxes, labels, scores = (torch.cat(parts).cpu().numpy() for parts in zip(*detections, strict=True))
    boxes = scale_boxes(boxes, annotations.sizes[image])
    boxes[:, 2:] -= boxes[:, :2]
    category_ids = np.array([category.id for category in annotations.categories], np.int64)
    return Results(
        annotations.image_ids[image], category_ids[labels - 1], boxes.round(DECIMALS), scores.astype(np.float64)
    )


class RankResults(NamedTuple):
    """One rank's results on its images."""

    results: Results
    non_finite: int
    loss_sums: list[float] | None  # of ValidationLoss


def score_distributed(
    processes: Processes, annotations: Annotations, own: RankResults, seconds: dict[str, float]
) -> Evaluation:
    """Scores the detections of all ranks.  own, seconds: this rank's.  All ranks must call this."""
    with timed(seconds, "gathering"):
        gathered = processes.gather(tuple(own), long_timeout=True)
    shards = None
    if gathered is not None:  # on rank 0
        with timed(seconds, "scoring"):
            results = join_results((results for results, _, _ in gathered), annotations)
            non_finite = sum(count for _, count, _ in gathered)
            losses = mean_losses([sums for _, _, sums in gathered], annotations)
            shards = shard_categories(annotations, results, processes.world_size)
    with timed(seconds, "gathering"):
        shard = processes.scatter(shards)
    with timed(seconds, "scoring"):
        metrics = score_shard(shard)
    with timed(seconds, "gathering"):
        gathered = processes.gather((metrics, seconds), long_timeout=True)
    if gathered is None:
        return Evaluation(*processes.broadcast_object())
    with timed(seconds, "scoring"):
        coco_metrics = merge_shards(annotations, [metrics for metrics, _ in gathered])
    processes.broadcast_object((coco_metrics, None, non_finite, {}, losses))
    all_seconds = summarise_ranks([seconds, *(others for _, others in gathered[1:])])
    return Evaluation(coco_metrics, results, non_finite, all_seconds, losses)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode; the end restores the mode of every module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def log_non_finite(report: Report, count: int) -> None:
    """Warns of default boxes whose outputs are NaN or infinite."""
    if count:
        report.warn(f"the outputs of {count} default boxes were not finite: these boxes detect nothing")
