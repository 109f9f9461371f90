"""Small inputs of the plots, and the texts of a figure."""

import json
from pathlib import Path

import numpy as np

from src.report.image_plots import Example

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)


def random_image(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def random_boxes(count: int, width: int, height: int, seed: int = 0) -> np.ndarray:
    corners = np.random.default_rng(seed).uniform(0, 1, (count, 2, 2)) * (width, height)
    return np.sort(corners, axis=1).reshape(count, 4)


def iteration_entry(number: int, epoch: int, **changes) -> dict:
    losses = {"loss": 3 + 10 / (number + 1), "localisation_loss": 1.0, "label_loss": 2 + 10 / (number + 1)}
    return {"kind": "iteration", "epoch": epoch, "iteration": number, **losses, "learning_rate": 0.01, **changes}


def evaluation_entry(epoch: int, mean_ap: float | None) -> dict:
    return {"kind": "evaluation", "epoch": epoch, "mAP": mean_ap, "AP50": mean_ap and 2 * mean_ap, "AP75": mean_ap}


def write_metrics(path: Path, entries: list[dict], ending: str = "") -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + ending)
    return path


def example(names=("dog", "cat"), scores=(0.9, 0.4), size=(64, 48)) -> Example:
    boxes = random_boxes(len(names), *size)
    return Example(random_image(*size), boxes, list(names), boxes, list(names), np.array(scores))


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]
