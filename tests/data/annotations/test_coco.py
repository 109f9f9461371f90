"""Annotation files of many tools: what is read, which ids and categories are accepted, and the errors.

Expected values are worked out by hand or by pycocotools.
"""

import contextlib
import io
import json
import pickle

import numpy as np
import pytest
from pycocotools.coco import COCO

from src.data.annotations.coco import Category, read_annotations
from tests.helpers.annotation_files import IMAGES, LARGEST_ID, content, error_of, read, without
from tests.helpers.datasets import CATEGORIES, annotation, write_annotations

# --- fields and types -------------------------------------------------------------------------------------------------


def test_the_arrays_equal_those_of_pycocotools(coco128):
    path = coco128 / "annotations" / "instances_train2017.json"
    annotations = read_annotations(path, coco128 / "train2017", for_scoring=True)
    truth = annotations.ground_truth
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(path))
    assert len(annotations) == 128 and len(annotations.boxes) == 939 and annotations.warnings == ()
    category_ids = [category["id"] for category in coco.dataset["categories"]]
    assert annotations.image_ids.tolist() == [image["id"] for image in coco.dataset["images"]]
    for index, image_id in enumerate(annotations.image_ids.tolist()):
        image = coco.imgs[image_id]
        own = [entry for entry in coco.dataset["annotations"] if entry["image_id"] == image_id]
        rows = slice(*annotations.first_box[index : index + 2])
        boxes, labels = annotations.targets(index)
        assert annotations.file_name(index) == image["file_name"]
        assert annotations.sizes[index].tolist() == [image["width"], image["height"]]
        assert [category_ids[label - 1] for label in labels] == [entry["category_id"] for entry in own]
        assert truth.areas[truth.image_index == index].tolist() == [entry["area"] for entry in own]
        assert annotations.crowd[rows].tolist() == [bool(entry["iscrowd"]) for entry in own]
        expected = [[x, y, x + w, y + h] for x, y, w, h in (entry["bbox"] for entry in own)]
        np.testing.assert_allclose(boxes, np.array(expected).reshape(-1, 4), atol=0.011)  # clipping moves two by 0.01


def test_arrays_have_the_documented_types(tmp_path):
    annotations = read(tmp_path, content([annotation(2), annotation(1), annotation(2, category_id=2, iscrowd=1)]))
    kinds = {
        "image_ids": np.int64, "sizes": np.int32, "first_box": np.int64, "boxes": np.float32, "labels": np.int64,
        "crowd": np.bool_,
    }  # fmt: skip
    assert {name: getattr(annotations, name).dtype for name in kinds} == kinds
    assert annotations.image_path(1) == tmp_path / "train2017" / "2.jpg"
    assert annotations.first_box.tolist() == [0, 1, 3, 3, 3]
    assert annotations.labels.tolist() == [1, 1, 2] and annotations.crowd.tolist() == [False, False, True]
    assert annotations.with_boxes().tolist() == [0, 1]
    assert annotations.targets(3)[0].shape == (0, 4)
    assert annotations.categories == (Category(1, "square"), Category(2, "disc"))


def test_changing_a_target_leaves_the_annotations_unchanged(tmp_path):
    annotations = read(tmp_path, content())
    annotations.targets(0)[0][:] = 0
    assert annotations.boxes.tolist() == [[20, 20, 80, 70]]


def test_pickled_annotations_are_complete(tmp_path):
    annotations = read(tmp_path, content([annotation(4)]))
    copy = pickle.loads(pickle.dumps(annotations))
    assert [copy.file_name(i) for i in range(4)] == ["1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    assert copy.boxes.tolist() == annotations.boxes.tolist()


def test_optional_fields_may_be_missing(tmp_path):
    entries = [without(annotation(1), "id"), {**annotation(2), "area": 12.5, "iscrowd": 1}]
    annotations = read(tmp_path, content(entries), for_scoring=True)
    assert annotations.ground_truth.areas.tolist() == [3000, 12.5]  # 60 x 50
    assert annotations.crowd.tolist() == [False, True]


def test_null_in_an_optional_field_counts_as_missing(tmp_path):
    annotations = read(
        tmp_path,
        content([annotation(1, area=None, iscrowd=None, segmentation=None)], info=None, licenses=None),
        for_scoring=True,
    )
    assert annotations.ground_truth.areas.tolist() == [3000] and not annotations.crowd.any()


def test_iscrowd_may_be_true_or_false(tmp_path):
    assert read(tmp_path, content([annotation(1, iscrowd=True), annotation(1, iscrowd=False)])).crowd.tolist() == [
        True,
        False,
    ]


def test_fields_of_other_tools_are_ignored(tmp_path):
    ignored = {
        "keypoints": [1, [2, {"a": None}]],
        "segmentation": {"counts": "x\\y", "size": [1, 2]},
        "score": "high",
    }
    assert len(read(tmp_path, content([annotation(1, **ignored)], extra={"a": [[]]})).boxes) == 1


def test_a_byte_order_mark_is_ignored(tmp_path):
    path = write_annotations(tmp_path, "")
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(content()).encode())
    assert len(read_annotations(path, tmp_path).boxes) == 1


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_nan_in_an_ignored_field_is_accepted(tmp_path, number):
    entry = annotation(1, score="X", caption='the "NaN" of \\ Infinity\\')
    text = json.dumps(content([entry], info={"a": ["X", 'NaN, "'], "b": "X"})).replace('"X"', number)
    assert read(tmp_path, text).boxes.tolist() == [[20, 20, 80, 70]]


