"""The figures of a GPU, the most important first: `make gpu DATA=DIR`; DIR holds photographs in the COCO 2017 layout.

A run that is cut short keeps the rows that it has printed.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import evaluation
from benchmarks.machine import fitting_batch
from benchmarks.step import (
    COMPILED,
    FLOAT32,
    GOAL_WHOLE,
    HALF,
    TURNS,
    Kind,
    make_trainer,
    measure_whole_run,
    step_speed,
)
from benchmarks.table import figure, speed
from benchmarks.turns import Pair, cpu_seconds, in_turns, seconds
from src.benchmark import endless, peak_memory, random_batch
from src.data.annotations.coco import Annotations, locations, read_annotations
from src.data.pipelines.loader_config import LoaderConfig
from src.data.pipelines.loaders import make_train_loader
from src.runtime.precision import image_dtype

HERE = Path(__file__).parents[1]
BACKBONE = "resnet50"
WORKERS = (4, 8, 16)  # threads of dali, worker processes of no_dali
EPOCH = 32  # iterations of an epoch at least, so that its start weighs little
LOADER_BATCHES = 24  # of a measurement of the loaders alone
COPIED = 2**30  # bytes of the copy that measures the bandwidth
GOAL_COMPILED = 1.10  # times the eager step
GOAL_TWO = 0.95  # of twice the images/s of one GPU

# A training step of ResNet-50 in half precision computes 120.5 GFLOP an image and moves so many MB of memory for it:
# eager, and with batch-norm, addition and ReLU fused.  At the 550 TFLOP/s that kernels reach in practice, the bounds
# are 1,725 images/s eager and 2,205 fused at an H100's 2.9 TB/s, and 2,165 eager at an H200's 4.15 TB/s.  The last two
# constants are fitted to these three and meet them within 1%: GFLOP and MB of the layers that arithmetic bounds.
EAGER_MB, FUSED_MB = 1343.0, 977.0
ARITHMETIC_GFLOP, ARITHMETIC_MB = 104.0, 212.0
TFLOPS = 550.0


def bound(traffic: float, bandwidth: float) -> float:
    """The images/s that a training step can reach.  traffic: MB an image; bandwidth: GB/s."""
    milliseconds = (traffic - ARITHMETIC_MB) / bandwidth + ARITHMETIC_GFLOP / TFLOPS
    return 1000 / milliseconds


class Load(NamedTuple):
    """What a loader delivers, and what it takes for that."""

    images_per_second: float
    cores: float  # busy ones


def cores_needed(step: float, loads: Sequence[Load]) -> float:
    """The cores below which a pipeline starves the GPU.  step: images/s of the training step."""
    return step * statistics.median(load.cores / load.images_per_second for load in loads)


def run(data: Path, device: torch.device, *, backbone: str = BACKBONE, batch_size: int | None = None) -> Iterator[dict]:
    """All rows.  batch_size: by default 128, or what the GPU's memory holds."""
    with tempfile.TemporaryDirectory() as folder:
        float32_batch, half_batch = (
            batch_size or fitting_batch(torch.cuda.mem_get_info(device)[0], kind) for kind in ("float32", "--fp16")
        )
        repeated = repeat_data(data, EPOCH * half_batch, Path(folder))
        annotations = read_annotations(*locations(repeated, "train"))
        step = yield from step_rows(backbone, device, float32_batch, half_batch)
        loads: dict[str, list[Load]] = {"dali": [], "no_dali": []}
        for pipeline, measured in loads.items():
            for workers in WORKERS:
                load = measure_load(pipeline, annotations, _config(workers, half_batch, device))
                measured.append(load)
                yield figure(f"{pipeline} alone, {workers} {_unit(pipeline)} (images/s)", load.images_per_second)
                yield figure(f"  cores that it takes ({load.images_per_second / step:.2f} of the step)", load.cores)
        for pipeline, measured in loads.items():
            name = f"cores below which {pipeline} starves the step of {step:.0f} images/s"
            yield figure(name, cores_needed(step, measured))
        yield from run_rows(annotations, device, backbone, half_batch)
        yield from evaluation.run(device=device)
        if torch.cuda.device_count() > 1:
            yield two_gpus_row(repeated, half_batch, ("--backbone", backbone, "--fp16"))


def _unit(pipeline: str) -> str:
    return "threads" if pipeline == "dali" else "workers"


def _config(workers: int, batch_size: int, device: torch.device) -> LoaderConfig:
    return LoaderConfig(batch_size=batch_size, num_workers=workers, device=device, amp=True)


