"""How fast detections are made and scored: `python -m benchmarks.evaluation [--gpu]`.

Each figure stands beside a yardstick from the same run, because machines differ and drift.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from torch import Tensor

from benchmarks import sharing, table
from src.data.annotations.coco import Annotations, read_annotations
from src.evaluation.evaluate import to_results
from src.evaluation.results import Results, write_results
from src.evaluation.scoring import score
from src.ssd.default_boxes import IMAGE_SIZE, NUM_DEFAULT_BOXES
from src.ssd.detect import detect
from src.ssd.model import SSD300, fold_batch_norms

CPU = torch.device("cpu")
BATCH = 32
LABELS = 81
REPEATS = 7
IMAGES = 5_000
DETECTIONS = 637_000
BOXES_AN_IMAGE = 7
SIZE = (640, 480)  # pixels, of the made-up images
# The goals are a CPU's: on a GPU the softmax takes microseconds, and starting a kernel too.
CASES = {"few candidates": (1.0, 9.0, 8), "crowded": (4.0, 8.0, 30)}  # spread, background, goal: times the softmax
SCORING_GOAL = 1.2  # times faster-coco-eval's own time on arrays
FOLDING_GOAL = 1.15  # times the images/s of the network as it is trained


def run(*, device: torch.device | None = None) -> Iterator[dict]:
    """Rows name, ours, yardstick, ratio, goal (greatest ratio), met; times in the unit that the name tells."""
    yield from detection_rows(device or CPU)
    yield from scoring_rows(device or CPU)


def detection_rows(device: torch.device) -> list[dict]:
    rows = []
    for name, (spread, background, goal) in CASES.items():
        offsets, logits = network_output(spread, background, device)
        ours, softmax = alternately(partial(detect, offsets, logits), partial(torch.softmax, logits, dim=1), device)
        scale = 1000 / BATCH
        rows.append(
            table.cost(
                f"detections, {name}, beside softmax (ms/image)",
                ours * scale,
                softmax * scale,
                goal if device == CPU else None,
            )
        )
    return rows


def network_output(spread: float, background: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Offsets [N, 4, A] and logits [N, C, A]: noise, and a preference for the background."""
    generator = torch.Generator().manual_seed(0)
    offsets = torch.randn(BATCH, 4, NUM_DEFAULT_BOXES, generator=generator)
    logits = spread * torch.randn(BATCH, LABELS, NUM_DEFAULT_BOXES, generator=generator)
    logits[:, 0] += background
    return offsets.to(device), logits.to(device)


def alternately(
    first: Callable, second: Callable, device: torch.device, *, repeats: int = REPEATS, warm_up: bool = True
) -> tuple[float, float]:
    """Median seconds of each, taken in turns."""
    times = [(seconds(first, device), seconds(second, device)) for _ in range(repeats + warm_up)]
    ours, theirs = zip(*times[warm_up:], strict=True)
    return statistics.median(ours), statistics.median(theirs)


