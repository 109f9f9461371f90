"""Annotations of other people's making: what works, what is mended with a warning, what is an error.

Expected values are worked out by hand or by pycocotools.
"""

import contextlib
import io
import json
import os
import pickle

import numpy as np
import pytest
from pycocotools.coco import COCO

from src.data.annotations import coco
from src.data.annotations.coco import Category, check_images_exist, read_annotations
from src.data.annotations.dataset import read_dataset
from src.data.pipelines.dali_files import write_clean_file
from src.runtime.errors import DataError
from tests.helpers.annotation_files import IMAGES, LARGEST_ID, content, error_of, read, without
from tests.helpers.datasets import CATEGORIES, annotation, write_annotations, write_coco

# --- what is read ----------------------------------------------------------------------------------------------------


def test_the_arrays_are_those_of_pycocotools(coco128):
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


def test_types_and_paths(tmp_path):
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


def test_a_boxs_copy_can_be_changed(tmp_path):
    annotations = read(tmp_path, content())
    annotations.targets(0)[0][:] = 0
    assert annotations.boxes.tolist() == [[20, 20, 80, 70]]


def test_workers_get_them_whole(tmp_path):
    annotations = read(tmp_path, content([annotation(4)]))
    copy = pickle.loads(pickle.dumps(annotations))
    assert [copy.file_name(i) for i in range(4)] == ["1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    assert copy.boxes.tolist() == annotations.boxes.tolist()


def test_what_is_not_needed_may_be_missing(tmp_path):
    entries = [without(annotation(1), "id"), {**annotation(2), "area": 12.5, "iscrowd": 1}]
    annotations = read(tmp_path, content(entries), for_scoring=True)
    assert annotations.ground_truth.areas.tolist() == [3000, 12.5]  # 60 x 50
    assert annotations.crowd.tolist() == [False, True]


def test_null_counts_as_missing(tmp_path):
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


def test_fields_of_other_tools_are_passed_over(tmp_path):
    strange = {"keypoints": [1, [2, {"a": None}]], "segmentation": {"counts": "x\\y", "size": [1, 2]}, "score": "high"}
    assert len(read(tmp_path, content([annotation(1, **strange)], extra={"a": [[]]})).boxes) == 1


def test_a_byte_order_mark_is_passed_over(tmp_path):
    path = write_annotations(tmp_path, "")
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(content()).encode())
    assert len(read_annotations(path, tmp_path).boxes) == 1


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_nan_in_a_field_that_is_not_read(tmp_path, number):
    entry = annotation(1, score="X", caption='the "NaN" of \\ Infinity\\')
    text = json.dumps(content([entry], info={"a": ["X", 'NaN, "'], "b": "X"})).replace('"X"', number)
    assert read(tmp_path, text).boxes.tolist() == [[20, 20, 80, 70]]


def test_file_names_of_any_script_and_with_subfolders(tmp_path):
    names = ["ä/猫 1.jpg", "train/a,b\n.png", "./c.jpg", "d\\e.jpg"]
    annotations = read(
        tmp_path, content(images=[{**image, "file_name": name} for image, name in zip(IMAGES, names, strict=True)])
    )
    assert [annotations.file_name(i) for i in range(4)] == names


# --- ids and categories ----------------------------------------------------------------------------------------------


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


def test_category_sets_that_differ(tmp_path):
    message = error_of(
        tmp_path, content(), categories=(Category(1, "square"), Category(2, "ring"), Category(5, "star"))
    )
    assert "only here: 2 'disc'" in message and "only there: 2 'ring', 5 'star'" in message


def test_categories_must_be_there_once(tmp_path):
    assert "`categories` is empty" in error_of(tmp_path, content(categories=[]))
    assert "category id 1 occurs more than once" in error_of(tmp_path, content(categories=[*CATEGORIES, CATEGORIES[0]]))


def test_categories_of_one_name_are_told_of(tmp_path):
    categories = [*CATEGORIES, {"id": 7, "name": "disc"}]
    assert "categories 2, 7 have the same name 'disc'" in read(tmp_path, content(categories=categories)).warnings[0]


