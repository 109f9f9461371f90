"""Logs the data and the machine before the work begins, and opens the report of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from src.data.annotations.coco import Annotations
from src.data.pipelines.loaders import TrainLoader
from src.report.report import Report
from src.report.run_folder import branch_off, same_folder, set_aside_old_run
from src.runtime.distributed import Processes
from src.runtime.precision import NO_FAST_HALF, half_is_fast


class ResumePoint(NamedTuple):
    """Where a run continues."""

    file: Path  # the checkpoint
    epoch: int
    iteration: int  # the next one, counted from the run's start


def start_report(
    output: Path, *, resume_point: ResumePoint | None, flags: Mapping[str, object], processes: Processes
) -> Report:
    """Opens a run's files in `output`.

    A new run first moves the files of an older one aside; a continued run cuts its files back to its checkpoint.
    """
    in_output = resume_point is not None and same_folder(resume_point.file.parent, output)
    line = branch_off(output, resume_point.file) if resume_point and in_output else set_aside_old_run(output)
    report = Report(output, append=in_output)
    if line:
        report.note(line)
    if resume_point is not None:
        report.rewind(epoch=resume_point.epoch, iteration=resume_point.iteration)
        report.note(
            f"Continued from {resume_point.file}: epoch {resume_point.epoch}, iteration {resume_point.iteration}"
        )
    report.write_flags(flags, device=device_name(processes.device), processes=processes.world_size)
    return report


def compare_data(processes: Processes, **data: Annotations | None) -> None:
    """Raises UserError, on all ranks, if a rank has read other annotations than rank 0.

    data: the annotations by name ("training", "validation").
    """
    found = {f"{name} annotations": _summary(part) for name, part in data.items() if part is not None}
    processes.require_agreement(found, remedy="copy the same data set to every machine")


def _summary(annotations: Annotations) -> str:
    return (
        f"{len(annotations)} images with {len(annotations.boxes)} boxes of {len(annotations.categories)} categories "
        f"(digest {annotations.digest})"
    )


def log_data_warnings(report: Report, *data: Annotations | None, amp: bool, device: torch.device) -> None:
    """Logs the warnings about the data, and one if --fp16 (`amp`) cannot be fast on the device."""
    for annotations in data:
        for warning in annotations.warnings if annotations else ():
            report.warn(warning)
    if amp and not half_is_fast(device):
        report.warn(NO_FAST_HALF)


def log_run_start(
    report: Report,
    processes: Processes,
    loader: TrainLoader,
    *,
    training: Annotations,
    validation: Annotations | None,
) -> None:
    """Logs what a run works on: the device and the sizes of its data sets."""
    report.note(f"Device: {device_name(processes.device)}, processes: {processes.world_size}")
    report.note(
        f"Training images: {loader.num_images} with {len(training.boxes)} boxes of {len(training.categories)} "
        f"categories ({len(training) - loader.num_images} without boxes left out)"
    )
    if validation is not None:
        report.note(f"Validation images: {len(validation)} with {len(validation.boxes)} boxes")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
