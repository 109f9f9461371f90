"""The confusion matrix on cases computed by hand, and against plain loops."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

from src.evaluation.confusion import TruthBoxes, confusion_matrix, min_scores_by_category, write_confusion
from src.evaluation.results import Results
from src.evaluation.thresholds import Threshold, Thresholds
from src.report.confusion_plot import draw_confusion

CATEGORY_IDS = np.array([3, 70])
ALL = np.array([0.3, 0.3])


def truth(*images: list[tuple]) -> TruthBoxes:
    """Each image has (label, left, top, width, height, is a crowd)."""
    rows = [row for image in images for row in image]
    boxes = np.array([row[1:5] for row in rows], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    first = np.cumsum([0, *map(len, images)])
    labels, crowd = np.array([row[0] for row in rows], np.int64), np.array([row[5] for row in rows], bool)
    return TruthBoxes(boxes, labels, crowd, first, np.arange(len(images)) + 10, CATEGORY_IDS)


def results(*rows: tuple) -> Results:
    """Each is (image, label, left, top, width, height, score)."""
    columns = np.array(rows, np.float64).reshape(-1, 7)
    ids = CATEGORY_IDS[columns[:, 1].astype(int) - 1]
    return Results(columns[:, 0].astype(np.int64) + 10, ids, columns[:, 2:6], columns[:, 6])


BOX, ELSEWHERE, NEAR = (10, 10, 40, 40), (100, 100, 30, 30), (12, 10, 40, 40)


@pytest.mark.parametrize(
    ("there", "found", "expected"),
    [
        ([(1, *BOX, False)], [(0, 1, *NEAR, 0.9)], {(0, 0): 1}),
        ([(1, *BOX, False)], [(0, 2, *NEAR, 0.9)], {(0, 1): 1}),
        ([(1, *BOX, False)], [(0, 1, *NEAR, 0.29)], {(0, 2): 1}),
        ([(1, *BOX, False)], [(0, 1, *ELSEWHERE, 0.9)], {(0, 2): 1, (2, 0): 1}),
        ([(1, *BOX, False)], [(0, 1, *NEAR, 0.5), (0, 2, *BOX, 0.8)], {(0, 1): 1, (2, 0): 1}),
        ([(1, *BOX, False), (2, *NEAR, False)], [(0, 2, *NEAR, 0.9), (0, 1, *BOX, 0.8)], {(0, 0): 1, (1, 1): 1}),
        ([(1, 0, 0, 90, 90, True)], [(0, 1, *BOX, 0.9), (0, 2, *BOX, 0.9)], {(2, 1): 1}),
        ([(1, 0, 0, 90, 90, True), (1, *BOX, False)], [(0, 1, *BOX, 0.9)], {(0, 0): 1}),
        ([], [(0, 2, *BOX, 0.9)], {(2, 1): 1}),
        ([(2, *BOX, False)], [], {(1, 2): 1}),
    ],
    ids=["right", "confused", "below the score", "both wrong", "the best score takes it", "by IoU", "in a crowd",
         "matched inside a crowd", "no ground truth", "no detection"],
)  # fmt: skip
def test_small_cases(there, found, expected):
    matrix = confusion_matrix(results(*found), truth(there), ALL)
    assert {tuple(cell): matrix[tuple(cell)] for cell in np.argwhere(matrix).tolist()} == expected


def test_the_matrix_equals_that_of_plain_loops():
    random = np.random.default_rng(0)
    images = [
        [(int(random.integers(1, 3)), *random.uniform(0, 50, 2), *random.uniform(20, 60, 2), False) for _ in range(n)]
        for n in random.integers(0, 6, 40)
    ]
    rows = [
        (image, int(random.integers(1, 3)), *random.uniform(0, 50, 2), *random.uniform(20, 60, 2), random.uniform())
        for image in range(40)
        for _ in range(8)
    ]
    there, expected = truth(*images), np.zeros((3, 3), int)
    for image in range(40):
        boxes = there.boxes[there.first_box[image] : there.first_box[image + 1]]
        labels = there.labels[there.first_box[image] : there.first_box[image + 1]]
        free = set(range(len(boxes)))
        for row in sorted((row for row in rows if row[0] == image and row[6] >= 0.3), key=lambda row: -row[6]):
            corners = torch.tensor([[row[2], row[3], row[2] + row[4], row[3] + row[5]]])
            overlap = box_iou(corners.double(), torch.from_numpy(boxes))[0].tolist() if len(boxes) else []
            best = max(
                (index for index in free if overlap[index] >= 0.5), key=lambda index: overlap[index], default=None
            )
            free.discard(best)
            expected[2 if best is None else labels[best] - 1, row[1] - 1] += 1
        for index in free:
            expected[labels[index] - 1, 2] += 1
    assert (confusion_matrix(results(*rows), there, ALL) == expected).all()


def test_min_scores_fall_back_to_the_overall_score():
    own = Threshold(0.6, 0.5, 0.5, 0.5)
    f1 = np.zeros((101, 2))
    assert min_scores_by_category(Thresholds(own._replace(score=0.4), [own, None], f1)).tolist() == [0.6, 0.4]
    assert min_scores_by_category(Thresholds(None, [None, None], f1)).tolist() == [np.inf, np.inf]


@pytest.mark.parametrize("count", [1, 3, 80, 200])
def test_the_file_and_the_picture_show_the_matrix(count, tmp_path):
    matrix = np.random.default_rng(0).poisson(0.2, (count + 1, count + 1)) + 20 * np.eye(count + 1, dtype=int)
    names = [f"$category_{number} of many words" for number in range(count)]
    min_scores = np.full(count, 0.4)
    write_confusion(tmp_path / "a.json", matrix, names, min_scores)
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["matrix"] == matrix.tolist()
    assert content["names"] == [*names, "background"]
    figure = draw_confusion(matrix, names, tmp_path / "a.png")
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) == min(count, 80) + 1
    with Image.open(tmp_path / "a.png") as picture:
        assert max(picture.size) < 2600
