"""The files of an evaluation: detections.json and the pictures.

Nothing here imports torch at module level, so that `src.evaluation.write_artifacts`, a process of its own, starts in
1 s of a core instead of 6 s.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from src.data.annotations.coco import Annotations
from src.evaluation.confusion import (
    TruthBoxes,
    collect_truth_boxes,
    confusion_matrix,
    min_scores_by_category,
    write_confusion,
)
from src.evaluation.results import Results, scale_boxes, write_results
from src.evaluation.scoring import IOU_THRESHOLDS, RECALLS, CocoMetrics
from src.evaluation.thresholds import SCORES, Thresholds
from src.report.confusion_plot import draw_confusion
from src.report.drawing import PANEL_SIDE
from src.report.image_plots import Example, draw_detections
from src.report.precision_recall_plot import draw_precision_recall
from src.report.run_folder import CONFUSION, CONFUSION_PICTURE, DETECTIONS, EXAMPLES, PRECISION_RECALL, TRAINING
from src.report.training_plot import draw_training
from src.runtime.errors import UserError

ARTIFACTS = DETECTIONS, PRECISION_RECALL, EXAMPLES, TRAINING, CONFUSION_PICTURE, CONFUSION
NUM_EXAMPLES = 8  # validation images in detections.png


class ArtifactInputs(NamedTuple):
    """The content of an evaluation's files, before any file is drawn or written."""

    results: Results
    precision: np.ndarray  # [T, R, K], see CocoMetrics
    thresholds: Thresholds
    truth: TruthBoxes
    names: list[str]  # of the K categories
    examples: list[Example]  # the images of detections.png
    metrics_file: Path | None  # metrics.jsonl of a training run, for training.png
    metrics_size: int  # bytes of it to read: later lines belong to the next picture


def collect_artifact_inputs(
    results: Results,
    coco_metrics: CocoMetrics,
    validation: Annotations,
    *,
    metrics_file: Path | None = None,
    metrics_size: int = 0,
) -> ArtifactInputs:
    """The inputs of `write_artifacts`; reads the example images.  Raises DataError if one of them cannot be read."""
    return ArtifactInputs(
        results=results,
        precision=coco_metrics.precision,
        thresholds=coco_metrics.thresholds,
        truth=collect_truth_boxes(validation),
        names=[category.name for category in validation.categories],
        examples=[_make_example(validation, results, index) for index in _example_indices(validation)],
        metrics_file=metrics_file,
        metrics_size=metrics_size,
    )


def write_artifacts(inputs: ArtifactInputs, output: Path) -> list[str]:
    """Writes the files into `output`; returns an error line for each file that cannot be written."""
    writers: list[Callable[[], object]] = [
        partial(write_results, output / DETECTIONS, inputs.results),
        partial(
            draw_precision_recall,
            inputs.precision,
            IOU_THRESHOLDS,
            RECALLS,
            inputs.names,
            output / PRECISION_RECALL,
            f1=(SCORES, inputs.thresholds.f1),
        ),
        partial(_write_confusion, inputs, output),
        partial(draw_detections, inputs.examples, output / EXAMPLES),
    ]
    if inputs.metrics_file is not None:
        writers.append(partial(draw_training, inputs.metrics_file, output / TRAINING, size=inputs.metrics_size))
    failures = []
    for write in writers:
        try:
            write()
        except UserError as error:
            failures.append(str(error))
    return failures


def _write_confusion(inputs: ArtifactInputs, output: Path) -> None:
    min_scores = min_scores_by_category(inputs.thresholds)
    matrix = confusion_matrix(inputs.results, inputs.truth, min_scores)
    write_confusion(output / CONFUSION, matrix, inputs.names, min_scores)
    draw_confusion(matrix, inputs.names, output / CONFUSION_PICTURE)


def _example_indices(validation: Annotations) -> np.ndarray:
    """Indices of the example images, spread evenly over the images with boxes; the same in every evaluation."""
    candidates = validation.with_boxes() if len(validation.boxes) else np.arange(len(validation))
    return candidates[np.linspace(0, len(candidates) - 1, min(NUM_EXAMPLES, len(candidates))).round().astype(int)]


def _make_example(validation: Annotations, results: Results, index: int) -> Example:
    """The image at its size in detections.png, with boxes and detections in pixels of that size."""
    from src.data.images.formats import decode_thumbnail  # here, because it imports torch

    names = {category.id: category.name for category in validation.categories}
    truth_boxes, labels = validation.targets(index)
    own = results.image_ids == validation.image_ids[index]
    boxes = results.boxes[own].copy()
    boxes[:, 2:] += boxes[:, :2]
    path, upright = validation.image_path(index), validation.upright
    image = decode_thumbnail(path, PANEL_SIDE, any_format=False, upright=upright).permute(1, 2, 0).numpy()
    scale = np.array(image.shape[1::-1]) / validation.sizes[index]  # [2]
    return Example(
        image=image,
        truth_boxes=scale_boxes(truth_boxes, scale),
        truth_names=[validation.categories[label - 1].name for label in labels],
        boxes=scale_boxes(boxes, scale),
        names=[names[category] for category in results.category_ids[own].tolist()],
        scores=results.scores[own],
    )
