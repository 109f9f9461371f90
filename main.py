"""Trains SSD300 on a ResNet: `python main.py --data DIR`.  README.rst has every flag and what a run leaves."""

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
    fail,
    meets_target,
    report_error_before_cleanup,
)
from src.report.report import Report, RunContext
from src.report.run_folder import LAST
from src.report.startup import ResumedFrom, compare_data, start_report, tell_data, tell_start
from src.runtime import launcher_env, process_group
from src.runtime.console import robust_console
from src.runtime.devices import configure
from src.runtime.distributed import Processes
from src.runtime.errors import DivergenceError, SigtermReceived, UserError
from src.runtime.output_files import lock_output_folder
from src.runtime.preemption import GracefulShutdown, raise_on_signals
from src.ssd.detect import IOU_THRESHOLD, MAX_DETECTIONS
from src.ssd.model import SSD300, feature_channels, training_memory_format
from src.training.checkpoint import TRAINING_DATA, Identity
from src.training.resume import resumed_file, run_to_continue, schedule_warnings, start_position, starting_model
from src.training.run import Run
from src.training.step import Schedule, Trainer, make_optimizer

SINGLE_PROCESS_MODES = {
    "check": ", which uses all cores",
    "benchmark": "",
    "export": "",
}  # modes that work on one, and why


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; the exit status."""
    try:
        with robust_console(), raise_on_signals():
            with launcher_env.print_once_per_node():
                flags = parse_args(argv)
            return run_rank(flags)
    except KeyboardInterrupt:
        return INTERRUPTED
    except SigtermReceived:
        return TERMINATED


def run_rank(flags: Flags) -> int:
    """Joins the other ranks and does this one's part of the mode; the exit status."""
    try:
        with process_group.start(flags.local_rank) as processes:
            try:
                # Before anything else that ranks do together: ranks with other flags would wait for each other in vain.
                processes.require_agreement(
                    flags.shared | {"the device": processes.device.type},
                    remedy="start all ranks with the same flags, all on GPUs or all on CPUs",
                )
                processes.check_devices()
                configure(processes.device)
                with convert_worker_errors():
                    return train(flags, processes) if flags.mode == "training" else work(flags, processes)
            except Exception as error:
                return fail(error, processes)
    except UserError as error:  # the processes could not be joined
        print(f"main.py: error: {error}", file=sys.stderr)
        return BAD_INPUT


def train(flags: Flags, processes: Processes) -> int:
    """`--mode training`: from scratch, from weights, or from where a run stopped."""
    began = time.perf_counter()
    with ExitStack() as stack:
        stop = stack.enter_context(closing(GracefulShutdown(processes)))
        epochs = [epoch for epoch in flags.evaluation_epochs if epoch < flags.epochs]
        training, validation = processes.on_all_ranks(partial(
            read_dataset, flags.data, evaluating=bool(epochs), upright=flags.upright,
            tell=print if processes.is_main else None,
        ))  # fmt: skip
        compare_data(processes, training=training, validation=validation)
        schedule = Schedule(
            base=flags.learning_rate,
            images=flags.batch_size * processes.world_size,
            warmup=flags.warmup or 0,
            multistep=tuple(flags.multistep),
        )
        settings = {"the number of processes": processes.world_size, TRAINING_DATA: training.digest}
        identity = Identity(
            flags.backbone, [list(category) for category in training.categories], flags.seed, flags.altering | settings
        )
        resumed = resumed_file(flags.resume, flags.output) if processes.is_main else None
        before = processes.broadcast_object(run_to_continue(resumed, flags.output, identity) if resumed else None)
        model, news = starting_model(
            flags.backbone, training.categories, seed=flags.seed, resumed=(resumed, before) if resumed else None,
            checkpoint=flags.checkpoint, backbone_weights=flags.backbone_weights, processes=processes,
        )  # fmt: skip
        loader = stack.enter_context(closing(loader_maker(flags, processes)(training)))
        stack.enter_context(report_error_before_cleanup(processes))
        stack.enter_context(convert_worker_errors())
        trainer = make_trainer(flags, processes, model)
        position, warnings = start_position(trainer, loader, schedule, identity, before, rank=processes.rank)
        report = Report.disabled()
        if processes.is_main:
            stack.enter_context(lock_output_folder(flags.output))
            # An older run's files are moved, or cut back, only now: all that could be among them has been read.
            continued = ResumedFrom(resumed, before.position.epoch, before.position.iteration) if resumed else None
            report = start_report(flags.output, continued=continued, flags=asdict(flags), processes=processes)
            stack.enter_context(closing(report))
        del before  # its weights and momentum: 200 MB and more on each rank
        tell_data(report, training, validation, half=flags.fp16, device=processes.device)
        missing = flags.output / LAST if flags.resume and not resumed else None
        for warning in (
            schedule_warnings(schedule, flags.epochs, len(loader), flags.unreached_evaluations, missing) + warnings
        ):
            report.warn(warning)
        for line in news:
            report.note(line)
        tell_start(
            report, processes=processes, loader=loader, epochs=flags.epochs, images=schedule.images,
            learning_rate=schedule.peak, training=training, validation=validation,
        )  # fmt: skip
        report.begin_run(mlperf_constants(flags, schedule, loader.num_images, len(validation) if validation else 0))
        context = RunContext(processes, report, flags.output)
        evaluate = None if validation is None else stack.enter_context(
            make_evaluation(model, validation, evaluation_config(flags), context)
        )  # fmt: skip
        stack.enter_context(
            report_error_before_cleanup(processes)
        )  # not only when the files of the last evaluation are made
        run = Run(
            trainer, loader, schedule, evaluate=evaluate, evaluation_epochs=epochs, identity=identity,
            position=position, output=flags.output, processes=processes, stop=stop, report=report,
        )  # fmt: skip
        train_to_the_end(run, epochs=flags.epochs, began=began)
        return meets_target(run.position.last_map, flags.target, report)


