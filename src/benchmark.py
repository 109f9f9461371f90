"""How fast a training step and an evaluation step are: `--mode benchmark`, and `python -m benchmarks` too.

Times are read after the device has finished, so a step here cannot overlap the next one's preparation on a GPU.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from typing import NamedTuple

import numpy as np
import torch

from src.data.annotations.coco import Annotations
from src.data.pipelines.batch import Batch
from src.data.pipelines.loaders import TrainLoader
from src.evaluation.evaluate import evaluating, prepare_for_inference
from src.report.report import Report
from src.report.startup import device_name, log_data_warnings
from src.runtime.precision import autocast, image_dtype
from src.ssd.default_boxes import IMAGE_SIZE, NUM_DEFAULT_BOXES, default_boxes
from src.ssd.detect import detect
from src.training.step import Trainer

WARM_UP = 3  # steps that are not counted: memory is claimed, convolutions are chosen
LEARNING_RATE = 1e-4  # small, so that random labels do not break the network down
BOXES_MATCHED = 20  # default boxes of a random image
STEPS = 20  # of each kind in `--mode benchmark`


class Timing(NamedTuple):
    """Steps of one kind."""

    name: str
    images: int  # a step
    seconds: np.ndarray  # [S] of each step, waiting included
    waiting: np.ndarray  # [S] of which spent waiting for input

    @property
    def images_per_second(self) -> float:
        """The median."""
        return self.images / float(np.median(self.seconds))

    def line(self) -> str:
        """What a user reads: median, spread and waiting."""
        fast, slow = self.images / np.quantile(self.seconds, (0.05, 0.95))
        return (
            f"{self.name:<24} {self.images_per_second:9.1f} images/s  ({slow:.1f} to {fast:.1f} in nine of ten steps), "
            f"waiting for input: {self.waiting.sum() / self.seconds.sum():.1%}"
        )


def random_batch(batch_size: int, num_labels: int, *, device: torch.device, dtype: torch.dtype) -> Batch:
    """A batch of noise with 20 matched default boxes an image."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator).to(
        device, dtype, memory_format=torch.channels_last
    )
    labels = torch.zeros(batch_size, NUM_DEFAULT_BOXES, dtype=torch.long)
    chosen = torch.rand(batch_size, NUM_DEFAULT_BOXES, generator=generator).argsort(dim=1)[:, :BOXES_MATCHED]
    labels.scatter_(1, chosen, torch.randint(1, num_labels, chosen.shape, generator=generator))
    boxes = default_boxes().expand(batch_size, -1, -1)
    return Batch(images, boxes.to(device), labels.to(device))


def endless(loader: TrainLoader) -> Iterator[Batch]:
    """Batch after batch, epoch after epoch."""
    epoch = 0
    while True:
        loader.set_epoch(epoch)
        yield from loader
        epoch += 1


def time_training(name: str, trainer: Trainer, batches: Iterable[Batch], *, steps: int) -> Timing:
    """Times `steps` training steps, those of a run, after a warm-up."""
    trainer.training_model.train()
    return _timed(name, batches, lambda batch: trainer.step(batch, LEARNING_RATE), trainer.device, steps)


@torch.inference_mode()
def time_evaluation(name: str, trainer: Trainer, batches: Iterable[Batch], *, steps: int) -> Timing:
    """Times `steps` evaluation steps, from images to detections, after a warm-up."""
    with evaluating(trainer.model):
        network = prepare_for_inference(trainer.model, device=trainer.device, amp=trainer.amp)

        def step(batch: Batch) -> None:
            with autocast(trainer.device, trainer.amp):
                offsets, logits = network(batch.images)
            detect(offsets, logits)

        return _timed(name, batches, step, trainer.device, steps)


def _timed(
    name: str, batches: Iterable[Batch], step: Callable[[Batch], object], device: torch.device, steps: int
) -> Timing:
    waiting, seconds, images = [], [], 0
    batches = iter(batches)
    for _ in range(WARM_UP + steps):
        began = time.perf_counter()
        batch = next(batches)
        arrived = time.perf_counter()
        step(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        waiting.append(arrived - began)
        seconds.append(time.perf_counter() - began)
        images = len(batch.images)
    return Timing(name, images, np.array(seconds[WARM_UP:]), np.array(waiting[WARM_UP:]))


def peak_memory(device: torch.device) -> int | None:
    """The most memory in use so far, in bytes: the GPU's, or this process's on a CPU; None where it is unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # here, because Windows lacks it
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def benchmark(
    trainer: Trainer,
    loader: TrainLoader,
    training: Annotations,
    *,
    backbone: str,
    batch_size: int,
    report: Report,
) -> None:
    """`--mode benchmark`: times training on real and on random input and evaluation; a line each and the peak memory.

    loader: gives the images of `training`, `batch_size` of them a step.
    """
    device = trainer.device
    log_data_warnings(report, training, amp=trainer.amp, device=device)
    report.note(f"Device: {device_name(device)}, {backbone}, {batch_size} images a step")
    dtype = image_dtype(device, trainer.amp)
    noise = random_batch(batch_size, len(training.categories) + 1, device=device, dtype=dtype)
    for name, measure, batches in (
        ("training, random input", time_training, repeat(noise)),
        ("training, real input", time_training, endless(loader)),
        ("evaluation", time_evaluation, repeat(noise)),
    ):
        report.note(measure(name, trainer, batches, steps=STEPS).line())
    peak = peak_memory(device)
    if peak is not None:
        report.note(f"peak memory: {peak / 2**20:.0f} MiB")
