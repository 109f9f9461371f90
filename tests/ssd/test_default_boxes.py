import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torchvision.ops import box_convert, box_iou

from src.ssd.default_boxes import (
    BOXES_PER_CELL,
    NUM_DEFAULT_BOXES,
    decode,
    default_boxes,
    default_boxes_ltrb,
    encode,
    match,
)


def random_boxes(count: int, seed: int) -> torch.Tensor:
    """[count, 4] ltrb in 0..1 with areas above 0."""
    corners = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(seed))
    low, high = corners.amin(dim=1), corners.amax(dim=1)
    return torch.cat((low, high + 1e-3), dim=1)


def test_default_boxes_are_the_oracles(oracle):
    boxes = oracle("default_boxes.npz")
    assert len(boxes["xywh"]) == NUM_DEFAULT_BOXES == 8732
    assert BOXES_PER_CELL == (4, 6, 6, 6, 4, 4)
    assert_close(default_boxes(), torch.from_numpy(boxes["xywh"]), atol=1e-6, rtol=0)
    assert_close(default_boxes_ltrb(), torch.from_numpy(boxes["ltrb"]), atol=1e-6, rtol=0)


def assert_matches(cases: dict, batch_size: int) -> None:
    """Matches the oracle's images in batches and compares indices, labels and boxes."""
    ids = [key.removesuffix("_boxes_ltrb") for key in cases if key.endswith("_boxes_ltrb")]
    assert len(ids) == 24
    for start in range(0, len(ids), batch_size):
        chosen = ids[start : start + batch_size]
        boxes = [torch.from_numpy(cases[f"{one}_boxes_ltrb"]) for one in chosen]
        image_index = torch.cat([torch.full((len(one),), image) for image, one in enumerate(boxes)])
        indices = match(torch.cat(boxes), image_index, len(boxes), default_boxes_ltrb())
        for image, (one, box, index) in enumerate(zip(chosen, boxes, indices, strict=True)):
            (positive,) = (index >= 0).numpy().nonzero()
            index = index - sum(len(earlier) for earlier in boxes[:image])
            np.testing.assert_array_equal(positive, cases[f"{one}_pos"])
            np.testing.assert_array_equal(cases[f"{one}_labels"][index[positive]], cases[f"{one}_pos_labels"])
            centred = box_convert(box[index[positive]], "xyxy", "cxcywh")
            np.testing.assert_allclose(centred, cases[f"{one}_pos_xywh"], atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 7, 24])
def test_random_boxes_match_as_in_the_oracle(oracle, batch_size):
    assert_matches(oracle("encode_random.npz"), batch_size)


@pytest.mark.parametrize("batch_size", [1, 24])
def test_photographs_match_as_in_the_oracle(encode_oracle, batch_size):
    assert_matches(encode_oracle, batch_size)


def test_match_without_any_box_is_background():
    none = match(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), 2, default_boxes_ltrb())
    assert none.shape == (2, 8732)
    assert (none == -1).all()


def test_an_image_without_boxes_between_others_is_background():
    boxes = random_boxes(2, seed=1)
    index = match(boxes, torch.tensor([0, 2]), 3, default_boxes_ltrb())
    assert set(index[0].tolist()) == {-1, 0}
    assert set(index[1].tolist()) == {-1}
    assert set(index[2].tolist()) == {-1, 1}


def test_every_box_claims_its_best_default_box_and_the_last_claimant_gets_it():
    box = random_boxes(1, seed=3)
    twice = torch.cat((box, box))
    index = match(twice, torch.zeros(2, dtype=torch.long), 1, default_boxes_ltrb())[0]
    best = box_iou(box, default_boxes_ltrb()).argmax()
    assert index[best] == 1
    assert set(index.tolist()) <= {-1, 0, 1}


def test_overlap_equals_torchvisions():
    from src.ssd.default_boxes import _iou

    boxes = random_boxes(40, seed=5)
    assert torch.equal(_iou(boxes, default_boxes_ltrb()), box_iou(boxes, default_boxes_ltrb()))


def test_decode_undoes_encode():
    boxes = box_convert(random_boxes(NUM_DEFAULT_BOXES, seed=0), "xyxy", "cxcywh")
    assert_close(decode(encode(boxes, default_boxes()), default_boxes()), boxes, atol=1e-5, rtol=1e-4)


def test_encode_uses_the_variances():
    default = torch.tensor([0.5, 0.5, 0.2, 0.4])
    box = torch.tensor([0.52, 0.46, 0.2 * np.e, 0.4 / np.e])
    # (0.02 / 0.2) / 0.1, (-0.04 / 0.4) / 0.1, log(e) / 0.2, log(1 / e) / 0.2
    assert_close(encode(box, default), torch.tensor([1.0, -1.0, 5.0, -5.0]), atol=1e-4, rtol=0)