def test_file_names_may_be_of_any_script_and_have_subfolders(tmp_path):
    names = ["ä/猫 1.jpg", "train/a,b\n.png", "./c.jpg", "d\\e.jpg"]
    annotations = read(
        tmp_path, content(images=[{**image, "file_name": name} for image, name in zip(IMAGES, names, strict=True)])
    )
    assert [annotations.file_name(i) for i in range(4)] == names


def test_whole_numbers_may_be_written_as_floats(tmp_path):
    """pandas writes them so if the column has missing values."""
    images = [{**image, "id": float(image["id"]), "width": 160.0, "height": 120.0} for image in IMAGES]
    clipped = (150, 110, 30, 30)  # its warning names the id
    entries = [annotation(2.0, clipped, 2.0, id=9007199254740993, iscrowd=1.0), annotation(1, id=4, iscrowd=0.0)]
    categories = [{**category, "id": float(category["id"])} for category in CATEGORIES]
    text = json.dumps(content(entries, images=images, categories=categories), indent=1)
    text = text.replace("9007199254740993", "9007199254740993.00")  # which a float would not hold
    annotations = read(tmp_path, text)
    assert annotations.image_ids.tolist() == [1, 2, 3, 4]
    assert annotations.sizes.tolist() == [[160, 120]] * 4
    assert [category.id for category in annotations.categories] == [1, 2]
    assert annotations.warnings[0].endswith("(annotation ids 9007199254740993)")
    assert (annotations.labels.tolist(), annotations.crowd.tolist()) == ([1, 2], [False, True])


@pytest.mark.parametrize("wrong", [1.5, 1e300, "1"])
def test_numbers_that_are_not_whole_are_refused(tmp_path, wrong):
    message = error_of(tmp_path, content([annotation(1.0), annotation(wrong)]))
    assert f"image_id is {json.dumps(wrong)} in annotations[1] (id 2)" in message


# --- ids and categories -----------------------------------------------------------------------------------------------


def test_labels_follow_the_training_files_order(tmp_path):
    categories = [{"id": 90, "name": "kite"}, {"id": 0, "name": "cat"}, {"id": 7, "name": "dog"}]
    boxes = [annotation(1, category_id=category_id) for category_id in (0, 7, 90)]
    training = read_annotations(write_annotations(tmp_path, content(boxes, categories=categories)), tmp_path)
    assert training.categories == ((90, "kite"), (0, "cat"), (7, "dog"))
    assert training.labels.tolist() == [2, 3, 1]
    other_order = content(boxes, categories=categories[::-1])
    path = write_annotations(tmp_path, other_order, "val")
    validation = read_annotations(path, tmp_path, categories=training.categories)
    assert validation.categories == training.categories
    assert validation.labels.tolist() == [2, 3, 1]


def test_category_sets_that_differ_are_refused(tmp_path):
    message = error_of(
        tmp_path, content(), categories=(Category(1, "square"), Category(2, "ring"), Category(5, "star"))
    )
    assert "only here: 2 'disc'" in message and "only there: 2 'ring', 5 'star'" in message


def test_categories_must_not_be_empty_or_repeat_an_id(tmp_path):
    assert "`categories` is empty" in error_of(tmp_path, content(categories=[]))
    assert "category id 1 occurs more than once" in error_of(tmp_path, content(categories=[*CATEGORIES, CATEGORIES[0]]))


def test_categories_of_one_name_cause_a_warning(tmp_path):
    categories = [*CATEGORIES, {"id": 7, "name": "disc"}]
    assert "categories 2, 7 have the same name 'disc'" in read(tmp_path, content(categories=categories)).warnings[0]


