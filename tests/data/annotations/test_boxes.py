"""Boxes of annotation files: which are clipped, left out or kept for the scoring, with their warnings; the digest."""

import json

import pytest

from src.data.annotations.coco import read_annotations
from tests.helpers.annotation_files import IMAGES, content, read
from tests.helpers.datasets import annotation, write_annotations


def test_boxes_without_area_are_left_out(tmp_path):
    flat = [(20, 20, 0, 5), (20, 20, 5, 0), (20, 20, -5, 5), (20, 20, 5, -1e300), (20, 20, 1e-9, 5)]
    outside = [(160, 0, 5, 5), (0, 130, 5, 5), (-9, 0, 9, 5), (1e300, 0, 1e300, 5)]
    annotations = read(tmp_path, content([annotation(1, bbox=bbox) for bbox in [*flat, *outside, (20, 20, 5, 5)]]))
    assert annotations.boxes.tolist() == [[20, 20, 25, 25]]
    joined = "\n".join(annotations.warnings)
    assert "5 of 10 annotations left out: the width or height" in joined and "annotation ids 1, 2, 3, 4, 5)" in joined
    assert "4 of 10 annotations left out: their `bbox` is outside" in joined and "ids 6, 7, 8, 9)" in joined


def test_boxes_are_clipped_to_the_image(tmp_path):
    given = [(-0.25, 0, 10, 10), (150, 110, 10.25, 10.5), (-1e6, -1e6, 2e6, 2e6), (100, -1e308, 5, 1.7e308)]
    annotations = read(tmp_path, content([annotation(1, bbox=bbox) for bbox in given]))
    assert annotations.boxes.tolist() == [[0, 0, 9.75, 10], [150, 110, 160, 120], [0, 0, 160, 120], [100, 0, 105, 120]]
    assert "2 of 4 annotations clipped" in annotations.warnings[0] and "ids 3, 4)" in annotations.warnings[0]


def test_a_warning_lists_the_first_five_ids(tmp_path):
    annotations = read(tmp_path, content([annotation(1), *[annotation(1, bbox=(1, 1, 0, 0))] * 9]))
    assert (
        "9 of 10 annotations" in annotations.warnings[0]
        and "(annotation ids 2, 3, 4, 5, 6, ...)" in annotations.warnings[0]
    )


def test_boxes_given_as_corners_cause_a_warning(coco128, tmp_path):
    given = json.loads((coco128 / "annotations" / "instances_train2017.json").read_text())
    for entry in given["annotations"]:
        x, y, width, height = entry["bbox"]
        entry["bbox"] = [x, y, x + width, y + height]
    warnings = read_annotations(write_annotations(tmp_path, given), tmp_path).warnings
    assert [line for line in warnings if "look like x1, y1, x2, y2: they must be x, y, width, height" in line]


def test_boxes_given_as_fractions_cause_a_warning(tmp_path):
    entries = [annotation(1, (0.1, 0.2, 0.5, 0.6)), annotation(1, (0, 0, 1, 1))]
    (line,) = read(tmp_path, content(entries)).warnings
    assert "look like fractions of the image: they must be in pixels" in line


def test_a_box_whose_edges_are_equal_in_float32_is_left_out(tmp_path):
    """Divided by 640, 500 and the next float32 are equal, so the logarithm of the width would be infinite."""
    images = [{"id": 1, "file_name": "1.jpg", "width": 640, "height": 480}]
    entries = [annotation(1, (500, 5, 3e-5, 9)), annotation(1, (500, 5, 9, 9))]
    annotations = read(tmp_path, content(entries, images))
    assert annotations.boxes.tolist() == [[500, 5, 509, 14]]
    assert "1 of 2 annotations left out" in annotations.warnings[0]


def test_validation_boxes_that_no_detection_can_match_count_as_missed(tmp_path):
    """Equal to pycocotools, which ignores crowds and negative areas."""
    given = [(20, 20, 0, 5), (20, 20, -5, -5), (20, 20, -5, 5), (200, 0, 5, 5), (150, 110, 30, 30), (20, 20, 5, 5)]
    entries = [*(annotation(1, bbox=bbox) for bbox in given), annotation(2, bbox=(0, 0, 0, 5), iscrowd=1)]
    annotations = read(tmp_path, content([*entries, annotation(99)]), for_scoring=True)
    lines = [line.removeprefix(f"{annotations.path}: ") for line in annotations.warnings]
    assert lines == [
        "1 of 8 annotations left out: no image has their image_id (99)",
        "2 of 8 annotations count as missed in the scoring: the width or height of their `bbox` is not positive "
        "(annotation ids 1, 2)",
        "2 of 8 annotations left out: the width or height of their `bbox` is not positive (annotation ids 3, 7)",
        "1 of 8 annotations count as missed in the scoring: their `bbox` is outside the image (annotation ids 4)",
        "1 of 8 annotations scored as they stand: their `bbox` reaches more than a pixel outside the image "
        "(annotation ids 5)",
    ]


def test_the_ground_truth_equals_the_file(tmp_path):
    entries = [annotation(2, (150.1, 100.3, 30, 30), area=12.5), annotation(99), annotation(1, (0.1, 7, 0, -3), 2),
               annotation(1, (5, 6, 7.5, 8), iscrowd=1, area=None)]  # fmt: skip
    assert read(tmp_path, content(entries)).ground_truth is None
    truth = read(tmp_path, content(entries), for_scoring=True).ground_truth
    assert truth.image_index.tolist() == [1, 0, 0]
    assert truth.labels.tolist() == [1, 2, 1]
    assert truth.boxes.tolist() == [[150.1, 100.3, 30, 30], [0.1, 7, 0, -3], [5, 6, 7.5, 8]]
    assert truth.areas.tolist() == [12.5, 0, 60]
    assert truth.crowd.tolist() == [False, False, True]


@pytest.mark.parametrize(
    "changed",
    [{"bbox": [20, 20, 60, 51]}, {"category_id": 2}, {"area": 7}, {"iscrowd": 1}, {"image_id": 2}, {"id": 7}, {}],
)
def test_the_digest_of_a_validation_file_depends_on_what_is_scored(tmp_path, changed):
    before, after = (
        read(tmp_path, content([annotation(1), {**annotation(1), **fields}]), for_scoring=True)
        for fields in ({}, changed)
    )
    assert (before.digest == after.digest) == (changed.keys() <= {"id"})


@pytest.mark.parametrize("changed", [{"id": 9}, {"file_name": "x.jpg"}, {"width": 161}, {"license": 3}])
def test_the_digest_of_a_validation_file_covers_images_without_boxes(tmp_path, changed):
    images = [*IMAGES[:3], {**IMAGES[3], **changed}]
    before, after = (read(tmp_path, content(images=given), for_scoring=True) for given in (IMAGES, images))
    assert (before.digest == after.digest) == ("license" in changed)


def test_rotated_boxes_of_cvat_cause_a_warning(tmp_path):
    """They are trained without their rotation.  Attributes of other programs have any type."""
    given = [{"occluded": False, "rotation": 0.0}, {"rotation": 30.5}, None, [1, "rotation"], {"rotation": "left"}, {},
             {"rotation": -3}]  # fmt: skip
    entries = [annotation(1 + number % 4, attributes=attributes) for number, attributes in enumerate(given)]
    annotations = read(tmp_path, content([*entries, annotation(1)]))
    (warning,) = annotations.warnings
    assert warning.endswith(
        "2 of 8 annotations trained upright: their `attributes.rotation` is not 0, which boxes cannot have "
        "(annotation ids 2, 7)"
    )
    assert len(annotations.boxes) == 8
