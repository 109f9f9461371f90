"""Annotation files of other people's making: what works, what is mended with a warning, what is an error.

Expected values are worked out by hand or by pycocotools.
"""

import contextlib
import io
import json
import os
import pickle
import re

import numpy as np
import pytest
from pycocotools.coco import COCO

from src.coco import Category, check_images_exist, read_annotations, write_clean_file
from src.errors import DataError

from .datasets import CATEGORIES, annotation, write_annotations

LARGEST_ID = 2**63 - 1
IMAGES = [{"id": i, "file_name": f"{i}.jpg", "width": 160, "height": 120} for i in (1, 2, 3, 4)]


def content(annotations=None, images=None, categories=None, **fields) -> dict:
    """An annotation file's content: four images of 160 x 120, one annotation; annotations get the ids 1, 2, ..."""
    annotations = [annotation(1)] if annotations is None else annotations
    return {
        "images": IMAGES if images is None else images,
        "annotations": [{"id": number, **entry} for number, entry in enumerate(annotations, 1)],
        "categories": CATEGORIES if categories is None else categories,
        **fields,
    }


@pytest.fixture
def read(tmp_path):
    """`read(content)`: the Annotations of a file with that content, a dict or text."""

    def written_and_read(what, **options):
        return read_annotations(write_annotations(tmp_path, what), tmp_path / "train2017", **options)

    return written_and_read


@pytest.fixture
def error_of(read, tmp_path):
    """`error_of(content)`: the message, a line that names the file."""

    def message(what, **options) -> str:
        with pytest.raises(DataError) as caught:
            read(what, **options)
        text = str(caught.value)
        assert "\n" not in text
        assert str(tmp_path / "annotations" / "instances_train2017.json") in text
        return text

    return message


def without(entry: dict, field: str) -> dict:
    return {key: value for key, value in entry.items() if key != field}


# --- what is read ----------------------------------------------------------------------------------------------------


def test_the_arrays_are_those_of_pycocotools(coco128):
    path = coco128 / "annotations" / "instances_train2017.json"
    annotations = read_annotations(path, coco128 / "train2017")
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(path))
    assert len(annotations) == 128 and len(annotations.boxes) == 939 and annotations.warnings == ()
    category_ids = [category["id"] for category in coco.dataset["categories"]]
    assert annotations.image_ids.tolist() == [image["id"] for image in coco.dataset["images"]]
    for index, image_id in enumerate(annotations.image_ids.tolist()):
        image = coco.imgs[image_id]
        own = [entry for entry in coco.dataset["annotations"] if entry["image_id"] == image_id]
        rows = slice(*annotations.first_box[index : index + 2])
        boxes, labels = annotations.of_image(index)
        assert annotations.file_name(index) == image["file_name"]
        assert annotations.sizes[index].tolist() == [image["width"], image["height"]]
        assert [category_ids[label - 1] for label in labels] == [entry["category_id"] for entry in own]
        assert annotations.annotation_ids[rows].tolist() == [entry["id"] for entry in own]
        assert annotations.areas[rows].tolist() == [entry["area"] for entry in own]
        assert annotations.crowd[rows].tolist() == [bool(entry["iscrowd"]) for entry in own]
        expected = [[x, y, x + w, y + h] for x, y, w, h in (entry["bbox"] for entry in own)]
        np.testing.assert_allclose(boxes, np.array(expected).reshape(-1, 4), atol=0.011)  # clipping moves two by 0.01


def test_types_and_paths(read, tmp_path):
    annotations = read(content([annotation(2), annotation(1), annotation(2, category_id=2, iscrowd=1)]))
    kinds = {
        "image_ids": np.int64, "sizes": np.int32, "first_box": np.int64, "boxes": np.float32, "labels": np.int64,
        "crowd": np.bool_, "areas": np.float64, "annotation_ids": np.int64,
    }  # fmt: skip
    assert {name: getattr(annotations, name).dtype for name in kinds} == kinds
    assert annotations.image_path(1) == tmp_path / "train2017" / "2.jpg"
    assert annotations.annotation_ids.tolist() == [2, 1, 3]
    assert annotations.labels.tolist() == [1, 1, 2] and annotations.crowd.tolist() == [False, False, True]
    assert annotations.with_boxes().tolist() == [0, 1]
    assert annotations.of_image(3)[0].shape == (0, 4)
    assert annotations.categories == (Category(1, "square"), Category(2, "disc"))


