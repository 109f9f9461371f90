"""The 12 metrics against pycocotools, on real and on random annotations; the results file."""

import json
import os

import numpy as np
import pytest

from src.data.annotations.coco import read_annotations
from src.evaluation.results import Results, join_results, write_results
from src.evaluation.scoring import METRIC_NAMES, CocoMetrics, merge_shards, score, score_shard, shard_categories
from tests.helpers.datasets import annotation, write_annotations
from tests.helpers.pycocotools_scorer import plain_scorer

NO_RESULTS = Results(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0))


def noisy_results(file, *, seed: int, extra: int = 3, digits: int = 2) -> Results:
    """Detections near the boxes of an annotation file, some with a wrong category, and some anywhere."""
    rng = np.random.default_rng(seed)
    content = json.loads(file.read_text())
    categories = [entry["id"] for entry in content["categories"]]
    rows = []
    for entry in content["annotations"]:
        x, y, width, height = entry["bbox"]
        for _ in range(rng.integers(0, 4)):
            shift = rng.normal(0, 0.12, 4) * (width, height, width, height)
            label = entry["category_id"] if rng.random() < 0.8 else int(rng.choice(categories))
            box = np.array([x, y, width, height]) + shift
            rows.append((entry["image_id"], label, [*box[:2], *np.abs(box[2:])]))
    for image in content["images"]:
        for _ in range(rng.integers(0, extra + 1)):
            box = rng.uniform(0, 100, 4)
            rows.append((image["id"], int(rng.choice(categories)), list(box)))
    ids, labels, boxes = (np.array(column) for column in zip(*rows, strict=True))
    scores = rng.uniform(0.05, 1, len(rows)).round(digits)  # few digits: equal scores abound
    order = rng.permutation(len(rows))
    return Results(ids[order], labels[order], boxes[order], scores[order])


def random_file(folder, *, seed: int, image_ids, categories, crowds: float = 0.1):
    rng = np.random.default_rng(seed)
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in image_ids]
    boxes = []
    for number in range(1, 8 * len(images)):
        width, height = np.exp(rng.uniform(1, 5.5, 2)).round(2).tolist()
        x, y = rng.uniform(0, 300, 2).round(2).tolist()
        area = width * height * rng.uniform(0.3, 1)
        crowd = int(rng.random() < crowds)
        entry = annotation(
            image_ids[rng.integers(len(image_ids))], (x, y, width, height), id=number, area=area, iscrowd=crowd
        )
        entry["category_id"] = categories[rng.integers(len(categories) - 1)]["id"]  # the last has no box
        boxes.append(entry)
    return write_annotations(folder, {"images": images, "annotations": boxes, "categories": categories}, "val")


CATEGORIES = [{"id": 90, "name": "kite"}, {"id": 1, "name": "person"}, {"id": 7, "name": "train"}]


def scored_in_shards(annotations, results: Results, count: int) -> CocoMetrics:
    """As so many processes score, which may be more than there are categories."""
    return merge_shards(annotations, [score_shard(shard) for shard in shard_categories(annotations, results, count)])


def assert_same(ours: CocoMetrics, theirs: CocoMetrics) -> None:
    """Bit for bit."""
    assert (ours.summary, ours.category_ap) == (theirs.summary, theirs.category_ap)
    assert np.array_equal(ours.precision, theirs.precision)


def assert_scores_as_pycocotools(annotation_file, folder, results: Results) -> None:
    annotations = read_annotations(annotation_file, folder, for_scoring=True)
    results = join_results([results], annotations)
    write_results(folder / "detections.json", results)
    coco_metrics = score(annotations, results)
    for processes in (2, 3, 5):
        assert_same(scored_in_shards(annotations, results, processes), coco_metrics)
    expected = plain_scorer(annotation_file, folder / "detections.json")
    metrics = [-1 if value is None else value for value in coco_metrics.summary.values()]
    np.testing.assert_allclose(metrics, expected.stats, rtol=0, atol=1e-12)
    position = [sorted(category.id for category in annotations.categories).index(c.id) for c in annotations.categories]
    precision = expected.eval["precision"][:, :, position, 0, -1]
    np.testing.assert_allclose(coco_metrics.precision, precision, rtol=0, atol=1e-12)
    for category, column in zip(annotations.categories, np.moveaxis(precision, 2, 0), strict=True):
        ap = coco_metrics.category_ap[category.name]
        assert ap == (pytest.approx(column.mean()) if column.max() > -1 else None)


