"""The flags of main.py.  README.rst documents them, and a test pins them to it."""

import argparse
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NoReturn, TypeVar

from src.data.pipelines.loaders import PIPELINES
from src.report.exit_status import BAD_INPUT
from src.ssd.model import BACKBONES

MAX_INT = 2**31 - 1  # DALI counts in 32 bits
EVALUATION_EPOCHS = [3, 21, 31, 37, 42, 48, 53, 59, 64]
MULTISTEP_EPOCHS = [43, 54]
ORIENTATIONS = ("stored", "upright")
MODES = ("training", "evaluation", "prediction", "check", "benchmark", "export")

# Flags whose values make a run what it is.
RUN_DEFINING = ("batch-size", "seed", "learning-rate", "momentum", "weight-decay", "warmup", "multistep", "fp16",
                "compile", "data_pipeline", "orientation", "freeze-backbone")  # fmt: skip

# Flags that may differ between ranks: machines have their own folders and cores, and only rank 0 reads weights.
PER_RANK = ("data", "output", "num_workers", "local_rank", "checkpoint", "resume", "backbone_weights")

Add = Callable[..., argparse.Action]  # the add_argument of a group
Number = TypeVar("Number", int, float)


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The values of the flags, given or default, in the order of the usage text."""

    data: Path
    epochs: int
    batch_size: int  # per process
    eval_batch_size: int  # per process
    seed: int
    evaluation: Sequence[int]  # as given, or EVALUATION_EPOCHS itself
    multistep: Sequence[int]
    learning_rate: float  # for 32 images
    momentum: float
    weight_decay: float
    warmup: int | None
    num_workers: int
    fp16: bool
    local_rank: int
    data_pipeline: str
    mode: str
    target: float | None
    score: float | str | None  # None: as published; "best": each category's own
    orientation: str
    backbone: str
    backbone_weights: str
    freeze_backbone: bool
    checkpoint: Path | None
    resume: Path | bool | None  # True: from last.pt in `output`
    compile: bool
    output: Path

    @property
    def evaluation_epochs(self) -> list[int]:
        """The epochs after which to evaluate: those given, else the published ones and the last."""
        if self.evaluation is EVALUATION_EPOCHS:
            return [*EVALUATION_EPOCHS, self.epochs - 1]
        return list(self.evaluation)

    @property
    def reached_evaluations(self) -> frozenset[int]:
        """The epochs after which the run evaluates."""
        return frozenset(epoch for epoch in self.evaluation_epochs if epoch < self.epochs)

    @property
    def unreached_evaluations(self) -> list[int]:
        """Epochs given with --evaluation that the run ends before."""
        given = [] if self.evaluation is EVALUATION_EPOCHS else sorted(set(self.evaluation))
        return [epoch for epoch in given if epoch >= self.epochs]

    @property
    def upright(self) -> bool:
        """Whether images are turned by their EXIF orientation."""
        return self.orientation == "upright"

    @property
    def same_on_all_ranks(self) -> dict[str, object]:
        """The flags on which all ranks must agree, by the names that a user writes."""
        names = [field.name for field in fields(self) if field.name not in PER_RANK]
        values = {name: getattr(self, name) for name in names} | {"evaluation": self.evaluation_epochs}
        return {f"--{name if name == 'data_pipeline' else name.replace('_', '-')}": values[name] for name in names}

    @property
    def run_defining_flags(self) -> dict[str, object]:
        """The flags that make a run what it is, by the names that a user writes."""
        return {f"--{name}": getattr(self, name.replace("-", "_")) for name in RUN_DEFINING}


class Parser(argparse.ArgumentParser):
    """Reports a bad flag in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: error: {message} (--help lists the flags)\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of a flag, unless it is None or False."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = Parser(
        prog="main.py",
        description="Trains the Single Shot MultiBox Detector (SSD300 on a ResNet) on data in the COCO 2017 layout.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    _add_documented(parser)
    _add_modes(parser.add_argument_group("what to do").add_argument)
    _add_input(parser.add_argument_group("input").add_argument)
    _add_weights(parser.add_argument_group("network and weights").add_argument)
    _add_speed(parser.add_argument_group("speed").add_argument)
    _add_output(parser.add_argument_group("output").add_argument)
    return parser


def _add_documented(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", "-d", type=_path, required=True, help="path to training and test data")
    add("--epochs", "-e", type=_count, default=65, help="epochs to train")
    add("--batch-size", "--bs", "-b", type=_positive, default=32, help="images per iteration, per process")
    add("--eval-batch-size", "--ebs", type=_positive, default=32, help="images per evaluation step, per process")
    add("--seed", "-s", type=_seed, default=0, help="seed of everything random")
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
        help="half precision: float16 with loss scaling on a GPU, bfloat16 on a CPU that has it")  # fmt: skip
    add("--local_rank", "--local-rank", type=_count, default=0,
        help="set by the launcher; the LOCAL_RANK variable wins")  # fmt: skip
    add("--data_pipeline", "--data-pipeline", choices=PIPELINES, default="dali",
        help="what prepares the training images: NVIDIA DALI or torchvision")  # fmt: skip