def test_a_boxs_copy_can_be_changed(read):
    annotations = read(content())
    annotations.of_image(0)[0][:] = 0
    assert annotations.boxes.tolist() == [[20, 20, 80, 70]]


def test_workers_get_them_whole(read):
    annotations = read(content([annotation(4)]))
    copy = pickle.loads(pickle.dumps(annotations))
    assert [copy.file_name(i) for i in range(4)] == ["1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    assert copy.boxes.tolist() == annotations.boxes.tolist()


def test_what_is_not_needed_may_be_missing(read):
    annotations = read(content([without(annotation(1), "id"), {**annotation(2), "area": 12.5, "iscrowd": 1}]))
    assert annotations.areas.tolist() == [3000, 12.5]  # 60 x 50
    assert annotations.crowd.tolist() == [False, True]


def test_null_counts_as_missing(read):
    annotations = read(content([annotation(1, area=None, iscrowd=None, segmentation=None)], info=None, licenses=None))
    assert annotations.areas.tolist() == [3000] and not annotations.crowd.any()


def test_iscrowd_may_be_true_or_false(read):
    assert read(content([annotation(1, iscrowd=True), annotation(1, iscrowd=False)])).crowd.tolist() == [True, False]


def test_fields_of_other_tools_are_passed_over(read):
    strange = {"keypoints": [1, [2, {"a": None}]], "segmentation": {"counts": "x\\y", "size": [1, 2]}, "score": "high"}
    assert len(read(content([annotation(1, **strange)], extra={"a": [[]]})).boxes) == 1


def test_a_byte_order_mark_is_passed_over(tmp_path):
    path = write_annotations(tmp_path, "")
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(content()).encode())
    assert len(read_annotations(path, tmp_path).boxes) == 1


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_nan_in_a_field_that_is_not_read(read, number):
    entry = annotation(1, score="X", caption='the "NaN" of \\ Infinity\\')
    text = json.dumps(content([entry], info={"a": ["X", 'NaN, "'], "b": "X"})).replace('"X"', number)
    assert read(text).boxes.tolist() == [[20, 20, 80, 70]]


