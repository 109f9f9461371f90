"""Images/s that the loaders prepare, as batches on the CPU: `python -m benchmarks loaders --data DIR`.

The baseline of no_dali is a DataLoader that only decodes and resizes; that of dali is a DALI graph that only decodes
the window and resizes it.  Both have as many workers or threads.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.table import speed
from benchmarks.turns import CPU, Pair, in_turns
from src.data.annotations.coco import Annotations, locations, read_annotations
from src.data.images.decode import resize
from src.data.pipelines.dali_pipeline import DaliTrainLoader
from src.data.pipelines.image_reader import read_image
from src.data.pipelines.loader_config import LoaderConfig
from src.data.pipelines.torch_pipeline import TorchTrainLoader
from src.data.pipelines.workers import PREFETCH

WORKERS = (1, 2, 4)
GOAL_WORKERS = 2
GOALS = {"no_dali": 0.5, "dali": 0.7}  # least ratio to the baseline
BATCH_SIZE = 32
BATCHES = 8  # in a measurement
TURNS = 5


class DecodedImages(Dataset):
    """The images of the annotations, decoded and resized, repeated many times."""

    def __init__(self, annotations: Annotations) -> None:
        self.annotations = annotations
        self.images = annotations.with_boxes()

    def __len__(self) -> int:
        return endless(self.images).size

    def __getitem__(self, position: int) -> torch.Tensor:
        return resize(read_image(self.annotations, self.images[position % len(self.images)]))


def run(data: Path, *, batches: int = BATCHES, turns: int = TURNS) -> Iterator[dict]:
    """A row for each pipeline and number of workers or threads."""
    annotations = read_annotations(*locations(data, "train"))
    for workers in WORKERS:
        for pipeline, unit in (("no_dali", "workers"), ("dali", "threads")):
            pair = measure(pipeline, annotations, workers, batches=batches, turns=turns)
            goal = GOALS[pipeline] if workers == GOAL_WORKERS else None
            yield speed(f"{pipeline}, {unit}: {workers} (images/s)", pair, goal)


def measure(pipeline: str, annotations: Annotations, workers: int, *, batches: int, turns: int) -> Pair:
    """Images/s of a pipeline and of its baseline."""
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # the cores belong to the workers and to DALI, as beside a GPU
        if pipeline == "dali":
            ours, baseline = dali_batches(annotations, workers, stack), window_batches(annotations, workers)
        else:
            ours, baseline = torch_batches(annotations, workers, stack), decoded_batches(annotations, workers)
        warm_up = PREFETCH * workers + 1  # batches that were prepared while the other was measured
        return in_turns(
            lambda: images_per_second(ours, batches, warm_up),
            lambda: images_per_second(baseline, batches, warm_up),
            turns,
            warm_up=0,
        )


def images_per_second(next_batch: Callable, batches: int, warm_up: int) -> float:
    for _ in range(warm_up):
        next_batch()
    start = time.perf_counter()
    for _ in range(batches):
        next_batch()
    return batches * BATCH_SIZE / (time.perf_counter() - start)


# --- functions that return the next batch ---------------------------------------------------------------------------


def torch_batches(annotations: Annotations, workers: int, stack: ExitStack) -> Callable:
    loader = TorchTrainLoader(annotations, LoaderConfig(batch_size=BATCH_SIZE, num_workers=workers, device=CPU))
    stack.callback(loader.close)
    loader.sampler.images = endless(loader.sampler.images)
    return iter(loader).__next__


def decoded_batches(annotations: Annotations, workers: int) -> Callable:
    loader = DataLoader(
        DecodedImages(annotations), batch_size=BATCH_SIZE, shuffle=True, num_workers=workers, prefetch_factor=PREFETCH
    )
    return iter(loader).__next__


def dali_batches(annotations: Annotations, threads: int, stack: ExitStack) -> Callable:
    loader = DaliTrainLoader(annotations, LoaderConfig(batch_size=BATCH_SIZE, num_workers=threads, device=CPU))
    stack.callback(loader.close)
    return epochs(loader).__next__


def epochs(loader: DaliTrainLoader) -> Iterator:
    while True:
        yield from loader


def window_batches(annotations: Annotations, threads: int) -> Callable:
    loader = DaliTrainLoader(annotations, LoaderConfig(batch_size=BATCH_SIZE, num_workers=threads, device=CPU))
    return loader.build(("resized",)).run


def endless(images: np.ndarray) -> np.ndarray:
    """More images than a measurement takes: the starts of short epochs would distort it."""
    return np.resize(images, 100_000)
