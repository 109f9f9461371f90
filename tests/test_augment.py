import json

import numpy as np
import pytest
import torch
from torchvision.tv_tensors import BoundingBoxes, Image

from src.augment import RandomWindowCrop, colour_matrix, draw_window
from src.batch import IMAGENET_MEAN, IMAGENET_STD, coloured

TOLERANCE = 0.02
DRAWS = 40


def annotated(coco128):
    """Width, height and boxes [G, 4] ltrb in pixels of every annotated photograph."""
    content = json.loads((coco128 / "annotations" / "instances_train2017.json").read_text())
    for image in content["images"]:
        boxes = [entry["bbox"] for entry in content["annotations"] if entry["image_id"] == image["id"]]
        if boxes:
            left, top, width, height = torch.tensor(boxes).float().unbind(dim=1)
            yield image["width"], image["height"], torch.stack((left, top, left + width, top + height), dim=1)


def test_crop_statistics_are_the_oracles(coco128, oracle):
    expected = oracle("random_crop")
    torch.manual_seed(0)
    areas, aspects, kept_fractions, box_areas = [], [], [], []
    for width, height, boxes in annotated(coco128):
        for _ in range(DRAWS):
            window, kept = draw_window(boxes, width, height)
            left, top, right, bottom = window or (0, 0, width, height)
            area = (right - left) * (bottom - top) / (width * height)
            areas.append(area if window else 1.0)
            aspects.append((right - left) / width / ((bottom - top) / height) if window else None)
            kept_fractions.append(kept.float().mean().item() if window else 1.0)
            left_over = boxes if kept is None else boxes[kept]
            limits = torch.tensor([left, top, right, bottom])
            clipped = torch.minimum(torch.maximum(left_over, limits[[0, 1, 0, 1]]), limits[[2, 3, 2, 3]])
            sizes = (clipped[:, 2:] - clipped[:, :2]).prod(dim=1) / ((right - left) * (bottom - top))
            box_areas.append(sizes.mean().item())  # of a draw: images with few boxes count as much as crowded ones
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
    boxes = torch.tensor([[10.0, 10, 60, 60], [100, 80, 160, 120]])
    picture = torch.arange(120 * 160).remainder(251).byte().view(1, 120, 160).expand(3, -1, -1)
    torch.manual_seed(1)
    crop = RandomWindowCrop()
    cropped = 0
    for _ in range(60):
        image, left_over, labels = crop(
            Image(picture), BoundingBoxes(boxes, format="XYXY", canvas_size=(120, 160)), torch.tensor([3, 7])
        )
        height, width = image.shape[1:]
        assert len(left_over) == len(labels) >= 1
        assert (left_over[:, :2] >= 0).all()
        assert (left_over[:, 2:] <= torch.tensor([width, height])).all()
        assert (left_over[:, 2:] > left_over[:, :2]).all()
        cropped += (height, width) != (120, 160)
    assert cropped > 10


def test_a_window_in_a_tiny_image_has_a_pixel():
    torch.manual_seed(0)
    for _ in range(50):
        window, _ = draw_window(torch.tensor([[0.0, 0, 1, 1]]), 1, 1)
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
    mean, deviation = (np.array(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    changed = (coloured(torch.from_numpy(images), matrices).double().numpy() * deviation + mean) * 255
    np.testing.assert_allclose(changed[0], step_by_step(images[0], *parameters), atol=1e-3)
    # YIQ's published coefficients are rounded: there and back is up to 0.7 grey levels off
    np.testing.assert_allclose(changed[1], images[1], atol=0.8)
