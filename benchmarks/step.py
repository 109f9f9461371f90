"""The training step beside the plain network, and a whole run beside the bare step: `python -m benchmarks step run`.

The baseline of the step is the same network in float32 with channels first.
"""

import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.table import speed
from benchmarks.turns import CPU, Pair, cpu_seconds, in_turns, seconds
from src.benchmark import LEARNING_RATE, random_batch
from src.data.annotations.coco import Annotations, locations, read_annotations
from src.data.pipelines.batch import Batch
from src.data.pipelines.loader_config import LoaderConfig
from src.data.pipelines.loaders import make_train_loader
from src.report.report import Report
from src.runtime.distributed import Processes
from src.runtime.precision import half_is_fast, image_dtype
from src.runtime.preemption import GracefulShutdown
from src.ssd.model import SSD300, training_memory_format
from src.training.checkpoint import Position
from src.training.loop import train_epoch
from src.training.optimizer import make_optimizer
from src.training.schedule import Schedule
from src.training.step import Trainer

BATCH = 8
TURNS = 3
STEPS = {"cpu": 1, "cuda": 10}  # in a turn; a step of ResNet-50 takes a CPU seconds
BARE_STEPS = {"cpu": 8, "cuda": 30}  # in a turn beside an epoch of a whole run
GOAL_WHOLE = 0.95
LABELS = 81


class Kind(NamedTuple):
    """A way to train."""

    flags: str
    amp: bool = False
    compiled: bool = False
    goal: float | None = None  # least ratio to the plain network


FLOAT32, HALF, COMPILED = Kind("float32", goal=1.2), Kind("--fp16", amp=True, goal=2.4), Kind("--compile", True, True)
PLAIN_CPU = Kind("float32", goal=1.0)  # on a CPU without bfloat16 arithmetic, where channels last gains little


def make_trainer(
    backbone: str,
    device: torch.device,
    kind: Kind,
    *,
    memory_format: torch.memory_format | None = None,
    labels: int = LABELS,
) -> Trainer:
    """A trainer as a run makes it.  memory_format: another than a run's."""
    memory_format = memory_format or training_memory_format(backbone, device)
    model = SSD300(backbone, labels).to(device).to(memory_format=memory_format)
    optimizer = make_optimizer(model, momentum=0.9, weight_decay=5e-4)
    return Trainer(
        model, optimizer, Processes.single(device), amp=kind.amp, memory_format=memory_format, compiled=kind.compiled
    )


def step_speed(trainer: Trainer, batch: Batch) -> float:
    """Images/s of a few training steps."""
    trainer.training_model.train()
    steps = STEPS[trainer.device.type]

    def train() -> None:
        for _ in range(steps):
            trainer.step(batch, LEARNING_RATE)

    return steps * len(batch.images) / seconds(train, trainer.device)


def run(*, backbone: str = "resnet50", batch_size: int = BATCH) -> Iterator[dict]:
    """A row for each precision that the CPU computes in: images/s of the step."""
    batch = random_batch(batch_size, LABELS, device=CPU, dtype=torch.float32)
    channels_first = Batch(batch.images.contiguous(), batch.boxes, batch.labels)
    plain = make_trainer(backbone, CPU, PLAIN_CPU, memory_format=torch.contiguous_format)
    kinds = (FLOAT32, HALF) if half_is_fast(CPU) else (PLAIN_CPU,)
    if len(kinds) == 1:
        print(f"training step, {backbone}, --fp16: left out, this CPU has no bfloat16 arithmetic")
    for kind in kinds:
        trainer = make_trainer(backbone, CPU, kind)
        pair = in_turns(partial(step_speed, trainer, batch), partial(step_speed, plain, channels_first), TURNS)
        yield speed(f"training step, {backbone}, batch {batch_size}, {kind.flags} (images/s)", pair, kind.goal)


def whole_run(data: Path, *, backbone: str | None = None, batch_size: int = BATCH) -> Iterator[dict]:
    """A row for each pipeline: images/s of an epoch of a run beside the bare step on random input.

    backbone: by default the program's own; the smallest on a CPU that needs minutes for an epoch of it.
    """
    amp = half_is_fast(CPU)
    backbone = backbone or ("resnet50" if amp else "resnet18")
    annotations = read_annotations(*locations(data, "train"))
    trainer = make_trainer(backbone, CPU, HALF if amp else PLAIN_CPU, labels=len(annotations.categories) + 1)
    for pipeline in ("no_dali", "dali"):
        config = LoaderConfig(batch_size=batch_size, num_workers=2, device=CPU, amp=amp)
        whole = measure_whole_run(pipeline, annotations, trainer, config)
        yield speed(f"whole run beside the bare step, {pipeline}, {backbone} (images/s)", whole.pair, GOAL_WHOLE)


class WholeRun(NamedTuple):
    """An epoch of a run with its data."""

    pair: Pair  # images/s, beside the bare step on random input
    cores: float  # that it keeps busy


def measure_whole_run(pipeline: str, annotations: Annotations, trainer: Trainer, config: LoaderConfig) -> WholeRun:
    """Measures one pipeline.  The first turn, which starts its workers, does not count."""
    noise = random_batch(
        config.batch_size, len(annotations.categories) + 1, device=trainer.device,
        dtype=image_dtype(trainer.device, trainer.amp),
    )  # fmt: skip
    loader = make_train_loader(pipeline, annotations, config)
    cores: list[float] = []

    def run_speed() -> float:
        loader.set_epoch(len(cores))
        busy, began = cpu_seconds(), time.perf_counter()
        images_per_second = epoch_speed(trainer, loader, config.batch_size)
        cores.append((cpu_seconds() - busy) / (time.perf_counter() - began))
        return images_per_second

    def bare_speed() -> float:
        return epoch_speed(trainer, [noise] * BARE_STEPS[trainer.device.type], config.batch_size)

    pair = in_turns(run_speed, bare_speed, TURNS)
    loader.close()
    return WholeRun(pair, statistics.median(cores[1:]))


def epoch_speed(trainer: Trainer, batches: Iterable[Batch], batch_size: int) -> float:
    """Images/s of an epoch as a run trains it, with its logging."""
    schedule = Schedule(base_learning_rate=LEARNING_RATE, global_batch_size=batch_size)
    shutdown = GracefulShutdown(trainer.processes)
    with tempfile.TemporaryDirectory() as folder, open("/dev/null", "w") as nowhere:
        report = Report(Path(folder), append=False, stream=nowhere)
        result = train_epoch(trainer, batches, schedule, position=Position(), shutdown=shutdown, report=report)
        report.close()
    shutdown.close()
    return result.images / result.seconds
