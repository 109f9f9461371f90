"""The ONNX files: the network by torch, and what comes before and after it as graphs of ONNX's own operators.

The only module that imports onnx and onnxscript, which are optional.
Shapes: N images, A = 8,732 default boxes, C labels, K categories, T = 200 candidates, D = 200 detections.
"""

import numpy as np
import onnx
import torch
from onnx import ModelProto, compose, numpy_helper
from onnxscript import FLOAT, INT64, UINT8, script
from onnxscript import opset20 as op
from torch import nn

from src.data.pipelines.batch import IMAGENET_MEAN, IMAGENET_STD
from src.ssd.default_boxes import IMAGE_SIZE, NUM_DEFAULT_BOXES, VARIANCES, default_boxes
from src.ssd.detect import IOU_THRESHOLD, MAX_BOX_COORDINATE, MAX_CANDIDATES, MAX_DETECTIONS, SCORE_THRESHOLD

OPSET = 20
MEAN, DEVIATION = (np.array(values, np.float32).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
SCALE = numpy_helper.from_array(1 / (255 * DEVIATION))
SHIFT = numpy_helper.from_array(MEAN / DEVIATION)
DEFAULTS = numpy_helper.from_array(default_boxes().numpy())
CENTRE_VARIANCE, SIZE_VARIANCE = VARIANCES

Bytes, Pixels = UINT8["N", 3, IMAGE_SIZE, IMAGE_SIZE], FLOAT["N", 3, IMAGE_SIZE, IMAGE_SIZE]
Offsets, Logits = FLOAT["N", 4, NUM_DEFAULT_BOXES], FLOAT["N", "C", NUM_DEFAULT_BOXES]
Boxes, Labels, Scores = FLOAT["N", MAX_DETECTIONS, 4], INT64["N", MAX_DETECTIONS], FLOAT["N", MAX_DETECTIONS]


@script(default_opset=op)
def normalised(images: Bytes) -> Pixels:
    """`src.data.pipelines.batch.normalise`.  Every value has a name, none of which is one of `detections`'."""
    values = op.Cast(images, to=FLOAT.dtype)
    scale = op.Constant(value=SCALE)
    shift = op.Constant(value=SHIFT)
    scaled = values * scale
    pixels = scaled - shift
    return pixels


@script(default_opset=op)
def detections(offsets: Offsets, logits: Logits) -> tuple[Boxes, Labels, Scores]:
    """`detect`: boxes, labels and scores, filled up with 0.  TopK gives the first of equal values, as ONNX has it."""
    nothing = op.Constant(value_float=0.0)
    total = op.ReduceSum(logits, [1], keepdims=1) + op.ReduceSum(offsets, [1], keepdims=1)
    broken = op.Or(op.IsNaN(total), op.IsInf(total))  # [N, 1, A], `finite_boxes`
    probabilities = op.Slice(op.Softmax(logits, axis=1), [1], [2147483647], [1])  # [N, K, A]
    unlikely = probabilities <= op.Constant(value_float=SCORE_THRESHOLD)
    possible = op.Where(op.Or(broken, unlikely), nothing, probabilities)
    candidates, places = op.TopK(possible, op.Constant(value_ints=[MAX_CANDIDATES]), axis=2)  # [N, K, T]

    default_centre, default_size = op.Split(op.Constant(value=DEFAULTS), num_outputs=2, axis=1)  # [A, 2]
    centre_offset, size_offset = op.Split(op.Transpose(offsets, perm=[0, 2, 1]), num_outputs=2, axis=2)  # [N, A, 2]
    centre = default_centre + centre_offset * op.Constant(value_float=CENTRE_VARIANCE) * default_size
    size = default_size * op.Exp(size_offset * op.Constant(value_float=SIZE_VARIANCE))
    half = size * op.Constant(value_float=0.5)
    corners = op.Concat(centre - half, centre + half, axis=2)
    decoded = op.Clip(
        corners, op.Constant(value_float=-MAX_BOX_COORDINATE), op.Constant(value_float=MAX_BOX_COORDINATE)
    )  # [N, A, 4]
    flat_places = op.Reshape(places, [0, -1])  # [N, K x T]
    boxes_of_candidates = op.GatherND(decoded, op.Unsqueeze(flat_places, [2]), batch_dims=1)  # [N, K x T, 4]

    # Each class of each image is an image of one class to the operator: it sees that class's candidates alone.
    rows = op.Reshape(candidates, op.Constant(value_ints=[-1, MAX_CANDIDATES]))  # [N x K, T]
    kept = op.NonMaxSuppression(
        op.Reshape(boxes_of_candidates, op.Constant(value_ints=[-1, MAX_CANDIDATES, 4])),
        op.Unsqueeze(rows, [1]),
        op.Constant(value_ints=[MAX_CANDIDATES]),
        op.Constant(value_floats=[IOU_THRESHOLD]),
        op.Constant(value_floats=[SCORE_THRESHOLD]),
    )  # [.., 3]: row, 0, place
    place_of_kept = op.Gather(kept, [0, 2], axis=1)
    survivors = op.ScatterND(rows * nothing, place_of_kept, op.GatherND(rows, place_of_kept))

    survivors_of_image = op.Reshape(survivors, op.Shape(flat_places))
    scores, best = op.TopK(survivors_of_image, op.Constant(value_ints=[MAX_DETECTIONS]), axis=1)  # [N, D]
    found = scores > nothing
    label = best / op.Constant(value_int=MAX_CANDIDATES) + op.Constant(value_int=1)
    labels = op.Where(found, label, op.Constant(value_int=0))
    boxes_of_best = op.GatherND(boxes_of_candidates, op.Unsqueeze(best, [2]), batch_dims=1)
    boxes = op.Where(op.Unsqueeze(found, [2]), boxes_of_best, nothing)  # [N, D, 4]
    return boxes, labels, scores


def network_graph(network: nn.Module) -> ModelProto:
    """normalised [N, 3, 300, 300] to offsets [N, 4, A] and logits [N, C, A].  network: on the CPU, in evaluation."""
    program = torch.onnx.export(
        network, (torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE),), dynamo=True, verbose=False, opset_version=OPSET,
        dynamic_shapes=({0: "N"},), input_names=["normalised"], output_names=["offsets", "logits"],
    )  # fmt: skip
    model = program.model_proto
    for node in model.graph.node:  # traces with the paths of this machine's files
        node.ClearField("metadata_props")
    return model


def detector_graph(network: ModelProto) -> ModelProto:
    """images [N, 3, 300, 300] uint8 to boxes, labels and scores, around `network_graph`."""
    before, after = normalised.to_model_proto(), detections.to_model_proto()
    before.ir_version = after.ir_version = network.ir_version
    for node in (*before.graph.node, *after.graph.node):
        node.ClearField("name")  # both count from n0
    model = compose.merge_models(before, network, io_map=[("pixels", "normalised")])
    return compose.merge_models(model, after, io_map=[("offsets", "offsets"), ("logits", "logits")])


def with_metadata(model: ModelProto, metadata: dict[str, str]) -> bytes:
    """The content of a file: the model, checked, with metadata."""
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()
