"""Trains SSD300 on a ResNet: `python main.py --data DIR`.  README.rst lists every flag and every output file."""

from src.runtime.environment import prepare

if __name__ == "__main__":
    prepare()

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from functools import partial

import torch

from src.benchmark import benchmark
from src.check import check
from src.data.annotations.coco import Annotations
from src.data.annotations.dataset import read_dataset
from src.data.pipelines.loaders import LoaderConfig, TrainLoader, make_decode_check, make_train_loader
from src.data.pipelines.workers import convert_worker_errors
from src.evaluation.evaluate import EvaluationConfig
from src.evaluation.predict import predict_folder
from src.evaluation.validation import make_evaluation, score_checkpoint
from src.export.export import export
from src.flags import Flags, parse_args
from src.report import mlperf
from src.report.exit_status import (
    BAD_INPUT,
    DONE,
    INTERRUPTED,
    TERMINATED,
    report_error,
    report_error_before_cleanup,
    target_exit_status,
)
from src.report.report import Report, RunContext
from src.report.run_folder import LAST_CHECKPOINT
from src.report.startup import ResumePoint, compare_data, log_data_warnings, log_run_start, start_report
from src.runtime import launcher_env, process_group
from src.runtime.console import tolerate_console_errors
from src.runtime.devices import configure_backends
from src.runtime.distributed import Processes
from src.runtime.errors import SigtermReceived, UserError
from src.runtime.output_files import lock_output_folder
from src.runtime.preemption import raise_on_signals
from src.ssd.detect import IOU_THRESHOLD, MAX_DETECTIONS
from src.ssd.model import SSD300, feature_channels, training_memory_format
from src.training.checkpoint import TRAINING_DATA_KEY, RunFingerprint
from src.training.loop import TrainingLoop
from src.training.optimizer import make_optimizer
from src.training.resume import ResumedRun, load_starting_weights, read_resumed_run, restore_run
from src.training.schedule import Schedule, schedule_warnings
from src.training.step import Trainer

