"""Evaluation from images to scores, on one rank and on several."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.ops import box_convert, box_iou

from src.data.annotations.coco import locations, read_annotations
from src.data.pipelines.loader_config import LoaderConfig
from src.data.pipelines.torch_pipeline import EvaluationLoader
from src.evaluation.evaluate import evaluate, prepare_for_inference, to_results
from src.evaluation.scoring import METRIC_NAMES
from src.runtime.distributed import Processes
from src.ssd.default_boxes import NUM_DEFAULT_BOXES, default_boxes, default_boxes_ltrb, encode
from src.ssd.detect import Detections
from src.ssd.model import SSD300
from tests.helpers.datasets import annotation, write_coco
from tests.helpers.oracle_inputs import quiet_output
from tests.helpers.ranks import Ranks

CPU = torch.device("cpu")
ALONE = Processes.single(CPU)


def test_results_have_the_annotation_files_ids_and_pixels(tmp_path):
    largest = 2**63 - 1
    images = [
        {"id": largest, "file_name": "a.png", "width": 200, "height": 100},
        {"id": 2**53 + 1, "file_name": "b.png", "width": 50, "height": 80},
    ]
    categories = [{"id": 90, "name": "kite"}, {"id": 7, "name": "train"}]
    folder = write_coco(tmp_path, [annotation(largest, category_id=7)], images=images, categories=categories)
    annotations = read_annotations(*locations(folder, "val"), for_scoring=True)
    detections = [
        Detections(torch.tensor([[0.1, 0.2, 0.5, 0.7]]), torch.tensor([2]), torch.tensor([0.75])),
        Detections(torch.tensor([[0.0, 0, 1, 1], [-0.5, 0, 0.5, 2]]), torch.tensor([1, 2]), torch.tensor([0.5, 0.25])),
    ]
    results = to_results(detections, np.array([1, 0]), annotations)
    assert results.image_ids.tolist() == [2**53 + 1, largest, largest]
    assert results.category_ids.tolist() == [7, 90, 7]
    assert results.boxes.tolist() == [[5, 16, 20, 40], [0, 0, 200, 100], [-100, 0, 200, 200]]
    assert results.scores.tolist() == [0.75, 0.5, 0.25]


class PerfectDetector(nn.Module):
    """Detects all ground truth of each image; an image's first pixel is its index."""

    def __init__(self, annotations) -> None:
        super().__init__()
        self.annotations = annotations
        self.norm = nn.BatchNorm2d(3)
        self.frozen = nn.BatchNorm2d(3).eval()

    def forward(self, images):
        assert not self.norm.training and not torch.is_grad_enabled()
        offsets, logits = quiet_output(len(images), len(self.annotations.categories) + 1)
        for row, index in enumerate(images[:, 0, 0, 0].int().tolist()):
            width, height = self.annotations.sizes[index]
            boxes, labels = self.annotations.targets(index)
            boxes = torch.from_numpy(boxes) / torch.tensor([width, height, width, height])
            default = box_iou(boxes, default_boxes_ltrb()).argmax(1)
            offsets[row, :, default] = encode(box_convert(boxes, "xyxy", "cxcywh"), default_boxes()[default]).T
            logits[row, labels, default] = 40.0
        return offsets, logits


def numbered_batches(indices, size: int = 2):
    indices = torch.as_tensor(indices)
    return [(part[:, None, None, None].expand(-1, 3, 300, 300).float(), part) for part in indices.split(size)]


@pytest.fixture
def annotations(tmp_path):
    boxes = [
        annotation(1, (10, 10, 60, 50)),
        annotation(2, (5, 40, 30, 60), 2),
        annotation(2, (70, 10, 80, 100)),
        annotation(4, (30, 30, 90, 70), 2),
        annotation(5, (0, 0, 160, 120)),
    ]
    folder = write_coco(tmp_path, boxes, images=5)
    return read_annotations(*locations(folder, "val"), for_scoring=True)


def test_a_perfect_detector_scores_1_and_every_module_keeps_its_mode(annotations):
    model = PerfectDetector(annotations)
    steps = []
    bar = SimpleNamespace(update=lambda: steps.append(1))

    class Progress:
        def __init__(self, total, name):
            assert total == 3

        def __enter__(self):
            return bar

        def __exit__(self, *_):
            pass

    evaluation = evaluate(model, numbered_batches(range(5)), annotations, processes=ALONE, progress=Progress)
    assert list(evaluation.coco_metrics.summary) == list(METRIC_NAMES)
    assert evaluation.coco_metrics.summary["mAP"] == pytest.approx(1)
    assert evaluation.coco_metrics.category_ap == {"square": pytest.approx(1), "disc": pytest.approx(1)}
    assert evaluation.results.image_ids.tolist() == [1, 2, 2, 4, 5]
    assert evaluation.non_finite == 0
    assert len(steps) == 3
    assert set(evaluation.seconds) == {"loading", "network", "detections", "gathering", "scoring", "waiting"}
    assert evaluation.seconds["network"] > 0 and evaluation.seconds["waiting"] == 0
    assert (model.training, model.norm.training, model.frozen.training) == (True, True, False)


class NanDetector(nn.Module):
    def forward(self, images):
        return (torch.full_like(part, float("nan")) for part in quiet_output(len(images)))


def test_non_finite_output_is_counted_and_scores_0(annotations):
    evaluation = evaluate(NanDetector(), numbered_batches(range(5)), annotations, processes=ALONE)
    assert evaluation.non_finite == 5 * NUM_DEFAULT_BOXES
    assert len(evaluation.results.scores) == 0
    assert evaluation.coco_metrics.summary["mAP"] == 0


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_any_number_of_processes_scores_the_same_on_every_rank(annotations, world_size):
    alone = evaluate(PerfectDetector(annotations), numbered_batches(range(5)), annotations, processes=ALONE)
    assert alone.losses["validation_loss"] > 0.1

    def evaluate_shard(processes):
        shard = numbered_batches(range(processes.rank, 5, world_size), size=1) if processes.rank < 5 else []
        return evaluate(PerfectDetector(annotations), shard, annotations, processes=processes)

    evaluations = Ranks(world_size).all_do(evaluate_shard)
    assert evaluations[0].seconds["waiting"] >= 0
    for number, evaluation in enumerate(evaluations):
        assert evaluation.coco_metrics.summary == alone.coco_metrics.summary
        assert evaluation.losses == pytest.approx(alone.losses, rel=1e-5)
        assert (evaluation.results is None) == (number > 0)
    for ours, theirs in zip(evaluations[0].results, alone.results, strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(("amp", "fast", "folds"), [(False, True, True), (True, True, False), (True, False, True)])
def test_on_a_cpu_batch_norms_are_folded_except_in_half_precision(monkeypatch, amp, fast, folds):
    monkeypatch.setattr("src.evaluation.evaluate.half_is_fast", lambda device: fast)
    model = SSD300("resnet18", 3).eval()
    assert (prepare_for_inference(model, device=CPU, amp=amp) is not model) == folds


def test_the_network_itself_on_real_files_in_half_precision(annotations):
    loader = EvaluationLoader(annotations, LoaderConfig(batch_size=2, num_workers=0, device=CPU))
    evaluation = evaluate(SSD300("resnet18", 3), loader, annotations, processes=ALONE, amp=True)
    assert evaluation.non_finite == 0
    assert set(evaluation.results.image_ids) <= set(annotations.image_ids)
    assert np.isfinite(evaluation.results.boxes).all()
    assert 0 <= evaluation.coco_metrics.summary["mAP"] < 0.5
