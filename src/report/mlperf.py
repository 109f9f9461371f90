"""mlperf.log: the run in the format of MLPerf v0.5, with the SSD tags of the package mlperf_compliance.

The package is imported when a log is started.  Its import adds a console handler and opens the file that the variable
COMPLIANCE_FILE names, its lines name their caller by full path, and it prints blank lines: here its logger gets one
handler, on our file, and paths begin at the project's folder.
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
CALLER_OF_WRITE = 2  # frames above the package's own that a line names as its origin

LINE = re.compile(r"^:::MLPv\S+ ssd \S+ \(\S+\) (?P<key>\w+)(?:: (?P<value>.*))?\n", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What is known of a run before it starts and not fixed in the program."""

    backbone: str
    feature_channels: Sequence[int]  # of the six feature maps
    images: int  # trained on in an epoch
    batch_size: int  # of all processes together
    batch_norm_span: int  # images that batch-norm statistics are taken over
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
    """Writes the tags of one run; a run that is continued goes on in its file.  Raises OSError on write errors."""

    def __init__(self, path: Path, constants: Constants, *, append: bool) -> None:
        """Tells the constants, after which the training loop begins.  append: continue the file if it has them."""
        self._package = _package()
        self._constants = constants
        told = path.read_text("utf-8") if append and path.exists() else ""
        self._epoch = max((int(tag["value"]) for tag in LINE.finditer(told) if tag["key"] == "train_epoch"), default=-1)
        self._handler = _FileHandler(path, mode="a" if append else "w", encoding="utf-8")
        _use_only(self._package.LOGGER, self._handler)
        if not told:
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
        self._write(package.INPUT_SHARD, constants.images)  # the whole set is shuffled
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
        """An epoch begins, or is gone on with, which is not told again."""
        if epoch <= self._epoch:
            return
        self._epoch = epoch
        self._write(self._package.TRAIN_EPOCH, epoch)
        if epoch in self._constants.multistep:
            falls = sum(step <= epoch for step in self._constants.multistep)
            self._write(self._package.OPT_LR, self._constants.learning_rate / 10**falls)

    def begin_evaluation(self, epoch: int) -> None:
        self._write(self._package.EVAL_START, epoch)
        self._write(self._package.EVAL_SIZE, self._constants.evaluation_images)

    def end_evaluation(self, epoch: int, accuracy: float | None) -> None:
        """accuracy: mAP, None where it is not defined."""
        self._write(self._package.EVAL_ACCURACY, {"epoch": epoch, "value": accuracy})
        self._write(self._package.EVAL_TARGET, self._constants.target)
        self._write(self._package.EVAL_STOP, epoch)

    def end_run(self, *, accuracy: float | None, completed: bool) -> None:
        """The run is over.  It is a success when it was completed and its accuracy reaches the target, if there is one.

        accuracy: the final mAP, None where there is none.
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
    """Raises errors on writing, which `logging` would print."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, the name is logging's
        raise

    def close(self) -> None:
        with suppress(OSError):  # every line was flushed, and an error raised, when it was written
            super().close()


def _package() -> ModuleType:
    """The package's logging module, imported without opening a file, its paths cut to begin at the project's folder."""
    environment_file = os.environ.pop("COMPLIANCE_FILE", None)
    try:
        from mlperf_compliance import mlperf_log
    finally:
        if environment_file is not None:
            os.environ["COMPLIANCE_FILE"] = environment_file
    mlperf_log.ROOT_DIR_SSD = re.escape(str(Path(__file__).parents[2]))
    return mlperf_log


def _use_only(logger: logging.Logger, handler: logging.Handler) -> None:
    for other in logger.handlers[:]:
        logger.removeHandler(other)
        other.close()
    logger.addHandler(handler)
    logger.propagate = False


def rewind(text: str, epoch: int) -> str:
    """An mlperf.log as it was before `epoch` was evaluated: what a run continued in that epoch goes on from.

    A run that had ended goes on as if it had not; a line that was cut goes, and so do constants that are not complete.
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