def test_metrics_are_pycocotools_on_photographs(coco128, tmp_path):
    file = coco128 / "annotations" / "instances_train2017.json"
    assert_scores_as_pycocotools(file, tmp_path, noisy_results(file, seed=1))


@pytest.mark.parametrize("seed", range(4))
def test_metrics_are_pycocotools_on_random_boxes_and_crowds(tmp_path, seed):
    image_ids = np.random.default_rng(seed).permutation(60)[:25].tolist()  # in no order, with a 0
    file = random_file(tmp_path, seed=seed, image_ids=image_ids, categories=CATEGORIES)
    assert_scores_as_pycocotools(file, tmp_path, noisy_results(file, seed=seed + 10, digits=1))


def test_ids_beyond_float64_stay_distinct(tmp_path):
    image_ids = [2**63 - 1, 2**53, 2**53 + 1, 2**63 - 2, -(2**63)]
    file = random_file(tmp_path, seed=5, image_ids=image_ids, categories=CATEGORIES)
    results = noisy_results(file, seed=6)
    assert_scores_as_pycocotools(file, tmp_path, results)
    written = json.loads((tmp_path / "detections.json").read_text())
    assert {entry["image_id"] for entry in written} == set(results.image_ids.tolist())


def test_more_than_100_detections_of_a_category_in_an_image(tmp_path):
    file = random_file(tmp_path, seed=8, image_ids=[1, 2], categories=CATEGORIES)
    assert_scores_as_pycocotools(file, tmp_path, noisy_results(file, seed=9, extra=900))


def test_boxes_that_training_drops_or_clips_count_as_in_every_scorer(tmp_path):
    images = [{"id": 1, "file_name": "1.jpg", "width": 160, "height": 120}]
    boxes = [
        annotation(1, (-20, 10, 60, 50), id=1, area=3000.0, iscrowd=0),
        annotation(1, (100, 100, 0, 20), id=2, area=0.0, iscrowd=0),
        annotation(1, (30, 60, 200, 200), id=3, area=9000.0, iscrowd=0),
        annotation(99, (0, 0, 10, 10), id=4, area=100.0, iscrowd=0),  # of no image
    ]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "square"}]}
    file = write_annotations(tmp_path, content, "val")
    found = np.array([[-20.0, 10, 60, 50], [30, 60, 130, 60]])
    assert_scores_as_pycocotools(file, tmp_path, Results(np.ones(2, int), np.ones(2, int), found, np.array([0.9, 0.8])))


def test_a_missing_area_is_width_times_height(tmp_path):
    file = random_file(tmp_path, seed=3, image_ids=[4, 5, 6], categories=CATEGORIES, crowds=0)
    content = json.loads(file.read_text())
    for entry in content["annotations"]:
        entry["area"] = entry["bbox"][2] * entry["bbox"][3]
    expected = write_annotations(tmp_path / "with", content, "val")
    for entry in content["annotations"]:
        del entry["area"], entry["iscrowd"]
    bare = write_annotations(tmp_path / "without", content, "val")
    results = noisy_results(file, seed=4)
    bare, expected = (
        score(read_annotations(path, tmp_path, for_scoring=True), results).summary for path in (bare, expected)
    )
    assert bare == expected


def test_the_file_may_change_or_vanish_after_it_was_read(tmp_path):
    """As while a training runs: the ground truth is that of its start."""
    file = random_file(tmp_path, seed=3, image_ids=[4, 1, 3, 2], categories=CATEGORIES)
    results = noisy_results(file, seed=5)
    annotations = read_annotations(file, tmp_path, for_scoring=True)
    expected = score(annotations, results)
    assert expected.summary["mAP"] > 0
    content = json.loads(file.read_text())
    write_annotations(tmp_path, {**content, "annotations": content["annotations"][:1]}, "val")
    assert_same(score(annotations, results), expected)
    file.unlink()
    assert_same(score(annotations, results), expected)


