"""A small run that calls every method of a report, and a reader of mlperf.log."""

import json
import re
from collections.abc import Callable
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import NamedTuple

from src.report import mlperf
from src.report.metrics import IterationMetrics
from src.report.report import Report

CONSTANTS = mlperf.Constants(
    backbone="resnet50",
    feature_channels=(1024, 512, 512, 256, 256, 256),
    images=117266,
    batch_size=256,
    batch_norm_span=32,
    learning_rate=0.0208,
    warmup=None,
    multistep=(1, 2),
    momentum=0.9,
    weight_decay=5e-4,
    nms_threshold=0.5,
    max_detections=200,
    evaluation_images=5000,
    target=0.25,
)
ITERATIONS = 30  # an epoch of the runs below
PER_EPOCH = ITERATIONS + 3  # stages: the begin, the iterations, the end and the evaluation


def log_iteration(report: Report, iteration: int, **changes) -> None:
    logged = {
        "loss": 17.20314,
        "localisation_loss": 2.5,
        "label_loss": 14.75,
        "learning_rate": 2.6e-3,
        "images_per_second": 523.1,
        "loss_scale": 65536.0,
        "skipped_steps": 3,
    }
    report.log_iteration(iteration // ITERATIONS, iteration, IterationMetrics(**(logged | changes)))


def end_epoch(report: Report, epoch: int) -> None:
    report.end_epoch(epoch=epoch, seconds=61.23, images_per_second=523.14, average_images_per_second=523.14)


class Stage(NamedTuple):
    """A step of a run between two possible checkpoints."""

    epoch: int  # with iteration, the position of a checkpoint that is written just before
    iteration: int
    inside: bool  # whether the epoch has begun and not ended
    play: Callable[[Report], None]


def stages() -> list[Stage]:
    """A run of three epochs, each evaluated; its values depend on the position alone."""
    found = []
    for epoch in range(3):
        first = epoch * ITERATIONS
        found.append(Stage(epoch, first, False, methodcaller("begin_epoch", epoch=epoch, iterations=ITERATIONS)))
        for iteration in range(first, first + ITERATIONS):
            found.append(Stage(epoch, iteration, True, partial(train_and_log, iteration=iteration)))
        found.append(Stage(epoch, first + ITERATIONS, True, partial(end_epoch, epoch=epoch)))
        found.append(Stage(epoch, first + ITERATIONS, False, partial(evaluate, epoch=epoch)))
    end = methodcaller("end_run", average_images_per_second=531.04, seconds=4021.66, accuracy=2 / 7)
    return [*found, Stage(3, 3 * ITERATIONS, False, end)]


def train_and_log(report: Report, iteration: int) -> None:
    report.advance(256)
    if iteration % 20 == 0:
        log_iteration(report, iteration, loss=20 - iteration / 7)


def evaluate(report: Report, epoch: int) -> None:
    report.begin_evaluation(epoch)
    report.log_evaluation(epoch=epoch, metrics={"mAP": epoch / 7, "AP50": epoch / 3, "AP small": None})


def play_run(report: Report, start: int = 0, stop: int | None = None) -> None:
    """Plays stages start..stop as a run that starts at `start`."""
    report.begin_run(CONSTANTS)
    stage = stages()[start]
    if stage.inside:
        report.begin_epoch(stage.epoch, ITERATIONS, stage.iteration - stage.epoch * ITERATIONS)
    for stage in stages()[start:stop]:
        stage.play(report)


def tags(folder: Path) -> list[tuple[str, object]]:
    """Key and value of each line of mlperf.log; fails on a line of another form."""
    found = []
    for line in (folder / "mlperf.log").read_text().splitlines():
        match = re.fullmatch(r":::MLPv0\.5\.0 ssd \d+\.\d{9} \(src/report/mlperf\.py:\d+\) (\w+)(?:: (.+))?", line)
        assert match, line
        found.append((match[1], None if match[2] is None else json.loads(match[2])))
    return found
