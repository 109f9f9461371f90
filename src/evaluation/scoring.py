"""COCO's metrics of detections, by faster-coco-eval.

A category's precision and recall depend on its own boxes alone, so ranks score different categories (a CategoryShard
each) and the merged metrics equal those of one process bit for bit.
Shapes: B boxes, I images and K categories of the annotation file (K' of a shard), T = 10 IoU thresholds, R = 101
recalls, A = 4 area ranges, M = 3 limits on the number of detections per image.
"""

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from numpy.typing import ArrayLike

from src.data.annotations.coco import Annotations
from src.evaluation.results import Results, garbage_collector_paused, index_of
from src.evaluation.thresholds import Thresholds, find_best_thresholds

METRIC_NAMES = (
    "mAP",
    "AP50",
    "AP75",
    "AP small",
    "AP medium",
    "AP large",
    "AR1",
    "AR10",
    "AR100",
    "AR small",
    "AR medium",
    "AR large",
)
IOU_THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).round(2).tolist())
RECALLS = tuple(np.linspace(0, 1, 101).round(2).tolist())
# Cost of evaluating one category on an image without detections, in units of one detection.
COST_PER_IMAGE = 0.1


class CocoMetrics(NamedTuple):
    """COCO's metrics of detections.  None: not defined, because there is no ground truth."""

    summary: dict[str, float | None]  # the keys are METRIC_NAMES
    precision: np.ndarray  # [T, R, K], all areas, at most 100 detections per image; -1: not defined
    category_ap: dict[str, float | None]  # by name, in the order of the labels; equal names get their ids
    thresholds: Thresholds


def score(annotations: Annotations, results: Results) -> CocoMetrics:
    """The metrics, computed by this process alone; without detections all that are defined are 0."""
    (shard,) = shard_categories(annotations, results, 1)
    return merge_shards(annotations, [score_shard(shard)])


class CategoryShard(NamedTuple):
    """The categories that one rank scores, with their ground truth and detections."""

    labels: np.ndarray  # int64 [K'] in 1..K, ascending
    num_images: int
    truth: "BoxColumns"
    detections: "BoxColumns"


class ShardMetrics(NamedTuple):
    """Precision and recall of a shard's categories; -1: not defined, because there is no ground truth."""

    labels: np.ndarray  # the shard's, [K']
    precision: np.ndarray  # float64 [T, R, K', A, M]
    recall: np.ndarray  # float64 [T, K', A, M]
    score_at_recall: np.ndarray  # float64 [R, K'] score at which a recall is first reached at IoU 0.5; 0: never
    num_truth: np.ndarray  # int64 [K'] boxes without crowds


class BoxColumns(NamedTuple):
    """Boxes of the ground truth or of detections as the scorer takes them, each column [B]."""

    images: np.ndarray  # 1..I in the order of the image ids
    labels: np.ndarray  # 1..K
    boxes: np.ndarray  # [B, 4] left, top, width, height in pixels
    areas: np.ndarray
    crowd: np.ndarray  # 0 or 1
    scores: np.ndarray

    def select_shard(self, shard: int, shard_by_category: np.ndarray) -> "BoxColumns":
        """The boxes of a shard's categories, in the same order.  shard_by_category: [K], the shard of each category."""
        in_shard = shard_by_category[self.labels - 1] == shard
        return BoxColumns(*(column[in_shard] for column in self))


def shard_categories(annotations: Annotations, results: Results, count: int) -> list[CategoryShard]:
    """All categories, divided into `count` shards of about equal work; with fewer categories some shards are empty.

    The scorer stores ids as float64, which rounds large ones, so images and categories are numbered from 1.  Images are
    numbered in the order of their ids, in which a scorer that reads the files takes them, so that detections of equal
    score get the same order there and here.
    """
    numbers = np.argsort(np.argsort(annotations.image_ids)) + 1  # [I]
    truth = _convert_ground_truth(annotations, numbers)
    detections = BoxColumns(
        images=numbers[index_of(results.image_ids, annotations.image_ids)],
        labels=_labels(results.category_ids, annotations),
        boxes=results.boxes,
        areas=results.boxes[:, 2:].prod(axis=1),
        crowd=np.zeros(len(results.scores), np.int64),
        scores=results.scores,
    )
    detection_counts = np.bincount(detections.labels, minlength=1 + len(annotations.categories))[1:]
    shard_by_category = _assign_categories(detection_counts, len(numbers), count)
    return [
        CategoryShard(
            labels=np.flatnonzero(shard_by_category == shard) + 1,
            num_images=len(numbers),
            truth=truth.select_shard(shard, shard_by_category),
            detections=detections.select_shard(shard, shard_by_category),
        )
        for shard in range(count)
    ]


