"""What evaluations leave for the eye: figures in lines, detections.json, pictures."""

from pathlib import Path

import numpy as np

from src.data.coco import Annotations
from src.data.pictures import decode_within
from src.errors import printable
from src.output import make_folder
from src.report.canvas import PANEL
from src.report.plots import Example, draw_detections, draw_precision_recall
from src.report.report import RESULTS, NullReport, Report

from .evaluate import Evaluation
from .scoring import Results, Scores, write_results

EXAMPLES = 8  # validation images in detections.png
RECALLS = np.linspace(0, 1, 101)  # COCO's


def leave_evaluation(found: Evaluation, validation: Annotations, output: Path, report: Report | NullReport) -> None:
    """Writes detections.json, precision_recall.png and detections.png, and notes what is odd about the evaluation."""
    assert found.results is not None  # this is rank 0
    make_folder(output)
    write_results(output / RESULTS, found.results)
    warn_of_non_finite(report, found.non_finite)
    if not len(found.results.scores):
        report.note("Nothing was detected with a score above the threshold")
    names = [category.name for category in validation.categories]
    draw_precision_recall(found.scores.precision, RECALLS, names, output / "precision_recall.png")
    draw_detections([_example(validation, found.results, i) for i in _shown(validation)], output / "detections.png")


def warn_of_non_finite(report: Report | NullReport, count: int) -> None:
    """Tells of network outputs that were NaN or infinite."""
    if count:
        report.warn(f"{count} default boxes' outputs were not finite: they detect nothing")


def tell_figures(report: Report | NullReport, scores: Scores) -> None:
    """COCO's 12 figures and the average precision of each category, a line each."""
    for name, value in scores.figures.items():
        report.note(f"{name:<9} {_figure(value)}")
    figures = {printable(name): value for name, value in scores.category_ap.items()}
    width = max(map(len, figures))
    report.note("mAP by category:")
    for name, value in figures.items():
        report.note(f"  {name:<{width}}  {_figure(value)}")


def _figure(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.4f}"


def _shown(validation: Annotations) -> np.ndarray:
    """The images in the picture: spread evenly over those with boxes, the same ones every time."""
    candidates = validation.with_boxes() if len(validation.boxes) else np.arange(len(validation))
    return candidates[np.linspace(0, len(candidates) - 1, min(EXAMPLES, len(candidates))).round().astype(int)]


def _example(validation: Annotations, results: Results, index: int) -> Example:
    """An image, as small as it is shown, beside its boxes and its detections, all by name."""
    names = {category.id: category.name for category in validation.categories}
    boxes, labels = validation.of_image(index)
    own = results.image_ids == validation.image_ids[index]
    found = results.boxes[own].copy()
    found[:, 2:] += found[:, :2]
    image = decode_within(validation.image_path(index), PANEL, own=False).permute(1, 2, 0).numpy()
    scale = np.tile(np.array(image.shape[1::-1]) / validation.sizes[index], 2)  # of the shown image's pixels, [4]
    return Example(
        image=image,
        truth_boxes=boxes * scale,
        truth_names=[validation.categories[label - 1].name for label in labels],
        boxes=found * scale,
        names=[names[category] for category in results.category_ids[own].tolist()],
        scores=results.scores[own],
    )
