"""The pictures: what was given against matplotlib's own objects and the pixels of the files."""

import json
import os
import subprocess
import sys
import warnings
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.patches import Rectangle
from PIL import Image

from src.report import plots
from src.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
ODD_NAMES = [
    "$5 bill$ and \\frac{",
    "_hidden",
    "名前",
    "ñandú 🦤",
    "",
    "a name of more than two dozen characters",
    "a\nb",
]


def random_image(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def random_boxes(count: int, width: int, height: int, seed: int = 0) -> np.ndarray:
    corners = np.random.default_rng(seed).uniform(0, 1, (count, 2, 2)) * (width, height)
    return np.sort(corners, axis=1).reshape(count, 4)


def iteration(number: int, epoch: int, **changes) -> dict:
    figures = {"loss": 3 + 10 / (number + 1), "localisation_loss": 1.0, "label_loss": 2 + 10 / (number + 1)}
    return {"kind": "iteration", "epoch": epoch, "iteration": number, **figures, "learning_rate": 0.01, **changes}


def evaluation(epoch: int, mean_ap: float | None) -> dict:
    return {"kind": "evaluation", "epoch": epoch, "mAP": mean_ap, "AP50": mean_ap and 2 * mean_ap, "AP75": mean_ap}


def write_metrics(path: Path, entries: list[dict], ending: str = "") -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + ending)
    return path


def example(names=("dog", "cat"), scores=(0.9, 0.4), size=(64, 48)) -> plots.Example:
    boxes = random_boxes(len(names), *size)
    return plots.Example(random_image(*size), boxes, list(names), boxes, list(names), np.array(scores))


def draw_each(folder: Path) -> dict[str, Path]:
    """Every kind of picture, of small input."""
    metrics = write_metrics(folder / "metrics.jsonl", [iteration(0, 0), iteration(20, 0), evaluation(0, 0.2)])
    one = example()
    draws = {
        "training.png": lambda path: plots.draw_training(metrics, path),
        "precision_recall.png": lambda path: plots.draw_precision_recall(
            np.full((10, 101, 2), 0.5), IOU_THRESHOLDS, RECALLS, ["dog", "cat"], path
        ),
        "detections.png": lambda path: plots.draw_detections([one], path),
        "batch.png": lambda path: plots.draw_batch(
            np.zeros((1, 3, 30, 30)), [np.array([[1, 2, 20, 25.0]])], [["dog"]], path
        ),
        "prediction.png": lambda path: plots.draw_prediction(one.image, one.boxes, one.names, one.scores, path),
    }
    for name, draw in draws.items():
        draw(folder / name)
    return {name: folder / name for name in draws}


def line_data(axes, label: str) -> tuple[np.ndarray, np.ndarray]:
    (line,) = (line for line in axes.lines if line.get_label() == label)
    return line.get_xdata(), line.get_ydata()


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def drawn_boxes(axes) -> list[tuple[float, ...]]:
    patches = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    return [
        (*patch.get_xy(), patch.get_x() + patch.get_width(), patch.get_y() + patch.get_height()) for patch in patches
    ]


# All of them


def test_every_picture_is_a_png_file_with_the_same_bytes_each_time(tmp_path):
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
    first, second = draw_each(tmp_path / "first"), draw_each(tmp_path / "second")
    for name, path in first.items():
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) >= 48
            assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24)) > 2, "something is drawn"
        assert path.read_bytes() == second[name].read_bytes()
    assert {path.name for path in (tmp_path / "first").iterdir()} == {*first, "metrics.jsonl"}, "nothing is left over"


