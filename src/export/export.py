"""`--mode export`: a trained detector as files that other programs run, and how far they are from it."""

import json
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
from src.weights.detector import check_finite, known_categories, read_labelled, trained_model
from src.weights.exported import load_trained, require, trained_detector
from src.weights.files import load_checkpoint

DETECTOR, NETWORK, DEFAULT_BOXES = "detector.onnx", "network.onnx", "default_boxes.json"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
COMPARED = 8  # pictures on which the files are compared with the network
CPU = torch.device("cpu")
MATCHED = 1e-2  # of the image, and in score: a detection of both is no further apart than this
TOLERATED = 1e-4  # difference in boxes and scores without a warning


def export(checkpoint: Path, data: Path, output: Path, *, backbone: str, report: Report) -> None:
    """Writes a checkpoint's detector into `output` as files that other programs run, compared with it on pictures.

    data: an image, a folder of images, or a data set, whose validation images are taken.  backbone: that of a
    checkpoint which does not say; the categories of one which does not say are the data set's.  Raises UserError,
    before the work, for what is missing or is no checkpoint.
    """
    require(PACKAGES, what="--mode export")
    pictures = read_pictures(data, report)
    state = load_checkpoint(checkpoint)
    check_finite(state["model"], source=checkpoint)
    categories = labelled_categories(state, data, source=checkpoint, report=report)
    trained = trained_model(state, backbone=backbone, num_categories=len(categories), source=checkpoint, device=CPU)
    make_folder(output)
    thresholds = state.get("score_thresholds")
    for name, content in exported_files(trained, categories, thresholds).items():
        with atomic_write(output / name) as file:
            file.write(content)
    tell_differences(trained.eval(), pictures, output, report)


def labelled_categories(state: dict, data: Path, *, source: Path, report: Report) -> tuple[Category, ...]:
    """The categories of a checkpoint's labels; of one that does not say those of the data set, in their order.

    Without a data set, that a label is its category's id.  Raises UserError where the data set has others.
    """
    if "categories" in state:
        return known_categories(state)
    annotations, folder = locations(data, "val")
    if annotations.is_file():
        report.note(f"{source}: does not say what its labels are: the categories of {annotations} in their order")
        return read_labelled(annotations, folder, state, source=source).categories
    report.note(
        f"{source}: does not say the ids of its categories: its labels are taken for them (a data set as --data, which "
        "it was trained on, tells)"
    )
    return known_categories(state)


def read_pictures(data: Path, report: Report) -> Tensor:
    """The first images of `data` for the network, [P, 3, 300, 300] uint8; warns of those that cannot be read.

    Raises UserError where none can.
    """
    annotations, folder = locations(data, "val")
    pictures: list[Tensor] = []
    for path in find_images(folder if annotations.is_file() else data).files:
        try:
            pictures.append(resize(decode_any(path)))
        except UserError as error:
            report.warn(f"left out: {error}")
        if len(pictures) == COMPARED:
            break
    if not pictures:
        raise UserError(f"{data}: none of its images can be read, and what is exported is tried on some")
    return torch.stack(pictures)


def exported_files(
    trained: nn.Module, categories: Sequence[Category], score_thresholds: dict | None = None
) -> dict[str, bytes]:
    """The files by name: their content.  score_thresholds: of the checkpoint, which an older one does not have."""
    from src.export.onnx_graph import (  # here, because what it needs is optional
        detector_graph,
        network_graph,
        with_metadata,
    )

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
    """What turns the offsets of network.onnx into boxes, as JSON."""
    boxes = [[float(str(value)) for value in box] for box in default_boxes().numpy()]  # float32's short digits
    return json.dumps({"form": "cx, cy, width, height", "variances": VARIANCES, "default_boxes": boxes})


def tell_differences(trained: nn.Module, pictures: Tensor, output: Path, report: Report) -> None:
    """A line for each file: how large it is, and how far what it gives is from what the trained network gives."""
    normalised = normalise(pictures)
    with torch.inference_mode():
        offsets, logits = trained(normalised)
    outputs = run_network(output / NETWORK, normalised)
    pairs = list(zip((offsets, logits), outputs, strict=True))
    furthest = max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
    largest = max(float(ours.abs().max()) for ours, _ in pairs)
    told = f"offsets and logits, which reach {largest:.1f}, at most {furthest:.1e} from the network's"
    report.note(f"{_size(output / NETWORK)}, {told}")
    report.note(_size(output / DEFAULT_BOXES))
    state = load_trained(output / DETECTOR)
    detector = trained_detector(state, backbone="", num_categories=0, source=output / DETECTOR, device=CPU)
    expected, _ = detect_batch(trained, normalised)
    found, _ = detect_batch(detector, pictures)
    difference = compare(expected, found)
    report.note(f"{_size(output / DETECTOR)}, {difference.line(len(pictures))}")
    if difference.unmatched or difference.furthest > TOLERATED:
        report.warn(f"{output / DETECTOR}: what it detects is not what the network detects")


def run_network(file: Path, images: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets and logits that network.onnx gives for normalised images."""
    import onnxruntime  # here, because it is optional

    session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    offsets, logits = session.run(["offsets", "logits"], {"normalised": images.numpy()})
    return torch.from_numpy(offsets), torch.from_numpy(logits)


class Difference(NamedTuple):
    """How two detectors differ on the same pictures."""

    detections: int  # of the first
    furthest: float  # greatest difference of a detection's box (as a fraction of the image) or score
    unmatched: int  # detections of either that are not the other's

    def line(self, pictures: int) -> str:
        told = f"{self.detections} detections in {pictures} pictures, boxes and scores at most {self.furthest:.1e}"
        missed = f", {self.unmatched} detections of one only" if self.unmatched else ""
        return f"{told} from the network's{missed}"


def compare(wanted: Sequence[Detections], found: Sequence[Detections]) -> Difference:
    """Each image's detections by two detectors; near ones of one label are the same detection."""
    nearest = [torch.cat(_nearest(*pair)) for pair in zip(wanted, found, strict=True)]
    distances = torch.cat([*nearest, torch.zeros(0)])
    matched = distances[distances < MATCHED]
    furthest = float(matched.max()) if len(matched) else 0.0
    return Difference(sum(len(image.scores) for image in wanted), furthest, len(distances) - len(matched))


def _nearest(first: Detections, second: Detections) -> tuple[Tensor, Tensor]:
    """How far each detection of an image is from the nearest one of the same label of the other detector; [D], [E]."""
    apart = (first.boxes[:, None] - second.boxes).abs().amax(dim=2)
    apart = torch.maximum(apart, (first.scores[:, None] - second.scores).abs())  # [D, E]
    apart = torch.where(first.labels[:, None] == second.labels, apart, torch.inf)
    fill = torch.full((1, 1), torch.inf)  # for the minimum of nothing
    rows = torch.cat((apart, fill.expand(len(apart), 1)), dim=1).amin(dim=1)
    columns = torch.cat((apart, fill.expand(1, apart.shape[1])), dim=0).amin(dim=0)
    return rows, columns


def _size(file: Path) -> str:
    return f"{file}: {file.stat().st_size / 1e6:.1f} MB"
