import json

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from src.data.pipelines.augment import colour_matrix, draw_window, random_crop
from src.data.pipelines.batch import colour_and_normalise, denormalise, normalise

TOLERANCE = 0.02
DRAWS = 40


def annotated(coco128):
    """Width, height and boxes [G, 4] ltrb in pixels of every annotated photograph."""
    content = json.loads((coco128 / "annotations" / "instances_train2017.json").read_text())
    for image in content["images"]:
        boxes = [entry["bbox"] for entry in content["annotations"] if entry["image_id"] == image["id"]]
        if boxes:
            left, top, width, height = np.array(boxes, np.float32).T
            yield image["width"], image["height"], np.stack((left, top, left + width, top + height), axis=1)


def test_crop_statistics_are_the_oracles(coco128, oracle):
    expected = oracle("random_crop")
    random = np.random.default_rng(0)
    areas, aspects, kept_fractions, box_areas = [], [], [], []
    for width, height, boxes in annotated(coco128):
        for _ in range(DRAWS):
            window, kept = draw_window(boxes, width, height, random)
            left, top, right, bottom = window or (0, 0, width, height)
            area = (right - left) * (bottom - top) / (width * height)
            areas.append(area if window else 1.0)
            aspects.append((right - left) / width / ((bottom - top) / height) if window else None)
            kept_fractions.append(kept.mean() if window else 1.0)
            left_over = boxes if kept is None else boxes[kept]
            clipped = np.clip(left_over, [left, top, left, top], [right, bottom, right, bottom])
            sizes = (clipped[:, 2:] - clipped[:, :2]).prod(axis=1) / ((right - left) * (bottom - top))
            box_areas.append(sizes.mean())  # of a draw: images with few boxes count as much as crowded ones
    assert len(areas) == expected["draws"]
    cropped = [aspect is not None for aspect in aspects]
    cropped_areas = np.array(areas)[cropped]
    deciles = [10, 50, 90]
    assert np.mean(cropped) == pytest.approx(expected["cropped_fraction"], abs=TOLERANCE)
    assert np.mean(areas) == pytest.approx(expected["kept_area_mean"], abs=TOLERANCE)
    assert np.percentile(cropped_areas, deciles) == pytest.approx(
        expected["kept_area_of_cropped_p10_p50_p90"], abs=TOLERANCE
    )
    assert np.percentile([a for a in aspects if a is not None], deciles) == pytest.approx(
        expected["aspect_of_cropped_p10_p50_p90"], abs=2 * TOLERANCE
    )
    assert np.mean(kept_fractions) == pytest.approx(expected["kept_boxes_fraction_mean"], abs=TOLERANCE)
    assert np.mean(box_areas) == pytest.approx(expected["mean_box_area_after"], abs=TOLERANCE)


def test_crop_keeps_boxes_by_their_centres_and_clips_them():
    boxes = np.array([[10, 10, 60, 60], [100, 80, 160, 120]], np.float32)
    picture = torch.arange(120 * 160).view(1, 120, 160).expand(3, -1, -1)  # every pixel tells where it is
    random = np.random.default_rng(1)
    cropped = 0
    for _ in range(60):
        image, left_over, labels = random_crop(picture, boxes, np.array([3, 7]), random)
        (top, left), (height, width) = divmod(image[0, 0, 0].item(), 160), image.shape[1:]
        expected = {}
        for label, box in zip((3, 7), boxes, strict=True):
            if left < (box[0] + box[2]) / 2 < left + width and top < (box[1] + box[3]) / 2 < top + height:
                inside = np.clip(box, [left, top, left, top], [left + width, top + height] * 2)
                expected[label] = (inside - [left, top, left, top]).tolist()
        assert dict(zip(labels.tolist(), left_over.tolist(), strict=True)) == expected
        assert left_over.dtype == np.float32
        assert len(expected) >= 1
        cropped += (height, width) != (120, 160)
    assert cropped > 10
    assert boxes.tolist() == [[10, 10, 60, 60], [100, 80, 160, 120]]  # as they were


def test_every_box_that_a_crop_keeps_has_area():
    """A window ends at whole pixels: a box smaller than one must not be kept for its centre and then clipped away."""
    random = np.random.default_rng(0)
    corners = random.uniform(0, 99, (2000, 2)).astype(np.float32)
    boxes = np.concatenate((corners, corners + np.float32(0.3)), axis=1)
    picture = torch.zeros(3, 100, 100)
    for _ in range(30):
        _, left_over, _ = random_crop(picture, boxes, np.ones(len(boxes), np.int64), random)
        assert (left_over[:, 2:] > left_over[:, :2]).all()


def test_a_window_in_a_tiny_image_has_a_pixel():
    random = np.random.default_rng(0)
    for _ in range(50):
        window, _ = draw_window(np.array([[0, 0, 1, 1]], np.float32), 1, 1, random)
        assert window is None or window == (0, 0, 1, 1)


def step_by_step(image: np.ndarray, brightness: float, contrast: float, saturation: float, hue: float) -> np.ndarray:
    """The colour formula one step after the other in double precision; image [3, H, W] in 0..255."""
    red, green, blue = image.astype(np.float64)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    in_phase = 0.596 * red - 0.274 * green - 0.321 * blue
    quadrature = 0.211 * red - 0.523 * green + 0.311 * blue
    angle = np.deg2rad(hue)
    turned = (
        np.cos(angle) * in_phase + np.sin(angle) * quadrature,
        np.cos(angle) * quadrature - np.sin(angle) * in_phase,
    )
    in_phase, quadrature = saturation * turned[0], saturation * turned[1]
    red = luma + 0.956 * in_phase + 0.621 * quadrature
    green = luma - 0.272 * in_phase - 0.647 * quadrature
    blue = luma - 1.107 * in_phase + 1.705 * quadrature
    return np.clip(brightness * (contrast * (np.stack((red, green, blue)) - 128) + 128), 0, 255)


@pytest.mark.parametrize(
    "parameters",
    [(1, 1, 1, 0), (0.875, 1, 1, 0), (1, 1.5, 1, 0), (1, 1, 0.5, 0), (1, 1, 1, 18), (1.125, 0.5, 1.5, -18)],
)
def test_colour_matrix_equals_the_steps_one_by_one(parameters):
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 40, 50), dtype=np.uint8)
    matrices = torch.from_numpy(np.stack([colour_matrix(*parameters), colour_matrix(1, 1, 1, 0)])).float()
    changed = denormalise(colour_and_normalise(torch.from_numpy(images), matrices).double()).numpy()
    np.testing.assert_allclose(changed[0], step_by_step(images[0], *parameters), atol=1e-3)
    # YIQ's published coefficients are rounded: there and back is up to 0.7 grey levels off
    np.testing.assert_allclose(changed[1], images[1], atol=0.8)


def test_colours_are_changed_in_full_float32_even_if_tf32_is_allowed():
    precisions = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "baddbmm" in str(function):
                precisions.append(torch.get_float32_matmul_precision())
            return function(*args, **kwargs or {})

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # as for every GPU
    try:
        with Products():
            normalise(torch.zeros(2, 3, 300, 300, dtype=torch.uint8))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert precisions == ["highest", "highest"]
