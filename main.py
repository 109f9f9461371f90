"""Trains SSD300 on a ResNet: `python main.py --data DIR`.  README.rst has every flag and what a run leaves."""

import argparse
import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import NoReturn

import torch

from src import distributed, mlperf
from src.checkpoint import load_checkpoint, load_weights
from src.coco import Annotations, Category, check_images_exist, read_annotations
from src.data import PIPELINES, EvaluationLoader, TrainLoader, make_train_loader
from src.distributed import Processes, StopNotice, Terminated
from src.errors import UserError
from src.evaluate import IOU_THRESHOLD, MAX_DETECTIONS, Evaluation, evaluate
from src.model import BACKBONES, SSD300, feature_channels
from src.report import NullReport, Report, set_aside_old_run
from src.run import LAST, Identity, Position, Run, changed_settings, digest, read_run, restore_position
from src.scoring import write_results
from src.train import REFERENCE_BATCH, Schedule, Trainer, TrainingBreakdownError, make_optimizer
from src.weights import load_backbone_weights, load_detector

EVALUATION_EPOCHS = [3, 21, 31, 37, 42, 48, 53, 59, 64]
MULTISTEP_EPOCHS = [43, 54]
MODES = ("training", "evaluation", "prediction", "check", "benchmark")
DONE, FAILED, BAD_INPUT, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143  # exit statuses


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: error: {message} (--help lists the flags)\n")


