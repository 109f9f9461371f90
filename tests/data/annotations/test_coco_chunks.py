"""Reading an annotation file in chunks gives what Python's JSON reader gives, whatever the file's layout."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from src.data.annotations import coco_json
from src.runtime.errors import DataError
from tests.helpers.annotation_files import IMAGES, content, error_of
from tests.helpers.annotation_strategies import SOUND, good
from tests.helpers.datasets import CATEGORIES, annotation

QUICKLY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
NASTY = ['}, {"id": 1', '"},{"', "\\", "[{", "]}", "},{", "\\u0022}, {", "é猫", '\\"', "NaN", ""]
KEYS = ["id", "images", "annotations", "categories", "parts", "a}, {b", '"']
INNER = st.recursive(
    st.none() | st.integers(-9, 9) | st.sampled_from(NASTY) | st.just(float("nan")) | st.just(float("-inf")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=8,
)
ORDERS = st.permutations(["info", "images", "annotations", "categories", "more"])
FORMS = st.sampled_from([{}, {"separators": (",", ":")}, {"indent": 1}, {"ensure_ascii": False}, {"indent": "\t"}])


def read_in_chunks(path: Path, monkeypatch, size: int) -> dict[str, list]:
    """The entries of each list as plain values, decoded `size` bytes at a time."""
    lists: dict[str, list] = {}
    with monkeypatch.context() as patch:
        patch.setattr(coco_json, "CHUNK_SIZE", size)
        for list_name, first, entries in coco_json.read_chunks(path):
            assert first == (len(lists[list_name]) if first else 0)
            lists[list_name] = lists.get(list_name, [])[:first] + entries
    return {name: [plain(entry) for entry in entries] for name, entries in lists.items()}


def plain(entry) -> dict:
    return {name: getattr(entry, name) for name in entry.__struct_fields__ if name != "attributes"}


def expected(value: dict, list_name: str) -> list[dict]:
    """The entries of a list that Python's reader has read, with the fields that `read_chunks` reads."""
    optional = {"id": None, "area": None, "iscrowd": 0}
    fields = {
        "images": ("id", "file_name", "width", "height"),
        "annotations": ("image_id", "category_id", "bbox", "id", "area", "iscrowd"),
        "categories": ("id", "name"),
    }
    entries = [{name: entry.get(name, optional.get(name)) for name in fields[list_name]} for entry in value[list_name]]
    return [{**entry, "bbox": tuple(entry["bbox"])} if "bbox" in entry else entry for entry in entries]


@st.composite
def written(draw) -> str:
    """A sound file's text in some order of keys and some layout, with odd fields that are not read."""
    value = draw(good())
    for name in ("images", "annotations", "categories"):
        value[name] = [
            {**draw(st.dictionaries(st.just("parts"), INNER)), **entry, **draw(st.dictionaries(st.just("more"), INNER))}
            for entry in value[name]
        ]
    value |= {"info": draw(INNER), "more": draw(INNER)}
    text = json.dumps({key: value[key] for key in draw(ORDERS)}, **draw(FORMS))
    return draw(st.sampled_from(["", " \n", "\ufeff"])) + text + draw(st.sampled_from(["", "\n \t"]))


@QUICKLY
@given(written(), st.sampled_from([1, 20, 90, 400, 2**24]))
def test_chunks_together_equal_the_whole_file(tmp_path, monkeypatch, text, size):
    path = tmp_path / "instances.json"
    path.write_bytes(text.encode(errors="surrogatepass"))
    value = json.loads(text.removeprefix("\ufeff"))
    found = read_in_chunks(path, monkeypatch, size)
    assert found == {name: expected(value, name) for name in ("images", "annotations", "categories")}


@pytest.mark.parametrize("size", [1, 50, 2**24])
def test_the_last_of_two_equal_keys_counts(tmp_path, monkeypatch, size):
    """As in Python's reader; boxes belong to the images of the last list."""
    path = tmp_path / "instances.json"
    one, other = content([annotation(1)] * 3), content([annotation(2)] * 2, images=IMAGES[1:])
    for order in (["annotations", "images", "annotations", "images"], ["images", "annotations", "images"]):
        sources = [one, other] if len(order) == 3 else [one, one, other, other]
        parts = [f'"{key}": {json.dumps(source[key])}' for key, source in zip(order, [*sources, other], strict=False)]
        text = "{" + ", ".join([*parts, f'"c\\u0061tegories": {json.dumps(CATEGORIES)}']) + "}"
        path.write_text(text)
        value = json.loads(text)
        found = read_in_chunks(path, monkeypatch, size)
        assert found == {name: expected(value, name) for name in ("images", "annotations", "categories")}


def test_annotations_come_after_the_images(tmp_path, monkeypatch):
    monkeypatch.setattr(coco_json, "CHUNK_SIZE", 60)
    path = tmp_path / "instances.json"
    value = content([annotation(1)] * 9)
    for order in (["annotations", "images", "categories"], ["images", "annotations", "categories"]):
        path.write_text(json.dumps({key: value[key] for key in order}))
        list_names = [chunk.list_name for chunk in coco_json.read_chunks(path)]
        assert list_names.count("annotations") > 3 and list_names.index("annotations") > max(
            index for index, name in enumerate(list_names) if name == "images"
        )


def test_chunks_are_hardly_larger_than_the_chunk_size(tmp_path, monkeypatch):
    """Even if entries hold lists of objects that begin like entries."""
    monkeypatch.setattr(coco_json, "CHUNK_SIZE", 4096)
    segments = [{"id": 5, "area": 1}] * 3
    entries = [{"id": number, "segments": segments, **annotation(1), "text": "}, {"} for number in range(2000)]
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content(entries)))
    sizes = [len(chunk.entries) for chunk in coco_json.read_chunks(path) if chunk.list_name == "annotations"]
    assert sum(sizes) == 2000 and max(sizes) < 120  # of 200 bytes each


# --- errors ----------------------------------------------------------------------------------------------------------


@QUICKLY
@example(122, 2, b"NaN")  # in a string that goes on after the end of its entry
@given(st.integers(0, len(SOUND)), st.integers(0, 3), st.sampled_from([b"", b"NaN", b"}", b"]", b'"', b",", b"\xff"]))
def test_errors_do_not_depend_on_the_chunk_size(tmp_path, monkeypatch, place, removed, inserted):
    path = tmp_path / "instances.json"
    path.write_bytes(SOUND[:place] + inserted + SOUND[place + removed :])
    outcomes = []
    for size in (1, 64, 2**24):
        try:
            outcomes.append(read_in_chunks(path, monkeypatch, size))
        except DataError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_errors_far_down_a_file_name_the_entry_or_the_line(tmp_path, monkeypatch):
    monkeypatch.setattr(coco_json, "CHUNK_SIZE", 300)
    entries = [annotation(1, score=float("nan")) for _ in range(400)]
    entries[333] |= {"bbox": [1, 2, 3, float("inf")]}
    message = error_of(tmp_path, json.dumps(content(entries), indent=1))
    assert "bbox is [1, 2, 3, Infinity] in annotations[333] (id 334): it must be four finite numbers" in message
    lines = json.dumps(content(entries[:300]), indent=1).splitlines()
    number = random.Random(0).randrange(2000, len(lines) - 50)
    lines[number] = "  ?" + lines[number].strip()
    text = "\n".join(lines)
    message = error_of(tmp_path, text)
    assert f"line {number + 1}, column 3 (byte {text.index('?')})" in message
