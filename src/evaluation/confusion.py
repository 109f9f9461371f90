"""The confusion matrix: detections from each category's best score on, matched with the ground truth at IoU 0.5.

Nothing here imports torch; see `artifacts`.  Shapes: D detections, B boxes of the ground truth, K categories, P pairs
of a detection and a box of its image.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from src.data.annotations.coco import Annotations
from src.evaluation.results import Results, index_of
from src.evaluation.thresholds import Thresholds
from src.runtime.output_files import atomic_write

MIN_IOU = 0.5


class TruthBoxes(NamedTuple):
    """The boxes of a validation file, without boxes that have no area."""

    boxes: np.ndarray  # [B, 4] ltrb in pixels, grouped by image
    labels: np.ndarray  # [B] in 1..K
    crowd: np.ndarray  # bool [B]
    first_box: np.ndarray  # [I + 1]: those of image i are boxes[first_box[i] : first_box[i + 1]]
    image_ids: np.ndarray  # [I]
    category_ids: np.ndarray  # [K]


def collect_truth_boxes(validation: Annotations) -> TruthBoxes:
    ids = np.array([category.id for category in validation.categories], np.int64)
    return TruthBoxes(
        validation.boxes, validation.labels, validation.crowd, validation.first_box, validation.image_ids, ids
    )


def min_scores_by_category(thresholds: Thresholds) -> np.ndarray:
    """The score from which on detections of each category count, [K].

    A category without its own best score takes the one of all categories; infinity if that is not defined either.
    """
    overall = thresholds.overall.score if thresholds.overall else np.inf
    return np.array([own.score if own else overall for own in thresholds.by_category])


def confusion_matrix(results: Results, truth: TruthBoxes, min_scores: np.ndarray) -> np.ndarray:
    """Counts [K + 1, K + 1]: rows are the ground truth, columns the detections, the last of each is the background.

    min_scores: [K]; detections with a lower score do not count.
    As in COCO's scoring, detections are matched best first, each with the free box of the highest IoU; but here boxes
    of any category are candidates.  An unmatched detection that lies in a crowd of its category is ignored.
    """
    size = len(truth.category_ids) + 1
    labels = index_of(results.category_ids, truth.category_ids)  # from 0
    kept = np.flatnonzero(results.scores >= min_scores[labels])
    kept = kept[np.argsort(-results.scores[kept], kind="stable")]
    labels = labels[kept]
    boxes = results.boxes[kept].copy()
    boxes[:, 2:] += boxes[:, :2]
    images = index_of(results.image_ids[kept], truth.image_ids)
    detection, box = _pair_with_boxes(images, truth.first_box)
    crowd = truth.crowd[box]
    iou = _pair_ious(boxes, truth.boxes, crowd, detection, box)
    overlapping = iou >= MIN_IOU
    candidates = overlapping & ~crowd
    matched = _match(detection[candidates], box[candidates], iou[candidates], len(kept))
    in_crowd = np.zeros(len(kept), bool)
    in_crowd[detection[overlapping & crowd & (truth.labels[box] - 1 == labels[detection])]] = True
    counted = (matched >= 0) | ~in_crowd
    rows = np.full(len(kept), size - 1)
    rows[matched >= 0] = truth.labels[matched[matched >= 0]] - 1
    matrix = np.zeros((size, size), np.int64)
    np.add.at(matrix, (rows[counted], labels[counted]), 1)
    missed = ~truth.crowd
    missed[matched[matched >= 0]] = False
    np.add.at(matrix, (truth.labels[missed] - 1, size - 1), 1)
    return matrix


def _pair_with_boxes(images: np.ndarray, first_box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Detection and box of each pair, [P].  images: [D], the index of each detection's image."""
    counts = (first_box[1:] - first_box[:-1])[images]
    detection = np.repeat(np.arange(len(images)), counts)
    index_in_image = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return detection, first_box[images][detection] + index_in_image


def _pair_ious(
    boxes: np.ndarray, truth_boxes: np.ndarray, crowd: np.ndarray, detection: np.ndarray, box: np.ndarray
) -> np.ndarray:
    """IoU of each pair, [P]; for a crowd box the share of the detection inside it.  crowd, detection, box: [P]."""
    # As [4, ...], because contiguous columns are faster.
    first, second = (np.ascontiguousarray(each.T) for each in (boxes, truth_boxes))
    intersection = np.ones(len(detection))
    for low, high in ((0, 2), (1, 3)):
        side = np.minimum(first[high][detection], second[high][box])
        side -= np.maximum(first[low][detection], second[low][box])
        intersection *= np.maximum(side, 0)
    area = _area(boxes)[detection]
    return intersection / np.maximum(np.where(crowd, area, area + _area(truth_boxes)[box] - intersection), 1e-9)


def _match(detection: np.ndarray, box: np.ndarray, iou: np.ndarray, count: int) -> np.ndarray:
    """The box of each of `count` detections, -1 for none.  Detections are numbered by score, best first.

    detection, box, iou: [P].
    """
    order = np.lexsort((-iou, detection))
    detection, box = detection[order], box[order]
    # Deferred acceptance: in each round every detection chooses a box, and each box keeps the best detection that chose
    # it.  The result equals that of detections which choose one after the other.
    while True:
        _, first = np.unique(detection, return_index=True)
        best = np.full(box.max(initial=-1) + 1, count)  # the detection that each box keeps
        np.minimum.at(best, box[first], detection[first])
        possible = detection <= best[box]
        if possible.all():
            break
        detection, box = detection[possible], box[possible]
    matched = np.full(count, -1)
    matched[detection[first]] = box[first]
    return matched


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def write_confusion(path: Path, matrix: np.ndarray, names: list[str], min_scores: np.ndarray) -> None:
    """Writes the matrix with its names, IoU and scores as JSON.  Raises UserError."""
    content = {
        "rows": "ground truth",
        "columns": "detections",
        "names": [*names, "background"],
        "iou": MIN_IOU,
        "min_scores": [float(value) if np.isfinite(value) else None for value in min_scores],
        "matrix": matrix.tolist(),
    }
    with atomic_write(path) as file:
        file.write(json.dumps(content, ensure_ascii=False).encode())