def seconds(function: Callable, device: torch.device) -> float:
    _synchronise(device)
    start = time.perf_counter()
    function()
    _synchronise(device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Scene(NamedTuple):
    """Ground truth of 5,000 images and detections of it, half of them near a box."""

    annotations: Annotations
    results: Results


def scoring_rows(device: torch.device) -> list[dict]:
    """Scoring beside the scorer's own time, and where the time of an evaluation of 5,000 images goes."""
    with tempfile.TemporaryDirectory() as folder:
        scene = make_scene(Path(folder))
        scoring, own = alternately(lambda: score(*scene), scorer_alone(scene), CPU, repeats=1, warm_up=False)
        writing = seconds(lambda: write_results(Path(folder) / "detections.json", scene.results), device)
        shared = sharing.rows(*scene, Path(folder))
    network, unfolded, detections = _batch_seconds(scene, device)
    batches = IMAGES / BATCH
    return [
        table.cost(
            f"scoring {DETECTIONS:,} detections, beside faster-coco-eval on arrays (s)", scoring, own, SCORING_GOAL
        ),
        *shared,
        table.speed(
            "network, ResNet-50, batch-norm folded, beside as it is (images/s)",
            BATCH / network,
            BATCH / unfolded,
            FOLDING_GOAL,
        ),
        table.cost(f"evaluation of {IMAGES:,} images: network, ResNet-50 (s)", network * batches),
        table.cost(f"evaluation of {IMAGES:,} images: detections (s)", detections * batches),
        table.cost(f"evaluation of {IMAGES:,} images: scoring (s)", scoring),
        table.cost(f"evaluation of {IMAGES:,} images: detections.json (s)", writing),
    ]


@torch.inference_mode()
def _batch_seconds(scene: Scene, device: torch.device) -> tuple[float, float, float]:
    """Seconds of a batch in the network, in the unfolded one, and of making results of output.

    The output has candidates in the usual number.
    """
    model = SSD300("resnet50", LABELS).to(device).to(memory_format=torch.channels_last).eval()
    images = torch.randn(BATCH, 3, IMAGE_SIZE, IMAGE_SIZE).to(device, memory_format=torch.channels_last)
    offsets, logits = network_output(1.0, 6.0, device)
    indices = np.arange(BATCH)
    network, unfolded = alternately(partial(fold_batch_norms(model), images), partial(model, images), device, repeats=2)
    detections, _ = alternately(
        lambda: to_results(detect(offsets, logits), indices, scene.annotations), lambda: None, device, repeats=2
    )
    return network, unfolded, detections


def make_scene(folder: Path) -> Scene:
    rng = np.random.default_rng(0)
    count = IMAGES * BOXES_AN_IMAGE
    truth, owner, label = random_boxes(rng, count), rng.integers(0, IMAGES, count), rng.integers(1, LABELS, count)
    file = folder / "instances.json"
    file.write_text(json.dumps(coco_content(owner, label, truth)))
    near = rng.integers(0, count, DETECTIONS)
    is_near = rng.random(DETECTIONS) < 0.5
    boxes = truth[near] + truth[near][:, [2, 3, 2, 3]] * rng.normal(0, 0.1, (DETECTIONS, 4))
    boxes = np.where(is_near[:, None], boxes, random_boxes(rng, DETECTIONS))
    results = Results(
        image_ids=np.where(is_near, owner[near], rng.integers(0, IMAGES, DETECTIONS)),
        category_ids=np.where(is_near, label[near], rng.integers(1, LABELS, DETECTIONS)),
        boxes=np.concatenate((boxes[:, :2], np.abs(boxes[:, 2:])), axis=1),
        scores=rng.uniform(0.05, 1, DETECTIONS),
    )
    order = np.argsort(results.image_ids, kind="stable")
    return Scene(read_annotations(file, folder, for_scoring=True), Results(*(column[order] for column in results)))


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """[count, 4] x, y, width, height, inside the image, of COCO's mixture of sizes."""
    sides = np.exp(rng.uniform(np.log(8), np.log(400), (count, 2)))
    return np.concatenate((rng.uniform(0, 1, (count, 2)) * (np.array(SIZE) - sides), sides), axis=1)


def coco_content(owner: np.ndarray, label: np.ndarray, boxes: np.ndarray) -> dict:
    width, height = SIZE
    rows = zip(owner.tolist(), label.tolist(), boxes.tolist(), boxes[:, 2:].prod(axis=1).tolist(), strict=True)
    keys = ("image_id", "category_id", "bbox", "area")
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": width, "height": height} for i in range(IMAGES)],
        "categories": [{"id": k, "name": f"category {k}"} for k in range(1, LABELS)],
        "annotations": [
            {"id": number, "iscrowd": 0, **dict(zip(keys, row, strict=True))} for number, row in enumerate(rows, 1)
        ],
    }


def scorer_alone(scene: Scene) -> Callable[[], None]:
    """faster-coco-eval as its users call it, on an array of detections; the ground truth is loaded beforehand."""
    truth = COCO(str(scene.annotations.path))
    ids, labels, boxes, scores = scene.results
    array = np.column_stack((ids, boxes, scores, labels)).astype(np.float64)

    def work() -> None:
        scorer = COCOeval_faster(truth, truth.loadRes(array), "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="measure on the GPU")
    device = torch.device("cuda" if parser.parse_args().gpu else "cpu")
    print(table.table(list(run(device=device))))


if __name__ == "__main__":
    main()
