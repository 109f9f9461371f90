"""Detections as COCO's results, written and scored as COCO does, in shares or at once with the same outcome.

A category's precision and recall depend on its own detections alone, so each share is some of the categories.
Nothing here imports torch: helper processes score shares too.
Shapes: D detections, B boxes, K categories, I images of the annotation file; T = 10 IoU thresholds, R = 101 recalls,
A = 4 areas, M = 3 numbers of detections.
"""

import gc
import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from numpy.typing import ArrayLike

from src.data.annotations.coco import Annotations
from src.data.annotations.coco_json import AnnotationEntry, pieces
from src.runtime.background_process import Errand, spare_cores
from src.runtime.output_files import atomic_write

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
DECIMALS = 3  # of a pixel, in results: what is written is what is scored
WRITTEN_AT_ONCE = 50_000  # detections
WORTH_A_HELPER = 50_000  # detections; fewer are scored before a helper process has started
IDLE = 0.1  # what a category costs in an image without any of its detections, in detections


class Results(NamedTuple):
    """Detections of any number of images as COCO's result format has them, in plain arrays."""

    image_ids: np.ndarray  # int64 [D], the file's
    category_ids: np.ndarray  # int64 [D], the file's
    boxes: np.ndarray  # float64 [D, 4] left, top, width, height in pixels of the original image
    scores: np.ndarray  # float64 [D] in 0..1


class Scores(NamedTuple):
    """How good detections are.  None: not defined, for want of ground truth."""

    figures: dict[str, float | None]  # the keys are METRIC_NAMES
    precision: np.ndarray  # [10, 101, K] at IoU 0.5..0.95 and recall 0..1 for the best 100 detections; -1: not defined
    category_ap: dict[str, float | None]  # by name, in the order of `categories`; namesakes with their ids


def join_results(parts: Iterable[Results], annotations: Annotations) -> Results:
    """All of `parts` in the order of the annotation file's images."""
    joined = Results(*(np.concatenate(arrays) for arrays in zip(_no_results(), *parts, strict=True)))
    order = np.argsort(_find(joined.image_ids, annotations.image_ids), kind="stable")
    return Results(*(array[order] for array in joined))


def _no_results() -> Results:
    return Results(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0))


class _Result(msgspec.Struct):
    image_id: int
    category_id: int
    bbox: list[float]
    score: float


def write_results(path: Path, results: Results) -> None:
    """Writes COCO's results format, which any COCO scorer reads."""
    write_list(path, _parts(results))


def _parts(results: Results) -> Iterator[list[_Result]]:
    for start in range(0, len(results.scores), WRITTEN_AT_ONCE):
        columns = (array[start : start + WRITTEN_AT_ONCE].tolist() for array in results)
        yield [_Result(*row) for row in zip(*columns, strict=True)]


def write_list(path: Path, parts: Iterable[Sequence[msgspec.Struct]]) -> None:
    """Writes a JSON list, an object a line, from parts of it; an older file stays whole until it is replaced.

    Raises UserError where it cannot be written.
    """
    encoder = msgspec.json.Encoder()
    with atomic_write(path) as file, _collector_paused():
        before = b"["
        for part in parts:
            file.write(before + encoder.encode_lines(part).rstrip().replace(b"\n", b",\n"))
            before = b",\n"
        file.write(b"[]" if before == b"[" else b"]")


