"""Annotation files' contents for property tests: random ones of the right form, and one fixed file."""

import json

from hypothesis import strategies as st

IDS = st.integers(0, 3) | st.sampled_from([2**63 - 1, -(2**63)])
NUMBERS = st.integers(-20, 200) | st.floats(-300, 300) | st.floats(allow_nan=False, allow_infinity=False)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
IMAGES = st.fixed_dictionaries(
    {
        "id": IDS,
        "file_name": st.sampled_from(["a.jpg", "b.jpg", "sub/c.jpg", "d.jpg"]) | st.text(min_size=1, max_size=5),
        "width": st.integers(1, 200),
        "height": st.integers(1, 200),
    },
    optional={"license": ANYTHING},
)
ANNOTATIONS = st.fixed_dictionaries(
    {
        "image_id": IDS,
        "category_id": st.integers(1, 2),
        "bbox": st.lists(NUMBERS, min_size=4, max_size=4) | st.just([0, 0, 1, 1]),
    },
    optional={
        "id": IDS,
        "area": st.none() | st.floats(0, 1e4),
        "iscrowd": st.sampled_from([0, 1, None, True]),
        "segmentation": ANYTHING,
    },
)
CATEGORIES = st.permutations([{"id": 1, "name": "square"}, {"id": 2, "name": "disc"}])


@st.composite
def good(draw) -> dict:
    """A file's content of the right form; some annotations may be of no image, some boxes without area."""
    images = draw(st.lists(IMAGES, min_size=1, max_size=4, unique_by=(lambda i: i["id"], lambda i: i["file_name"])))
    annotations = draw(st.lists(ANNOTATIONS, max_size=6))
    for entry in annotations[1:]:
        entry["image_id"] = draw(st.sampled_from(images))["id"]
    return {"info": draw(ANYTHING), "images": images, "annotations": annotations, "categories": draw(CATEGORIES)}


SOUND = json.dumps(
    {
        "info": {"year": 2017, "contributor": 'A. "B" Ä'},
        "images": [{"id": i, "file_name": f"sub/{i}.jpg", "width": 160, "height": 120} for i in (1, 2)],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2.5, 30, 4e1], "iscrowd": 0, "area": 900.5},
            {"id": 2, "image_id": 2, "category_id": 2, "bbox": [100, 20, 10, 10], "segmentation": [[1, 2, 3.5, 4]]},
        ],
        "categories": [{"id": 1, "name": "square"}, {"id": 2, "name": "disc"}],
    },
    ensure_ascii=False,
).encode()
