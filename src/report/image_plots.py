"""Images with boxes: detections.png, batch.png and the pictures of a prediction.

Names may be any text.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from src.report.drawing import MAX_BOXES, Panel, assign_colours, draw_grid, draw_image
from src.report.figures import plot_style, save_figure

MIN_SCORE = 0.3  # of drawn detections: below it most are wrong, and they hide the picture
MAX_BATCH_IMAGES = 16


class Example(NamedTuple):
    """An image with its ground truth and its detections, best first; boxes are ltrb in pixels of `image`."""

    image: np.ndarray  # [H, W, 3] uint8
    truth_boxes: np.ndarray  # [G, 4]
    truth_names: Sequence[str]
    boxes: np.ndarray  # [D, 4]
    names: Sequence[str]
    scores: np.ndarray  # [D] in 0..1


@plot_style()
def draw_detections(examples: Iterable[Example], path: Path | str, *, min_score: float = MIN_SCORE) -> Figure:
    """Draws each image twice, with its ground truth and with its detections of `min_score` or more; the figure.

    examples: `Example`s or tuples of the same six.  Raises UserError.
    """
    panels = []
    for image, truth_boxes, truth_names, boxes, names, scores in examples:
        panels.append(Panel(f"ground truth: {len(truth_names)}", image, *_largest_first(truth_boxes, truth_names)))
        kept = filter_by_score(boxes, names, scores, min_score)
        title = f"detections (score ≥ {min_score:g}): {len(kept[0])} of {len(names)}"
        panels.append(Panel(title, image, *kept))
    # Names of the ground truth get the first colours, so that these do not depend on the detections.
    colours = assign_colours(name for panel in panels[::2] + panels[1::2] for name in panel.names)
    return save_figure(draw_grid(panels, colours, columns=4), path)


@plot_style()
def draw_batch(
    images: np.ndarray, boxes: Sequence[np.ndarray], names: Sequence[Sequence[str]], path: Path | str
) -> Figure:
    """Draws the first 16 images of a batch with their boxes; the figure.

    images: [N, 3, H, W] in 0..255.  boxes: [B, 4] of each image, ltrb in its pixels.  Raises UserError.
    """
    shown = slice(MAX_BATCH_IMAGES)
    pixels = np.asarray(images[shown]).clip(0, 255).round().astype(np.uint8).transpose(0, 2, 3, 1)  # [N, H, W, 3]
    panels = [
        Panel(f"image {number}, boxes: {len(its_names)}", image, *_largest_first(its_boxes, its_names))
        for number, (image, its_boxes, its_names) in enumerate(zip(pixels, boxes[shown], names[shown], strict=True))
    ]
    return save_figure(
        draw_grid(panels, assign_colours(name for each in names[shown] for name in each), columns=4), path
    )


@plot_style()
def draw_prediction(
    image: np.ndarray,
    boxes: np.ndarray,
    names: Sequence[str],
    scores: np.ndarray,
    path: Path | str,
    *,
    min_score: float = MIN_SCORE,
) -> Figure:
    """Draws the detections of `min_score` or more on the image [H, W, 3] uint8, unscaled; the figure.

    boxes: [D, 4] ltrb in pixels.  scores: [D].  Raises UserError.
    """
    panel = Panel("", image, *filter_by_score(boxes, names, scores, min_score))
    return save_figure(draw_image(panel, assign_colours(panel.names)), path)


def _largest_first(boxes: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, Sequence[str]]:
    """Boxes [B, 4] and names in the given order; if they are more than MAX_BOXES, the largest ones come first."""
    if len(boxes) <= MAX_BOXES:
        return boxes, names
    order = (-(boxes[:, 2:] - boxes[:, :2]).prod(axis=1)).argsort(kind="stable")
    order = np.concatenate((np.sort(order[:MAX_BOXES]), order[MAX_BOXES:]))
    return boxes[order], [names[i] for i in order]


def filter_by_score(
    boxes: np.ndarray, names: Sequence[str], scores: np.ndarray, min_score: float
) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Boxes [L, 4], names and scores of the detections that score at least `min_score`, best first."""
    scores = np.asarray(scores)
    kept = [i for i in (-scores).argsort(kind="stable") if scores[i] >= min_score]
    return np.asarray(boxes).reshape(-1, 4)[kept], [names[i] for i in kept], scores[kept]