def train_to_the_end(run: Run, *, epochs: int, began: float) -> None:
    """Trains until `epochs` are done and tells how it ended.  began: time.perf_counter() of the start."""
    position, report = run.position, run.report  # `run` moves the position on
    if position.epoch >= epochs:
        report.note(f"Nothing is left to train: {position.epoch} epochs are done (--epochs {epochs})")
    try:
        run.train(epochs)
    except DivergenceError:
        report.mark_failed()
        raise
    except SigtermReceived:
        report.note(run.stopped_by())
        raise
    accuracy = position.last_map if position.evaluated else "not evaluated"
    report.end_run(
        average_images_per_second=run.images_per_second, seconds=time.perf_counter() - began, accuracy=accuracy
    )


def loader_maker(flags: Flags, processes: Processes) -> Callable[[Annotations], TrainLoader]:
    """Of the training annotations."""
    config = LoaderConfig(
        batch_size=flags.batch_size, num_workers=flags.num_workers, device=processes.device, amp=flags.fp16,
        seed=flags.seed, shard=processes.shard,
    )  # fmt: skip
    return partial(make_train_loader, flags.data_pipeline, config=config)


def evaluation_config(flags: Flags) -> EvaluationConfig:
    return EvaluationConfig(batch_size=flags.eval_batch_size, num_workers=flags.num_workers, amp=flags.fp16)


def make_trainer(flags: Flags, processes: Processes, model: SSD300) -> Trainer:
    if flags.freeze_backbone:
        model.freeze_backbone()
    layout = processes.broadcast_object(
        training_memory_format(flags.backbone, processes.device)
    )  # one, whatever the machines
    model = model.to(processes.device).to(memory_format=layout)
    optimizer = make_optimizer(model, momentum=flags.momentum, weight_decay=flags.weight_decay)
    return Trainer(
        model, optimizer=optimizer, device=processes.device, half=flags.fp16, processes=processes,
        layout=layout, compiled=flags.compile,
    )  # fmt: skip


def mlperf_constants(flags: Flags, schedule: Schedule, images: int, evaluation_images: int) -> mlperf.Constants:
    return mlperf.Constants(
        backbone=flags.backbone, feature_channels=feature_channels(flags.backbone), images=images,
        batch_size=schedule.images, batch_norm_span=flags.batch_size, learning_rate=schedule.peak,
        warmup=flags.warmup, multistep=flags.multistep, momentum=flags.momentum, weight_decay=flags.weight_decay,
        nms_threshold=IOU_THRESHOLD, max_detections=MAX_DETECTIONS, evaluation_images=evaluation_images,
        target=flags.target,
    )  # fmt: skip


def work(flags: Flags, processes: Processes) -> int:
    """Every other mode, which writes no log of a run; the exit status."""
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
            training, _ = read_dataset(flags.data, evaluating=False, upright=flags.upright, tell=report.note)
            torch.manual_seed(flags.seed)
            model = SSD300(flags.backbone, len(training.categories) + 1)
            trainer = make_trainer(flags, processes, model)
            with closing(loader_maker(flags, processes)(training)) as loader, report_error_before_cleanup(processes):
                benchmark(
                    trainer, loader, training, backbone=flags.backbone, batch_size=flags.batch_size, report=report
                )
            return DONE
        assert flags.checkpoint is not None  # parse_args sees to that
        if flags.mode == "evaluation":
            accuracy = score_checkpoint(
                flags.checkpoint, flags.data, upright=flags.upright, backbone=flags.backbone,
                config=evaluation_config(flags), context=context,
            )  # fmt: skip
            return meets_target(accuracy, flags.target, report)
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
