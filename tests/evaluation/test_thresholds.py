"""Score thresholds against a search over all scores."""

import numpy as np
import pytest

from src.data.annotations.coco import read_annotations
from src.evaluation.results import Results
from src.evaluation.scoring import score
from tests.helpers.datasets import annotation, write_coco

COUNT = 30  # boxes of category 1; category 2 has half as many


@pytest.fixture(scope="module")
def annotations(tmp_path_factory):
    """Each image has a box of category 1 and a crowd of category 2, every second image also a box of category 2."""
    entries = []
    for image in range(1, COUNT + 1):
        entries.append(annotation(image, (10, 10, 40, 40)))
        entries.append(annotation(image, (100, 60, 50, 50), 2, iscrowd=1))
        if image % 2:
            entries.append(annotation(image, (60, 10, 40, 40), 2))
    categories = [{"id": number, "name": name} for number, name in ((1, "square"), (2, "disc"), (3, "star"))]
    folder = write_coco(tmp_path_factory.mktemp("data"), entries, images=COUNT, categories=categories, splits=("val",))
    return read_annotations(folder / "annotations" / "instances_val2017.json", folder / "val2017", for_scoring=True)


def detections(seed: int) -> tuple[Results, list[tuple[int, float, bool]]]:
    """Right and wrong detections and some inside crowds; and (category, score, right) of those outside crowds."""
    random = np.random.default_rng(seed)
    rows, truth = [], []
    for image in range(1, COUNT + 1):
        for category, box, is_there in ((1, (10, 10, 40, 40), True), (2, (60, 10, 40, 40), image % 2 == 1)):
            value = round(random.uniform(0.05, 1), 6)
            if is_there and random.uniform() < 0.8:
                rows.append((image, category, box, value))
                truth.append((category, value, True))
            wrong = round(random.uniform(0.05, 0.7), 6)
            rows.append((image, category, (5, 80, 20, 20), wrong))
            truth.append((category, wrong, False))
        rows.append((image, 2, (110, 70, 20, 20), 0.99))  # in the crowd: neither right nor wrong
    images, categories, boxes, scores = map(np.array, zip(*rows, strict=True))
    return Results(images, categories, boxes.astype(np.float64), scores), truth


def best_by_search(truth: list[tuple[int, float, bool]], category: int, total: int) -> tuple[float, float, float]:
    """F1, precision and recall at the score with the best F1."""
    own = [(value, right) for each, value, right in truth if each == category]
    found = []
    for min_score in {value for value, _ in own}:
        kept = [right for value, right in own if value >= min_score]
        precision, recall = sum(kept) / len(kept), sum(kept) / total
        found.append((2 * precision * recall / max(precision + recall, 1e-9), precision, recall))
    return max(found)


@pytest.mark.parametrize("seed", range(5))
def test_the_best_f1_equals_that_of_a_search_over_all_scores(annotations, seed):
    results, truth = detections(seed)
    thresholds = score(annotations, results).thresholds
    for category, total in ((1, COUNT), (2, COUNT // 2)):
        found = thresholds.by_category[category - 1]
        f1, precision, recall = best_by_search(truth, category, total)
        assert (found.f1, found.precision, found.recall) == pytest.approx((f1, precision, recall))
        kept = [right for each, value, right in truth if each == category and value >= found.score]
        assert sum(kept) / len(kept) == pytest.approx(precision)
    assert thresholds.by_category[2] is None


def test_the_overall_score_maximises_the_mean_f1(annotations):
    results, _ = detections(0)
    thresholds = score(annotations, results).thresholds
    assert np.isnan(thresholds.f1[:, 2]).all()
    means = thresholds.f1[:, :2].mean(axis=1)
    assert thresholds.overall.f1 == pytest.approx(means.max())
    best = round(100 * thresholds.overall.score)
    assert means[best] == means.max() > means[best + 1 :].max()  # the highest of the best scores
    state = thresholds.as_state()
    assert state["all"] == thresholds.overall.score
    assert len(state["by_label"]) == 3 and state["by_label"][2] is None


def test_without_detections_no_threshold_is_defined(annotations):
    empty = Results(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0))
    thresholds = score(annotations, empty).thresholds
    assert thresholds.overall is None
    assert thresholds.by_category == [None, None, None]


def test_shards_give_the_same_thresholds(annotations):
    from src.evaluation.scoring import merge_shards, score_shard, shard_categories

    results, _ = detections(1)
    whole = score(annotations, results).thresholds
    shards = [score_shard(shard) for shard in shard_categories(annotations, results, 4)]
    merged = merge_shards(annotations, shards).thresholds
    assert merged.as_state() == whole.as_state()
