"""training.png against the logged numbers."""

import warnings

import numpy as np
import pytest

from src.report.training_plot import draw_training
from src.runtime.errors import UserError
from tests.helpers.plot_inputs import evaluation_entry, iteration_entry, texts, write_metrics


def line_data(axes, label: str) -> tuple[np.ndarray, np.ndarray]:
    (line,) = (line for line in axes.lines if line.get_label() == label)
    return line.get_xdata(), line.get_ydata()


def test_training_curves_are_the_logged_numbers(tmp_path):
    logged = [iteration_entry(number, number // 32, learning_rate=number / 1000) for number in range(0, 96, 20)]
    entries = [
        *logged,
        {"kind": "epoch", "epoch": 0, "seconds": 3.0},
        evaluation_entry(0, 0.1),
        evaluation_entry(2, 0.3),
    ]
    figure = draw_training(write_metrics(tmp_path / "metrics.jsonl", entries), tmp_path / "training.png")
    losses, rate, accuracy = figure.axes[:3]
    for axes, label, key in (
        (losses, "loss", "loss"),
        (losses, "localisation part", "localisation_loss"),
        (losses, "label part", "label_loss"),
        (rate, rate.lines[0].get_label(), "learning_rate"),
    ):
        x, y = line_data(axes, label)
        assert x.tolist() == [0, 20, 40, 60, 80]
        assert y.tolist() == [entry[key] for entry in logged]
    for label, values in (("mAP", [0.1, 0.3]), ("AP50", [0.2, 0.6]), ("AP75", [0.1, 0.3])):
        x, y = line_data(accuracy, label)
        assert y.tolist() == values
        assert x == pytest.approx([32, 96], rel=0.3), "the ends of the epochs, estimated from the log"
    assert "0.3000 mAP after epoch 2" in accuracy.get_title()
    assert losses.get_xlim() == rate.get_xlim() == accuracy.get_xlim()
    for axes in (losses, accuracy):
        assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1, "it would hide the last points"


@pytest.mark.parametrize("length", [1, 7, 20, 32, 100, 458])
def test_an_evaluation_stands_at_the_estimated_end_of_its_epoch(tmp_path, length):
    epochs = 12
    entries = [iteration_entry(number, number // length) for number in range(0, epochs * length, 20)]
    entries.append(evaluation_entry(epochs - 1, 0.1))
    figure = draw_training(write_metrics(tmp_path / "metrics.jsonl", entries), tmp_path / "training.png")
    (end,) = line_data(figure.axes[2], "mAP")[0]
    assert end == pytest.approx(epochs * length, abs=20 + epochs)


@pytest.mark.parametrize("lengths", [[8, 8, 8], [32, 32], [4], [6, 12, 12]])
def test_an_evaluation_stands_at_the_logged_end_of_its_epoch(tmp_path, lengths):
    """A short run logs few iterations; a run that continues with another batch size has epochs of another length."""
    ends = np.cumsum(lengths).tolist()
    entries = [
        iteration_entry(number, int(np.searchsorted(ends, number, "right"))) for number in range(0, ends[-1], 20)
    ]
    for epoch, end in enumerate(ends):
        entries += [{"kind": "epoch", "epoch": epoch, "iteration": end}, evaluation_entry(epoch, 0.1)]
    figure = draw_training(write_metrics(tmp_path / "metrics.jsonl", entries), tmp_path / "training.png")
    assert line_data(figure.axes[2], "mAP")[0].tolist() == ends


def test_long_runs_are_smoothed_and_keep_their_raw_curves(tmp_path):
    values = np.random.default_rng(0).normal(5, 1, 500)
    entries = [iteration_entry(20 * n, 0, loss=value) for n, value in enumerate(values)]
    entries[100]["loss"] = None  # not finite when it was logged
    figure = draw_training(write_metrics(tmp_path / "metrics.jsonl", entries), tmp_path / "training.png")
    raw = figure.axes[0].lines[0].get_ydata()
    assert np.delete(raw, 100).tolist() == np.delete(values, 100).tolist() and np.isnan(raw[100])
    _, smooth = line_data(figure.axes[0], "loss")
    assert np.isfinite(smooth).all()
    for n in (0, 99, 250, 499):  # each the mean of the values within five
        near = np.delete(values, 100)[max(0, n - 6 - (n > 100)) : n + 6]
        assert abs(smooth[n] - near.mean()) < 0.5
    assert smooth.std() < 0.5 * values.std()


@pytest.mark.parametrize(
    ("entries", "ending", "remark"),
    [
        ([], "", "no evaluation yet"),
        ([iteration_entry(0, 0)], "", "no evaluation yet"),
        (
            [iteration_entry(0, 0), iteration_entry(20, 1)],
            '{"kind": "evaluation", "epoch": 1, "mA',
            "no evaluation yet",
        ),
        ([iteration_entry(0, 0), iteration_entry(20, 1)], '17\nnull\n{"epoch": 3}\n[1, 2]\n', "no evaluation yet"),
        ([iteration_entry(0, 0, loss=0, localisation_loss=0, label_loss=0)], "", "no evaluation yet"),
        ([iteration_entry(0, 0, loss=None, localisation_loss=None, label_loss=None)], "", "no evaluation yet"),
        ([iteration_entry(0, 0), evaluation_entry(0, None)], "", "mAP not defined: no ground truth"),
        ([evaluation_entry(0, 0.0)], "", None),
        ([evaluation_entry(0, None), evaluation_entry(1, 0.5)], "", None),
    ],
    ids=["empty", "one", "cut", "other lines", "zero", "not finite", "not defined", "no iteration", "defined later"],
)
def test_a_metrics_file_may_be_short_or_unfinished(tmp_path, entries, ending, remark):
    path = write_metrics(tmp_path / "metrics.jsonl", entries, ending)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw_training(path, tmp_path / "training.png")
    assert texts(figure.axes[2]) == ([remark] if remark else [])
    assert (tmp_path / "training.png").stat().st_size > 1000


def test_a_missing_metrics_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*metrics\.jsonl: No such file"):
        draw_training(tmp_path / "metrics.jsonl", tmp_path / "training.png")
