"""Detection, evaluation and prediction on a fake GPU: the CPU's results, and waits per batch, not per image.

A failed test prints the events: the operators that waited or copied, with types and shapes.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from src.data.annotations.coco import Category
from src.data.images.formats import ImageFiles
from src.data.pipelines.loader_config import LoaderConfig
from src.data.pipelines.torch_pipeline import EvaluationLoader
from src.evaluation.evaluate import Evaluation, EvaluationConfig, evaluate
from src.evaluation.predict import predict
from src.evaluation.validation_loss import ValidationLoss
from src.report.report import Report, RunContext
from src.runtime.distributed import Processes
from src.ssd.detect import detect
from tests.helpers.datasets import annotation, write_coco
from tests.helpers.fake_cuda import CPU, GPU, GpuTensor, fake_gpu
from tests.helpers.fake_cuda_runs import (
    IMAGES,
    LABELS,
    annotations_of,
    assert_about,
    computed,
    detecting_network,
    dtypes,
    on_host,
    waits_and_copies,
)

DETECTION_OPERATORS = 148  # that compute on the GPU, as of today


def network_output(images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Offsets [N, 4, A] and logits [N, C, A] with some candidates an image."""
    generator = torch.Generator().manual_seed(0)
    offsets = torch.randn(images, 4, 8732, generator=generator)
    logits = torch.randn(images, LABELS, 8732, generator=generator)
    logits[:, 0] += 5
    return offsets, logits