def _assign_categories(detection_counts: np.ndarray, num_images: int, count: int) -> np.ndarray:
    """The shard of each category, [K]: the largest category first, each to the shard with the least work so far.

    detection_counts: [K], the number of detections of each category.
    """
    shard_by_category = np.zeros(len(detection_counts), np.int64)
    loads = [(0.0, shard) for shard in range(count)]
    for index in np.argsort(-detection_counts, kind="stable"):
        load, shard = heapq.heappop(loads)
        shard_by_category[index] = shard
        heapq.heappush(loads, (load + detection_counts[index] + COST_PER_IMAGE * num_images, shard))
    return shard_by_category


def score_shard(shard: CategoryShard) -> ShardMetrics:
    """Precision and recall of a shard's categories."""
    if not len(shard.labels):
        levels, recalls = len(IOU_THRESHOLDS), len(RECALLS)
        precision, recall = np.zeros((levels, recalls, 0, 4, 3)), np.zeros((levels, 0, 4, 3))
        return ShardMetrics(shard.labels, precision, recall, np.zeros((recalls, 0)), np.zeros(0, np.int64))
    with garbage_collector_paused():
        truth, detections = (_to_coco(each, shard.num_images, shard.labels) for each in (shard.truth, shard.detections))
        scorer = COCOeval_faster(truth, detections, "bbox")
        scorer.evaluate()
        scorer.accumulate()
    counts = np.bincount(shard.truth.labels[shard.truth.crowd == 0], minlength=shard.labels.max() + 1)
    return ShardMetrics(
        labels=shard.labels,
        precision=scorer.eval["precision"],
        recall=scorer.eval["recall"],
        score_at_recall=np.asarray(scorer.eval["scores"])[0, :, :, 0, -1],
        num_truth=counts[shard.labels],
    )


def merge_shards(annotations: Annotations, shards: Sequence[ShardMetrics]) -> CocoMetrics:
    """The metrics of all categories; every category must be in one of the shards."""
    order = np.argsort(np.concatenate([shard.labels for shard in shards]))
    precision = np.concatenate([shard.precision for shard in shards], axis=2)[:, :, order]  # [T, R, K, A, M]
    recall = np.concatenate([shard.recall for shard in shards], axis=1)[:, order]  # [T, K, A, M]
    score_at_recall = np.concatenate([shard.score_at_recall for shard in shards], axis=1)[:, order]
    num_truth = np.concatenate([shard.num_truth for shard in shards])[order]
    scorer = COCOeval_faster(None, None, "bbox")
    scorer.eval = {"precision": precision, "recall": recall}
    scorer.summarize()
    overall = precision[:, :, :, 0, -1]  # all areas, 100 detections
    by_category = zip(_unique_names(annotations), np.moveaxis(overall, 2, 0), strict=True)
    return CocoMetrics(
        summary={name: _none_if_negative(value) for name, value in zip(METRIC_NAMES, scorer.stats, strict=True)},
        precision=overall,
        category_ap={name: _none_if_negative(precision.mean()) for name, precision in by_category},
        thresholds=find_best_thresholds(overall[0], score_at_recall, num_truth),
    )


def _unique_names(annotations: Annotations) -> Iterator[str]:
    """The categories' names; equal names get their ids."""
    counts = Counter(category.name for category in annotations.categories)
    for category in annotations.categories:
        yield category.name if counts[category.name] == 1 else f"{category.name} (id {category.id})"


def _convert_ground_truth(annotations: Annotations, numbers: np.ndarray) -> BoxColumns:
    """The boxes as the file gives them, neither dropped nor clipped as for training.  numbers: [I], of the images."""
    assert annotations.ground_truth is not None, "the annotations must be read with for_scoring=True"
    image_index, labels, boxes, areas, crowd = annotations.ground_truth
    return BoxColumns(
        images=numbers[image_index],
        labels=labels.astype(np.int64),
        boxes=boxes,
        areas=areas,
        crowd=crowd.astype(np.int64),
        scores=np.zeros(len(labels)),
    )


def _labels(category_ids: ArrayLike, annotations: Annotations) -> np.ndarray:
    """The labels 1..K of category ids, [B]."""
    return index_of(category_ids, [category.id for category in annotations.categories]) + 1


def _to_coco(boxes: BoxColumns, num_images: int, labels: np.ndarray) -> COCO:
    # loadRes would make a polygon of each box, which takes longer than everything else here.
    rows = zip(*(column.tolist() for column in boxes), strict=True)
    return COCO(
        {
            "images": [{"id": number} for number in range(1, num_images + 1)],
            "categories": [{"id": label} for label in labels.tolist()],
            "annotations": [
                {
                    "id": number,
                    "image_id": image,
                    "category_id": label,
                    "bbox": box,
                    "area": area,
                    "iscrowd": crowd,
                    "score": score,
                }
                for number, (image, label, box, area, crowd, score) in enumerate(rows, 1)
            ],
        }
    )


def _none_if_negative(value: float) -> float | None:
    return None if value < 0 else float(value)
