"""Images prepared a second, as batches on the CPU: `python -m benchmarks.loaders --data DIR`.

Each pipeline is measured beside its yardstick with as many workers or threads, in turns: no_dali beside a DataLoader
that decodes and resizes and no more, dali beside a DALI graph that decodes the window and resizes it and no more.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks import table
from src.data.annotations.coco import Annotations, locations, read_annotations
from src.data.images.decode import resize
from src.data.pipelines.dali_pipeline import DaliTrainLoader
from src.data.pipelines.image_reader import read_image
from src.data.pipelines.loader_config import LoaderConfig
from src.data.pipelines.torch_pipeline import TorchTrainLoader
from src.data.pipelines.workers import PREFETCH

WORKERS = (1, 2, 4)
GOAL_WORKERS = 2
GOALS = {"no_dali": 0.5, "dali": 0.7}  # of the yardstick's images a second
BATCH_SIZE = 32
BATCHES = 8  # in a measurement
REPEATS = 5
CPU = torch.device("cpu")


class DecodedImages(Dataset):
    """The images of the annotations, again and again, decoded and resized."""

    def __init__(self, annotations: Annotations) -> None:
        self.annotations = annotations
        self.images = annotations.with_boxes()

    def __len__(self) -> int:
        return endless(self.images).size

    def __getitem__(self, position: int) -> torch.Tensor:
        return resize(read_image(self.annotations, self.images[position % len(self.images)]))


def run(data: Path, *, batches: int = BATCHES, repeats: int = REPEATS) -> list[dict]:
    """Rows name, ours and yardstick (images a second, medians), ratio, goal (least ratio, or None), met."""
    annotations = read_annotations(*locations(data, "train"))
    rows = []
    for workers in WORKERS:
        speeds = measure(annotations, workers, batches, repeats)
        for pipeline, unit in (("no_dali", "workers"), ("dali", "threads")):
            goal = GOALS[pipeline] if workers == GOAL_WORKERS else None
            name = f"{pipeline}, {unit}: {workers} (images/s)"
            rows.append(table.speed(name, speeds[pipeline], speeds[f"{pipeline} yardstick"], goal))
    return rows


def measure(annotations: Annotations, workers: int, batches: int, repeats: int) -> dict[str, float]:
    """Images a second of both pipelines and both yardsticks, the median of measurements taken in turns."""
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # in this process: the cores are the workers' and DALI's, as they are beside a GPU
        advance = {
            "no_dali": torch_batches(annotations, workers, stack),
            "no_dali yardstick": decoded_batches(annotations, workers),
            "dali": dali_batches(annotations, workers, stack),
            "dali yardstick": window_batches(annotations, workers),
        }
        speeds: dict[str, list[float]] = {name: [] for name in advance}
        for _ in range(repeats):
            for name, next_batch in advance.items():
                speeds[name].append(speed(next_batch, batches, warm_up=PREFETCH * workers + 1))
    return {name: statistics.median(figures) for name, figures in speeds.items()}


def speed(next_batch: Callable, batches: int, warm_up: int) -> float:
    """Images a second, without the batches that were prepared while others were measured."""
    for _ in range(warm_up):
        next_batch()
    start = time.perf_counter()
    for _ in range(batches):
        next_batch()
    return batches * BATCH_SIZE / (time.perf_counter() - start)


# --- what is measured: functions that give the next batch ------------------------------------------------------------


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
    """More images than any measurement takes: epochs of a few batches would be measured with their starts."""
    return np.resize(images, 100_000)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loaders", description=__doc__)
    parser.add_argument("--data", "-d", type=Path, required=True, help="a data set in the COCO 2017 layout")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="measurements of each (default: %(default)s)")
    options = parser.parse_args()
    print(table.table(run(options.data, repeats=options.repeats)))


if __name__ == "__main__":
    main()
