"""Trains SSD300 on a ResNet: `python main.py --data DIR`.  README.rst has every flag and what a run leaves."""

import argparse
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

# The imports below take seconds, in which Ctrl-C would show where they were.  Who starts this may have it ignored.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch

from src import distributed
from src.benchmark import benchmark as time_steps
from src.data.check import check_dataset
from src.data.coco import Annotations, Category, check_images_exist, locations, read_annotations
from src.data.loaders import EvaluationLoader, TrainLoader, make_train_loader
from src.distributed import Processes, StopNotice, Terminated
from src.errors import UserError
from src.evaluation.evaluate import IOU_THRESHOLD, MAX_DETECTIONS, Evaluation, evaluate
from src.evaluation.gallery import draw_training_batch, leave_evaluation, tell_figures, warn_of_non_finite
from src.evaluation.predict import find_images
from src.evaluation.predict import predict as predict_images
from src.flags import evaluation_epochs, parse_args, unreached_evaluations
from src.output import make_folder, reserved
from src.precision import SLOW_HALF, half_is_fast
from src.report import mlperf
from src.report.plots import draw_training
from src.report.report import METRICS, NullReport, Report, set_aside_old_run
from src.ssd.model import SSD300, feature_channels
from src.training.checkpoint import load_checkpoint, load_weights
from src.training.run import (
    LAST,
    TRAINING_DATA,
    Identity,
    Position,
    Run,
    changed_settings,
    read_run,
    restore_position,
)
from src.training.step import Schedule, Trainer, TrainingBreakdownError, make_optimizer
from src.training.weights import known_categories, load_backbone_weights, load_detector, read_labelled

