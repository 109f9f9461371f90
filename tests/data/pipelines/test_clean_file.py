"""The annotation file that is written for DALI holds the cleaned boxes."""

import json

import numpy as np

from src.data.annotations.coco import read_annotations
from src.data.pipelines.dali_files import write_clean_file
from tests.helpers.annotation_files import IMAGES, LARGEST_ID, content, read
from tests.helpers.datasets import annotation


def test_the_clean_file_has_the_boxes_of_training(tmp_path):
    categories = [{"id": 90, "name": "kite"}, {"id": 0, "name": "cat"}]
    given = [
        annotation(LARGEST_ID, (150.1, 100.3, 30, 30), 0),
        annotation(2, (0, 0, 0, 0), 90),
        annotation(4, (1, 2, 3.5, 4), 90, iscrowd=1),
        annotation(LARGEST_ID, (5, 5, 1e-3, 7), 90),
    ]
    images = [{**IMAGES[0], "id": LARGEST_ID, "file_name": "sub/ä.jpg"}, *IMAGES[1:]]
    annotations = read(tmp_path, content(given, images, categories))
    write_clean_file(annotations, tmp_path / "clean.json")
    clean = json.loads((tmp_path / "clean.json").read_text())
    assert clean["images"] == [
        {"id": 0, "file_name": "sub/ä.jpg", "width": 160, "height": 120},
        {"id": 1, "file_name": "4.jpg", "width": 160, "height": 120},
    ]
    assert clean["categories"] == [{"id": 1, "name": "kite"}, {"id": 2, "name": "cat"}]
    assert [(a["image_id"], a["category_id"], a["iscrowd"]) for a in clean["annotations"]] == [
        (0, 2, 0),
        (0, 1, 0),
        (1, 1, 0),
    ]
    boxes = np.array([entry["bbox"] for entry in clean["annotations"]])
    np.testing.assert_allclose(boxes, [[150.1, 100.3, 9.9, 19.7], [5, 5, 1e-3, 7], [1, 2, 3.5, 4]], atol=1e-5)
    assert len({entry["id"] for entry in clean["annotations"]}) == 3


def test_the_clean_file_reads_as_the_original(coco128, tmp_path):
    annotations = read_annotations(coco128 / "annotations" / "instances_train2017.json", coco128 / "train2017")
    write_clean_file(annotations, tmp_path / "clean.json")
    again = read_annotations(tmp_path / "clean.json", coco128 / "train2017")
    assert again.boxes.tolist() == annotations.boxes.tolist()
    assert again.labels.tolist() == annotations.labels.tolist()
    assert np.diff(again.first_box).tolist() == [n for n in np.diff(annotations.first_box) if n]
