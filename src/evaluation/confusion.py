"""Which categories are taken for which: detections from the best score on, matched with the ground truth at IoU 0.5.

No import here loads torch; see `artifacts`.  Shapes: D detections, B boxes of the ground truth, K categories.
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


class GroundTruth(NamedTuple):
    """The boxes of a validation file."""

    boxes: np.ndarray  # [B, 4] ltrb in pixels, grouped by image
    labels: np.ndarray  # [B] in 1..K
    crowd: np.ndarray  # bool [B]
    first_box: np.ndarray  # [I + 1]: those of image i are boxes[first_box[i] : first_box[i + 1]]
    image_ids: np.ndarray  # [I]
    category_ids: np.ndarray  # [K]


def ground_truth(validation: Annotations) -> GroundTruth:
    ids = np.array([category.id for category in validation.categories], np.int64)
    return GroundTruth(
        validation.boxes, validation.labels, validation.crowd, validation.first_box, validation.image_ids, ids
    )


def min_scores(thresholds: Thresholds) -> np.ndarray:
    """From which score on detections of each category count, [K]: its own, or that of all; infinite without either."""
    overall = thresholds.overall.score if thresholds.overall else np.inf
    return np.array([own.score if own else overall for own in thresholds.by_category])


def confusion_matrix(results: Results, truth: GroundTruth, least: np.ndarray) -> np.ndarray:
    """Counts [K + 1, K + 1]: row k what is there, column k what was detected, the last of each the background.

    least [K]: detections with a lower score do not count.
    Detections choose by score, best first, as in COCO's scoring, but whatever the category: each takes the box that it
    overlaps most, of those that are left.  One that takes none and lies in a crowd of its category is ignored.
    """
    size = len(truth.category_ids) + 1
    labels = index_of(results.category_ids, truth.category_ids)  # from 0
    kept = np.flatnonzero(results.scores >= least[labels])
    kept = kept[np.argsort(-results.scores[kept], kind="stable")]
    labels = labels[kept]
    boxes = results.boxes[kept].copy()
    boxes[:, 2:] += boxes[:, :2]
    images = index_of(results.image_ids[kept], truth.image_ids)
    detection, box = _pairs(images, truth.first_box)
    crowd = truth.crowd[box]
    overlap = _overlaps(boxes, truth.boxes, crowd, detection, box)
    close = overlap >= MIN_IOU
    usable = close & ~crowd
    matched = _match(detection[usable], box[usable], overlap[usable], len(kept))
    in_crowd = np.zeros(len(kept), bool)
    in_crowd[detection[close & crowd & (truth.labels[box] - 1 == labels[detection])]] = True
    counted = (matched >= 0) | ~in_crowd
    there = np.full(len(kept), size - 1)
    there[matched >= 0] = truth.labels[matched[matched >= 0]] - 1
    matrix = np.zeros((size, size), np.int64)
    np.add.at(matrix, (there[counted], labels[counted]), 1)
    missed = ~truth.crowd
    missed[matched[matched >= 0]] = False
    np.add.at(matrix, (truth.labels[missed] - 1, size - 1), 1)
    return matrix


def _pairs(images: np.ndarray, first_box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every detection with every box of its image: indices of both.  images [D]."""
    counts = (first_box[1:] - first_box[:-1])[images]
    detection = np.repeat(np.arange(len(images)), counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return detection, first_box[images][detection] + within


def _overlaps(
    boxes: np.ndarray, truth_boxes: np.ndarray, crowd: np.ndarray, detection: np.ndarray, box: np.ndarray
) -> np.ndarray:
    """IoU of each pair; with a crowd, the share of the detection that lies in it.  detection, box, crowd: per pair."""
    first, second = (np.ascontiguousarray(each.T) for each in (boxes, truth_boxes))  # [4, ...]: columns are faster
    inside = np.ones(len(detection))  # pixels
    for low, high in ((0, 2), (1, 3)):
        side = np.minimum(first[high][detection], second[high][box])
        side -= np.maximum(first[low][detection], second[low][box])
        inside *= np.maximum(side, 0)
    area = _area(boxes)[detection]
    return inside / np.maximum(np.where(crowd, area, area + _area(truth_boxes)[box] - inside), 1e-9)


def _match(detection: np.ndarray, box: np.ndarray, overlap: np.ndarray, count: int) -> np.ndarray:
    """The box of each of `count` detections, -1 for none; detections are numbered by score, best first."""
    order = np.lexsort((-overlap, detection))
    detection, box = detection[order], box[order]
    # Deferred acceptance: in each round every detection chooses a box, and each box keeps the best detection that chose
    # it.  The result is as if the detections had chosen one after the other.
    while True:
        _, first = np.unique(detection, return_index=True)
        best = np.full(box.max(initial=-1) + 1, count)  # detection of each box
        np.minimum.at(best, box[first], detection[first])
        left = detection <= best[box]
        if left.all():
            break
        detection, box = detection[left], box[left]
    matched = np.full(count, -1)
    matched[detection[first]] = box[first]
    return matched


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def write_confusion(path: Path, matrix: np.ndarray, names: list[str], least: np.ndarray) -> None:
    """Writes the counts and what they are of, as JSON."""
    content = {
        "rows": "ground truth",
        "columns": "detections",
        "names": [*names, "background"],
        "iou": MIN_IOU,
        "min_scores": [float(value) if np.isfinite(value) else None for value in least],
        "matrix": matrix.tolist(),
    }
    with atomic_write(path) as file:
        file.write(json.dumps(content, ensure_ascii=False).encode())