def test_a_category_that_is_not_listed(tmp_path):
    message = error_of(tmp_path, content([annotation(1), annotation(1, category_id=3)]))
    assert "annotations[1] (id 2) has category_id 3" in message and "it has 1, 2" in message


def test_annotations_of_other_images_are_left_out(tmp_path):
    annotations = read(tmp_path, content([annotation(99), annotation(1, (1, 2, 3, 4)), annotation(98)]))
    assert annotations.boxes.tolist() == [[1, 2, 4, 6]]
    assert [w for w in annotations.warnings if "2 of 3 annotations left out" in w and "image_id (99, 98)" in w]


def test_no_usable_annotation_at_all(tmp_path):
    folder = str(tmp_path / "train2017")
    message = error_of(tmp_path, content([annotation(99), annotation(98)]))
    assert "0 of 4 images" in message and "99" in message and folder in message
    message = error_of(tmp_path, content([annotation(1, bbox=(0, 0, 0, 5))]))
    assert "0 of 4 images" in message and folder in message
    assert "0 of 4 images" in error_of(tmp_path, content([]))


def test_a_validation_file_may_hold_no_boxes_but_not_those_of_other_images(tmp_path):
    categories = (Category(1, "square"), Category(2, "disc"))
    assert len(read(tmp_path, content([]), categories=categories, for_scoring=True)) == 4
    message = error_of(tmp_path, content([annotation(99)]), categories=categories, for_scoring=True)
    assert "0 of 4 images" in message


def test_boxes_of_more_images_than_16_bits_can_number(tmp_path):
    images = [{"id": i, "file_name": f"{i}", "width": 160, "height": 120} for i in range(70_000)]
    owners = [69_999, 4_463, 65_536, 0, 69_999, 4_463]  # 69,999 is 4,463 in the lower 16 bits
    entries = [annotation(owner, (number, 0, 9, 9)) for number, owner in enumerate(owners, 1)]
    annotations = read(tmp_path, content(entries, images))
    assert annotations.with_boxes().tolist() == [0, 4_463, 65_536, 69_999]
    assert annotations.boxes[:, 0].tolist() == [4, 2, 6, 3, 1, 5]


@pytest.mark.parametrize("ids", [(LARGEST_ID, LARGEST_ID - 1), (-LARGEST_ID - 1, 0)])
def test_the_largest_ids_come_out_exactly(tmp_path, ids):
    images = [{**image, "id": image_id} for image, image_id in zip(IMAGES, ids, strict=False)]
    annotations = read(tmp_path, content([annotation(ids[1], (2, 0, 9, 9)), annotation(ids[0], (1, 0, 9, 9))], images))
    assert annotations.image_ids.tolist() == list(ids)
    assert annotations.boxes[:, 0].tolist() == [1, 2]


@pytest.mark.parametrize("image_id", ["7", 7.5, LARGEST_ID + 1, 10**30, None, [7], True])
def test_an_image_id_that_is_no_whole_number(tmp_path, image_id):
    message = error_of(tmp_path, content(images=[IMAGES[0], {**IMAGES[1], "id": image_id}]))
    assert f'id is {json.dumps(image_id)} in images[1] (id {json.dumps(image_id)}, file_name "2.jpg")' in message
    assert "whole number" in message
    message = error_of(tmp_path, content([annotation(1), annotation(image_id)]))
    assert f"image_id is {json.dumps(image_id)} in annotations[1] (id 2)" in message


def test_the_same_image_id_twice(tmp_path):
    assert "images[1] and images[4] have the same id 2" in error_of(
        tmp_path, content(images=[*IMAGES, {**IMAGES[1], "file_name": "x"}])
    )


@pytest.mark.parametrize("name", ["2.jpg", "./2.jpg", ".//2.jpg", "a/./../2.jpg"])
def test_one_file_for_two_images(tmp_path, name):
    message = error_of(tmp_path, content(images=[*IMAGES, {**IMAGES[1], "id": 5, "file_name": name}]))
    expected = "a path below" if ".." in name else "images[1] and images[4] have the same file_name '2.jpg'"
    assert expected in message


