"""Annotation files as JSON: entries and fields of the wrong form, text that is not JSON, files that cannot be read."""

import json
import os
import re

import pytest

from src.data.annotations.coco import read_annotations
from src.data.annotations.coco_errors import BLOCK
from src.runtime.errors import DataError
from tests.helpers.annotation_files import IMAGES, content, error_of, read, without
from tests.helpers.datasets import CATEGORIES, annotation, write_annotations

BBOX_FAULTS = ["[]", "[1, 2, 3]", "[1, 2, 3, 4, 5]", '[1, 2, "3", 4]', "[1, 2, 3, null]", "null", '"1 2 3 4"', "7",
               "[1, 2, NaN, 4]", "[1, 2, 3, Infinity]", "[-Infinity, 2, 3, 4]", "[1, 2, 3, 1e999]", "[[1, 2, 3, 4]]",
               "{}"]  # fmt: skip


@pytest.mark.parametrize("bbox", BBOX_FAULTS)
def test_a_bbox_that_is_not_four_finite_numbers_is_refused(tmp_path, bbox):
    entries = [annotation(1), annotation(1, score="S"), annotation(1, bbox=["B"]), annotation(1, bbox=["B"])]
    text = json.dumps(content(entries), indent=1)
    text = re.sub(r'\[\s*"B"\s*\]', bbox, text).replace('"S"', "NaN")
    message = error_of(tmp_path, text)
    shown = bbox.replace("1e999", "Infinity")
    assert f"bbox is {shown} in annotations[2] (id 3): it must be four finite numbers, [x, y, width, height]" in message


# --- entries ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["bbox", "image_id", "category_id"])
def test_an_annotation_without_a_field_is_refused(tmp_path, field):
    assert f"annotations[1] (id 2) has no {field}: it must be" in error_of(
        tmp_path, content([annotation(1), without(annotation(1), field)])
    )


@pytest.mark.parametrize("field", ["file_name", "width", "height", "id"])
def test_an_image_without_a_field_is_refused(tmp_path, field):
    message = error_of(tmp_path, content(images=[IMAGES[0], without(IMAGES[1], field)]))
    known = {"id": 'file_name "2.jpg"', "file_name": "id 2"}.get(field, 'id 2, file_name "2.jpg"')
    assert f"images[1] ({known}) has no {field}: it must be" in message


@pytest.mark.parametrize("field", ["id", "name"])
def test_a_category_without_a_field_is_refused(tmp_path, field):
    assert f"has no {field}" in error_of(tmp_path, content(categories=[CATEGORIES[0], without(CATEGORIES[1], field)]))


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
def test_a_wrong_field_of_an_image_is_refused(tmp_path, field, value):
    message = error_of(tmp_path, content(images=[{**IMAGES[0], field: value}, IMAGES[1]]))
    assert f"{field} is {json.dumps(value)} in images[0]" in message


@pytest.mark.parametrize("name", ["/etc/1.jpg", "../1.jpg", "a/../../1.jpg", "a/..", "a\0.jpg"])
def test_a_file_name_must_stay_in_the_folder(tmp_path, name):
    message = error_of(tmp_path, content(images=[IMAGES[0], {**IMAGES[1], "file_name": name}]))
    assert "images[1]" in message and repr(name) in message and str(tmp_path / "train2017") in message


def test_a_wrong_iscrowd_is_refused(tmp_path):
    assert 'iscrowd is "much" in annotations[0] (id 1): it must be' in error_of(
        tmp_path, content([annotation(1, iscrowd="much")])
    )


@pytest.mark.parametrize("area", ['"much"', '"12"', "[7]", '{"a": 1}', "NaN", "true", "null"])
def test_an_area_that_is_no_number_counts_as_missing(tmp_path, area):
    text = json.dumps(content([annotation(1, area="A")])).replace('"A"', area)
    assert read(tmp_path, text, for_scoring=True).ground_truth.areas.tolist() == [3000]  # 60 x 50


@pytest.mark.parametrize("given", ["a1-uuid", 1.5, [1], {"a": None}, True, 10**30, None])
def test_an_annotation_id_may_be_anything(tmp_path, given):
    entries = [{**annotation(1), "id": given}, {**annotation(2), "id": 7}, {**annotation(2, (0, 0, 0, 9)), "id": 8}]
    annotations = read(tmp_path, {**content(), "annotations": entries})
    assert len(annotations.boxes) == 2
    assert "(annotation ids 3)" in annotations.warnings[0] and "numbered from 1" in annotations.warnings[1]


@pytest.mark.parametrize("written", ["1e0", "1.0e+0", "10E-1", "100e-2", "0.1e1", "1.0"])
@pytest.mark.parametrize("after", ["", ', "more": [1, {"id": 2.0}]'])
def test_whole_numbers_in_float_notation_are_read(tmp_path, written, after):
    text = json.dumps(content([annotation(1), annotation(2)])).replace('"image_id": 1,', f'"image_id": {written},')
    text = text.replace("160", "1.6e+02").replace("120", "12E1")[:-1] + after + "}"
    annotations = read(tmp_path, text)
    assert annotations.with_boxes().tolist() == [0, 1]
    assert annotations.sizes.tolist() == [[160, 120]] * 4


