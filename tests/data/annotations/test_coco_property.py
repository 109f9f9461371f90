"""Whatever the annotation file holds, it becomes clean arrays or a DataError that says where; nothing else."""

import copy
import json
import re
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from src.data.annotations.coco import Annotations, read_annotations
from src.data.pipelines.dali_files import write_clean_file
from src.runtime.errors import DataError
from tests.helpers.annotation_strategies import ANYTHING, SOUND, good

QUICKLY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], print_blob=True)
PLACE = re.compile(
    r"(images|annotations|categories)\[\d+\]|`(images|annotations|categories)`|byte \d+|\d+ bytes|0 of \d+|category id|"
    r"object with images|is empty|nested too deep|UTF-16"
)


@st.composite
def spoilt(draw) -> dict:
    """A good file's content with up to three of its entries or fields changed or removed."""
    content = copy.deepcopy(draw(good()))
    for _ in range(draw(st.integers(1, 3))):
        owner = content
        part = draw(st.sampled_from(["images", "annotations", "categories"]))
        if isinstance(content.get(part), list) and content[part] and draw(st.sampled_from([True, True, True, False])):
            entry = draw(st.sampled_from(content[part]))
            if isinstance(entry, dict) and entry:
                owner, part = entry, draw(st.sampled_from(sorted(entry)))
        if draw(st.booleans()):
            owner[part] = draw(ANYTHING)
        else:
            owner.pop(part, None)
    return content


def outcome(folder: Path, content: bytes) -> Annotations | str:
    """The Annotations of a file with that content, all they promise asserted, or a DataError's message."""
    path = folder / "annotations.json"
    path.write_bytes(content)
    try:
        annotations = read_annotations(path, folder)
    except DataError as error:
        message = str(error).replace(str(path), "FILE")
        assert message.startswith("FILE: ") and "\n" not in message
        assert PLACE.search(message), message
        return message
    check(annotations, folder / "clean.json")
    return annotations


def check(annotations: Annotations, clean_file: Path) -> None:
    """Asserts what Annotations promises, and that our own small file of them is a good one."""
    images, boxes = len(annotations), annotations.boxes
    owner = np.repeat(np.arange(images), np.diff(annotations.first_box))
    sizes = annotations.sizes[owner]
    assert len(annotations.first_box) == images + 1 and annotations.first_box[-1] == len(boxes)
    assert (annotations.sizes > 0).all() and len(set(annotations.image_ids.tolist())) == images
    assert len({annotations.file_name(i) for i in range(images)}) == images
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= sizes).all() and (boxes[:, 2:] > boxes[:, :2]).all()
    assert ((annotations.labels >= 1) & (annotations.labels <= len(annotations.categories))).all()
    assert len(annotations.labels) == len(annotations.crowd) == len(boxes)
    assert all("\n" not in line and str(annotations.path) in line for line in annotations.warnings)
    if len(boxes):
        write_clean_file(annotations, clean_file)
        again = read_annotations(clean_file, annotations.image_folder)
        assert again.boxes.tolist() == boxes.tolist() and again.labels.tolist() == annotations.labels.tolist()


@settings(QUICKLY, max_examples=100)
@given(good())
def test_good_files_are_read(tmp_path, content):
    annotations = outcome(tmp_path, json.dumps(content).encode())
    if isinstance(annotations, str):  # no image has a box, or a random name is of another folder or the same file
        assert "0 of" in annotations or "file_name" in annotations
        return
    known = {image["id"] for image in content["images"]}
    sides = [entry["bbox"][2:] for entry in content["annotations"] if entry["image_id"] in known]
    assert annotations.image_ids.tolist() == [image["id"] for image in content["images"]]
    assert len(annotations.boxes) <= sum(width > 0 and height > 0 for width, height in sides)


@settings(QUICKLY, max_examples=200)
@given(spoilt())
def test_spoilt_files_are_read_or_refused(tmp_path, content):
    outcome(tmp_path, json.dumps(content).encode())


@settings(QUICKLY, max_examples=50)
@given(ANYTHING)
def test_any_other_json_is_refused(tmp_path, content):
    assert isinstance(outcome(tmp_path, json.dumps(content).encode()), str)


TOKENS = [*b'NaN -Infinity null " { } [ ] , : - e999 \\ \\ud800'.split(), b"9" * 25, b"\n", b"\0"]
MARKS = [b"\xef\xbb\xbf", b"\xff\xfe", b"\xc3"]
PIECES = st.sampled_from(TOKENS) | st.sampled_from(MARKS) | st.binary(max_size=3)
REMOVED = st.sampled_from([0, 0, 1, 1, 2, 40])
CUTS = st.lists(st.tuples(st.integers(0, len(SOUND)), REMOVED, PIECES), min_size=1, max_size=3)


@settings(QUICKLY, max_examples=400)
@given(CUTS)
def test_changed_bytes_are_read_or_refused(tmp_path, cuts):
    content = SOUND
    for place, removed, piece in cuts:
        content = content[:place] + piece + content[place + removed :]
    outcome(tmp_path, content)


@settings(QUICKLY, max_examples=60)
@given(st.integers(0, len(SOUND) - 1))
def test_a_file_cut_off_is_refused(tmp_path, length):
    assert isinstance(outcome(tmp_path, SOUND[:length]), str)


def test_the_fuzzed_file_is_sound(tmp_path):
    assert len(outcome(tmp_path, SOUND).boxes) == 2
