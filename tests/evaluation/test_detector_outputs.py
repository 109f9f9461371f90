"""`--mode evaluation` with a detector whose outputs are known: good boxes, none, and NaN."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.ops import box_convert

import main
from src.data.annotations.coco import read_annotations
from src.ssd.default_boxes import NUM_DEFAULT_BOXES, default_boxes, encode
from tests.helpers.datasets import annotation, write_coco
from tests.helpers.pycocotools_scorer import plain_scorer
from tests.helpers.small_runs import flags

pytestmark = pytest.mark.usefixtures("tiny_model")


class FakeDetector(nn.Module):
    """Outputs boxes near the true ones, in the order of the images; or nothing, or NaN."""

    def __init__(self, annotations, *, shift: float = 0.0, quiet: bool = False, broken: int = 0) -> None:
        super().__init__()
        self.annotations = annotations
        self.shift = shift  # pixels more for each further box
        self.quiet = quiet
        self.broken = broken  # default boxes of each image that give NaN
        self.index = 0

    def forward(self, images):
        offsets = torch.zeros(len(images), 4, NUM_DEFAULT_BOXES)
        logits = torch.zeros(len(images), len(self.annotations.categories) + 1, NUM_DEFAULT_BOXES)
        logits[:, 0] = 20
        for row in range(len(images)):
            if not self.quiet:
                self.detect_truth(offsets[row], logits[row])
            logits[row, 1, -self.broken or NUM_DEFAULT_BOXES :] = float("nan")
            self.index += 1
        return offsets, logits

    def detect_truth(self, offsets, logits) -> None:
        boxes, labels = self.annotations.targets(self.index)
        scale = torch.from_numpy(np.tile(self.annotations.sizes[self.index], 2))
        for number, (box, label) in enumerate(zip(torch.from_numpy(boxes), labels.tolist(), strict=True)):
            default_box = 1000 * number  # far apart, so that no two boxes share a default box
            moved = (box + self.shift * (number + 1)) / scale
            offsets[:, default_box] = encode(box_convert(moved, "xyxy", "cxcywh"), default_boxes()[default_box])
            logits[label, default_box] = 22.0 + number


@pytest.fixture
def evaluate(monkeypatch, tmp_path, capsys):
    """`evaluate(data, **options)`: the status and what is printed of --mode evaluation with such a network."""

    def run_evaluation(data, **options):
        file = data / "annotations" / "instances_val2017.json"
        annotations = read_annotations(file, data / "val2017")
        checkpoint = {"model": {"weight": torch.zeros(1)}, "categories": [list(one) for one in annotations.categories]}
        torch.save(checkpoint, tmp_path / "detector.pt")
        monkeypatch.setattr(
            "src.evaluation.validation.build_trained_detector", lambda *_, **__: FakeDetector(annotations, **options)
        )
        asked = ("--mode", "evaluation", "--checkpoint", str(tmp_path / "detector.pt"))
        status = main.main(flags(data, tmp_path / "scores", *asked))
        return status, *capsys.readouterr()

    return run_evaluation


def test_pycocotools_gives_the_printed_metrics_for_the_results_file(evaluate, tmp_path):
    boxes = [
        annotation(image, (10 + 20 * k, 10 + 15 * k, 60, 40), 1 + k % 2, iscrowd=int(k == 2), area=2400)
        for image in (1, 2, 3)
        for k in range(4)
    ]
    data = write_coco(tmp_path / "data", boxes, images=4)
    status, printed, _ = evaluate(data, shift=2.5)
    assert status == 0
    theirs = plain_scorer(data / "annotations" / "instances_val2017.json", tmp_path / "scores" / "detections.json")
    assert 0.1 < theirs.stats[0] < 0.9
    for name, value in zip(("mAP", "AP50", "AP75"), theirs.stats, strict=False):
        assert f"{name:<9} {value:.4f}\n" in printed


def test_a_network_that_detects_nothing_scores_0(evaluate, tmp_path):
    categories = [{"id": 1, "name": "twin"}, {"id": 2, "name": "twin"}, {"id": 3, "name": "new\nline\x1b[31m"}]
    data = write_coco(tmp_path / "data", [annotation(1), annotation(2, category_id=2)], categories=categories)
    status, printed, warned = evaluate(data, quiet=True)
    assert status == 0
    assert "mAP       0.0000\n" in printed
    assert "Nothing was detected with a score above the threshold\n" in printed
    assert json.loads((tmp_path / "scores" / "detections.json").read_text()) == []
    lines = [line.split() for line in printed.splitlines()]
    by_category = [line for line in lines if line[:1] in (["twin"], [r"new\nline\x1b[31m"])]
    assert by_category[:3] == [
        ["twin", "(id", "1)", "0.0000"],
        ["twin", "(id", "2)", "0.0000"],
        [r"new\nline\x1b[31m", "not", "defined"],
    ]
    assert warned.count("the same name 'twin'") == 1


def test_output_that_is_not_finite_is_counted_and_the_rest_is_scored(evaluate, tmp_path):
    data = write_coco(tmp_path / "data", [annotation(image) for image in (1, 2, 3, 4)])
    status, printed, warned = evaluate(data, broken=3)
    assert status == 0
    assert warned == "main.py: warning: the outputs of 12 default boxes were not finite: these boxes detect nothing\n"
    assert "AP50      1.0000\n" in printed
    scores = [entry["score"] for entry in json.loads((tmp_path / "scores" / "detections.json").read_text())]
    assert len(scores) == 4 and all(np.isfinite(scores))
