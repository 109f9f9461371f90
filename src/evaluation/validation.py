"""Evaluation on the validation images: after an epoch of training, and of a checkpoint (`--mode evaluation`)."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from src.data.annotations.coco import Annotations, check_images_exist, locations
from src.data.pipelines.loaders import EvaluationLoader, LoaderConfig
from src.evaluation.artifacts import collect_artifact_inputs, write_artifacts
from src.evaluation.background_files import BackgroundFiles
from src.evaluation.evaluate import Evaluation, EvaluationConfig, evaluate, log_non_finite
from src.evaluation.scoring import CocoMetrics
from src.report.report import Report, RunContext
from src.report.startup import compare_data, log_data_warnings
from src.runtime.errors import UserError, escape_control_characters
from src.runtime.output_files import make_folder
from src.ssd.detect import EndToEndDetector
from src.weights.detector import read_labelled
from src.weights.exported import build_trained_detector, load_checkpoint_or_export


@contextmanager
def make_evaluation(
    model: nn.Module, validation: Annotations, config: EvaluationConfig, context: RunContext
) -> Iterator[Callable[[int], tuple[float | None, dict[str, Any]]]]:
    """A function that evaluates the network after an epoch: on all ranks, with metrics in the report and files.

    It takes the epoch and returns mAP (None: not defined) and entries for the network's checkpoint.  The files are
    written while training continues; the next evaluation and the end of the context wait for them.
    """
    report = context.report
    with (
        _evaluator(model, validation, config, context) as run_evaluation,
        BackgroundFiles(context.output, report) as files,
    ):

        def evaluate_epoch(epoch: int) -> tuple[float | None, dict[str, Any]]:
            files.finish()
            report.begin_evaluation(epoch)
            evaluation = run_evaluation()
            coco_metrics = evaluation.coco_metrics
            details = {"score_thresholds": coco_metrics.thresholds.as_record(list(coco_metrics.category_ap))}
            metrics = coco_metrics.summary | (evaluation.losses or {})
            report.log_evaluation(epoch=epoch, metrics=metrics, seconds=evaluation.seconds, details=details)
            if context.processes.is_main:
                log_evaluation_warnings(report, evaluation)
                files.start(evaluation, validation)
            return coco_metrics.summary["mAP"], {"score_thresholds": coco_metrics.thresholds.as_state()}

        yield evaluate_epoch


def score_checkpoint(
    checkpoint: Path, data: Path, *, upright: bool, backbone: str, config: EvaluationConfig, context: RunContext
) -> float | None:
    """`--mode evaluation`: prints the 12 metrics and mAP by category, writes the files; mAP, None: not defined.

    checkpoint: may be an exported file.  upright: see `read_annotations`.  backbone: for a checkpoint that names none.
    """
    processes, report = context.processes, context.report
    state = processes.broadcast_object(load_checkpoint_or_export(checkpoint) if processes.is_main else None)

    def read_validation() -> Annotations:
        annotations = read_labelled(*locations(data, "val"), state, source=checkpoint, upright=upright)
        check_images_exist(annotations, log_progress=report.note)
        return annotations

    validation = processes.run_on_all_ranks(read_validation)
    compare_data(processes, validation=validation)
    make_folder(context.output)  # first, so that an unwritable --output is an error before the work
    log_data_warnings(report, validation, amp=config.amp, device=processes.device)
    model = build_trained_detector(
        state, backbone=backbone, num_categories=len(validation.categories), source=checkpoint, device=processes.device
    )
    with _evaluator(model, validation, config, context) as run_evaluation:
        evaluation = run_evaluation()
    log_metrics(report, evaluation.coco_metrics)
    for name, loss in (evaluation.losses or {}).items():
        report.note(f"{name.replace('_', ' ')}: {'not finite' if loss is None else f'{loss:.4f}'}")
    if processes.is_main:
        assert evaluation.results is not None
        log_evaluation_warnings(report, evaluation)
        inputs = collect_artifact_inputs(evaluation.results, evaluation.coco_metrics, validation)
        failures = write_artifacts(inputs, make_folder(context.output))
        if failures:
            raise UserError("; ".join(failures))
    return evaluation.coco_metrics.summary["mAP"]


@contextmanager
def _evaluator(
    model: nn.Module, validation: Annotations, config: EvaluationConfig, context: RunContext
) -> Iterator[Callable[[], Evaluation]]:
    """A function that evaluates the model's current weights; the loader's worker processes stay between calls."""
    processes = context.processes
    loader_config = LoaderConfig(
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        device=processes.device,
        shard=processes.shard,
    )
    loader = EvaluationLoader(validation, loader_config, normalised=not isinstance(model, EndToEndDetector))
    with closing(loader):
        yield lambda: evaluate(
            model, loader, validation, processes=processes, amp=config.amp, progress=context.report.progress
        )


def log_evaluation_warnings(report: Report, evaluation: Evaluation) -> None:
    """Warns of outputs that are NaN or infinite, and prints a line if nothing was detected; call it on rank 0."""
    assert evaluation.results is not None
    log_non_finite(report, evaluation.non_finite)
    if not len(evaluation.results.scores):
        report.note("Nothing was detected with a score above the threshold")


def log_metrics(report: Report, coco_metrics: CocoMetrics) -> None:
    """Prints COCO's 12 metrics, each category's mAP and the score thresholds, a line each."""
    for name, value in coco_metrics.summary.items():
        report.note(f"{name:<9} {_metric_text(value)}")
    category_ap = {escape_control_characters(name): value for name, value in coco_metrics.category_ap.items()}
    width = max(map(len, category_ap))
    report.note("mAP by category:")
    for name, value in category_ap.items():
        report.note(f"  {name:<{width}}  {_metric_text(value)}")
    report.note("Score with the best F1 at IoU 0.5, and F1, precision and recall from that score on:")
    thresholds = coco_metrics.thresholds
    for name, threshold in zip(["(all)", *category_ap], [thresholds.overall, *thresholds.by_category], strict=True):
        shown = "  ".join(f"{value:.4f}" for value in threshold) if threshold else "not defined"
        report.note(f"  {name:<{max(width, 5)}}  {shown}")


def _metric_text(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.4f}"
