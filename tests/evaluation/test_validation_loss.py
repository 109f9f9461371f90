"""The validation loss: the mean of the training losses of single images with boxes."""

import numpy as np
import pytest
import torch

from src.data.annotations.coco import read_annotations
from src.evaluation.evaluate import detect_batch
from src.evaluation.validation_loss import ValidationLoss, mean_losses
from src.ssd.default_boxes import default_boxes_ltrb
from src.ssd.loss import MultiBoxLoss
from tests.helpers.datasets import annotation, write_coco

CPU = torch.device("cpu")
IMAGES = 7  # the fourth without boxes


@pytest.fixture(scope="module")
def annotations(tmp_path_factory):
    random = np.random.default_rng(0)
    entries = [
        annotation(image, [*random.uniform(0, 60, 2), *random.uniform(20, 50, 2)], 1 + int(random.integers(2)))
        for image in range(1, IMAGES + 1)
        for _ in range(image if image != 4 else 0)
    ]
    folder = write_coco(tmp_path_factory.mktemp("data"), entries, images=IMAGES, splits=("val",))
    return read_annotations(folder / "annotations" / "instances_val2017.json", folder / "val2017")


@pytest.fixture(scope="module")
def outputs():
    torch.manual_seed(0)
    return torch.randn(IMAGES, 4, 8732), torch.randn(IMAGES, 3, 8732)


def sums(annotations, outputs, batches) -> list[float]:
    loss = ValidationLoss(annotations, CPU)
    for batch in batches:
        loss.add(*(output[batch] for output in outputs), indices=np.array(batch))
    return loss.sums()


def one_by_one(annotations, outputs) -> np.ndarray:
    """Both parts of the loss of each image with boxes, [M, 2]; this function matches by plain loops."""
    from torchvision.ops import box_convert, box_iou

    defaults, parts = default_boxes_ltrb(), []
    for index in annotations.with_boxes().tolist():
        boxes, labels = (torch.from_numpy(array) for array in annotations.targets(index))
        boxes = boxes / torch.tensor([160, 120, 160, 120])
        overlap = box_iou(boxes, defaults)
        best, chosen = overlap.max(dim=0)
        for box in range(len(boxes)):
            default = int(overlap[box].argmax())
            best[default], chosen[default] = 2, box
        matched = torch.where(best > 0.5, labels[chosen], 0)
        target = box_convert(torch.where((best > 0.5)[:, None], boxes[chosen], defaults), "xyxy", "cxcywh")
        own = (output[index : index + 1] for output in outputs)
        parts.append(torch.stack(MultiBoxLoss().parts(*own, target[None], matched[None])).tolist())
    return np.array(parts)


def test_the_loss_is_the_mean_over_single_images(annotations, outputs):
    localisation, label = one_by_one(annotations, outputs).mean(axis=0)
    found = mean_losses([sums(annotations, outputs, [list(range(IMAGES))])], annotations)
    assert found["validation_localisation_loss"] == pytest.approx(localisation, rel=1e-5)
    assert found["validation_label_loss"] == pytest.approx(label, rel=1e-5)
    assert found["validation_loss"] == pytest.approx(localisation + label, rel=1e-5)


@pytest.mark.parametrize(
    "batches", [[[0, 1], [2, 3], [4, 5], [6]], [[3], [6, 5, 4], [0, 1, 2]], [[n] for n in range(7)]]
)
def test_batches_make_no_difference(batches, annotations, outputs):
    whole = sums(annotations, outputs, [list(range(IMAGES))])
    assert sums(annotations, outputs, batches) == pytest.approx(whole, rel=1e-6)


def test_ranks_make_no_difference(annotations, outputs):
    whole = mean_losses([sums(annotations, outputs, [list(range(IMAGES))])], annotations)
    ranks = [sums(annotations, outputs, [[n for n in range(IMAGES) if n % 3 == rank]]) for rank in range(3)]
    assert mean_losses(ranks, annotations) == pytest.approx(whole, rel=1e-6)


def test_a_missing_or_non_finite_loss_is_none(annotations, outputs):
    assert mean_losses([[1.0, 2.0], None], annotations) is None
    assert mean_losses([[float("nan"), 2.0]], annotations)["validation_loss"] is None


def test_the_loss_gets_the_outputs_of_the_detections(outputs):
    seen = []
    detect_batch(lambda images: outputs, torch.zeros(IMAGES, 3, 300, 300), observe=lambda *each: seen.append(each))
    assert all(one is other for one, other in zip(seen[0], outputs, strict=True))
