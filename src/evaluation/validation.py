"""Scoring on the validation images: after an epoch of training, and of a checkpoint (`--mode evaluation`)."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from torch import nn

from src.data.annotations.coco import Annotations, check_images_exist, locations
from src.data.pipelines.loaders import EvaluationLoader, LoaderConfig
from src.evaluation.artifacts import leave_evaluation, log_evaluation_warnings, tell_figures
from src.evaluation.background_files import BackgroundFiles
from src.evaluation.evaluate import evaluate
from src.report.report import NullReport, Report
from src.report.startup import tell_data
from src.runtime.distributed import Processes
from src.runtime.output_files import make_folder
from src.ssd.detect import EndToEndDetector
from src.weights.detector import read_labelled
from src.weights.exported import load_trained, trained_detector

Figures = dict[str, float | None]  # COCO's 12 by name, None: not defined


@contextmanager
def make_evaluation(
    model: nn.Module,
    validation: Annotations,
    *,
    batch_size: int,
    num_workers: int,
    half: bool,
    output: Path,
    processes: Processes,
    report: Report | NullReport,
) -> Iterator[Callable[[int], Figures]]:
    """A function of the epoch that scores the network on all processes, tells the report and leaves files.

    The files are made while training goes on; the next evaluation and the end wait for them.
    """
    loader = _loader(model, validation, batch_size=batch_size, num_workers=num_workers, processes=processes)
    with closing(loader), BackgroundFiles(output, report) as files:  # the workers stay from one evaluation to the next

        def evaluate_epoch(epoch: int) -> Figures:
            files.finish()
            report.begin_evaluation(epoch)
            found = evaluate(
                model, loader, validation, device=processes.device, half=half, dist=processes,
                progress=report.progress, helpers=num_workers,
            )  # fmt: skip
            report.evaluation(epoch=epoch, figures=found.scores.figures, seconds=found.seconds)
            if processes.is_main:
                log_evaluation_warnings(report, found)
                files.start(found, validation)
            return found.scores.figures

        yield evaluate_epoch


def score_checkpoint(
    checkpoint: Path,
    data: Path,
    output: Path,
    *,
    upright: bool,
    backbone: str,
    batch_size: int,
    num_workers: int,
    half: bool,
    processes: Processes,
    report: Report | NullReport,
) -> float | None:
    """Tells the 12 figures of a checkpoint and mAP by category, and leaves files in `output`; mAP, None: not defined.

    checkpoint: or an exported file.  upright: see `read_annotations`.
    backbone: that of a checkpoint which does not say.
    """
    state = processes.broadcast_object(load_trained(checkpoint) if processes.is_main else None)

    def read_validation() -> Annotations:
        annotations = read_labelled(*locations(data, "val"), state, source=checkpoint, upright=upright)
        check_images_exist(annotations, tell=report.note)
        return annotations

    validation = processes.on_all_ranks(read_validation)
    make_folder(output)  # before the work, not after it
    tell_data(report, validation, half=half, device=processes.device)
    model = trained_detector(
        state, backbone=backbone, num_categories=len(validation.categories), source=checkpoint, device=processes.device
    )
    loader = _loader(model, validation, batch_size=batch_size, num_workers=num_workers, processes=processes)
    with closing(loader):
        found = evaluate(
            model, loader, validation, device=processes.device, half=half, dist=processes, progress=report.progress,
            helpers=num_workers,
        )  # fmt: skip
    tell_figures(report, found.scores)
    if processes.is_main:
        leave_evaluation(found, validation, output, report)
    return found.scores.figures["mAP"]


def _loader(
    model: nn.Module, validation: Annotations, *, batch_size: int, num_workers: int, processes: Processes
) -> EvaluationLoader:
    config = LoaderConfig(
        batch_size=batch_size, num_workers=num_workers, device=processes.device, shard=processes.shard
    )
    return EvaluationLoader(validation, config, normalised=not isinstance(model, EndToEndDetector))