def make_parser() -> argparse.ArgumentParser:
    """The flags; README.rst and the tests pin the documented ones."""
    parser = Parser(
        prog="main.py",
        description="Trains the Single Shot MultiBox Detector (SSD300 on a ResNet) on data in the COCO 2017 layout.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    _add_documented(parser)
    _add_modes(parser.add_argument_group("what to do"))
    _add_weights(parser.add_argument_group("network and weights"))
    _add_output(parser.add_argument_group("output"))
    return parser


def _add_documented(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", "-d", type=_path, required=True, help="path to training and test data")
    add("--epochs", "-e", type=_count, default=65, help="epochs to train")
    add("--batch-size", "--bs", "-b", type=_positive, default=32, help="images per iteration, per process")
    add("--eval-batch-size", "--ebs", type=_positive, default=32, help="images per evaluation step, per process")
    add("--seed", "-s", type=_count, default=0, help="seed of everything random")
    add("--evaluation", nargs="*", type=_count, default=EVALUATION_EPOCHS, metavar="E",
        help="epochs (from 0) after which to evaluate; left out: these and the last; given empty: never")  # fmt: skip
    add("--multistep", nargs="*", type=_count, default=MULTISTEP_EPOCHS, metavar="E",
        help="epochs from whose start the learning rate is a tenth")  # fmt: skip
    add("--learning-rate", "--lr", type=_rate, default=2.6e-3,
        help="for 32 images: it is multiplied by processes x batch size / 32")  # fmt: skip
    add("--momentum", "-m", type=_rate, default=0.9, help="momentum of SGD")
    add("--weight-decay", "--wd", type=_rate, default=5e-4,
        help="weight decay of SGD; none on biases and batch-norm weights")  # fmt: skip
    add("--warmup", type=_count, default=None, help="iterations of linear warm-up from 0")
    add("--num-workers", type=_count, default=4, help="worker processes (no_dali) or threads (dali)")
    add("--fp16", action="store_true",
        help="half precision: float16 with loss scaling on a GPU, bfloat16 on a CPU")  # fmt: skip
    add("--local_rank", "--local-rank", type=_count, default=0,
        help="set by the launcher; the LOCAL_RANK variable wins")  # fmt: skip
    add("--data_pipeline", "--data-pipeline", choices=PIPELINES, default="dali",
        help="who prepares the training images: NVIDIA DALI or torchvision")  # fmt: skip


def _add_modes(group) -> None:
    group.add_argument(
        "--mode", choices=MODES, default="training",
        help="evaluation: score a checkpoint. prediction: --data is an image or a folder of images. check: read every "
        "image and annotation and report what is wrong. benchmark: time training steps and print images/s",
    )  # fmt: skip
    group.add_argument(
        "--target", type=_rate, default=None, metavar="MAP", help="exit status 1 when the final mAP is below it"
    )


def _add_weights(group) -> None:
    group.add_argument("--backbone", choices=BACKBONES, default="resnet50", help="the ResNet under the detector")
    group.add_argument(
        "--backbone-weights", default="imagenet", metavar="{imagenet,none,FILE}",
        help="torchvision's ImageNet weights, random ones, or a state_dict in a file",
    )  # fmt: skip
    group.add_argument(
        "--checkpoint", type=_path, default=None, metavar="FILE",
        help="the weights to use, in every mode; training starts at epoch 0 with them (fine-tuning)",
    )  # fmt: skip
    group.add_argument(
        "--resume", nargs="?", type=_path, const=True, default=None, metavar="FILE",
        help="continue a run exactly where FILE stopped; without FILE from last.pt in --output, or afresh where there "
        "is none",
    )  # fmt: skip


def _add_output(group) -> None:
    group.add_argument(
        "--output", type=_path, default=Path("models"), metavar="DIR", help="checkpoints, metrics and pictures"
    )


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    return Path(text).expanduser()


def _count(text: str) -> int:
    return _number(text, int, lambda value: value >= 0, "a whole number, 0 or more")


def _positive(text: str) -> int:
    return _number(text, int, lambda value: value >= 1, "a whole number, 1 or more")


def _rate(text: str) -> float:
    return _number(text, float, lambda value: math.isfinite(value) and value >= 0, "a number, 0 or more")


def _number(text: str, kind: type, accept, wanted: str):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not accept(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags, checked against each other; exits with status 2 and one line where they are bad."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.mode in ("evaluation", "prediction") and args.checkpoint is None:
        parser.error(f"--mode {args.mode} needs --checkpoint FILE")
    if args.checkpoint is not None and args.resume is not None:
        parser.error("--checkpoint starts a run with its weights, --resume continues one: give one of them")
    if args.mode in ("training", "benchmark") and args.batch_size == 1:
        parser.error("--batch-size 1: batch-norm cannot train on one image (the last map is 1 x 1); give 2 or more")
    if args.mode == "training" and args.epochs == 0:
        parser.error("--epochs 0: nothing to train")
    return args


def evaluation_epochs(args: argparse.Namespace) -> list[int]:
    """The epochs after which to evaluate: those given; where none are given, the published ones and the last."""
    if args.evaluation is EVALUATION_EPOCHS:
        return [*EVALUATION_EPOCHS, args.epochs - 1]
    return args.evaluation


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; the exit status."""
    args = parse_args(argv)
    jobs = {"training": train, "evaluation": score, "prediction": predict, "check": check, "benchmark": benchmark}
    try:
        with distributed.start(args.local_rank) as processes:
            try:
                configure(processes.device)
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
    lost = processes.is_lost(error)
    if processes.report_failure():
        who = f"rank {processes.rank}: " if processes.world_size > 1 else ""
        if lost:
            print(f"main.py: error: {who}lost touch with another process: {error}", file=sys.stderr)
        elif isinstance(error, (UserError, TrainingBreakdownError)):
            print(f"main.py: error: {who}{error}", file=sys.stderr)
        else:
            print(f"main.py: error: {who}a fault of the program:", file=sys.stderr)
            traceback.print_exception(error)
    return BAD_INPUT if isinstance(error, UserError) else FAILED


def configure(device: torch.device) -> None:
    """Lets a GPU choose its fastest convolutions, and TF32 where float32 is asked for."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")


def train(args: argparse.Namespace, processes: Processes) -> int:
    """`--mode training`: from scratch, from weights, or from where a run stopped."""
    began = time.perf_counter()
    stop = StopNotice(processes)
    epochs = [epoch for epoch in evaluation_epochs(args) if epoch < args.epochs]
    training, validation = read_data(args.data, evaluating=bool(epochs))
    schedule = make_schedule(args, processes)
    identity = make_identity(args, processes, training)
    state = processes.broadcast_object(resumed_state(args, identity) if processes.is_main else None)
    report = start_report(args, processes, state, training, validation)
    with closing(report), closing(stop):
        trainer = make_trainer(args, processes, report, training.categories, state)
        loader = make_train_loader(
            args.data_pipeline, training, batch_size=args.batch_size, num_workers=args.num_workers,
            device=processes.device, half=args.fp16, seed=args.seed, rank=processes.rank,
            world_size=processes.world_size,
        )  # fmt: skip
        with closing(loader):
            position = start_position(processes, report, trainer, loader, schedule, identity, state)
            tell_start(report, args, processes, loader, schedule, training, validation)
            evaluation = make_evaluation(args, processes, report, validation, trainer.model) if epochs else None
            run = Run(trainer, loader, schedule, evaluate=evaluation, evaluation_epochs=epochs, identity=identity,
                position=position, output=args.output, processes=processes, stop=stop, report=report)  # fmt: skip
            return finish(run, args, report, began)


def finish(run: Run, args: argparse.Namespace, report: Report | NullReport, began: float) -> int:
    """Trains to the end and tells how it ended; the exit status."""
    position = run.position
    if position.epoch >= args.epochs:
        report.note(f"Nothing is left to train: {position.epoch} epochs are done (--epochs {args.epochs})")
    try:
        run.train(args.epochs)
    except TrainingBreakdownError:
        report.break_down()
        raise
    except Terminated:
        report.note(
            f"Stopped by SIGTERM in epoch {position.epoch} after iteration {position.iteration - 1}; "
            f"--resume continues from {args.output / LAST}"
        )
        raise
    accuracy = position.last_map if position.evaluated else "not evaluated"
    report.end(average_images_per_second=run.images_per_second, seconds=time.perf_counter() - began, accuracy=accuracy)
    if args.target is not None and (position.last_map is None or position.last_map < args.target):
        report.warn(f"the final mAP is below --target {args.target}")
        return FAILED
    return DONE


def read_data(folder: Path, *, evaluating: bool) -> tuple[Annotations, Annotations | None]:
    """The training annotations, and those of the validation images where they will be needed; all images are there."""
    training = read_annotations(*locations(folder, "train"))
    validation = read_annotations(*locations(folder, "val"), categories=training.categories) if evaluating else None
    for annotations in (training, validation):
        if annotations is not None:
            check_images_exist(annotations)
    return training, validation


def locations(folder: Path, split: str) -> tuple[Path, Path]:
    """Annotation file and image folder of a split in the COCO 2017 layout."""
    return folder / "annotations" / f"instances_{split}2017.json", folder / f"{split}2017"


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
        "data_pipeline",
    )
    settings = {f"--{name}": getattr(args, name.replace("-", "_")) for name in names}
    settings |= {"the number of processes": processes.world_size, "the training data": digest(training)}
    return Identity(args.backbone, [list(category) for category in training.categories], args.seed, settings)


def resumed_state(args: argparse.Namespace, identity: Identity) -> dict | None:
    """The checkpoint to continue from, None for a new run."""
    if args.resume is None:
        return None
    path = args.output / LAST if args.resume is True else args.resume
    if args.resume is True and not path.exists():
        return None
    return read_run(path, identity)


def start_report(
    args, processes: Processes, state: dict | None, training: Annotations, validation
) -> Report | NullReport:
    """Opens the run's files on rank 0 and tells what the data held; an older run's files are set aside first."""
    if not processes.is_main:
        return NullReport()
    continued = state is not None and (args.resume is True or args.resume.parent.resolve() == args.output.resolve())
    moved = None if continued else set_aside_old_run(args.output)
    report = Report(args.output, append=continued)
    if continued:
        report.truncate(epoch=state["epoch"], iteration=state["iteration"])
    if moved:
        report.note(moved)
    for annotations in (training, validation):
        for warning in annotations.warnings if annotations else ():
            report.warn(warning)
    if args.fp16 and not half_is_fast(processes.device):
        report.warn("--fp16: this CPU has no bfloat16 arithmetic, so it is slower than without")
    report.flags(vars(args), device=device_name(processes.device), processes=processes.world_size)
    return report


def half_is_fast(device: torch.device) -> bool:
    capabilities = torch.cpu.get_capabilities()
    return device.type == "cuda" or any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def make_trainer(
    args: argparse.Namespace, processes: Processes, report, categories: tuple[Category, ...], state: dict | None
) -> Trainer:
    """The network with the weights it starts from on rank 0 (several processes copy rank 0's), and its optimizer."""
    torch.manual_seed(args.seed)
    model = SSD300(args.backbone, len(categories) + 1)
    if processes.is_main:
        if state is not None:
            load_weights(model, state["model"], source=args.output, fresh_label_heads=False)
        elif args.checkpoint is not None:
            line = load_detector(model, load_checkpoint(args.checkpoint), categories, source=args.checkpoint)
            if line:
                report.note(line)
        else:
            load_backbone_weights(model, args.backbone, args.backbone_weights)
    processes.broadcast_object()  # fetching may take long
    model.to(processes.device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, momentum=args.momentum, weight_decay=args.weight_decay)
    return Trainer(model, optimizer=optimizer, device=processes.device, half=args.fp16, processes=processes)


def start_position(processes: Processes, report, trainer: Trainer, loader: TrainLoader, schedule: Schedule,
                   identity: Identity, state: dict | None) -> Position:  # fmt: skip
    """Where the run begins; everything but the weights is taken from the checkpoint, where there is one."""
    if state is None:
        return Position()
    changed = changed_settings(state, identity)
    if changed:
        report.warn(f"continued with other settings than before, so the run is another one: {', '.join(changed)}")
    trainer.restore(state)
    position = restore_position(state, schedule)
    states = state["pipeline"]
    own = states[processes.rank] if len(states) == processes.world_size else {}
    loader.load_state_dict(own, epoch=position.epoch, iteration=position.within)
    for warning in loader.warnings:
        report.warn(warning)
    return position


def tell_start(report, args, processes: Processes, loader: TrainLoader, schedule: Schedule, training: Annotations,
               validation: Annotations | None) -> None:  # fmt: skip
    """What the run found and will do, in a few lines and in the MLPerf log."""
    rate = schedule.base * schedule.images / REFERENCE_BATCH
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
    loader = EvaluationLoader(
        validation,
        batch_size=args.eval_batch_size,
        num_workers=args.num_workers,
        device=processes.device,
        rank=processes.rank,
        world_size=processes.world_size,
    )

    def evaluate_epoch(epoch: int) -> dict[str, float | None]:
        report.begin_evaluation(epoch)
        found = evaluate(model, loader, validation, device=processes.device, half=args.fp16, dist=processes,
                         progress=report.progress)  # fmt: skip
        report.evaluation(epoch=epoch, figures=found.scores.figures)
        if processes.is_main:
            leave_results(args.output, report, found)
        processes.broadcast_object()  # pictures may take long
        return found.scores.figures

    return evaluate_epoch


def leave_results(output: Path, report: Report, found: Evaluation) -> None:
    """Writes what an evaluation leaves beside its figures, and notes what is odd about it."""
    write_results(output / "detections.json", found.results)
    if found.non_finite:
        report.warn(f"{found.non_finite} outputs of the network were not finite and detect nothing")
    if not len(found.results.scores):
        report.note("Nothing was detected with a score above the threshold")


def score(args: argparse.Namespace, processes: Processes) -> int:
    raise NotImplementedError


def predict(args: argparse.Namespace, processes: Processes) -> int:
    raise NotImplementedError


def check(args: argparse.Namespace, processes: Processes) -> int:
    raise NotImplementedError


def benchmark(args: argparse.Namespace, processes: Processes) -> int:
    raise NotImplementedError


if __name__ == "__main__":
    sys.exit(main())
