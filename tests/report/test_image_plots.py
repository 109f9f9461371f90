"""Images with boxes: the given boxes against matplotlib's objects and the pixels of the files."""

from itertools import combinations

import numpy as np
import pytest
from matplotlib.patches import Rectangle
from PIL import Image

from src.report.image_plots import Example, draw_batch, draw_detections, draw_prediction
from tests.helpers.plot_inputs import example, random_boxes, random_image, texts


def drawn_boxes(axes) -> list[tuple[float, ...]]:
    patches = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    return [
        (*patch.get_xy(), patch.get_x() + patch.get_width(), patch.get_y() + patch.get_height()) for patch in patches
    ]


def test_detections_are_drawn_next_to_the_ground_truth(tmp_path):
    image = random_image(160, 120)
    truth, found = random_boxes(2, 160, 120, seed=1), random_boxes(3, 160, 120, seed=2)
    one = Example(image, truth, ["dog", "cat"], found, ["dog", "bird", "cat"], np.array([0.95, 0.5, 0.1]))
    empty = Example(random_image(90, 200), np.zeros((0, 4)), [], np.zeros((0, 4)), [], np.zeros(0))
    figure = draw_detections([one, empty, one], tmp_path / "detections.png", min_score=0.3)
    assert len(figure.axes) == 6
    left, right = figure.axes[:2]
    assert np.array(drawn_boxes(left)) == pytest.approx(truth)
    assert np.array(drawn_boxes(right)) == pytest.approx(found[:2]), "0.1 is below min_score"
    assert texts(left) == ["dog", "cat"] and texts(right) == ["dog 0.95", "bird 0.50"]
    assert left.get_title(loc="left") == "ground truth: 2"
    assert "2 of 3" in right.get_title(loc="left") and "0 of 0" in figure.axes[3].get_title(loc="left")
    assert drawn_boxes(figure.axes[2]) == drawn_boxes(figure.axes[3]) == []
    colours = [axes.patches[0].get_edgecolor() for axes in (left, right, *figure.axes[4:])]
    assert len(set(colours)) == 1, "a category has the same colour everywhere"
    assert left.patches[0].get_edgecolor() != left.patches[1].get_edgecolor()
    for axes in figure.axes:
        size = axes.images[0].get_array().shape
        assert axes.bbox.height / axes.bbox.width == pytest.approx(size[0] / size[1], rel=0.02)


def test_labels_do_not_overlap_and_stay_inside_their_image(tmp_path):
    count = 60
    boxes, names = random_boxes(count, 640, 480, seed=3), [f"category {k % 9}" for k in range(count)]
    crowded = Example(random_image(640, 480), boxes, names, boxes, names, np.linspace(1, 0.3, count))
    figure = draw_detections([crowded], tmp_path / "detections.png")
    for axes in figure.axes:
        assert len(drawn_boxes(axes)) == 40, "40 boxes are drawn, with or without labels"
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
    figure = draw_detections(examples, tmp_path / "detections.png")
    boxes = [axes.bbox for axes in figure.axes]
    assert not any(first.overlaps(second) for first, second in combinations(boxes, 2))
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
    assert all(figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1 for box in boxes)


def test_no_examples_give_an_empty_picture(tmp_path):
    draw_detections([], tmp_path / "detections.png")
    assert Image.open(tmp_path / "detections.png").size[0] > 100


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_a_batch_is_shown_as_the_network_sees_it(tmp_path, kind):
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 300, 300)).astype(kind)
    boxes = [random_boxes(2, 300, 300), np.zeros((0, 4)), random_boxes(1, 300, 300)]
    figure = draw_batch(images, boxes, [["dog", "cat"], [], ["cat"]], tmp_path / "batch.png")
    assert len(figure.axes) == 3
    for axes, image, its_boxes in zip(figure.axes, images, boxes, strict=True):
        assert (axes.images[0].get_array() == image.transpose(1, 2, 0)).all()
        assert np.reshape(drawn_boxes(axes), (-1, 4)) == pytest.approx(its_boxes)
    assert texts(figure.axes[0]) == ["dog", "cat"]
    assert [axes.get_title(loc="left") for axes in figure.axes][1] == "image 1, boxes: 0"


def test_a_large_batch_shows_its_first_images(tmp_path):
    images = np.zeros((40, 3, 20, 20), dtype=np.uint8)
    figure = draw_batch(images, [np.zeros((0, 4))] * 40, [[]] * 40, tmp_path / "batch.png")
    assert len(figure.axes) == 16


@pytest.mark.parametrize("size", [(1, 1), (29, 57), (640, 427), (333, 1001)], ids=str)
def test_a_prediction_has_the_pixels_of_its_image(tmp_path, size):
    image = random_image(*size)
    draw_prediction(image, np.zeros((0, 4)), [], np.zeros(0), tmp_path / "prediction.png")
    assert (np.asarray(Image.open(tmp_path / "prediction.png").convert("RGB")) == image).all()


def test_a_prediction_has_its_boxes_at_their_coordinates(tmp_path):
    image = np.full((200, 300, 3), 255, dtype=np.uint8)
    box = np.array([[40, 60, 220, 150.0]])
    draw_prediction(image, box, ["dog"], np.array([0.87]), tmp_path / "prediction.png")
    drawn = np.asarray(Image.open(tmp_path / "prediction.png").convert("RGB")).astype(int)
    coloured = (drawn.max(axis=2) - drawn.min(axis=2)) > 100
    below_the_label = coloured[100:]  # the label is above the box
    rows, columns = below_the_label.any(axis=1).nonzero()[0] + 100, below_the_label.any(axis=0).nonzero()[0]
    assert (columns[0], columns[-1], rows[-1]) == pytest.approx((40, 220, 150), abs=2)
    assert (drawn[75:140, 60:200] == 255).all(), "what is inside stays visible"
    draw_prediction(image, box, ["dog"], np.array([0.87]), tmp_path / "none.png", min_score=0.9)
    assert (np.asarray(Image.open(tmp_path / "none.png").convert("RGB")) == 255).all()


def test_boxes_beyond_the_image_are_cut_off(tmp_path):
    image = random_image(100, 80)
    boxes = np.array([[-500, -500, 900, 900], [90, 70, 4000, 3000], [-50, -50, -10, -10.0]])
    figure = draw_prediction(image, boxes, ["a", "b", "c"], np.array([0.9, 0.8, 0.7]), tmp_path / "prediction.png")
    assert Image.open(tmp_path / "prediction.png").size == (100, 80)
    assert all(figure.bbox.overlaps(text.get_window_extent()) for text in figure.axes[0].texts)