def test_file_names_of_any_script_and_with_subfolders(read):
    names = ["ä/猫 1.jpg", "train/a,b\n.png", "./c.jpg", "d\\e.jpg"]
    annotations = read(
        content(images=[{**image, "file_name": name} for image, name in zip(IMAGES, names, strict=True)])
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


def test_category_sets_that_differ(error_of):
    message = error_of(content(), categories=(Category(1, "square"), Category(2, "ring"), Category(5, "star")))
    assert "only here: 2 'disc'" in message and "only there: 2 'ring', 5 'star'" in message


def test_categories_must_be_there_once(error_of):
    assert "`categories` is empty" in error_of(content(categories=[]))
    assert "category id 1 occurs more than once" in error_of(content(categories=[*CATEGORIES, CATEGORIES[0]]))


def test_a_category_that_is_not_listed(error_of):
    message = error_of(content([annotation(1), annotation(1, category_id=3)]))
    assert "annotations[1] (id 2) has category_id 3" in message and "it has 1, 2" in message


def test_annotations_of_other_images_are_left_out(read):
    annotations = read(content([annotation(99), annotation(1), annotation(98)]))
    assert annotations.annotation_ids.tolist() == [2]
    assert [w for w in annotations.warnings if "2 of 3 annotations left out" in w and "image_id (99, 98)" in w]


def test_no_usable_annotation_at_all(error_of, tmp_path):
    folder = str(tmp_path / "train2017")
    message = error_of(content([annotation(99), annotation(98)]))
    assert "0 of 4 images" in message and "99" in message and folder in message
    message = error_of(content([annotation(1, bbox=(0, 0, 0, 5))]))
    assert "0 of 4 images" in message and folder in message
    assert "0 of 4 images" in error_of(content([]))


def test_a_validation_file_may_hold_no_boxes_but_not_those_of_other_images(read, error_of):
    categories = (Category(1, "square"), Category(2, "disc"))
    assert len(read(content([]), categories=categories)) == 4
    assert "0 of 4 images" in error_of(content([annotation(99)]), categories=categories)


@pytest.mark.parametrize("ids", [(LARGEST_ID, LARGEST_ID - 1), (-LARGEST_ID - 1, 0)])
def test_the_largest_ids_come_out_exactly(read, ids):
    images = [{**image, "id": image_id} for image, image_id in zip(IMAGES, ids, strict=False)]
    annotations = read(content([annotation(ids[1]), annotation(ids[0])], images))
    assert annotations.image_ids.tolist() == list(ids)
    assert annotations.annotation_ids.tolist() == [2, 1]


@pytest.mark.parametrize("image_id", ["7", 7.5, LARGEST_ID + 1, 10**30, None, [7], True])
def test_an_image_id_that_is_no_whole_number(error_of, image_id):
    message = error_of(content(images=[IMAGES[0], {**IMAGES[1], "id": image_id}]))
    assert f'id is {json.dumps(image_id)} in images[1] (id {json.dumps(image_id)}, file_name "2.jpg")' in message
    assert "whole number" in message
    message = error_of(content([annotation(1), annotation(image_id)]))
    assert f"image_id is {json.dumps(image_id)} in annotations[1] (id 2)" in message


def test_the_same_image_id_twice(error_of):
    assert "images[1] and images[4] have the same id 2" in error_of(
        content(images=[*IMAGES, {**IMAGES[1], "file_name": "x"}])
    )


@pytest.mark.parametrize("name", ["2.jpg", "./2.jpg", ".//2.jpg", "a/./../2.jpg"])
def test_one_file_for_two_images(error_of, name):
    message = error_of(content(images=[*IMAGES, {**IMAGES[1], "id": 5, "file_name": name}]))
    expected = "a path below" if ".." in name else "images[1] and images[4] have the same file_name '2.jpg'"
    assert expected in message


def test_annotations_without_ids_of_their_own_are_numbered(tmp_path):
    for ids in ((3, 3), (None, 3)):
        entries = [{**annotation(1), "id": number} for number in ids]
        annotations = read_annotations(write_annotations(tmp_path, content(entries)), tmp_path)
        assert annotations.annotation_ids.tolist() == [1, 2]
        assert "no id of their own" in annotations.warnings[0]


# --- boxes -----------------------------------------------------------------------------------------------------------


def test_boxes_without_area_are_left_out(read):
    flat = [(20, 20, 0, 5), (20, 20, 5, 0), (20, 20, -5, 5), (20, 20, 5, -1e300), (20, 20, 1e-9, 5)]
    outside = [(160, 0, 5, 5), (0, 130, 5, 5), (-9, 0, 9, 5), (1e300, 0, 1e300, 5)]
    annotations = read(content([annotation(1, bbox=bbox) for bbox in [*flat, *outside, (20, 20, 5, 5)]]))
    assert annotations.annotation_ids.tolist() == [10]
    joined = "\n".join(annotations.warnings)
    assert "4 of 10 annotations left out: the width or height" in joined and "annotation ids 1, 2, 3, 4)" in joined
    assert "5 of 10 annotations left out: their `bbox` is outside" in joined and "ids 5, 6, 7, 8, 9)" in joined


def test_boxes_are_clipped_to_the_image(read):
    given = [(-0.25, 0, 10, 10), (150, 110, 10.25, 10.5), (-1e6, -1e6, 2e6, 2e6), (100, -1e308, 5, 1.7e308)]
    annotations = read(content([annotation(1, bbox=bbox) for bbox in given]))
    assert annotations.boxes.tolist() == [[0, 0, 9.75, 10], [150, 110, 160, 120], [0, 0, 160, 120], [100, 0, 105, 120]]
    assert np.isfinite(annotations.areas).all()
    assert "2 of 4 annotations clipped" in annotations.warnings[0] and "ids 3, 4)" in annotations.warnings[0]


def test_many_ids_are_listed_in_part(read):
    annotations = read(content([annotation(1), *[annotation(1, bbox=(1, 1, 0, 0))] * 9]))
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


BBOX_FAULTS = ["[]", "[1, 2, 3]", "[1, 2, 3, 4, 5]", '[1, 2, "3", 4]', "[1, 2, 3, null]", "null", '"1 2 3 4"', "7",
               "[1, 2, NaN, 4]", "[1, 2, 3, Infinity]", "[-Infinity, 2, 3, 4]", "[1, 2, 3, 1e999]", "[[1, 2, 3, 4]]",
               "{}"]  # fmt: skip


@pytest.mark.parametrize("bbox", BBOX_FAULTS)
def test_a_bbox_that_is_not_four_numbers(error_of, bbox):
    entries = [annotation(1), annotation(1, score="S"), annotation(1, bbox=["B"]), annotation(1, bbox=["B"])]
    text = json.dumps(content(entries), indent=1)
    text = re.sub(r'\[\s*"B"\s*\]', bbox, text).replace('"S"', "NaN")
    message = error_of(text)
    shown = bbox.replace("1e999", "Infinity")
    assert f"bbox is {shown} in annotations[2] (id 3): it must be four finite numbers, [x, y, width, height]" in message


# --- entries ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["bbox", "image_id", "category_id"])
def test_an_annotation_without_a_field(error_of, field):
    assert f"annotations[1] (id 2) has no {field}: it must be" in error_of(
        content([annotation(1), without(annotation(1), field)])
    )


@pytest.mark.parametrize("field", ["file_name", "width", "height", "id"])
def test_an_image_without_a_field(error_of, field):
    message = error_of(content(images=[IMAGES[0], without(IMAGES[1], field)]))
    known = {"id": 'file_name "2.jpg"', "file_name": "id 2"}.get(field, 'id 2, file_name "2.jpg"')
    assert f"images[1] ({known}) has no {field}: it must be" in message


@pytest.mark.parametrize("field", ["id", "name"])
def test_a_category_without_a_field(error_of, field):
    assert f"has no {field}" in error_of(content(categories=[CATEGORIES[0], without(CATEGORIES[1], field)]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("file_name", ""),
        ("file_name", 3),
        ("width", 0),
        ("height", -3),
        ("width", "160"),
        ("height", 2**31),
        ("width", None),
    ],
)
def test_a_wrong_field_of_an_image(error_of, field, value):
    message = error_of(content(images=[{**IMAGES[0], field: value}, IMAGES[1]]))
    assert f"{field} is {json.dumps(value)} in images[0]" in message


@pytest.mark.parametrize("name", ["/etc/1.jpg", "../1.jpg", "a/../../1.jpg", "a/..", "a\0.jpg"])
def test_a_file_name_must_stay_in_the_folder(error_of, tmp_path, name):
    message = error_of(content(images=[IMAGES[0], {**IMAGES[1], "file_name": name}]))
    assert "images[1]" in message and repr(name) in message and str(tmp_path / "train2017") in message


@pytest.mark.parametrize("field", ["area", "iscrowd"])
def test_a_wrong_optional_field(error_of, field):
    assert f'{field} is "much" in annotations[0] (id 1): it must be' in error_of(
        content([annotation(1, **{field: "much"})])
    )


@pytest.mark.parametrize("part", ["images", "annotations", "categories"])
def test_parts_that_are_missing_or_no_list(error_of, part):
    assert f"has no `{part}`" in error_of(without(content(), part))
    assert f"`{part}` is of type null" in error_of({**content(), part: None})
    assert f"{part}[0] must be an object with" in error_of({**content(), part: [3]})


def test_no_images(error_of, tmp_path):
    message = error_of(content(images=[]))
    assert "`images` is empty" in message and str(tmp_path / "train2017") in message


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("[]", "is of type array: it must be an object with images, annotations, categories"),
        ("null", "is of type null"),
        ("<html>", "line 1, column 1 (byte 0), around \"<html>\""),
        ('{"images": [],\n "extra": [1,,2]}', "line 2, column 14 (byte 28)"),
        (json.dumps(content())[:-20], "ends in the middle"),
        (json.dumps(content()) + "}", "trailing characters at line 1"),
        ('{"a": ' + "[" * 99999 + "]" * 99999 + "}", "nested too deep"),
        (json.dumps(content()).replace("1.jpg", "\\ud800"), ""),
    ],
)  # fmt: skip
def test_a_file_that_is_no_json_object(error_of, text, expected):
    assert expected in error_of(text)


