"""The ONNX files: torch exports the network; graphs of ONNX operators come before and after it.

Only this module imports onnx and onnxscript, which are optional.
Shapes: N images, A = 8,732 default boxes, C labels, K categories, T = 200 candidates, D = 200 detections.
"""

import numpy as np
import onnx
import torch
from numpy.typing import ArrayLike
from onnx import ModelProto, TensorProto, compose, numpy_helper
from onnxscript import FLOAT, INT64, UINT8, script
from onnxscript import opset20 as op
from torch import nn

from src.data.pipelines.batch import IMAGENET_MEAN, IMAGENET_STD
from src.ssd.default_boxes import IMAGE_SIZE, NUM_DEFAULT_BOXES, VARIANCES, default_boxes
from src.ssd.detect import IOU_THRESHOLD, MAX_BOX_COORDINATE, MAX_CANDIDATES, MAX_DETECTIONS, SCORE_THRESHOLD

OPSET = 20


def _tensor(values: ArrayLike, dtype: type = np.float32) -> TensorProto:
    return numpy_helper.from_array(np.array(values, dtype))


# The graphs' constants are tensors, because onnxslim turns the attribute `value_float` into a double.
_MEAN, _DEVIATION = (np.array(values, np.float32).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
SCALE, SHIFT = _tensor(1 / (255 * _DEVIATION)), _tensor(_MEAN / _DEVIATION)
DEFAULT_BOXES = _tensor(default_boxes().numpy())
CENTRE_VARIANCE, SIZE_VARIANCE = map(_tensor, VARIANCES)
FARTHEST, NEAREST = _tensor(MAX_BOX_COORDINATE), _tensor(-MAX_BOX_COORDINATE)
ZERO, HALF = _tensor(0), _tensor(0.5)
SCORE_LIMIT, SCORE_LIMITS, IOU_LIMITS = _tensor(SCORE_THRESHOLD), _tensor([SCORE_THRESHOLD]), _tensor([IOU_THRESHOLD])
NO_LABEL, FIRST_LABEL, CANDIDATES = (_tensor(value, np.int64) for value in (0, 1, MAX_CANDIDATES))
NUM_CANDIDATES, NUM_DETECTIONS = (_tensor([value], np.int64) for value in (MAX_CANDIDATES, MAX_DETECTIONS))
ROWS_OF_SCORES, ROWS_OF_BOXES = _tensor([-1, MAX_CANDIDATES], np.int64), _tensor([-1, MAX_CANDIDATES, 4], np.int64)

Bytes, Pixels = UINT8["N", 3, IMAGE_SIZE, IMAGE_SIZE], FLOAT["N", 3, IMAGE_SIZE, IMAGE_SIZE]
Offsets, Logits = FLOAT["N", 4, NUM_DEFAULT_BOXES], FLOAT["N", "C", NUM_DEFAULT_BOXES]
Boxes, Labels, Scores = FLOAT["N", MAX_DETECTIONS, 4], INT64["N", MAX_DETECTIONS], FLOAT["N", MAX_DETECTIONS]


@script(default_opset=op)
def normalised(images: Bytes) -> Pixels:
    """`src.data.pipelines.batch.normalise`.  Its values have names that `detections` does not use."""
    values = op.Cast(images, to=FLOAT.dtype)
    scale = op.Constant(value=SCALE)
    shift = op.Constant(value=SHIFT)
    scaled = values * scale
    pixels = scaled - shift
    return pixels


@script(default_opset=op)
def detections(offsets: Offsets, logits: Logits) -> tuple[Boxes, Labels, Scores]:
    """`detect`: boxes, labels and scores, padded with 0.  ONNX's TopK puts the first of equal values first."""
    zero = op.Constant(value=ZERO)
    total = op.ReduceSum(logits, [1], keepdims=1) + op.ReduceSum(offsets, [1], keepdims=1)
    not_finite = op.Or(op.IsNaN(total), op.IsInf(total))  # [N, 1, A], `finite_box_mask`
    probabilities = op.Slice(op.Softmax(logits, axis=1), [1], [2147483647], [1])  # [N, K, A]
    unlikely = probabilities <= op.Constant(value=SCORE_LIMIT)
    possible = op.Where(op.Or(not_finite, unlikely), zero, probabilities)
    candidates, indices = op.TopK(possible, op.Constant(value=NUM_CANDIDATES), axis=2)  # [N, K, T]

    default_centre, default_size = op.Split(op.Constant(value=DEFAULT_BOXES), num_outputs=2, axis=1)  # [A, 2]
    centre_offset, size_offset = op.Split(op.Transpose(offsets, perm=[0, 2, 1]), num_outputs=2, axis=2)  # [N, A, 2]
    centre = default_centre + centre_offset * op.Constant(value=CENTRE_VARIANCE) * default_size
    size = default_size * op.Exp(size_offset * op.Constant(value=SIZE_VARIANCE))
    half = size * op.Constant(value=HALF)
    corners = op.Concat(centre - half, centre + half, axis=2)
    decoded = op.Clip(corners, op.Constant(value=NEAREST), op.Constant(value=FARTHEST))  # [N, A, 4]
    flat_indices = op.Reshape(indices, [0, -1])  # [N, K x T]
    boxes_of_candidates = op.GatherND(decoded, op.Unsqueeze(flat_indices, [2]), batch_dims=1)  # [N, K x T, 4]

    # NonMaxSuppression gets each class of each image as an image of one class.
    rows = op.Reshape(candidates, op.Constant(value=ROWS_OF_SCORES))  # [N x K, T]
    kept = op.NonMaxSuppression(
        op.Reshape(boxes_of_candidates, op.Constant(value=ROWS_OF_BOXES)),
        op.Unsqueeze(rows, [1]),
        op.Constant(value=NUM_CANDIDATES),
        op.Constant(value=IOU_LIMITS),
        op.Constant(value=SCORE_LIMITS),
    )  # [.., 3]: row, 0, index
    index_of_kept = op.Gather(kept, [0, 2], axis=1)
    survivors = op.ScatterND(rows * zero, index_of_kept, op.GatherND(rows, index_of_kept))

    survivors_of_image = op.Reshape(survivors, op.Shape(flat_indices))
    scores, best = op.TopK(survivors_of_image, op.Constant(value=NUM_DETECTIONS), axis=1)  # [N, D]
    found = scores > zero
    label = best / op.Constant(value=CANDIDATES) + op.Constant(value=FIRST_LABEL)
    labels = op.Where(found, label, op.Constant(value=NO_LABEL))
    boxes_of_best = op.GatherND(boxes_of_candidates, op.Unsqueeze(best, [2]), batch_dims=1)
    boxes = op.Where(op.Unsqueeze(found, [2]), boxes_of_best, zero)  # [N, D, 4]
    return boxes, labels, scores


def network_graph(network: nn.Module) -> ModelProto:
    """A graph from normalised [N, 3, 300, 300] to offsets [N, 4, A] and logits [N, C, A].

    network: on the CPU, in evaluation mode."""
    program = torch.onnx.export(
        network, (torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE),), dynamo=True, verbose=False, opset_version=OPSET,
        dynamic_shapes=({0: "N"},), input_names=["normalised"], output_names=["offsets", "logits"],
    )  # fmt: skip
    model = program.model_proto
    for node in model.graph.node:  # they hold paths of this machine's files
        node.ClearField("metadata_props")
    return model


def detector_graph(network: ModelProto) -> ModelProto:
    """A graph from images [N, 3, 300, 300] uint8 to boxes, labels and scores.  network: from `network_graph`."""
    before, after = normalised.to_model_proto(), detections.to_model_proto()
    before.ir_version = after.ir_version = network.ir_version
    for node in (*before.graph.node, *after.graph.node):
        node.ClearField("name")  # both number from n0
    model = compose.merge_models(before, network, io_map=[("pixels", "normalised")])
    model = compose.merge_models(model, after, io_map=[("offsets", "offsets"), ("logits", "logits")])
    del model.opset_import[1:]  # all parts import the same opset; quantize_dynamic takes a single import
    return model


def with_metadata(model: ModelProto, metadata: dict[str, str]) -> bytes:
    """The content of a file with the model and metadata; checks the model."""
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()