def _add_modes(add: Add) -> None:
    add(
        "--mode", choices=MODES, default="training",
        help="evaluation: score a checkpoint. prediction: --data is an image or a folder of images. check: read every "
        "image and annotation and report what is wrong. benchmark: time training steps and print images/s. export: "
        "write a checkpoint as files that other programs run, and print how much they differ from it on some images of "
        "--data (an image, a folder or a data set)",
    )  # fmt: skip
    add("--target", type=_fraction, default=None, metavar="MAP", help="exit status 1 when the final mAP is below it")
    add(
        "--score", type=_score, default=None, metavar="{S,best}",
        help="prediction: draw and list detections of this score or more; best: the score at which each category has "
        "its best F1; left out: draw from 0.3, list from 0.05",
    )  # fmt: skip


def _add_input(add: Add) -> None:
    add(
        "--orientation", choices=ORIENTATIONS, default="stored",
        help="the images that the annotation files describe: as stored, or turned upright by their EXIF orientation "
        "tags",
    )  # fmt: skip


def _add_weights(add: Add) -> None:
    add("--backbone", choices=BACKBONES, default="resnet50", help="the ResNet under the detector")
    add(
        "--backbone-weights", type=_weights, default="imagenet", metavar="{imagenet,none,FILE}",
        help="torchvision's ImageNet weights, random ones, or a state_dict in a file",
    )  # fmt: skip
    add(
        "--freeze-backbone", action="store_true",
        help="keep the backbone's weights and batch-norm statistics as they are; for a few hundred images or fewer",
    )  # fmt: skip
    add(
        "--checkpoint", type=_path, default=None, metavar="FILE",
        help="the weights to use, in every mode; training starts at epoch 0 with them (fine-tuning). Modes evaluation "
        "and prediction take an exported file, too",
    )  # fmt: skip
    add(
        "--resume", nargs="?", type=_path, const=True, default=None, metavar="FILE",
        help="continue a run exactly where FILE stopped; without FILE, continue from last.pt in --output, or start a "
        "new run if there is no last.pt",
    )  # fmt: skip


def _add_speed(add: Add) -> None:
    add(
        "--compile", action="store_true",
        help="train through torch.compile, which fuses the operations between the convolutions; starts a minute later",
    )  # fmt: skip


def _add_output(add: Add) -> None:
    add("--output", type=_path, default=Path("models"), metavar="DIR", help="checkpoints, metrics and pictures")


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r}: no home folder is known for its ~") from None


def _weights(text: str) -> str:
    return text if text in ("imagenet", "none") else str(_path(text))


def _count(text: str) -> int:
    return _number(text, int, lambda value: 0 <= value <= MAX_INT, f"a whole number from 0 to {MAX_INT}")


def _positive(text: str) -> int:
    return _number(text, int, lambda value: 1 <= value <= MAX_INT, f"a whole number from 1 to {MAX_INT}")


def _seed(text: str) -> int:
    return _number(text, int, lambda value: 0 <= value < 2**64, "a whole number from 0 to 2^64 - 1")


def _rate(text: str) -> float:
    return _number(text, float, lambda value: math.isfinite(value) and value >= 0, "a number, 0 or more")


def _fraction(text: str) -> float:
    return _number(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def _score(text: str) -> float | str:
    if text == "best":
        return text
    return _number(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1, or best")


def _number(text: str, kind: Callable[[str], Number], accept: Callable[[Number], bool], wanted: str) -> Number:
    with suppress(ValueError):
        value = kind(text)
        if accept(value):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")


def parse_args(argv: Sequence[str] | None = None) -> Flags:
    """Parses the flags and checks them against each other; prints one line and exits with status 2 if they are bad."""
    parser = make_parser()
    flags = Flags(**vars(parser.parse_args(argv)))
    if flags.mode in ("evaluation", "prediction", "export") and flags.checkpoint is None:
        parser.error(f"--mode {flags.mode} needs --checkpoint FILE")
    if flags.checkpoint is not None and flags.resume not in (None, True):
        parser.error("--checkpoint starts a run with its weights, --resume FILE continues one: give one of them")
    if flags.mode in ("training", "benchmark") and flags.batch_size == 1:
        parser.error("--batch-size 1: batch-norm cannot train on one image (the last map is 1 x 1); give 2 or more")
    if flags.mode == "training" and flags.epochs == 0:
        parser.error("--epochs 0: nothing to train")
    return flags
