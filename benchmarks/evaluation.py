"""How fast detections are made and scored: `python -m benchmarks evaluation`."""

import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from torch import Tensor, multiprocessing

from benchmarks.table import cost, figure, speed
from benchmarks.turns import CPU, Pair, in_turns, seconds
from src.data.annotations.coco import Annotations, read_annotations
from src.evaluation.evaluate import RankResults, score_distributed, to_results
from src.evaluation.results import Results, write_results
from src.evaluation.scoring import score
from src.runtime import process_group
from src.ssd.default_boxes import IMAGE_SIZE, NUM_DEFAULT_BOXES
from src.ssd.detect import detect
from src.ssd.model import SSD300, fold_batch_norms

BATCH = 32
LABELS = 81
TURNS = 5
SCORING_TURNS = 3
IMAGES = 5_000
DETECTIONS = 637_000
BOXES_AN_IMAGE = 7
SIZE = (640, 480)  # width and height of the images in pixels
# Spread of the logits, preference for the background, and the goal: times the softmax.  The goals are a CPU's: on a GPU
# the softmax takes microseconds, and starting a kernel takes as long.
CASES = {"few candidates": (1.0, 9.0, 8), "crowded": (4.0, 8.0, 30)}
SCORING_GOAL = 1.2  # times faster-coco-eval's own time on arrays
FOLDING_GOAL = 1.15  # times the images/s of the network as it is trained
SHARING_GOAL = 0.6  # of the time that one process with one core takes
WORLD_SIZE = 2  # processes that share the scoring
PORT = "29518"  # of their store


def run(*, device: torch.device = CPU) -> Iterator[dict]:
    """Rows of detections, scoring, and an evaluation of 5,000 images by part; the names give the units."""
    for name, (spread, background, goal) in CASES.items():
        pair = detection_pair(*network_output(spread, background, device), device)
        yield cost(f"detections, {name}, beside softmax (ms/image)", pair, goal if device == CPU else None)
    with tempfile.TemporaryDirectory() as folder:
        scene = make_scene(Path(folder))
        yield from scoring_rows(scene, Path(folder))
        yield from network_rows(scene, device)


def detection_pair(offsets: Tensor, logits: Tensor, device: torch.device) -> Pair:
    """Milliseconds an image of the detections and of the softmax of the same logits."""
    return in_turns(
        lambda: 1000 / BATCH * seconds(partial(detect, offsets, logits), device),
        lambda: 1000 / BATCH * seconds(partial(torch.softmax, logits, dim=1), device),
        TURNS,
    )


def network_output(spread: float, background: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Offsets [N, 4, A] and logits [N, C, A]: noise with a preference for the background."""
    generator = torch.Generator().manual_seed(0)
    offsets = torch.randn(BATCH, 4, NUM_DEFAULT_BOXES, generator=generator)
    logits = spread * torch.randn(BATCH, LABELS, NUM_DEFAULT_BOXES, generator=generator)
    logits[:, 0] += background
    return offsets.to(device), logits.to(device)


class Scene(NamedTuple):
    """Ground truth of 5,000 images and detections of it, half of them near a box."""

    annotations: Annotations
    results: Results


def scoring_rows(scene: Scene, folder: Path) -> Iterator[dict]:
    """Scoring beside the scorer's own time, by two processes, and the writing of detections.json."""
    own = scorer_alone(scene)
    pair = in_turns(lambda: seconds(lambda: score(*scene)), lambda: seconds(own), SCORING_TURNS, warm_up=0)
    yield cost(f"scoring {DETECTIONS:,} detections, beside faster-coco-eval on arrays (s)", pair, SCORING_GOAL)
    if hasattr(os, "sched_setaffinity") and len(os.sched_getaffinity(0)) > 1:
        np.savez(folder / "detections.npz", **scene.results._asdict())

        def by_one() -> float:
            with on_core(0):
                return seconds(lambda: score(*scene))

        def by_two() -> float:
            multiprocessing.spawn(score_share, (folder, scene.annotations.path), nprocs=WORLD_SIZE)
            return json.loads((folder / "seconds.json").read_text())

        pair = in_turns(by_two, by_one, SCORING_TURNS, warm_up=0)
        yield cost("scoring by two processes with a core each, beside one with a core (s)", pair, SHARING_GOAL)
    writing = seconds(lambda: write_results(folder / "detections.json", scene.results))
    yield figure(f"evaluation of {IMAGES:,} images: detections.json (s)", writing)


@contextmanager
def on_core(number: int) -> Iterator[None]:
    """Inside, this process computes on one of its cores."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(cores)[number]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def score_share(rank: int, folder: Path, annotation_file: Path) -> None:
    """One of the processes: it has the detections of every other image.  Rank 0 writes the seconds of scoring."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": PORT}
    with on_core(rank), process_group.start(rank, CPU) as processes:
        annotations = read_annotations(annotation_file, folder, for_scoring=True)
        with np.load(folder / "detections.npz") as columns:
            results = Results(**columns)
        own = np.isin(results.image_ids, annotations.image_ids[rank::WORLD_SIZE])
        results = Results(*(column[own] for column in results))
        processes.all_reduce_max(0)  # both begin together
        found = score_distributed(processes, annotations, RankResults(results, 0, None), {})
        if processes.is_main:
            taken = found.seconds["gathering"] + found.seconds["scoring"]
            (folder / "seconds.json").write_text(json.dumps(taken))


