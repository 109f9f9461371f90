"""mlperf.log: a run's log in the format of MLPerf v0.5, with the SSD tags of the package mlperf_compliance.

The package is imported when a log is opened.  By itself it adds a console handler, opens the file that the variable
COMPLIANCE_FILE names, writes full paths of callers and prints blank lines.  Here its logger gets a single handler, on
our file, and paths begin at the project's folder.
"""

import logging
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from src.data.pipelines.augment import FLIP_PROBABILITY
from src.data.pipelines.batch import IMAGENET_MEAN, IMAGENET_STD
from src.ssd.default_boxes import ASPECT_RATIOS, BOXES_PER_CELL, FEATURE_SIZES, NUM_DEFAULT_BOXES, SCALES, STEPS

CROPPING_ITERATIONS = 1  # windows tried before another crop condition is picked
CALLER_OF_WRITE = 2  # stack frames between the package and the caller that a line names

LINE = re.compile(r"^:::MLPv\S+ ssd \S+ \(\S+\) (?P<key>\w+)(?:: (?P<value>.*))?\n", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Constants:
    """The constants of a run that depend on flags and data."""

    backbone: str
    feature_channels: Sequence[int]  # of the six feature maps
    images: int  # training images of an epoch
    batch_size: int  # of all processes together
    batch_norm_span: int  # images per batch-norm statistic
    learning_rate: float  # after the warm-up
    warmup: int | None  # iterations
    multistep: Sequence[int]  # epochs from whose start the learning rate is a tenth
    momentum: float
    weight_decay: float
    nms_threshold: float  # intersection over union
    max_detections: int  # an image
    evaluation_images: int
    target: float | None  # mAP


class MlperfLog:
    """Writes the tags of one run.  Every method raises OSError if it cannot write."""

    def __init__(self, path: Path, constants: Constants, *, append: bool) -> None:
        """Writes the constants and the start of the training loop.  append: continue a file that has them."""
        self._package = _package()
        self._constants = constants
        earlier = path.read_text("utf-8") if append and path.exists() else ""
        epochs = (int(tag["value"]) for tag in LINE.finditer(earlier) if tag["key"] == "train_epoch")
        self._epoch = max(epochs, default=-1)
        self._handler = _FileHandler(path, mode="a" if append else "w", encoding="utf-8")
        _use_only(self._package.LOGGER, self._handler)
        if not earlier:
            self._write(self._package.RUN_START)
            self._write_model()
            self._write_pipeline()
            self._write_optimizer()
            self._write(self._package.TRAIN_LOOP)

    def _write_model(self) -> None:
        package, constants = self._package, self._constants
        self._write(package.BACKBONE, constants.backbone)
        self._write(package.FEATURE_SIZES, FEATURE_SIZES)
        self._write(package.STEPS, STEPS)
        self._write(package.SCALES, SCALES)
        self._write(package.ASPECT_RATIOS, ASPECT_RATIOS)
        self._write(package.NUM_DEFAULTS_PER_CELL, BOXES_PER_CELL)
        self._write(package.LOC_CONF_OUT_CHANNELS, list(constants.feature_channels))
        self._write(package.NUM_DEFAULTS, NUM_DEFAULT_BOXES)
        self._write(package.NMS_THRESHOLD, constants.nms_threshold)
        self._write(package.NMS_MAX_DETECTIONS, constants.max_detections)

    def _write_pipeline(self) -> None:
        package, constants = self._package, self._constants
        self._write(package.INPUT_SIZE, constants.images)
        self._write(package.INPUT_SHARD, constants.images)  # all images are shuffled
        self._write(package.INPUT_ORDER)
        self._write(package.NUM_CROPPING_ITERATIONS, CROPPING_ITERATIONS)
        self._write(package.RANDOM_FLIP_PROBABILITY, FLIP_PROBABILITY)
        self._write(package.DATA_NORMALIZATION_MEAN, IMAGENET_MEAN)
        self._write(package.DATA_NORMALIZATION_STD, IMAGENET_STD)
        self._write(package.INPUT_BATCH_SIZE, constants.batch_size)
        self._write(package.INPUT_BN_SPAN, constants.batch_norm_span)

    def _write_optimizer(self) -> None:
        package, constants = self._package, self._constants
        self._write(package.OPT_NAME, package.SGD_WITH_MOMENTUM if constants.momentum else package.SGD)
        self._write(package.OPT_LR, constants.learning_rate)
        self._write(package.OPT_MOMENTUM, constants.momentum)
        self._write(package.OPT_WEIGHT_DECAY, constants.weight_decay)
        self._write(package.OPT_LR_WARMUP_STEPS, constants.warmup or 0)

    def begin_epoch(self, epoch: int) -> None:
        """Writes the start of an epoch, with its learning rate if that falls; nothing if the log has the epoch."""
        if epoch <= self._epoch:
            return
        self._epoch = epoch
        self._write(self._package.TRAIN_EPOCH, epoch)
        if epoch in self._constants.multistep:
            falls = sum(step <= epoch for step in self._constants.multistep)
            self._write(self._package.OPT_LR, self._constants.learning_rate / 10**falls)

    def begin_evaluation(self, epoch: int) -> None:
        """Writes the start of an evaluation."""
        self._write(self._package.EVAL_START, epoch)
        self._write(self._package.EVAL_SIZE, self._constants.evaluation_images)

    def end_evaluation(self, epoch: int, accuracy: float | None) -> None:
        """Writes the end of an evaluation.  accuracy: mAP; None: not defined."""
        self._write(self._package.EVAL_ACCURACY, {"epoch": epoch, "value": accuracy})
        self._write(self._package.EVAL_TARGET, self._constants.target)
        self._write(self._package.EVAL_STOP, epoch)

    def end_run(self, *, accuracy: float | None, completed: bool) -> None:
        """Writes the end of the run.  A completed run is a success if it has no target or its accuracy reaches it.

        accuracy: the final mAP; None: not defined or not evaluated.
        """
        target = self._constants.target
        reached = target is None or (accuracy is not None and accuracy >= target)
        self._write(self._package.RUN_STOP, {"success": completed and reached})
        self._write(self._package.RUN_FINAL)

    def close(self) -> None:
        self._package.LOGGER.removeHandler(self._handler)
        self._handler.close()

    def _write(self, tag: str, value: Any = None) -> None:
        self._package.ssd_print(tag, value, stack_offset=CALLER_OF_WRITE, extra_print=False)


class _FileHandler(logging.FileHandler):
    """A handler that raises write errors, which `logging` would print."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, the name is logging's
        raise

    def close(self) -> None:
        with suppress(OSError):  # every line was flushed when it was written, and raised its error then
            super().close()


def _package() -> ModuleType:
    """The package's logging module, imported without COMPLIANCE_FILE; its paths begin at the project's folder."""
    environment_file = os.environ.pop("COMPLIANCE_FILE", None)
    try:
        from mlperf_compliance import mlperf_log
    finally:
        if environment_file is not None:
            os.environ["COMPLIANCE_FILE"] = environment_file
    mlperf_log.ROOT_DIR_SSD = re.escape(str(Path(__file__).parents[2]))
    return mlperf_log


def _use_only(logger: logging.Logger, handler: logging.Handler) -> None:
    """Makes `handler` the only one of the logger."""
    for other in logger.handlers[:]:
        logger.removeHandler(other)
        other.close()
    logger.addHandler(handler)
    logger.propagate = False


def rewind(text: str, epoch: int) -> str:
    """The text of an mlperf.log up to the evaluation of `epoch`, in which the run continues.

    It leaves out the end of the run and damaged lines.  It is empty if the constants are incomplete.
    """
    kept, complete = [], False
    for tag in LINE.finditer(text):
        key, value = tag["key"], tag["value"]
        if (key == "train_epoch" and int(value) > epoch) or (key == "eval_start" and int(value) >= epoch):
            break
        complete = complete or key == "train_loop"
        if key not in ("run_stop", "run_final"):
            kept.append(tag[0])
    return "".join(kept) if complete else ""