def detection_waits(images: int) -> list[str]:
    """Of a batch's detections: candidates, their numbers, convergence of suppression, numbers of detections.

    Without the copy of the default boxes, which the first batch makes.
    """
    return ["aten.nonzero", f"copy out int64 [{images}]", "aten.equal", f"copy out int64 [{images}]"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_detections_equal_the_cpus_and_wait_as_often_for_five_images_as_for_one(dtype):
    for images in (1, 5):
        offsets, logits = (part.to(dtype) for part in network_output(images))
        with fake_gpu() as gpu:
            detect(GpuTensor(offsets), GpuTensor(logits))  # copies the default boxes
            first = len(gpu.events)
            first_operator = len(gpu.operators)
            ours = detect(GpuTensor(offsets), GpuTensor(logits))
            # More than 512 candidates, so the host reads whether an image needs more of them.
            nonzero, counts, converged, kept = detection_waits(images)
            assert waits_and_copies(gpu, first) == [nonzero, counts, converged, "aten._local_scalar_dense", kept]
            assert_about(len(gpu.operators) - first_operator, DETECTION_OPERATORS)
            assert dtypes(computed(gpu, "aten._softmax")) == {"float32"}
            assert "mixed" not in gpu.kinds()
        for one, other in zip(ours, detect(offsets, logits), strict=True):
            assert len(other.scores) > 0
            for part, expected in zip(one, other, strict=True):
                assert part.device == GPU
                assert torch.equal(on_host(part), expected)


def evaluation(data: Path, network: torch.nn.Module, batch_size: int, *, half: bool = False) -> Evaluation:
    annotations = annotations_of(data, "val")
    device = next(network.parameters()).device
    loader = EvaluationLoader(annotations, LoaderConfig(batch_size=batch_size, num_workers=0, device=device))
    return evaluate(network, loader, annotations, processes=Processes.single(device), amp=half)


def ground_truth_copies(images: int) -> list[str]:
    """Of the validation loss of a batch: boxes, labels and image indices, one box for each image."""
    return [f"pinned copy in {what}" for what in (f"float32 [{images}, 4]", *[f"int64 [{images}]"] * 2)]


def evaluation_waits(counts: list[int], images: int) -> list[str]:
    """Of an evaluation in batches of `images`.  counts: the number of detections of each batch."""
    found = ["copy in float32 [8732, 4]"] * 3  # default boxes for the validation loss, to match and to encode
    for number, count in enumerate(counts):
        found.append(f"pinned copy in uint8 [{images}, 3, 300, 300]")
        found += ["copy in float32 [2, 3]"] if number == 0 else []  # mean and deviation
        nonzero, candidates, converged, kept = detection_waits(images)
        found.append("aten._local_scalar_dense")  # number of outputs that are not finite
        found += ground_truth_copies(images)
        found += [nonzero, candidates]
        found += ["copy in float32 [8732, 4]"] if number == 0 else []  # default boxes
        found += [converged, kept]
        found += [f"copy out float32 [{count}, 4]", f"copy out int64 [{count}]", f"copy out float32 [{count}]"]
    return [*found, "copy out float64 [2]"]  # the validation loss


@pytest.mark.parametrize("half", [False, True], ids=["float32", "fp16"])
@pytest.mark.parametrize("batch_size", [IMAGES, IMAGES // 2, 1])
def test_an_evaluation_has_the_cpus_metrics_and_waits_per_batch_not_per_image(data, batch_size, half):
    ours = evaluation(data, detecting_network(CPU), IMAGES)
    assert ours.coco_metrics.summary["AP50"] > 0
    with fake_gpu() as gpu:
        network = detecting_network(GPU)
        start, first_operator = len(gpu.events), len(gpu.operators)
        theirs = evaluation(data, network, batch_size, half=half)
        found = waits_and_copies(gpu, start)
    assert "mixed" not in gpu.kinds()
    images = list(dict.fromkeys(theirs.results.image_ids.tolist()))
    counts = [int((theirs.results.image_ids == image).sum()) for image in images]
    batches = [sum(counts[first : first + batch_size]) for first in range(0, IMAGES, batch_size)]
    assert found == evaluation_waits(batches, batch_size)
    network_operators = computed(gpu, "aten.convolution", "aten.addmm", first=first_operator)
    assert dtypes(network_operators) == {"float16" if half else "float32"}
    assert not [operator for operator in gpu.operators[first_operator:] if "batch_norm" in operator.name]
    for convolution in network_operators[::2]:
        assert ["channels last" in part for part in convolution.tensors[:2]] == [True, True]
    if not half:
        for one, other in zip(ours.results, theirs.results, strict=True):
            np.testing.assert_allclose(one, other, atol=0.02)
        assert theirs.coco_metrics.summary == ours.coco_metrics.summary


def test_validation_losses_are_the_cpus_and_their_copies_do_not_wait(tmp_path):
    """The second of three images has no boxes, so rows of the outputs are selected."""
    boxes = [annotation(image, (5, 6, 130, 108)) for image in (1, 3)]
    annotations = annotations_of(write_coco(tmp_path, boxes, images=3, splits=("val",)), "val")
    outputs = network_output(3)
    ours = ValidationLoss(annotations, CPU)
    ours.add(*outputs, np.arange(3))
    with fake_gpu() as gpu:
        theirs = ValidationLoss(annotations, GPU)
        first = len(gpu.events)
        theirs.add(*map(GpuTensor, outputs), np.arange(3))
        assert waits_and_copies(gpu, first) == [*ground_truth_copies(2), "pinned copy in int64 [2]"]
        assert theirs.sums() == ours.sums()


@pytest.mark.parametrize("half", [False, True], ids=["float32", "fp16"])
def test_predictions_are_the_cpus(data, tmp_path, half):
    categories = [Category(1, "square"), Category(2, "disc")]
    files = sorted((data / "val2017").iterdir())[:3]
    images = ImageFiles(data / "val2017", files, 0, [])
    listed = {}
    for device in (CPU, GPU):
        with fake_gpu() as gpu:
            context = RunContext(Processes.single(device), Report.disabled(), tmp_path / device.type)
            network, first = detecting_network(device), len(gpu.events)
            config = EvaluationConfig(batch_size=2, num_workers=0, amp=half and device == GPU)
            done = predict(network, images, categories, config, context)
        assert "mixed" not in gpu.kinds()
        assert done.detections > 0
        listed[device] = json.loads((tmp_path / device.type / "detections.json").read_text())
    assert half or listed[CPU] == listed[GPU]
    assert dtypes(computed(gpu, "aten.convolution", "aten.addmm")) == {"float16" if half else "float32"}
    # The GPU gets pixels of 3 bytes, batch by batch.
    copied = [what for what in waits_and_copies(gpu, first) if "copy in" in what]
    constants = ["copy in float32 [2, 3]", "copy in float32 [8732, 4]"]
    assert copied == ["copy in uint8 [2, 3, 300, 300]", *constants, "copy in uint8 [1, 3, 300, 300]"]
