"""The ONNX graphs detect what the network and `detect` do."""

from contextlib import nullcontext

import onnxruntime
import pytest
import torch
from torch import Tensor

from src.data.pipelines.batch import normalise
from src.evaluation.evaluate import detect_batch
from src.export.export import compare, folded_copy
from src.export.onnx_graph import detections, detector_graph, network_graph, with_metadata
from src.ssd.detect import Detections, detect, strip_padding
from tests.helpers.exported import random_network
from tests.helpers.oracle_inputs import ORACLE_CASES, oracle_output, quiet_output, random_output
from tests.helpers.tiny_model import use_tiny_model

# Rounding may move the score or the overlap of this share of detections across a threshold.
AT_A_THRESHOLD = 0.01


def assert_same(found: list[Detections], expected: list[Detections], tolerance: float = 1e-4) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.labels.tolist() == theirs.labels.tolist()
        torch.testing.assert_close(ours.boxes, theirs.boxes, rtol=0, atol=tolerance)
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def onnx_detections():
    """A function that runs the ONNX graph after the network on offsets and logits."""
    session = onnxruntime.InferenceSession(detections.to_model_proto().SerializeToString())

    def run(offsets: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
        outputs = session.run(None, {"offsets": offsets.numpy(), "logits": logits.numpy()})
        return tuple(map(torch.from_numpy, outputs))

    return run


def all_kinds(labels: int) -> tuple[Tensor, Tensor]:
    """A network's output for five images: crowded, empty, saturated, with NaN, with a few detections."""
    crowded, few = random_output(1, labels), random_output(1, labels, seed=2, sigma=1.0, background=9.0)
    saturated, broken = random_output(1, labels, seed=1, sigma=200.0), random_output(1, labels, seed=3)
    broken[1][0, 1, ::2] = float("nan")
    broken[0][0, 3, 1::4] = float("inf")
    kinds = (crowded, quiet_output(1, labels), saturated, broken, few)
    return tuple(torch.cat(parts) for parts in zip(*kinds, strict=True))


@pytest.mark.parametrize("labels", [2, 81])
@pytest.mark.parametrize("images", [[0], [1], [4, 2, 0], [number % 5 for number in range(32)]])
def test_the_graph_detects_what_detect_does(onnx_detections, images, labels):
    offsets, logits = (part[images] for part in all_kinds(labels))
    expected = detect(offsets, logits)
    assert sum(len(image.scores) for image in expected) == 0 or images != [1]
    boxes, found, scores = onnx_detections(offsets, logits)
    assert_same(strip_padding(boxes, found, scores), expected, 1e-6)
    assert (boxes.dtype, found.dtype, scores.dtype) == (torch.float32, torch.int64, torch.float32)
    assert (tuple(boxes.shape), tuple(found.shape)) == ((len(images), 200, 4), (len(images), 200))
    nothing = scores == 0
    assert not boxes[nothing].any() and not found[nothing].any()


@pytest.mark.parametrize("case", ORACLE_CASES)
def test_detections_are_the_published_models(oracle, onnx_detections, case):
    arrays = oracle("decode.npz")
    boxes, labels, scores = (torch.from_numpy(arrays[f"{case}_{part}"]) for part in ("ltrb", "labels", "scores"))
    found = strip_padding(*onnx_detections(*oracle_output(case)))
    difference = compare([Detections(boxes, labels, scores)], found)
    assert difference.detections == len(scores)
    assert difference.farthest < 1e-5 and difference.unmatched == 0


def test_a_box_beyond_the_largest_coordinate_and_one_without_area_are_detected_as_by_detect(onnx_detections):
    offsets, logits = quiet_output(1, 81)
    logits[0, 1, [100, 101, 8000]] = 25
    offsets[0, 2:, 100] = 1e4
    offsets[0, 2:, 101] = -1e4
    expected = detect(offsets, logits)
    assert len(expected[0].scores) == 3
    assert_same(strip_padding(*onnx_detections(offsets, logits)), expected)


@pytest.mark.parametrize(("made", "categories"), [(use_tiny_model, 1), (nullcontext, 80)], ids=["tiny", "ResNet-50"])
def test_an_onnx_file_detects_what_its_network_detects(made, categories):
    """ResNet-50 has every kind of layer that the other backbones have."""
    with made():
        model = random_network("resnet50", categories)
    content = with_metadata(detector_graph(network_graph(folded_copy(model))), {})
    images = torch.randint(0, 256, (2, 3, 300, 300), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, _ = detect_batch(model, normalise(images))
    outputs = onnxruntime.InferenceSession(content).run(None, {"images": images.numpy()})
    difference = compare(expected, strip_padding(*map(torch.from_numpy, outputs)))
    assert difference.detections > 100 and difference.farthest < 1e-4
    assert difference.unmatched <= AT_A_THRESHOLD * difference.detections
