"""Detections against the oracle and against a plain loop."""

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou, nms

from src.ssd import detect as detection
from src.ssd.default_boxes import NUM_DEFAULT_BOXES, default_boxes, default_boxes_ltrb, encode
from src.ssd.detect import detect, finite_box_mask
from tests.helpers.oracle_inputs import ORACLE_CASES, oracle_output, quiet_output, random_output


def in_comparable_order(boxes: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Best first; runs of scores that differ by less than 1e-6 sorted by label and box."""
    run = np.cumsum(-np.diff(scores, prepend=scores[:1]) >= 1e-6)
    return np.lexsort((*boxes.T[::-1], labels, run))


@pytest.mark.parametrize("case", ORACLE_CASES)
def test_detections_are_the_published_models(oracle, case):
    expected = oracle("decode.npz")
    (found,) = detect(*oracle_output(case))
    boxes, labels, scores = (part.numpy() for part in found)
    expected = [expected[f"{case}_{part}"] for part in ("ltrb", "labels", "scores")]
    ours, theirs = in_comparable_order(boxes, labels, scores), in_comparable_order(*expected)
    assert np.array_equal(labels[ours], expected[1][theirs])
    np.testing.assert_allclose(boxes[ours], expected[0][theirs], rtol=0, atol=1e-5)
    np.testing.assert_allclose(scores[ours], expected[2][theirs], rtol=0, atol=1e-5)
    assert (found.labels.dtype, found.boxes.dtype, found.scores.dtype) == (torch.int64, torch.float32, torch.float32)


def loop_over_classes(offsets, logits, *, max_candidates: int = 200) -> list[tuple[int, float, int]]:
    """The detections of one image the slow way: (label, score, default box), best first."""
    scores = logits.double().softmax(0).numpy()
    defaults = default_boxes().double()
    centre = defaults[:, :2] + offsets[:2].T.double() * 0.1 * defaults[:, 2:]
    size = defaults[:, 2:] * torch.exp(offsets[2:].T.double() * 0.2)
    boxes = torch.cat((centre - size / 2, centre + size / 2), 1)
    found = []
    for label in range(1, len(scores)):
        candidates = [box for box in np.argsort(-scores[label], kind="stable") if scores[label, box] > 0.05]
        kept = []
        overlap = box_iou(boxes[candidates[:max_candidates]], boxes[candidates[:max_candidates]]).numpy()
        for i in range(len(overlap)):
            if not any(overlap[i, j] > 0.5 for j in kept):
                kept.append(i)
        found += [(label, scores[label, candidates[i]], candidates[i]) for i in kept]
    return sorted(found, key=lambda detection: -detection[1])[:200]


@pytest.mark.parametrize(
    ("labels", "sigma", "background", "scale"),
    [
        (2, 1.0, 0.0, 0.0),  # one class with 8,732 candidates, 200 of them are tried
        (2, 2.0, 3.0, 1.0),
        (6, 2.0, 0.0, 0.0),  # boxes that suppress each other: more candidates must be tried to fill 200
        (21, 3.0, 4.0, 0.3),
        (81, 1.0, 7.0, 1.0),
    ],
)
def test_detections_are_those_of_a_loop_over_the_classes(labels, sigma, background, scale):
    offsets, logits = random_output(1, labels, sigma=sigma, background=background)
    offsets *= scale
    (found,) = detect(offsets, logits)
    expected = loop_over_classes(offsets[0], logits[0])
    assert found.labels.tolist() == [label for label, _, _ in expected]
    np.testing.assert_allclose(found.scores, [score for _, score, _ in expected], rtol=1e-5)


def test_a_batch_of_crowded_images_detects_exactly_what_single_images_do():
    offsets, logits = (torch.cat([part.roll(97 * turn, dims=2) for turn in range(16)]) for part in random_output(2, 81))
    together = detect(offsets, logits)
    for image, found in enumerate(together):
        (alone,) = detect(offsets[image : image + 1], logits[image : image + 1])
        assert all(torch.equal(*pair) for pair in zip(found, alone, strict=True))


def detect_batched(offsets: torch.Tensor, logits: torch.Tensor) -> list[detection.Detections]:
    """`detect`, as on a GPU."""
    candidates = detection._find_candidates(offsets, logits, finite_box_mask(offsets, logits))
    return detection._detect_batched(offsets, candidates)


def assert_equal_to_each(offsets: torch.Tensor, logits: torch.Tensor) -> None:
    for together, alone in zip(detect_batched(offsets, logits), detect(offsets, logits), strict=True):
        for part, expected in zip(together, alone, strict=True):
            assert part.dtype == expected.dtype
            assert torch.equal(part, expected)


@pytest.mark.parametrize("case", ORACLE_CASES)
def test_batched_detection_equals_single_images_on_oracle_cases_bit_for_bit(case):
    assert_equal_to_each(*oracle_output(case))


@pytest.mark.parametrize(
    ("labels", "sigma", "background", "scale"),
    [
        (2, 1.0, 0.0, 0.0),  # 200 of 8,732 candidates are tried
        (6, 2.0, 0.0, 0.0),  # a second block of candidates is needed
        (21, 3.0, 4.0, 0.3),
        (81, 1.0, 7.0, 1.0),
        (81, 4.0, 8.0, 0.05),  # crowded, and most boxes overlap
    ],
)
def test_batched_detection_equals_single_images_bit_for_bit(labels, sigma, background, scale):
    offsets, logits = random_output(3, labels, seed=1, sigma=sigma, background=background)
    assert_equal_to_each(offsets * scale, logits)
    assert_equal_to_each(offsets * scale, (logits * 2).round() / 2)  # with many equal scores


def test_batched_detection_equals_single_images_on_empty_and_non_finite_output():
    offsets, logits = random_output(4, 21)
    logits[1, 0] = 100
    offsets[2, :, ::3] = float("nan")
    assert_equal_to_each(offsets, logits)
    assert_equal_to_each(*quiet_output(images=2))
    assert_equal_to_each(offsets[:0], logits[:0])


@pytest.mark.parametrize("seed", range(3))
def test_batched_suppression_equals_torchvisions_if_overlaps_equal_the_threshold(seed):
    """Boxes on a grid of 12 x 12: a sixth of the pairs that overlap by half do so exactly."""
    low = torch.randint(0, 8, (4, 300, 2), generator=torch.Generator().manual_seed(seed))
    boxes = torch.cat((low, low + 1 + torch.randint(0, 4, low.shape, generator=torch.Generator().manual_seed(9))), 2)
    keep = detection._suppress(boxes.double(), torch.ones(4, 300, dtype=torch.bool))
    assert (box_iou(boxes[0].double(), boxes[0].double()) == 0.5).any()
    for image, kept in zip(boxes.double(), keep, strict=True):
        expected = nms(image, torch.linspace(1, 0, 300).double(), 0.5)
        assert kept.nonzero().flatten().tolist() == expected.tolist()


def test_batched_suppression_follows_a_chain_to_its_end():
    """Each box overlaps only its neighbours, so every other one stays, and the last depends on the first."""
    left = torch.arange(101.0, dtype=torch.float64)
    chain = torch.stack((left, torch.zeros(101), left + 4, torch.ones(101)), dim=1)[:, [0, 1, 2, 3]].double()
    keep = detection._suppress(chain[None], torch.ones(1, 101, dtype=torch.bool))
    assert keep[0].tolist() == [number % 2 == 0 for number in range(101)]


def test_boxes_of_one_class_suppress_each_other_and_those_of_two_classes_do_not():
    offsets, logits = quiet_output()
    first, second = 4000, 4001  # the target: the same box from two default boxes
    for box in (first, second):
        target = torch.tensor([0.5, 0.5, 0.2, 0.3])
        offsets[0, :, box] = encode(target, default_boxes()[box])
    logits[0, 1, first], logits[0, 1, second], logits[0, 2, second] = 22, 21, 21
    (found,) = detect(offsets, logits)
    assert found.labels.tolist() == [1, 2]
    softmax = torch.tensor([[20.0, 22, 0], [20, 21, 21]]).softmax(1)
    torch.testing.assert_close(found.scores, torch.stack((softmax[0, 1], softmax[1, 2])))
    torch.testing.assert_close(found.boxes, torch.tensor([[0.4, 0.35, 0.6, 0.65]]).expand(2, 4), rtol=0, atol=1e-6)


def test_scores_at_the_threshold_are_left_out():
    offsets, logits = quiet_output(labels=2)
    for box, score in ((100, 0.0499), (5000, 0.0501)):
        logits[0, :, box] = torch.tensor([1 - score, score]).log()
    (found,) = detect(offsets, logits)
    np.testing.assert_allclose(found.scores, [0.0501], rtol=1e-4)
    torch.testing.assert_close(found.boxes[0], default_boxes_ltrb()[5000], rtol=0, atol=1e-6)


def test_half_precision_output_is_computed_in_float32():
    offsets, logits = (part.bfloat16() for part in random_output(2, 21, background=12.0))
    for half, full in zip(detect(offsets, logits), detect(offsets.float(), logits.float()), strict=True):
        assert all(torch.equal(*pair) for pair in zip(half, full, strict=True))
        assert half.scores.dtype == torch.float32


def test_nothing_is_detected_in_no_image_and_in_nothing_but_background():
    offsets, logits = quiet_output(images=2)
    for found in detect(offsets, logits):
        assert [tuple(part.shape) for part in found] == [(0, 4), (0,), (0,)]
    assert detect(offsets[:0], logits[:0]) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["offsets", "logits"])
def test_non_finite_output_detects_nothing_and_leaves_other_detections(value, where):
    offsets, logits = quiet_output()
    logits[0, 1, [10, 6000, 8000]] = 25
    before = detect(offsets, logits)[0]
    (offsets if where == "offsets" else logits)[0, 2, 6000] = value
    (found,) = detect(offsets, logits)
    assert len(before.scores) == 3
    expected = {tuple(box) for box in default_boxes_ltrb()[[10, 8000]].numpy().round(4).tolist()}
    assert {tuple(box) for box in found.boxes.numpy().round(4).tolist()} == expected
    assert (~finite_box_mask(offsets, logits)).nonzero().tolist() == [[0, 6000]]


def test_output_of_nothing_but_nan_detects_nothing():
    offsets, logits = (torch.full_like(part, float("nan")) for part in quiet_output(images=2))
    assert [len(found.scores) for found in detect(offsets, logits)] == [0, 0]
    assert int((~finite_box_mask(offsets, logits)).sum()) == 2 * NUM_DEFAULT_BOXES


def test_a_box_too_large_for_floats_stays_finite_and_suppresses_no_other():
    offsets, logits = quiet_output()
    logits[0, 1, [100, 8000]] = 25
    offsets[0, 2:, 100] = 1e4
    (found,) = detect(offsets, logits)
    assert len(found.scores) == 2 and found.boxes.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize(("sigma", "background"), [(1.0, 9.0), (1.0, 6.0), (4.0, 8.0)])
def test_detections_on_cuda_are_those_on_the_cpu(sigma, background):
    offsets, logits = random_output(4, 81, sigma=sigma, background=background)
    on_cuda = detect(offsets.cuda(), logits.cuda())
    for ours, expected in zip(on_cuda, detect(offsets, logits), strict=True):
        ours, expected = (tuple(part.cpu().numpy() for part in found) for found in (ours, expected))
        left, right = in_comparable_order(*ours), in_comparable_order(*expected)
        assert np.array_equal(ours[1][left], expected[1][right])
        np.testing.assert_allclose(ours[0][left], expected[0][right], rtol=0, atol=1e-5)
        np.testing.assert_allclose(ours[2][left], expected[2][right], rtol=0, atol=1e-5)