def test_other_encodings(tmp_path):
    path = write_annotations(tmp_path, "")
    path.write_bytes(json.dumps(content()).encode("utf-16"))
    with pytest.raises(DataError, match="UTF-16 text: save it as UTF-8"):
        read_annotations(path, tmp_path)
    path.write_bytes(json.dumps(content(), ensure_ascii=False).replace("2.jpg", "ä.jpg").encode("latin-1"))
    with pytest.raises(DataError, match=r"not UTF-8 at line 1, column \d+"):
        read_annotations(path, tmp_path)


def test_an_annotation_file_that_cannot_be_read(tmp_path):
    path = tmp_path / "annotations.json"
    with pytest.raises(DataError, match=rf"{path}: no such annotation file"):
        read_annotations(path, tmp_path)
    with pytest.raises(DataError, match=rf"{tmp_path}: the annotation file cannot be read \(Is a directory\)"):
        read_annotations(tmp_path, tmp_path)
    path.symlink_to(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_annotations(path, tmp_path)
    path.unlink()
    path.write_text("{}")
    with pytest.raises(DataError, match="cannot be read"):
        read_annotations(path / "below-a-file", tmp_path)


def test_a_pipe_is_read_too(tmp_path):
    """`--data` may hold what a decompressor writes."""
    reading, writing = os.pipe()
    os.write(writing, json.dumps(content()).encode())
    os.close(writing)
    assert len(read_annotations(f"/dev/fd/{reading}", tmp_path)) == 4
    os.close(reading)


def touch_images(folder, names) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_images_that_are_there(read, tmp_path):
    names = ["1.jpg", "a/2.jpg", "a/b/3.jpg", "./4.jpg"]
    touch_images(tmp_path / "train2017", names)
    images = [{**image, "file_name": name} for image, name in zip(IMAGES, names, strict=True)]
    check_images_exist(read(content(images=images)))


@pytest.mark.parametrize("missing", ["3.jpg", "a/2.jpg", "n" * 400])
def test_the_first_missing_image_is_named(read, tmp_path, missing):
    folder = tmp_path / "train2017"
    touch_images(folder, ["1.jpg", "a/b/5.jpg", "2.jpg", "4.jpg"])
    annotations = read(content(images=[*IMAGES[:2], {**IMAGES[2], "file_name": missing}, IMAGES[3]]))
    with pytest.raises(DataError) as caught:
        check_images_exist(annotations)
    assert str(folder / missing) in str(caught.value) and "image 3" in str(caught.value)


def test_a_missing_image_folder_is_named(read, tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path / 'train2017'}: .*No such file or directory"):
        check_images_exist(read(content()))


def test_a_folder_is_no_image(read, tmp_path):
    (tmp_path / "train2017" / "1.jpg").mkdir(parents=True)
    with pytest.raises(DataError, match=r"1\.jpg: no such image file"):
        check_images_exist(read(content()))


def test_the_clean_file_holds_what_is_trained_on(read, tmp_path):
    categories = [{"id": 90, "name": "kite"}, {"id": 0, "name": "cat"}]
    given = [
        annotation(LARGEST_ID, (150.1, 100.3, 30, 30), 0),
        annotation(2, (0, 0, 0, 0), 90),
        annotation(4, (1, 2, 3.5, 4), 90, iscrowd=1),
        annotation(LARGEST_ID, (5, 5, 1e-3, 7), 90),
    ]
    images = [{**IMAGES[0], "id": LARGEST_ID, "file_name": "sub/ä.jpg"}, *IMAGES[1:]]
    annotations = read(content(given, images, categories))
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
