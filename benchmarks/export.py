"""The exported files beside the program's own evaluation, on the CPU: `python -m benchmarks export`."""

from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.evaluation import LABELS
from benchmarks.table import speed
from benchmarks.turns import CPU, in_turns, seconds
from src.data.annotations.coco import Category
from src.data.pipelines.batch import normalise
from src.evaluation.evaluate import detect_batch
from src.export.export import DETECTOR, exported_files
from src.ssd.default_boxes import IMAGE_SIZE
from src.ssd.model import SSD300
from src.weights.exported import build_trained_detector

BATCH = 8
TURNS = 3
GOAL = 1.0  # not slower than the evaluation


def run(*, backbone: str = "resnet50", labels: int = LABELS, batch_size: int = BATCH) -> Iterator[dict]:
    """A row for detector.onnx: images/s from pixels to detections."""
    torch.manual_seed(0)
    network = SSD300(backbone, labels).to(memory_format=torch.channels_last).eval()
    images = torch.randint(0, 256, (batch_size, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
    files = exported_files(network, [Category(label, f"category {label}") for label in range(1, labels)])
    state = {"exported": files[DETECTOR]}
    exported = build_trained_detector(state, backbone="", num_categories=0, source=Path(DETECTOR), device=CPU)
    with torch.inference_mode():
        pair = in_turns(
            lambda: batch_size / seconds(lambda: detect_batch(exported, images)),
            lambda: batch_size / seconds(lambda: detect_batch(network, normalise(images))),
            TURNS,
        )
    name = f"{DETECTOR} beside the evaluation, {backbone}, batch {batch_size} (images/s)"
    yield speed(name, pair, GOAL)
