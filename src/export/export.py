"""`--mode export`: writes a trained detector as files for other programs and compares them with the detector."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from src.data.annotations.coco import Category, locations
from src.data.images.decode import resize
from src.data.images.formats import decode_any, find_images
from src.data.pipelines.batch import IMAGENET_MEAN, IMAGENET_STD, normalise
from src.evaluation.evaluate import detect_batch
from src.report.report import Report
from src.runtime.errors import UserError
from src.runtime.output_files import atomic_write, make_folder
from src.runtime.version import VERSION
from src.ssd.default_boxes import VARIANCES, default_boxes
from src.ssd.detect import Detections
from src.ssd.model import fold_batch_norms
from src.weights.detector import build_trained_model, check_finite, known_categories, read_labelled
from src.weights.exported import build_trained_detector, load_checkpoint_or_export, require
from src.weights.files import load_checkpoint

DETECTOR, NETWORK, DEFAULT_BOXES = "detector.onnx", "network.onnx", "default_boxes.json"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
NUM_PICTURES = 8  # for the comparison of the files with the network
CPU = torch.device("cpu")
MATCH_DISTANCE = 1e-2  # in boxes (fractions of the image) and scores: nearer ones are the same detection
TOLERANCE = 1e-4  # a larger difference in boxes or scores causes a warning; float32 rounding causes about 1e-5


def export(checkpoint: Path, data: Path, output: Path, *, backbone: str, report: Report) -> None:
    """Writes a checkpoint's detector into `output` as files for other programs; compares them on pictures.

    data: an image, a folder of images, or a data set with validation images, whose categories serve a checkpoint that
    names none.  backbone: used if the checkpoint names none.  Raises UserError before any work if a package is
    missing, no picture is readable, or the file is no checkpoint.
    """
    require(PACKAGES, what="--mode export")
    pictures = read_pictures(data, report)
    state = load_checkpoint(checkpoint)
    check_finite(state["model"], source=checkpoint)
    categories = label_categories(state, data, source=checkpoint, report=report)
    trained = build_trained_model(
        state, backbone=backbone, num_categories=len(categories), source=checkpoint, device=CPU
    )
    make_folder(output)
    thresholds = state.get("score_thresholds")
    for name, content in exported_files(trained, categories, thresholds).items():
        with atomic_write(output / name) as file:
            file.write(content)
    log_differences(trained.eval(), pictures, output, report)


def label_categories(state: dict, data: Path, *, source: Path, report: Report) -> tuple[Category, ...]:
    """The categories of a checkpoint's labels; if it names none, those of the data set in their order.

    Without a data set each label serves as its category's id.  Raises UserError if the data set has other categories
    than the checkpoint.
    """
    if "categories" in state:
        return known_categories(state)
    annotations, folder = locations(data, "val")
    if os.path.isfile(annotations):
        report.note(f"{source}: does not say what its labels are: the categories of {annotations} in their order")
        return read_labelled(annotations, folder, state, source=source).categories
    report.note(
        f"{source}: does not say the ids of its categories: its labels are taken for them (a data set as --data, which "
        "it was trained on, tells)"
    )
    return known_categories(state)


def read_pictures(data: Path, report: Report) -> Tensor:
    """The first images of `data` as the network takes them, [P, 3, 300, 300] uint8; warns of unreadable ones.

    Raises UserError if none can be read.
    """
    annotations, folder = locations(data, "val")
    pictures: list[Tensor] = []
    for path in find_images(folder if os.path.isfile(annotations) else data).files:
        try:
            pictures.append(resize(decode_any(path)))
        except UserError as error:
            report.warn(f"left out: {error}")
        if len(pictures) == NUM_PICTURES:
            break
    if not pictures:
        raise UserError(f"{data}: none of its images can be read, and what is exported is tried on some")
    return torch.stack(pictures)


def exported_files(
    trained: nn.Module, categories: Sequence[Category], score_thresholds: dict | None = None
) -> dict[str, bytes]:
    """The content of the files by name.  score_thresholds: of the checkpoint; None for an older one."""
    from src.export.onnx_graph import detector_graph, network_graph, with_metadata  # here, because onnx is optional

    metadata = {
        "categories": json.dumps([category._asdict() for category in categories], ensure_ascii=False),
        "mean": json.dumps(IMAGENET_MEAN),
        "deviation": json.dumps(IMAGENET_STD),
        "version": VERSION,
    }
    if score_thresholds is not None:
        metadata["score_thresholds"] = json.dumps(score_thresholds)
    graph = network_graph(folded_copy(trained))
    return {
        DETECTOR: with_metadata(detector_graph(graph), metadata),
        NETWORK: with_metadata(graph, metadata),
        DEFAULT_BOXES: default_boxes_file().encode(),
    }


def folded_copy(network: nn.Module) -> nn.Module:
    """A copy of the network for evaluation in float32 on the CPU, its batch-norms folded into the convolutions."""
    return fold_batch_norms(network.to("cpu", torch.float32).eval()).to(memory_format=torch.contiguous_format)


def default_boxes_file() -> str:
    """The content of default_boxes.json, with which other programs decode the offsets of network.onnx."""
    boxes = [[float(str(value)) for value in box] for box in default_boxes().numpy()]  # float32's short digits
    return json.dumps({"form": "cx, cy, width, height", "variances": VARIANCES, "default_boxes": boxes})


def log_differences(trained: nn.Module, pictures: Tensor, output: Path, report: Report) -> None:
    """Reports each file's size and the largest difference of its output from the trained network's."""
    normalised = normalise(pictures)
    with torch.inference_mode():
        offsets, logits = trained(normalised)
    pairs = list(zip((offsets, logits), run_network(output / NETWORK, normalised), strict=True))
    farthest = max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
    largest = max(float(ours.abs().max()) for ours, _ in pairs)
    report.note(
        f"{_size(output / NETWORK)}, offsets and logits, which reach {largest:.1f}, at most {farthest:.1e} from the "
        "network's"
    )
    report.note(_size(output / DEFAULT_BOXES))
    state = load_checkpoint_or_export(output / DETECTOR)
    detector = build_trained_detector(state, backbone="", num_categories=0, source=output / DETECTOR, device=CPU)
    expected, _ = detect_batch(trained, normalised)
    exported, _ = detect_batch(detector, pictures)
    difference = compare(expected, exported)
    report.note(f"{_size(output / DETECTOR)}, {difference.line(len(pictures))}")
    if difference.unmatched or difference.farthest > TOLERANCE:
        report.warn(f"{output / DETECTOR}: what it detects is not what the network detects")


def run_network(file: Path, images: Tensor) -> tuple[Tensor, Tensor]:
    """The offsets and logits of network.onnx for normalised images."""
    import onnxruntime  # here, because it is optional

    session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    offsets, logits = session.run(["offsets", "logits"], {"normalised": images.numpy()})
    return torch.from_numpy(offsets), torch.from_numpy(logits)


class Difference(NamedTuple):
    """How two detectors differ on the same pictures."""

    detections: int  # of the first
    farthest: float  # largest difference of matched boxes (fractions of the image) or scores
    unmatched: int  # detections of one detector that the other lacks

    def line(self, pictures: int) -> str:
        missed = f", {self.unmatched} detections of one only" if self.unmatched else ""
        return (
            f"{self.detections} detections in {pictures} pictures, boxes and scores at most {self.farthest:.1e} from "
            f"the network's{missed}"
        )


def compare(first: Sequence[Detections], second: Sequence[Detections]) -> Difference:
    """Compares two detectors on the same images; detections of one label within MATCH_DISTANCE are the same."""
    nearest = [torch.cat(_nearest(*pair)) for pair in zip(first, second, strict=True)]
    distances = torch.cat([*nearest, torch.zeros(0)])
    matched = distances[distances < MATCH_DISTANCE]
    farthest = float(matched.max()) if len(matched) else 0.0
    return Difference(sum(len(image.scores) for image in first), farthest, len(distances) - len(matched))


def _nearest(first: Detections, second: Detections) -> tuple[Tensor, Tensor]:
    """The distance of each detector's detections to the other's nearest with the same label, in one image; [D], [E]."""
    distance = (first.boxes[:, None] - second.boxes).abs().amax(dim=2)
    distance = torch.maximum(distance, (first.scores[:, None] - second.scores).abs())  # [D, E]
    distance = torch.where(first.labels[:, None] == second.labels, distance, torch.inf)
    nothing = torch.full((1, 1), torch.inf)  # so that a minimum exists if the other has no detections
    to_second = torch.cat((distance, nothing.expand(len(distance), 1)), dim=1).amin(dim=1)
    to_first = torch.cat((distance, nothing.expand(1, distance.shape[1])), dim=0).amin(dim=0)
    return to_second, to_first


def _size(file: Path) -> str:
    return f"{file}: {file.stat().st_size / 1e6:.1f} MB"
