"""The training step beside the plain network, and a whole run beside the bare step: `python -m benchmarks step run`.

The yardstick of the step is the same network in float32 with channels first, in the same run.
"""

import statistics
import tempfile
from itertools import repeat
from pathlib import Path

import torch

from src.batch import Batch
from src.benchmark import random_batch, time_training
from src.coco import read_annotations
from src.data import make_train_loader
from src.distributed import Processes, StopNotice
from src.half import half_is_fast
from src.model import SSD300
from src.report import Report
from src.train import Schedule, Trainer, make_optimizer, train_epoch

BATCH = 8
STEPS = 3  # of each kind, ResNet-50 on a CPU takes seconds for one
GOAL_FLOAT32, GOAL_HALF, GOAL_WHOLE = 1.2, 2.4, 0.95
LABELS = 81
TRIALS = 3  # of the whole run, in turns with the bare step


def make_trainer(
    backbone: str, device: torch.device, *, half: bool, channels_last: bool = True, labels: int = LABELS, seed: int = 0
):
    torch.manual_seed(seed)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = SSD300(backbone, labels).to(device, memory_format=layout)
    optimizer = make_optimizer(model, momentum=0.9, weight_decay=5e-4)
    return Trainer(model, optimizer=optimizer, device=device, half=half, processes=Processes(0, 1, device, None))


def run(device: torch.device | None = None, *, backbone: str = "resnet50", batch_size: int = BATCH) -> list[dict]:
    """Rows name, ours and yardstick (images a second, medians), ratio, goal (least ratio), met."""
    device = device or torch.device("cpu")
    batch = random_batch(batch_size, LABELS, device=device, dtype=torch.float32)
    first = Batch(batch.images.contiguous(), batch.boxes, batch.labels)
    plain = make_trainer(backbone, device, half=False, channels_last=False)
    yardstick = time_training("plain", plain, repeat(first), steps=STEPS).images_per_second
    rows = []
    for name, half, goal in (("float32", False, GOAL_FLOAT32), ("--fp16", True, GOAL_HALF)):
        trainer = make_trainer(backbone, device, half=half)
        ours = time_training(name, trainer, repeat(batch), steps=STEPS).images_per_second
        goal = goal if not half or half_is_fast(device) else None
        rows.append(row(f"training step, {backbone}, batch {batch_size}, {name}", ours, yardstick, goal))
    return rows


def whole_run(
    data: Path, device: torch.device | None = None, *, backbone: str = "resnet18", batch_size: int = BATCH
) -> list[dict]:
    """A row for each pipeline: an epoch of a run beside as many bare steps on random input, taken in turns."""
    device = device or torch.device("cpu")
    annotations = read_annotations(data / "annotations" / "instances_train2017.json", data / "train2017")
    labels = len(annotations.categories) + 1
    trainer = make_trainer(backbone, device, half=half_is_fast(device), labels=labels)
    noise = random_batch(batch_size, labels, device=device, dtype=torch.float32)
    rows = []
    for pipeline in ("no_dali", "dali"):
        loader = make_train_loader(
            pipeline, annotations, batch_size=batch_size, num_workers=2, device=device, half=trainer.half, seed=0
        )
        whole, bare = [], []
        for epoch in range(TRIALS + 1):
            loader.set_epoch(epoch)
            whole.append(_epoch_speed(trainer, loader, epoch, batch_size))
            steps = [noise] * len(loader)
            bare.append(_epoch_speed(trainer, steps, epoch, batch_size))
        loader.close()
        name = f"whole run beside the bare step, {pipeline}, {backbone}"
        # the first trial starts workers and warms caches
        rows.append(row(name, statistics.median(whole[1:]), statistics.median(bare[1:]), GOAL_WHOLE))
    return rows


def _epoch_speed(trainer: Trainer, batches, epoch: int, batch_size: int) -> float:
    """Images a second of one epoch as a run does it, with logging."""
    schedule = Schedule(base=1e-4, images=batch_size, warmup=0, multistep=())
    stop = StopNotice(trainer.breakdown.processes)
    with tempfile.TemporaryDirectory() as folder, open("/dev/null", "w") as nowhere:
        report = Report(Path(folder), append=False, stream=nowhere)
        result = train_epoch(
            trainer, batches, schedule, epoch=epoch, first_iteration=0, start=0, stop=stop, report=report
        )
        report.close()
    stop.close()
    return result.images / result.seconds


def row(name: str, ours: float, yardstick: float, goal: float | None) -> dict:
    ratio = ours / yardstick
    return {
        "name": f"{name} (images/s)",
        "ours": ours,
        "yardstick": yardstick,
        "ratio": ratio,
        "goal": goal,
        "met": None if goal is None else ratio >= goal,
    }