def test_pyplot_is_not_imported(tmp_path):
    program = (
        "import sys; from pathlib import Path; from tests.report.test_plots import draw_each;"
        "draw_each(Path(sys.argv[1]));"
        "assert 'matplotlib.pyplot' not in sys.modules; assert 'tkinter' not in sys.modules"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MPLBACKEND")}
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_settings_of_the_user_neither_count_nor_change(tmp_path):
    for folder in ("theirs", "ours"):
        (tmp_path / folder).mkdir()
    ours = draw_each(tmp_path / "ours")
    with matplotlib.rc_context({"text.usetex": True, "axes.facecolor": "red", "savefig.dpi": 30, "font.size": 30}):
        before = dict(matplotlib.rcParams)
        theirs = draw_each(tmp_path / "theirs")
        assert dict(matplotlib.rcParams) == before
    assert [path.read_bytes() for path in theirs.values()] == [path.read_bytes() for path in ours.values()]


def test_a_picture_that_cannot_be_written_is_a_user_error_and_the_old_one_stays(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"cannot write .*nowhere.*picture\.png: No such file or directory"):
        plots.draw_detections([example()], tmp_path / "nowhere" / "picture.png")
    (tmp_path / "picture.png").write_text("the old one")

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", disk_full)
    with pytest.raises(UserError, match="No space left"):
        plots.draw_detections([example()], tmp_path / "picture.png")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
    assert (tmp_path / "picture.png").read_text() == "the old one"


def test_names_may_be_any_text(tmp_path):
    count = len(ODD_NAMES)
    image, boxes, scores = random_image(200, 200), random_boxes(count, 200, 200), np.full(count, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plots.draw_prediction(image, boxes, ODD_NAMES, scores, tmp_path / "prediction.png")
        plots.draw_detections([plots.Example(image, boxes, ODD_NAMES, boxes, ODD_NAMES, scores)], tmp_path / "grid.png")
        plots.draw_precision_recall(
            np.full((10, 101, count), 0.5), IOU_THRESHOLDS, RECALLS, ODD_NAMES, tmp_path / "curves.png"
        )
    assert "名前 0.50" in texts(figure.axes[0])


# Training


def test_training_curves_are_the_logged_numbers(tmp_path):
    logged = [iteration(number, number // 32, learning_rate=number / 1000) for number in range(0, 96, 20)]
    entries = [*logged, {"kind": "epoch", "epoch": 0, "seconds": 3.0}, evaluation(0, 0.1), evaluation(2, 0.3)]
    figure = plots.draw_training(write_metrics(tmp_path / "metrics.jsonl", entries), tmp_path / "training.png")
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
        assert x == pytest.approx([32, 96], rel=0.3), "where the epochs ended, as closely as the log tells"
    assert "0.3000 mAP after epoch 2" in accuracy.get_title()
    assert losses.get_xlim() == rate.get_xlim() == accuracy.get_xlim()
    for axes in (losses, accuracy):
        assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1, "it would hide the last points"


@pytest.mark.parametrize("length", [1, 7, 20, 32, 100, 458])
def test_an_evaluation_stands_at_the_end_of_its_epoch(tmp_path, length):
    epochs = 12
    entries = [iteration(number, number // length) for number in range(0, epochs * length, 20)]
    entries.append(evaluation(epochs - 1, 0.1))
    figure = plots.draw_training(write_metrics(tmp_path / "metrics.jsonl", entries), tmp_path / "training.png")
    (end,) = line_data(figure.axes[2], "mAP")[0]
    assert end == pytest.approx(epochs * length, abs=20 + epochs)


@pytest.mark.parametrize("lengths", [[8, 8, 8], [32, 32], [4], [6, 12, 12]])
def test_evaluations_stand_where_the_log_says_that_their_epochs_ended(tmp_path, lengths):
    """Few iterations of a short run are logged; and one that is continued with another batch size has other epochs."""
    ends = np.cumsum(lengths).tolist()
    entries = [iteration(number, int(np.searchsorted(ends, number, "right"))) for number in range(0, ends[-1], 20)]
    for epoch, end in enumerate(ends):
        entries += [{"kind": "epoch", "epoch": epoch, "iteration": end}, evaluation(epoch, 0.1)]
    figure = plots.draw_training(write_metrics(tmp_path / "metrics.jsonl", entries), tmp_path / "training.png")
    assert line_data(figure.axes[2], "mAP")[0].tolist() == ends


def test_long_runs_are_smoothed_and_keep_their_raw_curves(tmp_path):
    values = np.random.default_rng(0).normal(5, 1, 500)
    entries = [iteration(20 * n, 0, loss=value) for n, value in enumerate(values)]
    entries[100]["loss"] = None  # not finite when it was logged
    figure = plots.draw_training(write_metrics(tmp_path / "metrics.jsonl", entries), tmp_path / "training.png")
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
        ([iteration(0, 0)], "", "no evaluation yet"),
        ([iteration(0, 0), iteration(20, 1)], '{"kind": "evaluation", "epoch": 1, "mA', "no evaluation yet"),
        ([iteration(0, 0), iteration(20, 1)], '17\nnull\n{"epoch": 3}\n[1, 2]\n', "no evaluation yet"),
        ([iteration(0, 0, loss=0, localisation_loss=0, label_loss=0)], "", "no evaluation yet"),
        ([iteration(0, 0, loss=None, localisation_loss=None, label_loss=None)], "", "no evaluation yet"),
        ([iteration(0, 0), evaluation(0, None)], "", "mAP not defined: no ground truth"),
        ([evaluation(0, 0.0)], "", None),
        ([evaluation(0, None), evaluation(1, 0.5)], "", None),
    ],
    ids=["empty", "one", "cut", "other lines", "zero", "not finite", "not defined", "no iteration", "defined later"],
)
def test_a_metrics_file_may_be_short_or_unfinished(tmp_path, entries, ending, remark):
    path = write_metrics(tmp_path / "metrics.jsonl", entries, ending)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plots.draw_training(path, tmp_path / "training.png")
    assert texts(figure.axes[2]) == ([remark] if remark else [])
    assert (tmp_path / "training.png").stat().st_size > 1000


def test_a_metrics_file_that_is_not_there_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*metrics\.jsonl: No such file"):
        plots.draw_training(tmp_path / "metrics.jsonl", tmp_path / "training.png")


# Precision and recall


def random_precision(categories: int, undefined=()) -> np.ndarray:
    precision = np.random.default_rng(0).uniform(0, 1, (10, 101, categories))
    precision[:, :, list(undefined)] = -1
    return precision


def test_curves_are_the_mean_over_the_categories_that_have_ground_truth(tmp_path):
    precision = random_precision(4, undefined=[1])
    figure = plots.draw_precision_recall(precision, IOU_THRESHOLDS, RECALLS, list("abcd"), tmp_path / "curves.png")
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
    bars = plots.draw_precision_recall(precision, IOU_THRESHOLDS, RECALLS, names, tmp_path / "curves.png").axes[1]
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
    figure = plots.draw_precision_recall(random_precision(80), IOU_THRESHOLDS, RECALLS, names, tmp_path / "curves.png")
    curves, bars = figure.axes
    extents = [label.get_window_extent() for label in bars.get_yticklabels()]
    assert not any(first.overlaps(second) for first, second in combinations(extents, 2))
    assert not any(extent.overlaps(curves.get_legend().get_window_extent()) for extent in extents)


def test_without_ground_truth_the_picture_says_so(tmp_path):
    figure = plots.draw_precision_recall(
        np.full((10, 101, 2), -1.0), IOU_THRESHOLDS, RECALLS, ["a", "b"], tmp_path / "curves.png"
    )
    assert texts(figure.axes[0]) == ["no ground truth"]


# Images


def test_detections_stand_beside_the_ground_truth(tmp_path):
    image = random_image(160, 120)
    truth, found = random_boxes(2, 160, 120, seed=1), random_boxes(3, 160, 120, seed=2)
    one = plots.Example(image, truth, ["dog", "cat"], found, ["dog", "bird", "cat"], np.array([0.95, 0.5, 0.1]))
    empty = plots.Example(random_image(90, 200), np.zeros((0, 4)), [], np.zeros((0, 4)), [], np.zeros(0))
    figure = plots.draw_detections([one, empty, one], tmp_path / "detections.png", min_score=0.3)
    assert len(figure.axes) == 6
    left, right = figure.axes[:2]
    assert np.array(drawn_boxes(left)) == pytest.approx(truth)
    assert np.array(drawn_boxes(right)) == pytest.approx(found[:2]), "0.1 is below the score that is asked for"
    assert texts(left) == ["dog", "cat"] and texts(right) == ["dog 0.95", "bird 0.50"]
    assert left.get_title(loc="left") == "ground truth: 2"
    assert "2 of 3" in right.get_title(loc="left") and "0 of 0" in figure.axes[3].get_title(loc="left")
    assert drawn_boxes(figure.axes[2]) == drawn_boxes(figure.axes[3]) == []
    colours = [axes.patches[0].get_edgecolor() for axes in (left, right, *figure.axes[4:])]
    assert len(set(colours)) == 1, "a category has one colour in the picture"
    assert left.patches[0].get_edgecolor() != left.patches[1].get_edgecolor()
    for axes in figure.axes:
        size = axes.images[0].get_array().shape
        assert axes.bbox.height / axes.bbox.width == pytest.approx(size[0] / size[1], rel=0.02)


def test_labels_do_not_overlap_and_stay_inside_their_image(tmp_path):
    count = 60
    boxes, names = random_boxes(count, 640, 480, seed=3), [f"category {k % 9}" for k in range(count)]
    crowded = plots.Example(random_image(640, 480), boxes, names, boxes, names, np.linspace(1, 0.3, count))
    figure = plots.draw_detections([crowded], tmp_path / "detections.png")
    for axes in figure.axes:
        assert len(drawn_boxes(axes)) == 40, "every box of these is drawn, labelled or not"
        extents = [text.get_window_extent() for text in axes.texts]
        assert len(extents) > 15
        assert not any(first.overlaps(second) for first, second in combinations(extents, 2))
        frame = axes.bbox
        assert all(frame.x0 - 1 < each.x0 and each.x1 < frame.x1 + 1 for each in extents)
        assert all(frame.y0 - 1 < each.y0 and each.y1 < frame.y1 + 1 for each in extents)
    assert texts(figure.axes[0])[0] == "and 20 more"
    assert texts(figure.axes[1])[:2] == ["and 20 more", "category 0 1.00"], "the best detection always has its label"
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    assert np.array(drawn_boxes(figure.axes[0])) == pytest.approx(boxes[areas >= np.sort(areas)[-40]])


@pytest.mark.parametrize("sizes", [[(1, 1)], [(500, 20), (20, 500)], [(300, 300)] * 9], ids=str)
def test_images_of_any_size_fit_into_the_grid(tmp_path, sizes):
    examples = [example(size=size) for size in sizes]
    figure = plots.draw_detections(examples, tmp_path / "detections.png")
    boxes = [axes.bbox for axes in figure.axes]
    assert not any(first.overlaps(second) for first, second in combinations(boxes, 2))
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
    assert all(figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1 for box in boxes)


def test_no_examples_give_an_empty_picture(tmp_path):
    plots.draw_detections([], tmp_path / "detections.png")
    assert Image.open(tmp_path / "detections.png").size[0] > 100


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_a_batch_is_shown_as_the_network_sees_it(tmp_path, kind):
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 300, 300)).astype(kind)
    boxes = [random_boxes(2, 300, 300), np.zeros((0, 4)), random_boxes(1, 300, 300)]
    figure = plots.draw_batch(images, boxes, [["dog", "cat"], [], ["cat"]], tmp_path / "batch.png")
    assert len(figure.axes) == 3
    for axes, image, its_boxes in zip(figure.axes, images, boxes, strict=True):
        assert (axes.images[0].get_array() == image.transpose(1, 2, 0)).all()
        assert np.reshape(drawn_boxes(axes), (-1, 4)) == pytest.approx(its_boxes)
    assert texts(figure.axes[0]) == ["dog", "cat"]
    assert [axes.get_title(loc="left") for axes in figure.axes][1] == "image 1, boxes: 0"


def test_of_a_large_batch_the_first_images_are_shown(tmp_path):
    images = np.zeros((40, 3, 20, 20), dtype=np.uint8)
    figure = plots.draw_batch(images, [np.zeros((0, 4))] * 40, [[]] * 40, tmp_path / "batch.png")
    assert len(figure.axes) == 16


@pytest.mark.parametrize("size", [(1, 1), (29, 57), (640, 427), (333, 1001)], ids=str)
def test_a_prediction_has_the_pixels_of_its_image(tmp_path, size):
    image = random_image(*size)
    plots.draw_prediction(image, np.zeros((0, 4)), [], np.zeros(0), tmp_path / "prediction.png")
    assert (np.asarray(Image.open(tmp_path / "prediction.png").convert("RGB")) == image).all()


def test_a_prediction_has_its_boxes_where_they_belong(tmp_path):
    image = np.full((200, 300, 3), 255, dtype=np.uint8)
    box = np.array([[40, 60, 220, 150.0]])
    plots.draw_prediction(image, box, ["dog"], np.array([0.87]), tmp_path / "prediction.png")
    drawn = np.asarray(Image.open(tmp_path / "prediction.png").convert("RGB")).astype(int)
    coloured = (drawn.max(axis=2) - drawn.min(axis=2)) > 100
    below_the_label = coloured[100:]  # the label is above the box
    rows, columns = below_the_label.any(axis=1).nonzero()[0] + 100, below_the_label.any(axis=0).nonzero()[0]
    assert (columns[0], columns[-1], rows[-1]) == pytest.approx((40, 220, 150), abs=2)
    assert (drawn[75:140, 60:200] == 255).all(), "what is inside stays visible"
    plots.draw_prediction(image, box, ["dog"], np.array([0.87]), tmp_path / "none.png", min_score=0.9)
    assert (np.asarray(Image.open(tmp_path / "none.png").convert("RGB")) == 255).all()


def test_boxes_beyond_the_image_are_cut_off(tmp_path):
    image = random_image(100, 80)
    boxes = np.array([[-500, -500, 900, 900], [90, 70, 4000, 3000], [-50, -50, -10, -10.0]])
    figure = plots.draw_prediction(
        image, boxes, ["a", "b", "c"], np.array([0.9, 0.8, 0.7]), tmp_path / "prediction.png"
    )
    assert Image.open(tmp_path / "prediction.png").size == (100, 80)
    assert all(figure.bbox.overlaps(text.get_window_extent()) for text in figure.axes[0].texts)