def test_nothing_detected_scores_0(tmp_path):
    file = random_file(tmp_path, seed=0, image_ids=[1, 2], categories=CATEGORIES)
    annotations = read_annotations(file, tmp_path, for_scoring=True)
    coco_metrics = score(annotations, NO_RESULTS)
    assert_same(scored_in_shards(annotations, NO_RESULTS, 5), coco_metrics)
    assert set(coco_metrics.summary.values()) <= {0, None}
    assert (coco_metrics.summary["mAP"], coco_metrics.summary["AR100"]) == (0, 0)
    assert coco_metrics.category_ap == {"kite": 0, "person": 0, "train": None}


def test_without_ground_truth_no_metric_is_defined(tmp_path):
    train = random_file(tmp_path / "train", seed=0, image_ids=[1, 2], categories=CATEGORIES)
    content = json.loads(train.read_text())
    file = write_annotations(tmp_path, {**content, "annotations": []}, "val")
    categories = read_annotations(train, tmp_path).categories
    annotations = read_annotations(file, tmp_path, categories=categories, for_scoring=True)
    results = Results(np.array([1]), np.array([90]), np.array([[1.0, 2, 3, 4]]), np.array([0.5]))
    for found in (results, NO_RESULTS):
        assert score(annotations, found).summary == dict.fromkeys(METRIC_NAMES)
        assert scored_in_shards(annotations, found, 2).summary == dict.fromkeys(METRIC_NAMES)


def test_shards_have_about_equal_numbers_of_detections(tmp_path):
    categories = [{"id": number, "name": str(number)} for number in range(1, 8)]
    file = random_file(tmp_path, seed=0, image_ids=[1, 2], categories=categories)
    labels = np.repeat(np.arange(1, 8), (10, 40, 20, 30, 50, 0, 0))
    ones = np.ones(len(labels))
    results = Results(ones.astype(int), labels, np.ones((len(labels), 4)), ones)
    shards = shard_categories(read_annotations(file, tmp_path, for_scoring=True), results, 3)
    assert sorted(len(shard.detections.scores) for shard in shards) == [50, 50, 50]
    assert sorted(label for shard in shards for label in shard.labels.tolist()) == list(range(1, 8))
    for shard in shards:
        assert set(shard.detections.labels) <= set(shard.labels) and set(shard.truth.labels) <= set(shard.labels)


def test_the_results_file_is_plain_and_exact(tmp_path):
    results = Results(
        np.array([2**63 - 1, 3]), np.array([90, 1]), np.array([[-1.5, 0.125, 10, 20], [0, 0, 1, 1]]), np.array([0.1, 1])
    )
    write_results(tmp_path / "detections.json", results)
    assert json.loads((tmp_path / "detections.json").read_text()) == [
        {"image_id": 2**63 - 1, "category_id": 90, "bbox": [-1.5, 0.125, 10, 20], "score": 0.1},
        {"image_id": 3, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1},
    ]
    write_results(tmp_path / "detections.json", NO_RESULTS)
    assert (tmp_path / "detections.json").read_text() == "[]"
    assert os.listdir(tmp_path) == ["detections.json"]


def test_a_large_results_file_is_written_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("src.evaluation.results.ROWS_PER_WRITE", 3)
    count = 10
    results = Results(np.arange(count), np.arange(count), np.zeros((count, 4)), np.ones(count))
    write_results(tmp_path / "detections.json", results)
    written = json.loads((tmp_path / "detections.json").read_text())
    assert [entry["image_id"] for entry in written] == list(range(count))


def test_scoring_prints_nothing(tmp_path, capfd):
    file = random_file(tmp_path, seed=0, image_ids=[1, 2], categories=CATEGORIES)
    score(read_annotations(file, tmp_path, for_scoring=True), noisy_results(file, seed=1))
    assert capfd.readouterr() == ("", "")