def test_annotations_without_ids_of_their_own_are_numbered(tmp_path):
    boxes = [(0, 0, 9, 9), (0, 0, 0, 9)]
    for ids in ((3, 3), (None, 3)):
        entries = [{**annotation(1, bbox), "id": number} for number, bbox in zip(ids, boxes, strict=True)]
        warnings = read_annotations(write_annotations(tmp_path, content(entries)), tmp_path).warnings
        assert "(annotation ids 2)" in warnings[0] and "no id of their own" in warnings[1]


# --- boxes -----------------------------------------------------------------------------------------------------------


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


def test_many_ids_are_listed_in_part(tmp_path):
    annotations = read(tmp_path, content([annotation(1), *[annotation(1, bbox=(1, 1, 0, 0))] * 9]))
    assert (
        "9 of 10 annotations" in annotations.warnings[0]
        and "(annotation ids 2, 3, 4, 5, 6, ...)" in annotations.warnings[0]
    )


def test_boxes_given_as_corners_are_told_of(coco128, tmp_path):
    given = json.loads((coco128 / "annotations" / "instances_train2017.json").read_text())
    for entry in given["annotations"]:
        x, y, width, height = entry["bbox"]
        entry["bbox"] = [x, y, x + width, y + height]
    warnings = read_annotations(write_annotations(tmp_path, given), tmp_path).warnings
    assert [line for line in warnings if "look like x1, y1, x2, y2: they must be x, y, width, height" in line]


def test_boxes_given_as_fractions_are_told_of(tmp_path):
    entries = [annotation(1, (0.1, 0.2, 0.5, 0.6)), annotation(1, (0, 0, 1, 1))]
    (line,) = read(tmp_path, content(entries)).warnings
    assert "look like fractions of the image: they must be in pixels" in line


def test_a_box_too_small_for_the_fractions_that_are_trained_on_is_left_out(tmp_path):
    """500 and the next float32 are one number when divided by 640: the box's logarithm would be infinite."""
    images = [{"id": 1, "file_name": "1.jpg", "width": 640, "height": 480}]
    entries = [annotation(1, (500, 5, 3e-5, 9)), annotation(1, (500, 5, 9, 9))]
    annotations = read(tmp_path, content(entries, images))
    assert annotations.boxes.tolist() == [[500, 5, 509, 14]]
    assert "1 of 2 annotations left out" in annotations.warnings[0]


def test_boxes_of_a_validation_file_that_no_detection_can_match_count_as_missed(tmp_path):
    """As pycocotools has it, which ignores crowds and negative areas."""
    given = [(20, 20, 0, 5), (20, 20, -5, -5), (20, 20, -5, 5), (200, 0, 5, 5), (150, 110, 30, 30), (20, 20, 5, 5)]
    entries = [*(annotation(1, bbox=bbox) for bbox in given), annotation(2, bbox=(0, 0, 0, 5), iscrowd=1)]
    annotations = read(tmp_path, content([*entries, annotation(99)]), for_scoring=True)
    told = [line.removeprefix(f"{annotations.path}: ") for line in annotations.warnings]
    assert told == [
        "1 of 8 annotations left out: no image has their image_id (99)",
        "2 of 8 annotations count as missed in the scoring: the width or height of their `bbox` is not positive "
        "(annotation ids 1, 2)",
        "2 of 8 annotations left out: the width or height of their `bbox` is not positive (annotation ids 3, 7)",
        "1 of 8 annotations count as missed in the scoring: their `bbox` is outside the image (annotation ids 4)",
        "1 of 8 annotations scored as they stand: their `bbox` reaches more than a pixel outside the image "
        "(annotation ids 5)",
    ]


def test_the_ground_truth_is_what_stands_in_the_file(tmp_path):
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
def test_the_digest_of_a_validation_file_is_that_of_what_is_scored(tmp_path, changed):
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


# --- files -----------------------------------------------------------------------------------------------------------


def touch_images(folder, names) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_images_that_are_there(tmp_path):
    names = ["1.jpg", "a/2.jpg", "a/b/3.jpg", "./4.jpg"]
    touch_images(tmp_path / "train2017", names)
    images = [{**image, "file_name": name} for image, name in zip(IMAGES, names, strict=True)]
    check_images_exist(read(tmp_path, content(images=images)))