def test_an_unknown_category_id_is_refused(tmp_path):
    message = error_of(tmp_path, content([annotation(1), annotation(1, category_id=3)]))
    assert "annotations[1] (id 2) has category_id 3" in message and "ids there: 1, 2" in message
    entries = [{**annotation(1), "id": None}, {**annotation(1, category_id=3), "id": 2}]
    message = error_of(tmp_path, {**content(), "annotations": entries})
    assert "annotations[1] has category_id 3" in message


def test_annotations_of_other_images_are_left_out(tmp_path):
    annotations = read(tmp_path, content([annotation(99), annotation(1, (1, 2, 3, 4)), annotation(98)]))
    assert annotations.boxes.tolist() == [[1, 2, 4, 6]]
    assert [w for w in annotations.warnings if "2 of 3 annotations left out" in w and "image_id (99, 98)" in w]


def test_a_training_file_without_a_usable_annotation_is_refused(tmp_path):
    folder = str(tmp_path / "train2017")
    message = error_of(tmp_path, content([annotation(99), annotation(98)]))
    assert "0 of 4 images" in message and "99" in message and folder in message
    message = error_of(tmp_path, content([annotation(1, bbox=(0, 0, 0, 5))]))
    assert "0 of 4 images" in message and folder in message
    assert "0 of 4 images" in error_of(tmp_path, content([]))


def test_a_validation_file_may_have_no_boxes_but_not_only_boxes_of_unknown_images(tmp_path):
    categories = (Category(1, "square"), Category(2, "disc"))
    assert len(read(tmp_path, content([]), categories=categories, for_scoring=True)) == 4
    message = error_of(tmp_path, content([annotation(99)]), categories=categories, for_scoring=True)
    assert "0 of 4 images" in message


def test_boxes_of_70000_images_are_grouped_by_image(tmp_path):
    images = [{"id": i, "file_name": f"{i}", "width": 160, "height": 120} for i in range(70_000)]
    image_ids = [69_999, 4_463, 65_536, 0, 69_999, 4_463]  # 69,999 is 4,463 in the lower 16 bits
    entries = [annotation(image_id, (number, 0, 9, 9)) for number, image_id in enumerate(image_ids, 1)]
    annotations = read(tmp_path, content(entries, images))
    assert annotations.with_boxes().tolist() == [0, 4_463, 65_536, 69_999]
    assert annotations.boxes[:, 0].tolist() == [4, 2, 6, 3, 1, 5]


@pytest.mark.parametrize("ids", [(LARGEST_ID, LARGEST_ID - 1), (-LARGEST_ID - 1, 0)])
def test_the_largest_ids_are_read_exactly(tmp_path, ids):
    images = [{**image, "id": image_id} for image, image_id in zip(IMAGES, ids, strict=False)]
    annotations = read(tmp_path, content([annotation(ids[1], (2, 0, 9, 9)), annotation(ids[0], (1, 0, 9, 9))], images))
    assert annotations.image_ids.tolist() == list(ids)
    assert annotations.boxes[:, 0].tolist() == [1, 2]


@pytest.mark.parametrize("image_id", ["7", 7.5, LARGEST_ID + 1, 10**30, None, [7], True])
def test_an_image_id_that_is_no_whole_number_is_refused(tmp_path, image_id):
    message = error_of(tmp_path, content(images=[IMAGES[0], {**IMAGES[1], "id": image_id}]))
    assert f'id is {json.dumps(image_id)} in images[1] (id {json.dumps(image_id)}, file_name "2.jpg")' in message
    assert "whole number" in message
    message = error_of(tmp_path, content([annotation(1), annotation(image_id)]))
    assert f"image_id is {json.dumps(image_id)} in annotations[1] (id 2)" in message


def test_a_repeated_image_id_is_refused(tmp_path):
    assert "images[1] and images[4] have the same id 2" in error_of(
        tmp_path, content(images=[*IMAGES, {**IMAGES[1], "file_name": "x"}])
    )


@pytest.mark.parametrize("name", ["2.jpg", "./2.jpg", ".//2.jpg", "a/./../2.jpg"])
def test_a_repeated_file_name_is_refused(tmp_path, name):
    message = error_of(tmp_path, content(images=[*IMAGES, {**IMAGES[1], "id": 5, "file_name": name}]))
    expected = "a path below" if ".." in name else "images[1] and images[4] have the same file_name '2.jpg'"
    assert expected in message


def test_annotations_without_unique_ids_are_numbered_in_warnings(tmp_path):
    boxes = [(0, 0, 9, 9), (0, 0, 0, 9)]
    for ids in ((3, 3), (None, 3)):
        entries = [{**annotation(1, bbox), "id": number} for number, bbox in zip(ids, boxes, strict=True)]
        warnings = read_annotations(write_annotations(tmp_path, content(entries)), tmp_path).warnings
        assert "(annotation ids 2)" in warnings[0] and "no id of their own" in warnings[1]
