import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali", reason="DALI has wheels for Linux only")
from nvidia import dali

from src.data.pipelines.augment import colour_matrix
from src.data.pipelines.dali_graph import (
    Settings,
    decode_and_resize,
    decode_on_cpu,
    decode_on_gpu,
    match_default_boxes,
    training_graph,
)
from src.ssd.default_boxes import default_boxes, default_boxes_ltrb, match
from tests.helpers.dali_loaders import epoch, loader
from tests.helpers.datasets import annotation, read, write_coco

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOLERANCE = 0.02
DRAWS = 40
WINDOWS = 25  # of a picture


def run(graph, batch_size: int, device: str = "cpu") -> list[torch.Tensor]:
    """The outputs of a graph, on the CPU."""
    pipeline = dali.Pipeline(
        batch_size=batch_size, num_threads=2, device_id=0 if device == "cuda" else None, exec_dynamic=True
    )
    with pipeline:
        pipeline.set_outputs(*graph())
    return [torch.from_dlpack(output.as_tensor()).cpu() for output in pipeline.run()]


def given(samples: list[np.ndarray], **options):
    return dali.fn.external_source(lambda: samples, **options)


def matches(sets: list[tuple[np.ndarray, np.ndarray]], device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes [N, A, 4] and labels [N, A] that the graph gives the default boxes for sets of (boxes ltrb, labels)."""
    boxes = [np.float32(boxes) for boxes, _ in sets]
    labels = [np.int32(labels) for _, labels in sets]

    def graph():
        return match_default_boxes(given(boxes), given(labels), on_gpu=device == "cuda")

    return tuple(part.flip(1) for part in run(graph, len(sets), device))


def assert_matches_are_the_oracles(expected: dict, device: str) -> None:
    names = [key.removesuffix("_pos") for key in expected if key.endswith("_pos")]
    assert len(names) == 24
    boxes, labels = matches([(expected[f"{name}_boxes_ltrb"], expected[f"{name}_labels"]) for name in names], device)
    for name, one_boxes, one_labels in zip(names, boxes, labels, strict=True):
        positive = expected[f"{name}_pos"]
        assert one_labels.nonzero().flatten().tolist() == positive.tolist()
        assert one_labels[positive].tolist() == expected[f"{name}_pos_labels"].tolist()
        np.testing.assert_allclose(one_boxes[positive], expected[f"{name}_pos_xywh"], atol=1e-6)
        background = one_labels == 0
        torch.testing.assert_close(one_boxes[background], default_boxes()[background], atol=1e-6, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_matches_are_the_oracles_on_random_boxes(oracle, device):
    assert_matches_are_the_oracles(oracle("encode_random.npz"), device)


@pytest.mark.parametrize("device", DEVICES)
def test_matches_are_the_oracles_on_photographs(encode_oracle, device):
    assert_matches_are_the_oracles(encode_oracle, device)


def test_matches_are_the_other_pipelines_on_random_boxes():
    rng = np.random.default_rng(5)
    sets = []
    for _ in range(40):
        corners = np.sort(rng.random((rng.integers(1, 30), 2, 2), dtype=np.float32), axis=1)
        sets.append((corners.reshape(-1, 4), rng.integers(1, 81, len(corners))))
    boxes, labels = matches(sets)
    for (truth, truth_labels), one_boxes, one_labels in zip(sets, boxes, labels, strict=True):
        index = match(torch.from_numpy(truth), torch.zeros(len(truth), dtype=torch.long), 1, default_boxes_ltrb())[0]
        positive = index >= 0
        assert torch.equal(one_labels, torch.where(positive, torch.from_numpy(truth_labels)[index], 0))
        corners = torch.from_numpy(truth)[index[positive]]
        centred = torch.cat(((corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]), dim=1)
        torch.testing.assert_close(one_boxes[positive], centred, atol=1e-6, rtol=0)


# --- windows and flips -----------------------------------------------------------------------------------------------


def test_crop_statistics_are_the_oracles(coco128, oracle):
    expected = oracle("random_crop")
    annotations = read(coco128)
    counts = np.diff(annotations.first_box)[annotations.with_boxes()]
    outputs = ("ids", "shape", "true_boxes", "flip")  # so that nothing is decoded
    pipeline = loader(annotations, batch_size=126, seed=1).build(outputs)
    shapes, kept_fractions, box_areas, flips = [], [], [], []
    for _ in range(DRAWS):
        ids, shape, boxes, flip = pipeline.run()
        shapes.append(shape.as_array())
        flips.append(flip.as_array())
        for sample, image in enumerate(ids.as_array()[:, 0]):
            left_over = np.array(boxes.at(sample))
            kept_fractions.append(len(left_over) / counts[image])
            box_areas.append((left_over[:, 2:] - left_over[:, :2]).prod(axis=1).mean())
    widths, heights = np.concatenate(shapes).T
    areas = widths * heights
    assert len(areas) == expected["draws"]
    cropped = areas < 1
    deciles = [10, 50, 90]
    assert cropped.mean() == pytest.approx(expected["cropped_fraction"], abs=TOLERANCE)
    assert areas.mean() == pytest.approx(expected["kept_area_mean"], abs=TOLERANCE)
    assert np.percentile(areas[cropped], deciles) == pytest.approx(
        expected["kept_area_of_cropped_p10_p50_p90"], abs=TOLERANCE
    )
    assert np.percentile((widths / heights)[cropped], deciles) == pytest.approx(
        expected["aspect_of_cropped_p10_p50_p90"], abs=TOLERANCE
    )
    assert np.mean(kept_fractions) == pytest.approx(expected["kept_boxes_fraction_mean"], abs=TOLERANCE)
    assert np.mean(box_areas) == pytest.approx(expected["mean_box_area_after"], abs=TOLERANCE)
    assert np.mean(flips) == pytest.approx(0.5, abs=TOLERANCE)


def test_boxes_follow_the_picture_through_window_and_flip(tmp_path):
    left, top, width, height = 30, 40, 50, 60
    write_coco(tmp_path, [annotation(1, (left, top, width, height))], images=1, size=(240, 180), splits=("train",))
    picture = np.zeros((180, 240, 3), np.uint8)
    picture[top : top + height, left : left + width] = 255
    Image.fromarray(picture).save(tmp_path / "train2017" / "000001.jpg", quality=95)
    annotations = read(tmp_path)
    pipeline = loader(annotations, batch_size=60).build(("images", "true_boxes", "shape", "flip"))
    images, boxes, shapes, flips = (output.as_array() for output in pipeline.run())
    assert 0 < flips.sum() < 60
    assert (shapes < 1).any()
    for image, (box,) in zip(images, boxes, strict=True):
        middle = (int(image.min()) + int(image.max())) / 2
        if image.min() == image.max():  # a window inside the square
            continue
        rows, columns = np.nonzero(image.mean(axis=2) > middle)
        found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 300
        np.testing.assert_allclose(found, box, atol=3 / 300)


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("parameters", [(1.0, 1.0, 1.0, 0.0), (1.125, 0.5, 1.5, -18.0), (0.875, 1.5, 0.6, 18.0)])
def test_the_colour_formula_is_dalis(parameters, device):
    picture = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)

    def graph():
        picture_node = given([picture], layout="HWC")
        factors = dict(zip(("brightness", "contrast", "saturation", "hue"), parameters, strict=True))
        picture_node = picture_node.gpu() if device == "cuda" else picture_node
        return (dali.fn.color_twist(picture_node, **factors, dtype=dali.types.FLOAT),)

    (changed,) = run(graph, 1, device)
    matrix = colour_matrix(*parameters)
    expected = picture @ matrix[:, :3].T + matrix[:, 3]
    assert np.abs(changed[0].numpy() - expected).mean() < 0.5  # the two round YIQ's coefficients differently


def test_colours_are_drawn_from_the_ranges_for_each_image(tmp_path):
    write_coco(tmp_path, [annotation(1)], images=1, splits=("train",))
    Image.new("RGB", (160, 120), (96, 96, 96)).save(tmp_path / "train2017" / "000001.jpg", quality=100)
    (batch,) = epoch(loader(read(tmp_path), batch_size=200), 0)
    images = batch.images.mean(dim=(2, 3)).numpy()  # [200, 3]
    grey = (images * (0.229, 0.224, 0.225) + (0.485, 0.456, 0.406)) * 255
    assert np.ptp(grey, axis=1).max() < 3  # hue and saturation leave grey as it is
    # brightness b and contrast c, even in their ranges: b (c (96 - 128) + 128) is 70 to 126, 96 on average
    assert 69.5 <= grey.min() < 75
    assert 120 < grey.max() <= 126.5
    assert grey.mean() == pytest.approx(96, abs=2)


@pytest.mark.parametrize("save", [{"format": "JPEG", "quality": 95}, {"format": "PNG"}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_picture_without_augmentation_is_pillows(tmp_path, save, mode):
    noise = np.random.default_rng(1).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((400, 260), Image.Resampling.BICUBIC).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me", which both pipelines ignore
    picture.save(tmp_path / "picture", exif=exif, **save)
    content = np.frombuffer((tmp_path / "picture").read_bytes(), np.uint8)

    def graph():
        return (decode_and_resize(given([content]), None, None, on_gpu=False, upright=False),)

    (resized,) = run(graph, 1)
    expected = np.asarray(
        Image.open(tmp_path / "picture").convert("RGB").resize((300, 300), Image.Resampling.BILINEAR), np.float32
    )
    assert np.abs(resized[0].numpy() - expected).mean() < 0.5


# --- the graph on a GPU ----------------------------------------------------------------------------------------------


def encoded(size: tuple[int, int], mode: str = "RGB", **save) -> np.ndarray:
    """The bytes of an image file with noise: the worst case for a decoder of windows."""
    noise = np.random.default_rng(size).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, **save)
    return np.frombuffer(buffer.getvalue(), np.uint8)


@pytest.mark.parametrize(
    "save",
    [
        {"format": "JPEG"},
        {"format": "JPEG", "subsampling": 0, "progressive": True},
        {"format": "JPEG", "mode": "L"},
        {"format": "JPEG", "mode": "CMYK"},
        {"format": "PNG"},
    ],
    ids=str,
)
def test_cropping_the_whole_picture_equals_decoding_the_window(save):
    """Bit for bit, so that a GPU, which crops whole pictures, gives the same pixels as a CPU."""
    rng = np.random.default_rng(0)
    sizes = (320, 240), (165, 251), (127, 9), (17, 23), (4, 5)
    contents = [content for size in sizes for content in [encoded(size, **save)] * WINDOWS]
    sides = rng.uniform(0.3, 1, (len(contents), 2)).astype(np.float32)
    corners = (rng.random(sides.shape) * (1 - sides)).astype(np.float32)
    sides[::WINDOWS], corners[::WINDOWS] = 1, 0  # no crop

    def graph():
        files, corner, side = given(contents), given(list(corners)), given(list(sides))
        return decode_on_cpu(files, corner, side), decode_on_gpu(files, corner, side, device="cpu")

    pipeline = dali.Pipeline(batch_size=len(contents), num_threads=2, device_id=None, exec_dynamic=True)
    with pipeline:
        pipeline.set_outputs(*graph())
    ours, whole = pipeline.run()
    for number in range(len(contents)):
        assert np.array_equal(ours.at(number), whole.at(number)), (number, corners[number], sides[number])


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("device_id", [None, 0])
def test_operators_run_on_the_expected_devices(tmp_path, device_id, augment):
    """The graph is only defined: building it needs a driver."""
    settings = Settings(2, device_id, 2, augment, seed=0, order_seed=0, rank=0, world_size=1, upright=False)
    with dali.Pipeline(batch_size=2, num_threads=2, device_id=device_id, exec_dynamic=True):
        nodes = training_graph(settings, tmp_path / "annotations.json", tmp_path, ["a.jpg"])
    found, waiting = set(), [node.source for node in nodes.values()]
    while waiting:
        operator = waiting.pop()
        found |= {(re.sub(r"^_+|_\d+$", "", operator.name), output.device) for output in operator.outputs}
        waiting += [node.source for node in operator.inputs]
    on_cpu = {"reader", "PeekImageShape", "ArithmeticGenericOp", "TensorSubscript", "Cat"}
    on_device = {"Image", "Resize", "BoxEncoder", "Cast"}
    if augment:
        on_cpu |= {"RandomBBoxCrop", "CoinFlip", "BbFlip", "Uniform", "Stack"}
        on_device |= {"Flip"}
    if augment and device_id is None:
        on_device = on_device - {"Image"} | {"ImageSlice"}
    if augment and device_id is not None:
        on_device |= {"Slice"}
    device = "cpu" if device_id is None else "gpu"
    assert found == {(name, "cpu") for name in on_cpu} | {(name, device) for name in on_device}
