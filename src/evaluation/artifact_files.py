"""The files that an evaluation leaves: detections.json and the pictures.

Nothing here imports torch, so that a helper process starts soon.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from src.evaluation.scoring import Results, write_results
from src.report.plots import Example, draw_detections, draw_precision_recall, draw_training
from src.runtime.errors import UserError

FILES = DETECTIONS, PRECISION_RECALL, EXAMPLES, TRAINING = (
    "detections.json",
    "precision_recall.png",
    "detections.png",
    "training.png",
)
RECALLS = np.linspace(0, 1, 101)  # COCO's


class ArtifactInputs(NamedTuple):
    """All that the files are made from."""

    results: Results
    precision: np.ndarray  # [T, R, K], see Scores
    names: list[str]  # of the K categories
    examples: list[Example]  # images to show
    metrics: Path | None  # metrics.jsonl of a run
    metrics_size: int  # bytes of it: what is written later belongs to the next picture


def leave_files(remains: ArtifactInputs, output: Path) -> None:
    """Makes the files.  Raises UserError for the first that cannot be written."""
    for make in _makers(remains, output):
        make()


def write_artifacts(remains: ArtifactInputs, output: Path) -> list[str]:
    """Makes the files; gives a line for each that cannot be written."""
    failures = []
    for make in _makers(remains, output):
        try:
            make()
        except UserError as error:
            failures.append(str(error))
    return failures


def _makers(remains: ArtifactInputs, output: Path) -> Iterator[Callable[[], object]]:
    yield partial(write_results, output / DETECTIONS, remains.results)
    yield partial(draw_precision_recall, remains.precision, RECALLS, remains.names, output / PRECISION_RECALL)
    yield partial(draw_detections, remains.examples, output / EXAMPLES)
    if remains.metrics is not None:
        yield partial(draw_training, remains.metrics, output / TRAINING, size=remains.metrics_size)