@torch.inference_mode()
def network_rows(scene: Scene, device: torch.device) -> Iterator[dict]:
    """The network, and the detections of an output with the usual number of candidates."""
    model = SSD300("resnet50", LABELS).to(device).to(memory_format=torch.channels_last).eval()
    folded = fold_batch_norms(model)
    images = torch.randn(BATCH, 3, IMAGE_SIZE, IMAGE_SIZE).to(device, memory_format=torch.channels_last)
    pair = in_turns(
        lambda: BATCH / seconds(partial(folded, images), device),
        lambda: BATCH / seconds(partial(model, images), device),
        TURNS,
    )
    yield speed("network, ResNet-50, batch-norm folded, beside as it is (images/s)", pair, FOLDING_GOAL)
    yield figure(f"evaluation of {IMAGES:,} images: network, ResNet-50 (s)", IMAGES / pair.ours)
    offsets, logits = network_output(1.0, 6.0, device)
    indices = np.arange(BATCH)

    def make_results() -> None:
        to_results(detect(offsets, logits), indices, scene.annotations)

    make_results()
    taken = statistics.median(seconds(make_results, device) for _ in range(TURNS))
    yield figure(f"evaluation of {IMAGES:,} images: detections (s)", taken * IMAGES / BATCH)


def make_scene(folder: Path) -> Scene:
    rng = np.random.default_rng(0)
    count = IMAGES * BOXES_AN_IMAGE
    truth, image, label = random_boxes(rng, count), rng.integers(0, IMAGES, count), rng.integers(1, LABELS, count)
    file = folder / "instances.json"
    file.write_text(json.dumps(coco_content(image, label, truth)))
    near = rng.integers(0, count, DETECTIONS)
    is_near = rng.random(DETECTIONS) < 0.5
    boxes = truth[near] + truth[near][:, [2, 3, 2, 3]] * rng.normal(0, 0.1, (DETECTIONS, 4))
    boxes = np.where(is_near[:, None], boxes, random_boxes(rng, DETECTIONS))
    results = Results(
        image_ids=np.where(is_near, image[near], rng.integers(0, IMAGES, DETECTIONS)),
        category_ids=np.where(is_near, label[near], rng.integers(1, LABELS, DETECTIONS)),
        boxes=np.concatenate((boxes[:, :2], np.abs(boxes[:, 2:])), axis=1),
        scores=rng.uniform(0.05, 1, DETECTIONS),
    )
    order = np.argsort(results.image_ids, kind="stable")
    return Scene(read_annotations(file, folder, for_scoring=True), Results(*(column[order] for column in results)))


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """[count, 4] x, y, width, height in pixels, inside the image; the sizes are mixed as COCO's."""
    sides = np.exp(rng.uniform(np.log(8), np.log(400), (count, 2)))
    return np.concatenate((rng.uniform(0, 1, (count, 2)) * (np.array(SIZE) - sides), sides), axis=1)


def coco_content(image: np.ndarray, label: np.ndarray, boxes: np.ndarray) -> dict:
    width, height = SIZE
    rows = zip(image.tolist(), label.tolist(), boxes.tolist(), boxes[:, 2:].prod(axis=1).tolist(), strict=True)
    keys = ("image_id", "category_id", "bbox", "area")
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": width, "height": height} for i in range(IMAGES)],
        "categories": [{"id": k, "name": f"category {k}"} for k in range(1, LABELS)],
        "annotations": [
            {"id": number, "iscrowd": 0, **dict(zip(keys, row, strict=True))} for number, row in enumerate(rows, 1)
        ],
    }


def scorer_alone(scene: Scene) -> Callable[[], None]:
    """A function that scores with faster-coco-eval alone, on ready arrays; the ground truth is loaded beforehand."""
    truth = COCO(str(scene.annotations.path))
    ids, labels, boxes, scores = scene.results
    array = np.column_stack((ids, boxes, scores, labels)).astype(np.float64)

    def evaluate() -> None:
        scorer = COCOeval_faster(truth, truth.loadRes(array), "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()

    return evaluate