@pytest.mark.parametrize("missing", ["3.jpg", "a/2.jpg", "n" * 400])
def test_the_first_missing_image_is_named(tmp_path, missing):
    folder = tmp_path / "train2017"
    touch_images(folder, ["1.jpg", "a/b/5.jpg", "2.jpg", "4.jpg"])
    annotations = read(tmp_path, content(images=[*IMAGES[:2], {**IMAGES[2], "file_name": missing}, IMAGES[3]]))
    with pytest.raises(DataError) as caught:
        check_images_exist(annotations)
    assert str(folder / missing) in str(caught.value) and "image 3" in str(caught.value)


def test_a_long_search_for_the_images_is_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr(coco, "CLOCK_INTERVAL", 2)
    monkeypatch.setattr(coco, "PROGRESS_INTERVAL", 0.0)
    touch_images(tmp_path / "train2017", ["1.jpg", "2.jpg", "3.jpg", "4.jpg", "other.txt"])
    annotations, lines = read(tmp_path, content()), []
    check_images_exist(annotations, tell=lines.append)
    assert lines == [f"Looking for the 4 images of {tmp_path / 'train2017'}: {found} files so far" for found in (2, 4)]
    monkeypatch.setattr(coco, "PROGRESS_INTERVAL", 60.0)
    check_images_exist(annotations, tell=lines.append)
    assert len(lines) == 2


def test_a_missing_image_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path / 'train2017'}: .*No such file or directory"):
        check_images_exist(read(tmp_path, content()))


def test_a_folder_is_no_image(tmp_path):
    (tmp_path / "train2017" / "1.jpg").mkdir(parents=True)
    with pytest.raises(DataError, match=r"1\.jpg: no such image file"):
        check_images_exist(read(tmp_path, content()))


def test_what_stands_in_the_place_of_an_image_is_named(tmp_path):
    folder = tmp_path / "train2017"
    touch_images(folder, ["a/1.jpg"])
    (folder / "dangling").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    whats = {
        "dangling": "no such image file (it is a link to nowhere, which is not there)",
        "loop": "(Too many levels of symbolic links)",
        "pipe": "no image file (it is a pipe or a device)",
        "a": "no such image file (it is a folder)",
        "a\\1.jpg": "there is a file 'a/1.jpg': write slashes in file_name",
    }
    for name, what in whats.items():
        with pytest.raises(DataError) as caught:
            check_images_exist(read(tmp_path, content(images=[{**IMAGES[0], "file_name": name}])))
        assert str(folder / name) in str(caught.value) and what in str(caught.value)


def test_what_no_entry_names_does_not_matter(tmp_path):
    folder = tmp_path / "train2017"
    touch_images(folder, ["1.jpg"])
    (folder / "loop").symlink_to("loop")
    check_images_exist(read(tmp_path, content(images=IMAGES[:1])))


def test_a_data_set_without_a_validation_split(tmp_path):
    data = write_coco(tmp_path, [annotation(1)], splits=("train",))
    assert read_dataset(data, evaluating=False, upright=False)[1] is None
    with pytest.raises(DataError, match=r"no validation split \(.*\): --evaluation without epochs trains without one"):
        read_dataset(data, evaluating=True, upright=False)


def test_the_clean_file_holds_what_is_trained_on(tmp_path):
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


def test_the_clean_file_reads_as_itself(coco128, tmp_path):
    annotations = read_annotations(coco128 / "annotations" / "instances_train2017.json", coco128 / "train2017")
    write_clean_file(annotations, tmp_path / "clean.json")
    again = read_annotations(tmp_path / "clean.json", coco128 / "train2017")
    assert again.boxes.tolist() == annotations.boxes.tolist()
    assert again.labels.tolist() == annotations.labels.tolist()
    assert np.diff(again.first_box).tolist() == [n for n in np.diff(annotations.first_box) if n]


def test_boxes_that_cvat_turns_are_told(tmp_path):
    """They are trained as they stand; attributes of other programs are of any type."""
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


def test_whole_numbers_may_be_written_as_fractions(tmp_path):
    """As pandas writes a column in which some are missing."""
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
def test_what_a_whole_number_would_lose_is_refused(tmp_path, wrong):
    message = error_of(tmp_path, content([annotation(1.0), annotation(wrong)]))
    assert f"image_id is {json.dumps(wrong)} in annotations[1] (id 2)" in message