BENCHMARK_STEPS = 20
UNREADABLE_TOLD = 3  # images that --mode prediction names
DONE, FAILED, BAD_INPUT, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143  # exit statuses


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; the exit status."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.stderr is None:  # closed by who started this
        sys.stderr = io.StringIO()
    with distributed.telling_once():
        args = parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files and categories may be beyond a terminal's alphabet
        sys.stdout.reconfigure(errors="backslashreplace")
    jobs = {"training": train, "evaluation": score, "prediction": predict, "check": check, "benchmark": benchmark}
    try:
        with distributed.start(args.local_rank) as processes:
            try:
                distributed.configure(processes.device)
                return jobs[args.mode](args, processes)
            except Exception as error:
                return fail(error, processes)
    except UserError as error:  # the processes could not be joined
        print(f"main.py: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    except Terminated:
        return TERMINATED


def fail(error: Exception, processes: Processes) -> int:
    """Tells why this process ends, unless another has told before; the exit status."""
    if processes.world_size > 1:  # a launcher that has seen another process end does not wait for the message
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    lost = processes.is_lost(error)
    if lost and processes.stopped_elsewhere() is not None:
        return TERMINATED
    if processes.report_failure():
        who = f"rank {processes.rank}: " if processes.world_size > 1 else ""
        if lost:
            other = f"rank {1 - processes.rank}" if processes.world_size == 2 else "another process"
            print(f"main.py: error: {who}lost touch with {other} ({distributed.reason(error)})", file=sys.stderr)
        elif isinstance(error, (UserError, TrainingBreakdownError)):
            print(f"main.py: error: {who}{error}", file=sys.stderr)
        elif is_out_of_memory(error):
            advice = "lower --batch-size, --eval-batch-size or --num-workers, or use --fp16"
            detail = (str(error).splitlines() or ["MemoryError"])[0]
            print(f"main.py: error: {who}out of memory ({detail}): {advice}", file=sys.stderr)
        else:
            print(f"main.py: error: {who}a fault of the program:", file=sys.stderr)
            traceback.print_exception(error)
        processes.told()
    return BAD_INPUT if isinstance(error, UserError) else FAILED


def is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU's or the host's memory was too small; for the host's, torch raises plain RuntimeErrors."""
    marks = ("can't allocate memory", "killed by signal: Killed")  # the second is how the system ends a worker process
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(mark in str(error) for mark in marks)


def train(args: argparse.Namespace, processes: Processes) -> int:
    """`--mode training`: from scratch, from weights, or from where a run stopped."""
    began = time.perf_counter()
    with ExitStack() as stack:
        stop = stack.enter_context(closing(StopNotice(processes)))
        epochs = [epoch for epoch in evaluation_epochs(args) if epoch < args.epochs]
        training, validation = read_data(args.data, evaluating=bool(epochs))
        schedule = make_schedule(args, processes)
        identity = make_identity(args, processes, training)
        state = processes.broadcast_object(resumed_state(args, identity) if processes.is_main else None)
        model, news = starting_model(args, processes, training.categories, state)
        loader = stack.enter_context(closing(make_loader(args, processes, training)))
        trainer = make_trainer(args, processes, model)
        position, warnings = start_position(processes, trainer, loader, schedule, identity, state)
        if processes.is_main:
            stack.enter_context(reserved(args.output))
        # An older run's files are moved, or cut back, only now: all that could be among them has been read.
        report = stack.enter_context(closing(start_report(args, processes, state, training, validation)))
        for epoch in unreached_evaluations(args):
            report.warn(f"--evaluation {epoch}: not reached, the epochs are 0 to {args.epochs - 1} (--epochs)")
        for warning in warnings:
            report.warn(warning)
        for line in news:
            report.note(line)
        tell_start(report, args, processes, loader, schedule, training, validation)
        run = Run(
            trainer, loader, schedule, evaluate=make_evaluation(args, processes, report, validation, model),
            evaluation_epochs=epochs, identity=identity, position=position, output=args.output, processes=processes,
            stop=stop, report=report,
        )  # fmt: skip
        return finish(run, args, report, began)


def finish(run: Run, args: argparse.Namespace, report: Report | NullReport, began: float) -> int:
    """Trains to the end and tells how it ended; the exit status."""
    position = run.position  # `run` moves it on
    if position.epoch >= args.epochs:
        report.note(f"Nothing is left to train: {position.epoch} epochs are done (--epochs {args.epochs})")
    try:
        run.train(args.epochs)
    except TrainingBreakdownError:
        report.break_down()
        raise
    except Terminated:
        where = f"in epoch {position.epoch} after {position.within} of its {position.length} iterations"
        report.note(f"Stopped by SIGTERM {where}; --resume continues from {args.output / LAST}")
        raise
    accuracy = position.last_map if position.evaluated else "not evaluated"
    report.end(average_images_per_second=run.images_per_second, seconds=time.perf_counter() - began, accuracy=accuracy)
    return meets_target(args, report, position.last_map)


def meets_target(args: argparse.Namespace, report: Report | NullReport, accuracy: float | None) -> int:
    """The exit status after an evaluation that ended with `accuracy`."""
    if args.target is None or (accuracy is not None and accuracy >= args.target):
        return DONE
    which = "there is no final mAP to reach" if accuracy is None else "the final mAP is below"
    report.warn(f"{which} --target {args.target}")
    return FAILED


def read_data(folder: Path, *, evaluating: bool) -> tuple[Annotations, Annotations | None]:
    """The training annotations, and those of the validation images where they will be needed; all images are there."""
    training = read_annotations(*locations(folder, "train"))
    validation = read_annotations(*locations(folder, "val"), categories=training.categories) if evaluating else None
    for annotations in (training, validation):
        if annotations is not None:
            check_images_exist(annotations)
    return training, validation


def make_loader(args: argparse.Namespace, processes: Processes, training: Annotations) -> TrainLoader:
    return make_train_loader(
        args.data_pipeline, training, batch_size=args.batch_size, num_workers=args.num_workers,
        device=processes.device, half=args.fp16, seed=args.seed, rank=processes.rank, world_size=processes.world_size,
    )  # fmt: skip


def make_schedule(args: argparse.Namespace, processes: Processes) -> Schedule:
    return Schedule(
        base=args.learning_rate,
        images=args.batch_size * processes.world_size,
        warmup=args.warmup or 0,
        multistep=tuple(args.multistep),
    )


def make_identity(args: argparse.Namespace, processes: Processes, training: Annotations) -> Identity:
    """What a checkpoint says of the run; the settings are named as the flags are."""
    names = (
        "batch-size",
        "seed",
        "learning-rate",
        "momentum",
        "weight-decay",
        "warmup",
        "multistep",
        "fp16",
        "compile",
        "data_pipeline",
    )
    settings = {f"--{name}": getattr(args, name.replace("-", "_")) for name in names}
    settings |= {"the number of processes": processes.world_size, TRAINING_DATA: training.digest}
    return Identity(args.backbone, [list(category) for category in training.categories], args.seed, settings)


def resumed_state(args: argparse.Namespace, identity: Identity) -> dict | None:
    """The checkpoint to continue from, None for a new run."""
    if args.resume is None or (args.resume is True and not resumed_file(args).exists()):
        return None
    return read_run(resumed_file(args), identity)


def resumed_file(args: argparse.Namespace) -> Path:
    return args.output / LAST if args.resume is True else args.resume


def start_report(args, processes: Processes, state: dict | None, training, validation) -> Report | NullReport:
    """Opens the run's files on rank 0 and tells what the data held; an older run's files are set aside first."""
    if not processes.is_main:
        return NullReport()
    continued = state is not None and resumed_file(args).parent.resolve() == args.output.resolve()
    moved = None if continued else set_aside_old_run(args.output)
    report = Report(args.output, append=continued)
    if moved:
        report.note(moved)
    if state is not None:
        report.truncate(epoch=state["epoch"], iteration=state["iteration"])
        report.note(f"Continued from {resumed_file(args)}: epoch {state['epoch']}, iteration {state['iteration']}")
    tell_data(report, args, processes, training, validation)
    report.flags(vars(args), device=device_name(processes.device), processes=processes.world_size)
    return report


def tell_data(report, args, processes: Processes, training: Annotations | None, validation: Annotations | None) -> None:
    """What is odd about the data and the machine."""
    for annotations in (training, validation):
        for warning in annotations.warnings if annotations else ():
            report.warn(warning)
    if args.fp16 and not half_is_fast(processes.device):
        report.warn(SLOW_HALF)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def starting_model(
    args: argparse.Namespace, processes: Processes, categories: tuple[Category, ...], state: dict | None
) -> tuple[SSD300, list[str]]:
    """The network with the weights it starts from, and lines to print about them.

    The weights are loaded on rank 0, from which the wrapper of several processes copies them.
    """
    torch.manual_seed(args.seed)
    model = SSD300(args.backbone, len(categories) + 1)
    news = []
    if processes.is_main:
        if state is not None:
            load_weights(model, state["model"], source=resumed_file(args), fresh_label_heads=False)
        elif args.checkpoint is not None:
            news += load_detector(model, load_checkpoint(args.checkpoint), categories, source=args.checkpoint)
        else:
            load_backbone_weights(model, args.backbone, args.backbone_weights)
    processes.broadcast_object()  # fetching may take long
    return model.to(processes.device, memory_format=torch.channels_last), news


def make_trainer(args: argparse.Namespace, processes: Processes, model: SSD300) -> Trainer:
    optimizer = make_optimizer(model, momentum=args.momentum, weight_decay=args.weight_decay)
    return Trainer(
        model, optimizer=optimizer, device=processes.device, half=args.fp16, processes=processes, compiled=args.compile
    )


def trained_model(args, processes: Processes, state: dict, num_categories: int) -> SSD300:
    """The network of a checkpoint, which says itself what backbone it has unless it is a published one."""
    model = SSD300(state.get("backbone", args.backbone), num_categories + 1)
    load_weights(model, state["model"], source=args.checkpoint, fresh_label_heads=False)
    return model.to(processes.device, memory_format=torch.channels_last)


def start_position(processes: Processes, trainer: Trainer, loader: TrainLoader, schedule: Schedule,
                   identity: Identity, state: dict | None) -> tuple[Position, list[str]]:  # fmt: skip
    """Where the run begins, and warnings; all but the weights is taken from the checkpoint, where there is one."""
    if state is None:
        return Position(), []
    changed = changed_settings(state, identity)
    warnings = []
    if changed:
        warnings = [f"continued with other settings than before, so the run is another one: {', '.join(changed)}"]
    trainer.restore(state)
    position = restore_position(state, schedule, len(loader))
    states = state["pipeline"]
    own = states[min(processes.rank, len(states) - 1)]  # which tells of another number of processes itself
    loader.load_state_dict(own, epoch=position.epoch, iteration=position.within)
    return position, warnings + loader.warnings


def tell_start(report, args, processes: Processes, loader: TrainLoader, schedule: Schedule, training: Annotations,
               validation: Annotations | None) -> None:  # fmt: skip
    """What the run found and will do, in a few lines and in the MLPerf log."""
    rate = schedule.peak
    report.note(f"Device: {device_name(processes.device)}, processes: {processes.world_size}")
    report.note(
        f"Training images: {loader.num_images} with {len(training.boxes)} boxes of {len(training.categories)} "
        f"categories ({len(training) - loader.num_images} without boxes left out)"
    )
    if validation is not None:
        report.note(f"Validation images: {len(validation)} with {len(validation.boxes)} boxes")
    report.note(f"Iterations an epoch: {len(loader)} of {schedule.images} images, learning rate: {rate:.4g}")
    report.begin_run(
        mlperf.Constants(
            backbone=args.backbone,
            feature_channels=feature_channels(args.backbone),
            images=loader.num_images,
            batch_size=schedule.images,
            batch_norm_span=args.batch_size,
            learning_rate=rate,
            warmup=args.warmup,
            multistep=args.multistep,
            momentum=args.momentum,
            weight_decay=args.weight_decay,
            nms_threshold=IOU_THRESHOLD,
            max_detections=MAX_DETECTIONS,
            evaluation_images=len(validation) if validation is not None else 0,
            target=args.target,
        )
    )


def make_evaluation(args, processes: Processes, report, validation: Annotations, model: torch.nn.Module) -> Callable:
    """A function of the epoch that scores the network on all processes, tells the report and leaves files."""

    def evaluate_epoch(epoch: int) -> dict[str, float | None]:
        report.begin_evaluation(epoch)
        found = score_images(args, processes, report, validation, model)
        report.evaluation(epoch=epoch, figures=found.scores.figures)
        if processes.is_main:
            leave_evaluation(found, validation, args.output, report)
            draw_training(args.output / METRICS, args.output / "training.png")
        processes.broadcast_object()  # pictures may take long
        return found.scores.figures

    return evaluate_epoch


def score_images(args, processes: Processes, report, validation: Annotations, model: torch.nn.Module) -> Evaluation:
    loader = EvaluationLoader(
        validation, batch_size=args.eval_batch_size, num_workers=args.num_workers, device=processes.device,
        rank=processes.rank, world_size=processes.world_size,
    )  # fmt: skip
    return evaluate(
        model, loader, validation, device=processes.device, half=args.fp16, dist=processes, progress=report.progress
    )


def score(args: argparse.Namespace, processes: Processes) -> int:
    """`--mode evaluation`: the 12 figures of a checkpoint, and mAP by category."""
    state = processes.broadcast_object(load_checkpoint(args.checkpoint) if processes.is_main else None)
    validation = read_labelled(*locations(args.data, "val"), state, source=args.checkpoint)
    check_images_exist(validation)
    make_folder(args.output)  # before the work, not after it
    report = Report(None, append=True) if processes.is_main else NullReport()
    with closing(report):
        tell_data(report, args, processes, None, validation)
        model = trained_model(args, processes, state, len(validation.categories))
        found = score_images(args, processes, report, validation, model)
        tell_figures(report, found.scores)
        if processes.is_main:
            leave_evaluation(found, validation, args.output, report)
    return meets_target(args, report, found.scores.figures["mAP"])


def predict(args: argparse.Namespace, processes: Processes) -> int:
    """`--mode prediction`: detections on images without annotations."""
    if processes.world_size > 1:
        raise UserError("--mode prediction works on one process")
    state = load_checkpoint(args.checkpoint)
    categories = known_categories(state)
    if args.data.is_dir() and args.data.samefile(make_folder(args.output)):
        raise UserError(f"--output {args.output} is the images' own folder: what is drawn there would count as images")
    with closing(Report(None, append=True)) as report:
        model = trained_model(args, processes, state, len(categories))
        done = predict_images(
            model, find_images(args.data), categories, args.output, batch_size=args.eval_batch_size,
            device=processes.device, half=args.fp16, progress=report.progress,
        )  # fmt: skip
        counted = f"{done.images - len(done.unreadable)} images, {done.detections} detections"
        report.note(f"{counted}: pictures and detections.json in {args.output}")
        warn_of_non_finite(report, done.non_finite)
    if done.unreadable:
        counted = f"{len(done.unreadable)} of {done.images} images left out"
        raise UserError(f"{counted}: {'; '.join(map(str, done.unreadable[:UNREADABLE_TOLD]))}")
    return DONE


def check(args: argparse.Namespace, processes: Processes) -> int:
    """`--mode check`: reads every image and annotation, and draws a training batch."""
    if processes.world_size > 1:
        raise UserError("--mode check works on one process, which uses all cores")
    with closing(Report(None, append=True)) as report:
        make_folder(args.output)
        files = [locations(args.data, split) for split in ("train", "val")]
        status = check_dataset(files, workers=os.cpu_count() or 1, progress=report.progress, write=report.note)
        if status == DONE:
            training = read_annotations(*files[0])
            with closing(make_loader(args, processes, training)) as loader:
                path = draw_training_batch(next(iter(loader)), training.categories, args.output)
            report.note(f"A training batch as the network sees it: {path}")
    return status


def benchmark(args: argparse.Namespace, processes: Processes) -> int:
    """`--mode benchmark`: the speed of training and evaluation steps."""
    if processes.world_size > 1:
        raise UserError("--mode benchmark works on one process")
    training, _ = read_data(args.data, evaluating=False)
    torch.manual_seed(args.seed)
    model = SSD300(args.backbone, len(training.categories) + 1)
    trainer = make_trainer(args, processes, model.to(processes.device, memory_format=torch.channels_last))
    with closing(Report(None, append=True)) as report, closing(make_loader(args, processes, training)) as loader:
        tell_data(report, args, processes, training, None)
        report.note(f"Device: {device_name(processes.device)}, {args.backbone}, {args.batch_size} images a step")
        time_steps(trainer, loader, batch_size=args.batch_size, num_labels=model.num_labels, steps=BENCHMARK_STEPS,
                   write=report.note)  # fmt: skip
    return DONE


if __name__ == "__main__":
    sys.exit(main())
