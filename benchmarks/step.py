"""The training step beside the plain network, and a whole run beside the bare step: `python -m benchmarks step run`.

The yardstick of the step is the same network in float32 with channels first, in the same run.
"""

import json
import os
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from itertools import repeat
from pathlib import Path

import torch

from benchmarks import table
from src.benchmark import random_batch, time_training
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
STEPS = {"cpu": 3, "cuda": 30}  # of each kind; ResNet-50 on a CPU takes seconds for one
GOAL_FLOAT32, GOAL_HALF, GOAL_WHOLE = 1.2, 2.4, 0.95
GOAL_PLAIN_CPU = 1.0  # in float32, on a CPU whose units are not made for channels last
LABELS = 81
TRIALS = 3  # of the whole run, in turns with the bare step
BARE_STEPS = {"cpu": 8, "cuda": 30}  # in a trial
GPU_ITERATIONS = 32  # of an epoch at least, beside which its start is short


def make_trainer(
    backbone: str,
    device: torch.device,
    *,
    half: bool,
    layout: torch.memory_format | None = None,
    compiled: bool = False,
    labels: int = LABELS,
    seed: int = 0,
) -> Trainer:
    """layout: a run's, if left out."""
    torch.manual_seed(seed)
    layout = layout or training_memory_format(backbone, device)
    model = SSD300(backbone, labels).to(device).to(memory_format=layout)
    optimizer = make_optimizer(model, momentum=0.9, weight_decay=5e-4)
    return Trainer(model, optimizer, Processes.single(device), amp=half, memory_format=layout, compiled=compiled)


def run(device: torch.device | None = None, *, backbone: str = "resnet50", batch_size: int = BATCH) -> Iterator[dict]:
    """Rows name, ours and yardstick (images a second, medians), ratio, goal (least ratio), met."""
    device = device or torch.device("cpu")
    batch = random_batch(batch_size, LABELS, device=device, dtype=torch.float32)
    first = Batch(batch.images.contiguous(), batch.boxes, batch.labels)
    plain = make_trainer(backbone, device, half=False, layout=torch.contiguous_format)
    yardstick = time_training("plain", plain, repeat(first), steps=STEPS[device.type]).images_per_second
    fast = half_is_fast(device)
    kinds: list[tuple[str, bool, bool, float | None]] = [
        ("float32", False, False, GOAL_FLOAT32 if fast else GOAL_PLAIN_CPU)
    ]
    if fast:
        kinds.append(("--fp16", True, False, GOAL_HALF))
    else:
        print(f"training step, {backbone}, --fp16: left out, this CPU has no bfloat16 arithmetic")
    if device.type == "cuda":
        kinds.append(("--fp16 --compile", True, True, None))
    for name, half, compiled, goal in kinds:
        trainer = make_trainer(backbone, device, half=half, compiled=compiled)
        ours = time_training(name, trainer, repeat(batch), steps=STEPS[device.type]).images_per_second
        yield table.speed(f"training step, {backbone}, batch {batch_size}, {name} (images/s)", ours, yardstick, goal)


def whole_run(
    data: Path, device: torch.device | None = None, *, backbone: str | None = None, batch_size: int = BATCH
) -> Iterator[dict]:
    """A row for each pipeline: an epoch of a run beside bare steps on random input, taken in turns.

    backbone: by default the program's own, and the smallest where a CPU would take minutes for each epoch of it.
    """
    device = device or torch.device("cpu")
    backbone = backbone or ("resnet50" if half_is_fast(device) else "resnet18")
    with tempfile.TemporaryDirectory() as folder:
        if device.type == "cuda":
            data = repeated(data, GPU_ITERATIONS * batch_size, Path(folder))
        annotations = read_annotations(*locations(data, "train"))
        yield from _whole_runs(annotations, device, backbone, batch_size)


def _whole_runs(annotations: Annotations, device: torch.device, backbone: str, batch_size: int) -> Iterator[dict]:
    labels = len(annotations.categories) + 1
    trainer = make_trainer(backbone, device, half=half_is_fast(device), labels=labels)
    noise = random_batch(batch_size, labels, device=device, dtype=image_dtype(device, trainer.amp))
    workers = (os.cpu_count() or 2) if device.type == "cuda" else 2
    for pipeline in ("no_dali", "dali"):
        config = LoaderConfig(batch_size=batch_size, num_workers=workers, device=device, amp=trainer.amp)
        loader = make_train_loader(pipeline, annotations, config)
        whole, bare = [], []
        for epoch in range(TRIALS + 1):
            loader.set_epoch(epoch)
            whole.append(_epoch_speed(trainer, loader, epoch, batch_size))
            bare.append(_epoch_speed(trainer, [noise] * BARE_STEPS[device.type], epoch, batch_size))
        loader.close()
        name = f"whole run beside the bare step, {pipeline}, {backbone} (images/s)"
        # the first trial starts workers and warms caches
        yield table.speed(name, statistics.median(whole[1:]), statistics.median(bare[1:]), GOAL_WHOLE)


def repeated(data: Path, images: int, folder: Path) -> Path:
    """A data set in `folder` of at least so many images: those of `data` over and over, by links to their files."""
    file, image_folder = locations(data, "train")
    content = json.loads(file.read_text())
    given, annotations = content["images"], content["annotations"]
    step = 1 + max(image["id"] for image in given)
    content["images"], content["annotations"] = [], []
    new_file, new_folder = locations(folder, "train")
    new_file.parent.mkdir(parents=True)
    new_folder.mkdir()
    for time in range(-(-images // len(given))):
        (new_folder / str(time)).symlink_to(image_folder.resolve(), target_is_directory=True)
        for image in given:
            name, number = f"{time}/{image['file_name']}", image["id"] + time * step
            content["images"].append(image | {"file_name": name, "id": number})
        for entry in annotations:
            content["annotations"].append(entry | {"image_id": entry["image_id"] + time * step, "id": None})
    new_file.write_text(json.dumps(content))
    return folder


def _epoch_speed(trainer: Trainer, batches: Iterable[Batch], epoch: int, batch_size: int) -> float:
    """Images a second of one epoch as a run does it, with logging."""
    schedule = Schedule(base_learning_rate=1e-4, global_batch_size=batch_size)
    stop = GracefulShutdown(trainer.processes)
    with tempfile.TemporaryDirectory() as folder, open("/dev/null", "w") as nowhere:
        report = Report(Path(folder), append=False, stream=nowhere)
        result = train_epoch(trainer, batches, schedule, position=Position(epoch), shutdown=stop, report=report)
        report.close()
    stop.close()
    return result.images / result.seconds
