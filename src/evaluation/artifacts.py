"""What evaluations leave for the eye: figures in lines, detections.json, pictures."""

from pathlib import Path

import numpy as np

from src.data.annotations.coco import Annotations
from src.data.images.formats import decode_thumbnail
from src.evaluation.artifact_files import ArtifactInputs, leave_files
from src.evaluation.evaluate import Evaluation
from src.evaluation.scoring import Results, Scores
from src.report.drawing import PANEL
from src.report.plots import Example
from src.report.report import NullReport, Report
from src.runtime.errors import printable
from src.runtime.output_files import make_folder

EXAMPLES = 8  # validation images in detections.png


def leave_evaluation(found: Evaluation, validation: Annotations, output: Path, report: Report | NullReport) -> None:
    """Writes detections.json, precision_recall.png and detections.png, and notes what is odd about the evaluation."""
    make_folder(output)
    log_evaluation_warnings(report, found)
    leave_files(remains_of(found, validation), output)


def remains_of(
    found: Evaluation, validation: Annotations, *, metrics: Path | None = None, metrics_size: int = 0
) -> ArtifactInputs:
    """What the files of an evaluation are made from; reads the images that will be shown."""
    results = found.results
    assert results is not None  # this is rank 0
    return ArtifactInputs(
        results=results,
        precision=found.scores.precision,
        names=[category.name for category in validation.categories],
        examples=[_example(validation, results, i) for i in _shown(validation)],
        metrics=metrics,
        metrics_size=metrics_size,
    )


def log_evaluation_warnings(report: Report | NullReport, found: Evaluation) -> None:
    """Tells where there is nothing to see, and of network outputs that were NaN or infinite."""
    assert found.results is not None  # this is rank 0
    warn_of_non_finite(report, found.non_finite)
    if not len(found.results.scores):
        report.note("Nothing was detected with a score above the threshold")


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
    path, upright = validation.image_path(index), validation.upright
    image = decode_thumbnail(path, PANEL, own=False, upright=upright).permute(1, 2, 0).numpy()
    scale = np.tile(np.array(image.shape[1::-1]) / validation.sizes[index], 2)  # of the shown image's pixels, [4]
    return Example(
        image=image,
        truth_boxes=boxes * scale,
        truth_names=[validation.categories[label - 1].name for label in labels],
        boxes=found * scale,
        names=[names[category] for category in results.category_ids[own].tolist()],
        scores=results.scores[own],
    )
