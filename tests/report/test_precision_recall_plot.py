"""precision_recall.png against the given arrays."""

from itertools import combinations

import numpy as np
import pytest

from src.report.precision_recall_plot import draw_precision_recall
from tests.helpers.plot_inputs import IOU_THRESHOLDS, RECALLS, texts


def random_precision(categories: int, undefined=()) -> np.ndarray:
    precision = np.random.default_rng(0).uniform(0, 1, (10, 101, categories))
    precision[:, :, list(undefined)] = -1
    return precision


def test_curves_are_the_mean_over_categories_with_ground_truth(tmp_path):
    precision = random_precision(4, undefined=[1])
    figure = draw_precision_recall(precision, IOU_THRESHOLDS, RECALLS, list("abcd"), tmp_path / "curves.png")
    curves, bars = figure.axes
    assert len(curves.lines) == 10
    for threshold, line in enumerate(curves.lines):
        expected = (precision[threshold, :, 0] + precision[threshold, :, 2] + precision[threshold, :, 3]) / 3
        assert line.get_xdata().tolist() == RECALLS.tolist()
        assert line.get_ydata() == pytest.approx(expected)
        assert line.get_label() == f"{0.5 + 0.05 * threshold:.2f}: {expected.mean():.3f}"
    assert len({tuple(line.get_color()) for line in curves.lines}) == 10
    assert {label.get_text() for label in bars.get_yticklabels()} == {"a", "c", "d"}
    assert "1 more" in bars.get_title()


@pytest.mark.parametrize("categories", [1, 4, 24, 25, 80])
def test_categories_are_listed_best_first_with_their_average_precision(tmp_path, categories):
    precision = random_precision(categories)
    names = [f"category {k}" for k in range(categories)]
    bars = draw_precision_recall(precision, IOU_THRESHOLDS, RECALLS, names, tmp_path / "curves.png").axes[1]
    average = {name: precision[:, :, k].mean() for k, name in enumerate(names)}
    ranking = sorted(names, key=average.get, reverse=True)
    if categories > 24:
        ranking = ranking[:12] + ranking[-12:]
    assert [label.get_text() for label in bars.get_yticklabels()] == ranking
    widths = [patch.get_width() for patch in bars.patches]
    assert widths == pytest.approx([average[name] for name in ranking])
    assert texts(bars) == [f"{average[name]:.3f}" for name in ranking]
    at_half = [precision[0, :, names.index(name)].mean() for name in ranking]
    assert bars.lines[0].get_xdata() == pytest.approx(at_half)
    assert bars.yaxis_inverted(), "the best on top"


def test_labels_of_the_categories_do_not_overlap(tmp_path):
    names = [f"a category with a long name {k}" for k in range(80)]
    figure = draw_precision_recall(random_precision(80), IOU_THRESHOLDS, RECALLS, names, tmp_path / "curves.png")
    curves, bars = figure.axes
    extents = [label.get_window_extent() for label in bars.get_yticklabels()]
    assert not any(first.overlaps(second) for first, second in combinations(extents, 2))
    assert not any(extent.overlaps(curves.get_legend().get_window_extent()) for extent in extents)


def test_without_ground_truth_the_picture_says_so(tmp_path):
    figure = draw_precision_recall(
        np.full((10, 101, 2), -1.0), IOU_THRESHOLDS, RECALLS, ["a", "b"], tmp_path / "curves.png"
    )
    assert texts(figure.axes[0]) == ["no ground truth"]