# Modes that run as a single process, and how the error about more ends.
SINGLE_PROCESS_MODES = {"check": ", which uses all cores", "benchmark": "", "export": ""}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit status."""
    try:
        with tolerate_console_errors(), raise_on_signals():
            with launcher_env.print_once_per_node():
                flags = parse_args(argv)
            return run_rank(flags)
    except KeyboardInterrupt:
        return INTERRUPTED
    except SigtermReceived:
        return TERMINATED


def run_rank(flags: Flags) -> int:
    """Joins the other ranks, runs the mode on this one and returns the exit status."""
    try:
        with process_group.start(flags.local_rank) as processes:
            try:
                # The first thing that ranks do together: with different flags they would wait for each other forever.
                processes.require_agreement(
                    flags.same_on_all_ranks | {"the device": processes.device.type},
                    remedy="start all ranks with the same flags, all on GPUs or all on CPUs",
                )
                processes.check_devices()
                configure_backends(processes.device)
                with convert_worker_errors():
                    return train(flags, processes) if flags.mode == "training" else run_mode(flags, processes)
            except Exception as error:
                return report_error(error, processes)
    except UserError as error:  # the processes could not join
        print(f"main.py: error: {error}", file=sys.stderr)
        return BAD_INPUT


def train(flags: Flags, processes: Processes) -> int:
    """Trains from scratch, from given weights, or from where a run stopped; returns the exit status."""
    began = time.perf_counter()
    with ExitStack() as stack:
        training, validation = read_data(flags, processes)
        schedule = make_schedule(flags, processes)
        fingerprint = make_fingerprint(flags, processes, training)
        resumed = processes.broadcast_object(
            read_resumed_run(flags.resume, flags.output, fingerprint) if processes.is_main else None
        )
        model, messages = make_starting_model(flags, processes, training, resumed)
        loader = stack.enter_context(closing(loader_maker(flags, processes)(training)))
        stack.enter_context(report_error_before_cleanup(processes))
        stack.enter_context(convert_worker_errors())
        trainer = make_trainer(flags, processes, model)
        position, warnings = restore_run(
            trainer, loader, schedule, fingerprint=fingerprint, resumed=resumed and resumed.checkpoint,
            rank=processes.rank,
        )  # fmt: skip
        # `start_report` moves or truncates the files of an older run, so all input among them has been read by now.
        report = Report.disabled()
        if processes.is_main:
            stack.enter_context(lock_output_folder(flags.output))
            resume_point = resumed and ResumePoint(
                resumed.file, resumed.checkpoint.position.epoch, resumed.checkpoint.position.iteration
            )
            report = start_report(flags.output, resume_point=resume_point, flags=asdict(flags), processes=processes)
            stack.enter_context(closing(report))
        missing_checkpoint = flags.output / LAST_CHECKPOINT if flags.resume and not resumed else None
        del resumed  # its weights and momentum take 200 MB and more on each rank
        log_data_warnings(report, training, validation, amp=flags.fp16, device=processes.device)
        for warning in (
            schedule_warnings(schedule, len(loader), flags.unreached_evaluations, missing_checkpoint) + warnings
        ):
            report.warn(warning)
        for line in messages:
            report.note(line)
        log_run_start(report, processes, loader, training=training, validation=validation)
        report.note(schedule.summary(len(loader)))
        report.begin_run(mlperf_constants(flags, schedule, loader.num_images, len(validation) if validation else 0))
        context = RunContext(processes, report, flags.output)
        evaluate = None if validation is None else stack.enter_context(
            make_evaluation(model, validation, evaluation_config(flags), context)
        )  # fmt: skip
        # Again, so that an error is printed before the evaluation's context waits for the last evaluation's files.
        stack.enter_context(report_error_before_cleanup(processes))
        loop = TrainingLoop(
            trainer, loader, schedule, position=position, fingerprint=fingerprint, context=context
        )  # fmt: skip
        loop.run(evaluate)
        report.end_run(
            average_images_per_second=loop.images_per_second,
            seconds=time.perf_counter() - began,
            accuracy=position.last_map if position.evaluated else "not evaluated",
        )
        return target_exit_status(position.last_map, flags.target, report)


def read_data(flags: Flags, processes: Processes) -> tuple[Annotations, Annotations | None]:
    """The training annotations and, if the run evaluates, the validation ones; all ranks have read the same."""
    training, validation = processes.run_on_all_ranks(partial(
        read_dataset, flags.data, evaluating=bool(flags.reached_evaluations), upright=flags.upright,
        log_progress=print if processes.is_main else None,
    ))  # fmt: skip
    compare_data(processes, training=training, validation=validation)
    return training, validation


def make_schedule(flags: Flags, processes: Processes) -> Schedule:
    return Schedule(
        base_learning_rate=flags.learning_rate,
        global_batch_size=flags.batch_size * processes.world_size,
        warmup=flags.warmup or 0,
        multistep=tuple(flags.multistep),
        epochs=flags.epochs,
        evaluation_epochs=flags.reached_evaluations,
    )


def make_fingerprint(flags: Flags, processes: Processes, training: Annotations) -> RunFingerprint:
    settings = {"the number of processes": processes.world_size, TRAINING_DATA_KEY: training.digest}
    categories = [list(category) for category in training.categories]
    return RunFingerprint(flags.backbone, categories, flags.seed, flags.run_defining_flags | settings)


def make_starting_model(
    flags: Flags, processes: Processes, training: Annotations, resumed: ResumedRun | None
) -> tuple[SSD300, list[str]]:
    """The network on the CPU, and lines to print about its weights.

    Only rank 0 loads weights; DistributedDataParallel copies them to the other ranks.
    """
    torch.manual_seed(flags.seed)
    model = SSD300(flags.backbone, len(training.categories) + 1)
    messages: list[str] = []
    if processes.is_main:
        messages = load_starting_weights(
            model, flags.backbone, training.categories, resumed=resumed, checkpoint=flags.checkpoint,
            backbone_weights=flags.backbone_weights,
        )  # fmt: skip
    processes.broadcast_object()  # the other ranks wait here: a download may take long
    return model, messages


def loader_maker(flags: Flags, processes: Processes) -> Callable[[Annotations], TrainLoader]:
    """A function that makes the training loader of annotations."""
    config = LoaderConfig(
        batch_size=flags.batch_size, num_workers=flags.num_workers, device=processes.device, amp=flags.fp16,
        seed=flags.seed, shard=processes.shard,
    )  # fmt: skip
    return partial(make_train_loader, flags.data_pipeline, config=config)


def evaluation_config(flags: Flags) -> EvaluationConfig:
    return EvaluationConfig(batch_size=flags.eval_batch_size, num_workers=flags.num_workers, amp=flags.fp16)


def make_trainer(flags: Flags, processes: Processes, model: SSD300) -> Trainer:
    """Moves the network to the device and makes its trainer."""
    if flags.freeze_backbone:
        model.freeze_backbone()
    # Rank 0's choice for all, because machines may differ.
    memory_format = processes.broadcast_object(training_memory_format(flags.backbone, processes.device))
    model = model.to(processes.device).to(memory_format=memory_format)
    optimizer = make_optimizer(model, momentum=flags.momentum, weight_decay=flags.weight_decay)
    return Trainer(
        model, optimizer, processes, amp=flags.fp16, memory_format=memory_format, compiled=flags.compile
    )  # fmt: skip


def mlperf_constants(flags: Flags, schedule: Schedule, num_images: int, evaluation_images: int) -> mlperf.Constants:
    return mlperf.Constants(
        backbone=flags.backbone, feature_channels=feature_channels(flags.backbone), images=num_images,
        batch_size=schedule.global_batch_size, batch_norm_span=flags.batch_size, learning_rate=schedule.peak,
        warmup=flags.warmup, multistep=flags.multistep, momentum=flags.momentum, weight_decay=flags.weight_decay,
        nms_threshold=IOU_THRESHOLD, max_detections=MAX_DETECTIONS, evaluation_images=evaluation_images,
        target=flags.target,
    )  # fmt: skip


def run_mode(flags: Flags, processes: Processes) -> int:
    """Runs a mode other than training and returns the exit status."""
    if flags.mode in SINGLE_PROCESS_MODES and processes.world_size > 1:
        raise UserError(f"--mode {flags.mode} works on one process{SINGLE_PROCESS_MODES[flags.mode]}")
    with closing(Report(None, append=True) if processes.is_main else Report.disabled()) as report:
        context = RunContext(processes, report, flags.output)
        if flags.mode == "check":
            return check(
                flags.data, flags.output, upright=flags.upright, make_loader=loader_maker(flags, processes),
                make_decode_check=partial(make_decode_check, flags.data_pipeline, device=processes.device),
                report=report,
            )  # fmt: skip
        if flags.mode == "benchmark":
            training, _ = read_dataset(flags.data, evaluating=False, upright=flags.upright, log_progress=report.note)
            torch.manual_seed(flags.seed)
            model = SSD300(flags.backbone, len(training.categories) + 1)
            trainer = make_trainer(flags, processes, model)
            with closing(loader_maker(flags, processes)(training)) as loader, report_error_before_cleanup(processes):
                benchmark(
                    trainer, loader, training, backbone=flags.backbone, batch_size=flags.batch_size, report=report
                )
            return DONE
        assert flags.checkpoint is not None  # parse_args checks it
        if flags.mode == "evaluation":
            mean_ap = score_checkpoint(
                flags.checkpoint, flags.data, upright=flags.upright, backbone=flags.backbone,
                config=evaluation_config(flags), context=context,
            )  # fmt: skip
            return target_exit_status(mean_ap, flags.target, report)
        if flags.mode == "export":
            export(flags.checkpoint, flags.data, flags.output, backbone=flags.backbone, report=report)
            return DONE
        predict_folder(
            flags.data, checkpoint=flags.checkpoint, backbone=flags.backbone, config=evaluation_config(flags),
            context=context, score=flags.score,
        )  # fmt: skip
    return DONE


if __name__ == "__main__":
    sys.exit(main())
