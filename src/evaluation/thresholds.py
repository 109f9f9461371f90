"""Score thresholds: the score with the best F1 at IoU 0.5, for each category and for all together.

F1 is the harmonic mean of precision and recall.  Shapes: K categories, R = 101 recalls, S = 101 scores, P points of a
category's curve.
"""

from typing import Any, NamedTuple

import numpy as np

SCORES = np.linspace(0, 1, 101)  # [S] of the F1 curves; the threshold of all categories is one of these
SCORE_DECIMALS = 4  # rounded down, so that the detection with the best F1 still reaches the threshold


class Threshold(NamedTuple):
    """A score, and F1, precision and recall of the detections with that score or more."""

    score: float
    f1: float
    precision: float
    recall: float


class Thresholds(NamedTuple):
    """The scores with the best F1.  None: not defined, because no detection is right or there is no ground truth."""

    overall: Threshold | None  # one score for all categories; F1 etc. are means over categories with ground truth
    by_category: list[Threshold | None]  # [K]
    f1: np.ndarray  # [S, K] of the detections with each score or more; NaN without ground truth

    def as_record(self, names: list[str]) -> dict[str, Any]:
        """The thresholds by category name, for metrics.jsonl."""
        named = zip(names, self.by_category, strict=True)
        return {"all": _to_dict(self.overall), "by category": {name: _to_dict(value) for name, value in named}}

    def as_state(self) -> dict[str, Any]:
        """The scores alone, in the order of the labels, for checkpoints and exported files."""
        return {
            "all": self.overall.score if self.overall else None,
            "by_label": [value.score if value else None for value in self.by_category],
        }


def find_best_thresholds(precision: np.ndarray, score_at_recall: np.ndarray, num_truth: np.ndarray) -> Thresholds:
    """The thresholds of all categories.

    precision, score_at_recall: [R, K], the curves of COCO's scorer at IoU 0.5.  Precision -1: not defined.  Score 0: no
    detection reaches that recall.  num_truth: [K], boxes without crowds.

    The scorer's precision at a recall is the highest at that recall or beyond.  The best F1 lies at a point where it is
    the actual precision, so the result is exact for up to 100 boxes of a category; with more boxes the recall is off by
    at most 1%.
    """
    categories = [
        _f1_curve(*columns) for columns in zip(precision.T, score_at_recall.T, num_truth.tolist(), strict=True)
    ]
    columns = [[_at_scores(curve, row) for curve in categories] for row in (1, 2, 3)]
    f1, at_precision, at_recall = (np.stack(column, axis=1) for column in columns)
    defined = num_truth > 0
    f1[:, ~defined] = np.nan
    overall = None
    if f1[:, defined].any():
        means = f1[:, defined].mean(axis=1)
        # Of equal F1 take the highest score: it leaves out the most detections.
        best = int(np.flatnonzero(means == means.max())[-1])
        rates = (at_precision[best, defined].mean(), at_recall[best, defined].mean())
        overall = Threshold(float(SCORES[best]), float(means[best]), *map(float, rates))
    return Thresholds(overall, [_best_point(curve) for curve in categories], f1)


def _f1_curve(precision: np.ndarray, scores: np.ndarray, num_truth: int) -> np.ndarray:
    """A category's score, F1, precision and recall at the P recalls that it reaches, [4, P]; scores fall."""
    steps = np.flatnonzero(scores > 0)
    steps = steps[steps > 0]  # recall 0 needs no detection
    # The scorer's entry for a recall is the first detection that reaches it; its own recall may be higher.
    recall = np.ceil(np.round(steps / 100 * num_truth, 6)) / max(1, num_truth)
    at = precision[steps]
    return np.stack([scores[steps], 2 * at * recall / (at + recall), at, recall])


def _at_scores(curve: np.ndarray, row: int) -> np.ndarray:
    """The curve's row for the detections with each of SCORES or more; 0 if no detection has that score.  [S]."""
    points = np.searchsorted(-curve[0], -SCORES, side="right")  # number of points with that score or more
    return np.concatenate([[0.0], curve[row]])[points]


def _best_point(curve: np.ndarray) -> Threshold | None:
    if not curve.shape[1]:
        return None
    score, *rates = curve[:, curve[1].argmax()].tolist()
    scale = 10**SCORE_DECIMALS
    return Threshold(np.floor(score * scale).item() / scale, *rates)


def _to_dict(value: Threshold | None) -> dict[str, float] | None:
    return value._asdict() if value else None