def score(annotations: Annotations, results: Results, *, helpers: int = 0) -> Scores:
    """COCO's 12 figures, by faster-coco-eval.  Nothing detected scores 0.

    helpers: processes that may score beside this one, where cores are idle and there is enough for them to do.
    """
    helpers = min(helpers, spare_cores(), len(results.scores) // WORTH_A_HELPER)
    own, *others = deal(annotations, results, 1 + helpers)
    with ExitStack() as stack:
        errands = [stack.enter_context(Errand()) for _ in others]
        for errand, share in zip(errands, others, strict=True):
            errand.send(score_share, share)
        parts = [score_share(own), *(errand.answer() for errand in errands)]
    return merge_shards(annotations, parts)


class Share(NamedTuple):
    """The categories that one process scores, with all that it needs for that."""

    labels: np.ndarray  # int64 [K'] in 1..K, ascending
    num_images: int
    truth: "_Boxes"
    found: "_Boxes"


class Part(NamedTuple):
    """What came of a share; -1: not defined, for want of ground truth."""

    labels: np.ndarray  # the share's, [K']
    precision: np.ndarray  # float64 [T, R, K', A, M]
    recall: np.ndarray  # float64 [T, K', A, M]


def deal(annotations: Annotations, results: Results, count: int) -> list[Share]:
    """All categories in `count` shares of about equal work; some are empty where there are fewer categories.

    The scorer computes with ids as float64, so it gets numbers from 1 in the ids' places.  Images keep the order of
    their ids, which is the one in which a scorer that reads the files meets them: equal scores then rank the same.
    """
    places = np.argsort(np.argsort(annotations.image_ids)) + 1  # [I]
    truth = _truth(annotations, places)
    found = _Boxes(
        images=places[_find(results.image_ids, annotations.image_ids)],
        labels=_labels(results.category_ids, annotations),
        boxes=results.boxes,
        areas=results.boxes[:, 2:].prod(axis=1),
        crowd=np.zeros(len(results.scores), np.int64),
        scores=results.scores,
    )
    owners = _owners(np.bincount(found.labels, minlength=1 + len(annotations.categories))[1:], len(places), count)
    return [
        Share(
            labels=np.flatnonzero(owners == owner) + 1,
            num_images=len(places),
            truth=truth.of_owner(owner, owners),
            found=found.of_owner(owner, owners),
        )
        for owner in range(count)
    ]


def _owners(detections: np.ndarray, num_images: int, count: int) -> np.ndarray:
    """The share of each category, the largest dealt first, each to the share that has least so far; [K].

    detections [K] of each category.
    """
    owners = np.zeros(len(detections), np.int64)
    loads = [(0.0, share) for share in range(count)]
    for label in np.argsort(-detections, kind="stable"):
        load, share = heapq.heappop(loads)
        owners[label] = share
        heapq.heappush(loads, (load + detections[label] + IDLE * num_images, share))
    return owners


def score_share(share: Share) -> Part:
    """The precision and recall of a share's categories."""
    if not len(share.labels):
        return Part(share.labels, np.zeros((10, 101, 0, 4, 3)), np.zeros((10, 0, 4, 3)))
    with _collector_paused():
        truth, found = (_coco(columns, share.num_images, share.labels) for columns in (share.truth, share.found))
        scorer = COCOeval_faster(truth, found, "bbox")
        scorer.evaluate()
        scorer.accumulate()
    return Part(share.labels, scorer.eval["precision"], scorer.eval["recall"])


def merge_shards(annotations: Annotations, parts: Sequence[Part]) -> Scores:
    """The figures of all categories, each of which is in one of the parts."""
    order = np.argsort(np.concatenate([part.labels for part in parts]))
    precision = np.concatenate([part.precision for part in parts], axis=2)[:, :, order]  # [T, R, K, A, M]
    recall = np.concatenate([part.recall for part in parts], axis=1)[:, order]  # [T, K, A, M]
    scorer = COCOeval_faster(None, None, "bbox")
    scorer.eval = {"precision": precision, "recall": recall}
    scorer.summarize()
    shown = precision[:, :, :, 0, -1]  # all areas, 100 detections
    by_category = zip(_names(annotations), np.moveaxis(shown, 2, 0), strict=True)
    return Scores(
        figures={name: _defined(value) for name, value in zip(METRIC_NAMES, scorer.stats, strict=True)},
        precision=shown,
        category_ap={name: _defined(column.mean()) for name, column in by_category},
    )


def _names(annotations: Annotations) -> Iterator[str]:
    """The categories' names, with the ids of those that share one."""
    counts = Counter(category.name for category in annotations.categories)
    for category in annotations.categories:
        yield category.name if counts[category.name] == 1 else f"{category.name} (id {category.id})"


class _Boxes(NamedTuple):
    """Columns of what the scorer takes, ground truth or detections, each [B]; boxes [B, 4] x, y, width, height."""

    images: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    scores: np.ndarray

    def of_owner(self, owner: int, owners: np.ndarray) -> "_Boxes":
        """The boxes of the categories that a share has, in the same order; owners [K]."""
        own = owners[self.labels - 1] == owner
        return _Boxes(*(column[own] for column in self))


def _truth(annotations: Annotations, places: np.ndarray) -> _Boxes:
    """The boxes of the file as they stand there: those that training drops or clips count, as in every COCO scorer."""
    entries = _annotation_entries(annotations.path)
    images = _find([entry.image_id for entry in entries], annotations.image_ids)
    entries = [entry for entry, image in zip(entries, images, strict=True) if image >= 0]
    boxes = np.array([entry.bbox for entry in entries], np.float64).reshape(-1, 4)
    areas = [box.prod() if entry.area is None else entry.area for entry, box in zip(entries, boxes[:, 2:], strict=True)]
    return _Boxes(
        images=places[images[images >= 0]],
        labels=_labels([entry.category_id for entry in entries], annotations),
        boxes=boxes,
        areas=np.array(areas),
        crowd=np.array([int(bool(entry.iscrowd)) for entry in entries]),
        scores=np.zeros(len(entries)),
    )


def _annotation_entries(path: Path) -> list[AnnotationEntry]:
    entries: list[AnnotationEntry] = []
    for part, first, some in pieces(path):
        if part == "annotations":
            entries[first:] = some
    return entries


def _labels(category_ids: ArrayLike, annotations: Annotations) -> np.ndarray:
    """Labels 1..K of category ids; [B]."""
    return _find(category_ids, [category.id for category in annotations.categories]) + 1


def _find(values: ArrayLike, among: ArrayLike) -> np.ndarray:
    """Where each value stands in `among`, whose values differ; -1 where it does not.  [B] int64."""
    values, among = np.asarray(values, np.int64), np.asarray(among, np.int64)
    order = np.argsort(among)
    nearest = order[np.searchsorted(among, values, sorter=order).clip(max=len(among) - 1)]
    return np.where(among[nearest] == values, nearest, -1)


def _coco(columns: _Boxes, num_images: int, labels: np.ndarray) -> COCO:
    # Not by loadRes, which takes longer than all the rest: it makes a polygon of each box.
    rows = zip(*(column.tolist() for column in columns), strict=True)
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


def _defined(value: float) -> float | None:
    return None if value < 0 else float(value)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Without the garbage collector, which would look through a million new objects time and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
