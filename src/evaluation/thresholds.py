"""From which score on detections are worth believing: where F1 at IoU 0.5 is best.

F1 is the harmonic mean of precision and recall.  Shapes: K categories, R = 101 recalls, S = 101 scores.
"""

from typing import Any, NamedTuple

import numpy as np

SCORES = np.linspace(0, 1, 101)  # [S] at which the F1 curves are drawn, and among which that of all is chosen
SCORE_DECIMALS = 4  # rounded down, so that the detection of that score still counts


class Threshold(NamedTuple):
    """A score, and what holds for the detections of that score or more."""

    score: float
    f1: float
    precision: float
    recall: float


class Thresholds(NamedTuple):
    """The score of the best F1.  None: not defined, because nothing right was detected or there is no ground truth."""

    overall: Threshold | None  # one score for all categories; figures are means over those with ground truth
    by_category: list[Threshold | None]  # [K]
    f1: np.ndarray  # [S, K] from each score on; NaN without ground truth

    def as_record(self, names: list[str]) -> dict[str, Any]:
        """For metrics.jsonl: plain numbers by name."""
        named = zip(names, self.by_category, strict=True)
        return {"all": _plain(self.overall), "by category": {name: _plain(value) for name, value in named}}

    def as_state(self) -> dict[str, Any]:
        """For checkpoints and exported files: scores alone, in the order of the labels."""
        return {
            "all": self.overall.score if self.overall else None,
            "by_label": [value.score if value else None for value in self.by_category],
        }


def best_thresholds(precision: np.ndarray, scores: np.ndarray, num_truth: np.ndarray) -> Thresholds:
    """The thresholds of all categories, of the curves that COCO's scorer gives at IoU 0.5.

    precision, scores [R, K]: at each recall, -1 where not defined; the score 0 marks a recall that is not reached.
    num_truth [K]: boxes to find, crowds left out.

    The scorer's precision is the highest at that recall or beyond, and the best F1 lies where both are equal.  So the
    result is exact for up to 100 boxes of a category, and for more the recall is coarse by 1%.
    """
    categories = [_curve(*columns) for columns in zip(precision.T, scores.T, num_truth.tolist(), strict=True)]
    columns = [[_at_scores(curve, row) for curve in categories] for row in (1, 2, 3)]
    f1, at_precision, at_recall = (np.stack(column, axis=1) for column in columns)
    defined = num_truth > 0
    f1[:, ~defined] = np.nan
    overall = None
    if f1[:, defined].any():
        means = f1[:, defined].mean(axis=1)
        best = int(np.flatnonzero(means == means.max())[-1])  # of equal ones the highest score: it leaves out the most
        figures = (at_precision[best, defined].mean(), at_recall[best, defined].mean())
        overall = Threshold(float(SCORES[best]), float(means[best]), *map(float, figures))
    return Thresholds(overall, [_best(curve) for curve in categories], f1)


def _curve(precision: np.ndarray, scores: np.ndarray, num_truth: int) -> np.ndarray:
    """Score, F1, precision and recall of a category at the recalls that it reaches, [4, P], scores falling."""
    steps = np.flatnonzero(scores > 0)
    steps = steps[steps > 0]  # at recall 0 nothing needs to be found
    # The scorer's entry for a recall is the first detection that reaches it, which may reach more.
    recall = np.ceil(np.round(steps / 100 * num_truth, 6)) / max(1, num_truth)
    at = precision[steps]
    return np.stack([scores[steps], 2 * at * recall / (at + recall), at, recall])


def _at_scores(curve: np.ndarray, row: int) -> np.ndarray:
    """A row of the curve for the detections from each of SCORES on, 0 where there are none; [S]."""
    found = np.searchsorted(-curve[0], -SCORES, side="right")  # points of that score or more
    return np.concatenate([[0.0], curve[row]])[found]


def _best(curve: np.ndarray) -> Threshold | None:
    if not curve.shape[1]:
        return None
    score, *figures = curve[:, curve[1].argmax()].tolist()
    scale = 10**SCORE_DECIMALS
    return Threshold(np.floor(score * scale).item() / scale, *figures)


def _plain(value: Threshold | None) -> dict[str, float] | None:
    return value._asdict() if value else None