@pytest.mark.parametrize("written", ["1e-1", "1.5", "1e400", "12e-1", "1e19"])
def test_numbers_that_are_not_whole_or_too_large_are_refused(tmp_path, written):
    text = json.dumps(content([annotation(1), annotation(2)])).replace('"image_id": 1,', f'"image_id": {written},')
    assert " in annotations[0] (id 1): it must be the id of an entry of `images`" in error_of(tmp_path, text)


def test_the_byte_of_an_error_after_numbers_in_float_notation_is_right(tmp_path):
    text = json.dumps(content()).replace("160", "1.6e+02").replace('"annotations"', '"annotations" ?')
    assert f"(byte {text.index('?')})" in error_of(tmp_path, text)


@pytest.mark.parametrize(
    ("beginning", "what"),
    [
        (b"\x1f\x8b\x08", "a gzip archive"),
        (b"PK\x03\x04", "a zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "a Git LFS pointer"),
        (b"<!DOCTYPE html>", "an HTML or XML page"),
        (b"\xef\xbb\xbf\n <html>", "an HTML or XML page"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path, beginning, what):
    path = write_annotations(tmp_path, "")
    path.write_bytes(beginning)
    with pytest.raises(DataError, match=f"{path}: is {what}"):
        read_annotations(path, tmp_path)


@pytest.mark.parametrize("name", ["images", "annotations", "categories"])
def test_lists_that_are_missing_or_of_another_type_are_refused(tmp_path, name):
    assert f"has no `{name}`" in error_of(tmp_path, without(content(), name))
    assert f"`{name}` is of type null" in error_of(tmp_path, {**content(), name: None})
    assert f"{name}[0] must be an object with" in error_of(tmp_path, {**content(), name: [3]})


def test_an_empty_list_of_images_is_refused(tmp_path):
    message = error_of(tmp_path, content(images=[]))
    assert "`images` is empty" in message and str(tmp_path / "train2017") in message


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("[]", "is of type array: it must be an object with images, annotations, categories"),
        ("null", "is of type null"),
        ("html", "line 1, column 1 (byte 0), around \"html\""),
        ('{"images": [],\n "extra": [1,,2]}', "line 2, column 14 (byte 28)"),
        (json.dumps(content())[:-20], "ends in the middle"),
        (json.dumps(content()) + "}", "trailing characters at line 1"),
        ('{"a": ' + "[" * 999_999 + "]" * 999_999 + "}", "nested too deep"),
        (json.dumps(content()).replace("1.jpg", "\\ud800"), ""),
        (json.dumps(content()).replace("1.jpg", "\\NaN"), "invalid escape character"),
        (json.dumps(content()).replace("annotations", "annotat\\NaN"), "invalid escape character"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_json_object_is_refused(tmp_path, text, expected):
    assert expected in error_of(tmp_path, text)


def test_other_encodings_are_refused(tmp_path):
    path = write_annotations(tmp_path, "")
    path.write_bytes(json.dumps(content()).encode("utf-16"))
    with pytest.raises(DataError, match="UTF-16 text: save it as UTF-8"):
        read_annotations(path, tmp_path)
    latin = json.dumps(content(), ensure_ascii=False).replace("2.jpg", "ä.jpg").encode("latin-1")
    for before in (b"{", b'{"info":\n "' + "ä".encode() * BLOCK + b'", '):  # a block begins inside a letter
        path.write_bytes(before + latin[1:])
        lines = (before + latin[1:]).partition(b"\xe4.jpg")[0].split(b"\n")
        with pytest.raises(DataError, match=rf"not UTF-8 at line {len(lines)}, column {len(lines[-1]) + 1} "):
            read_annotations(path, tmp_path)


@pytest.mark.parametrize("extra", [b'"info": "\xff"', b'"info": {"by": "\xff"}', b'"\xff": 1'])
def test_other_encodings_in_ignored_fields_are_accepted(tmp_path, extra):
    path = write_annotations(tmp_path, "")
    path.write_bytes(json.dumps(content()).encode().replace(b"{", b"{" + extra + b", ", 1))
    assert len(read_annotations(path, tmp_path).image_ids) == len(content()["images"])


def test_an_unreadable_annotation_file_is_named(tmp_path):
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
    with pytest.raises(DataError, match="--data must be a folder in the COCO 2017 layout"):
        read_annotations(path / "below-a-file", tmp_path)


def test_an_annotation_file_may_be_a_pipe(tmp_path):
    """A decompressor may write the annotation file."""
    reading, writing = os.pipe()
    os.write(writing, json.dumps(content()).encode())
    os.close(writing)
    assert len(read_annotations(f"/dev/fd/{reading}", tmp_path)) == 4
    os.close(reading)