def measure_bandwidth(device: torch.device) -> float:
    """GB/s of a copy within the device's memory, read and written bytes together."""
    source = torch.empty(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2e-9 * COPIED / statistics.median(seconds(partial(target.copy_, source), device) for _ in range(5))


def step_rows(backbone: str, device: torch.device, float32_batch: int, half_batch: int) -> Generator[dict, None, float]:
    """Images/s of the step in float32, in half precision beside its bound, and compiled beside bound and eager step.

    Returns the images/s in half precision.
    """
    bandwidth = measure_bandwidth(device)
    yield figure("bandwidth of the device's memory (GB/s)", bandwidth)

    def measured(kind: Kind, size: int) -> list[float]:
        trainer = make_trainer(backbone, device, kind)
        batch = random_batch(size, evaluation.LABELS, device=device, dtype=image_dtype(device, kind.amp))
        return [step_speed(trainer, batch) for _ in range(1 + TURNS)][1:]

    name = f"training step, {backbone}, batch"
    float32 = statistics.median(measured(FLOAT32, float32_batch))
    yield figure(f"{name} {float32_batch}, float32 (images/s)", float32)
    half = statistics.median(measured(HALF, half_batch))
    share = Pair(half, bound(EAGER_MB, bandwidth), 0.0)
    yield speed(f"{name} {half_batch}, --fp16, beside its bound (images/s)", share)
    yield from compiled_rows(backbone, device, half_batch, bandwidth)
    return half


def compiled_rows(backbone: str, device: torch.device, batch_size: int, bandwidth: float) -> Iterator[dict]:
    batch = random_batch(batch_size, evaluation.LABELS, device=device, dtype=image_dtype(device, True))
    compiled, eager = (make_trainer(backbone, device, kind) for kind in (COMPILED, HALF))
    both = in_turns(partial(step_speed, compiled, batch), partial(step_speed, eager, batch), TURNS)
    name = f"training step, {backbone}, batch {batch_size}, --fp16 --compile"
    yield speed(f"{name}, beside the eager step (images/s)", both, GOAL_COMPILED)
    yield speed(f"{name}, beside its bound (images/s)", Pair(both.ours, bound(FUSED_MB, bandwidth), 0.0))


def measure_load(pipeline: str, annotations: Annotations, config: LoaderConfig) -> Load:
    """The loader alone, on batches that arrive on the device."""
    loader = make_train_loader(pipeline, annotations, config)
    batches = endless(loader)
    for _ in islice(batches, LOADER_BATCHES // 2):  # those that were prepared ahead
        pass
    busy = cpu_seconds()
    taken = seconds(lambda: list(map(len, islice(batches, LOADER_BATCHES))), config.device)
    busy = cpu_seconds() - busy
    loader.close()
    return Load(LOADER_BATCHES * config.batch_size / taken, busy / taken)


def run_rows(annotations: Annotations, device: torch.device, backbone: str, batch_size: int) -> Iterator[dict]:
    """A whole run with each pipeline beside the bare step, the cores that it takes, and its peak memory."""
    workers = min(max(WORKERS), os.cpu_count() or 1)
    if device.type == "cuda":
        # The step in float32 takes nearly three times the memory of a run with --fp16.
        torch.cuda.reset_peak_memory_stats(device)
    for pipeline in ("dali", "no_dali"):
        trainer = make_trainer(backbone, device, HALF, labels=len(annotations.categories) + 1)
        whole = measure_whole_run(pipeline, annotations, trainer, _config(workers, batch_size, device))
        name = f"whole run beside the bare step, {pipeline}, {workers} {_unit(pipeline)} (images/s)"
        yield speed(name, whole.pair, GOAL_WHOLE)
        yield figure("  cores that it takes", whole.cores)
    peak = peak_memory(device)
    if peak is not None:
        yield figure(f"peak memory of a run at batch {batch_size} (MiB)", peak / 2**20)


def two_gpus_row(data: Path, batch_size: int, flags: Sequence[str], program: Sequence[str] = ("main.py",)) -> dict:
    """Images/s of two GPUs beside twice those of one: the second epoch of a run of the program."""
    one, two = (_epoch_speed(data, batch_size, count, flags, program) for count in (1, 2))
    return speed("whole run on two GPUs, beside twice that on one (images/s)", Pair(two, 2 * one, 0.0), GOAL_TWO)


def _epoch_speed(data: Path, batch_size: int, processes: int, flags: Sequence[str], program: Sequence[str]) -> float:
    with tempfile.TemporaryDirectory() as output:
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
        run_flags = ("--data", data, "--output", output, "--batch-size", batch_size, "--epochs", 2, "--evaluation")
        line = [sys.executable, *launcher, *program, *run_flags, "--backbone-weights", "none", *flags]
        subprocess.run(list(map(str, line)), check=True, cwd=HERE, stdout=subprocess.DEVNULL)
        entries = [json.loads(text) for text in Path(output, "metrics.jsonl").read_text().splitlines()]
    return [entry["images_per_second"] for entry in entries if entry["kind"] == "epoch"][-1]


def repeat_data(data: Path, images: int, folder: Path) -> Path:
    """A data set in `folder` with at least so many images: those of `data` again and again, as links to the files."""
    file, image_folder = locations(data, "train")
    content = json.loads(file.read_text())
    given, annotations = content["images"], content["annotations"]
    step = 1 + max(image["id"] for image in given)
    content["images"], content["annotations"] = [], []
    new_file, new_folder = locations(folder, "train")
    new_file.parent.mkdir(parents=True)
    new_folder.mkdir()
    for copy in range(-(-images // len(given))):
        (new_folder / str(copy)).symlink_to(image_folder.resolve(), target_is_directory=True)
        for image in given:
            name, number = f"{copy}/{image['file_name']}", image["id"] + copy * step
            content["images"].append(image | {"file_name": name, "id": number})
        for entry in annotations:
            number = 1 + len(content["annotations"])
            content["annotations"].append(entry | {"image_id": entry["image_id"] + copy * step, "id": number})
    new_file.write_text(json.dumps(content))
    return folder
