"""Runs of main.py that are stopped and continued, in this process and in two on gloo."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import distributed as dist

import main
from src.ssd.loss import LossParts
from src.training.step import Trainer
from src.weights.backbone import load_backbone_weights
from tests.helpers.tiny_model import use_tiny_model

SETTINGS = [(pipeline, half) for pipeline in ("dali", "no_dali") for half in (False, True)]
PAIR_SETTINGS = [(pipeline, True) for pipeline in ("dali", "no_dali")]  # on two processes precision changes nothing
# The warm-up ends inside the second epoch, in which the rate is a tenth.
FLAGS = ("--backbone", "resnet18", "--backbone-weights", "none", "-b", "2", "--num-workers", "0", "--lr", "0.16",
         "--warmup", "4", "--multistep", "1", "--evaluation")  # fmt: skip
FULL_RATE = 0.16 * 2 / 32  # for two images
INSIDE, BOUNDARY = "inside.pt", "boundary.pt"  # checkpoints inside the first epoch and at its end


def pipeline_flags(pipeline: str, half: bool) -> tuple[str, ...]:
    return "--data_pipeline", pipeline, *(["--fp16"] if half else [])


def run_two_epochs(data: Path, output: Path, *more: str, signalled_at: int | None = None) -> int:
    """main.py on `data`, telling the loss of every iteration; SIGTERM comes in its n-th training step, if at all."""
    step, steps = Trainer.step, iter(range(1, 100))

    def signalled(*arguments):
        if next(steps) == signalled_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    with mock.patch.object(Trainer, "step", signalled), mock.patch("src.training.loop.LOG_INTERVAL", 1):
        return main.main(["--data", str(data), "--output", str(output), "--epochs", "2", *FLAGS, *more])


def run_and_stop(data: Path, folder: Path, stops: list[int | None], start: Callable) -> None:
    """`folder/whole` is never stopped; `folder/stopped` is, in those steps since it started, and continued each time.

    INSIDE and BOUNDARY in `folder` are its first two checkpoints.
    """
    assert start(data, folder / "whole") == main.DONE
    names = iter([INSIDE, BOUNDARY])
    for number, stop in enumerate(stops):
        resumed = ["--resume"] if number else []
        assert start(data, folder / "stopped", *resumed, signalled_at=stop) == (main.TERMINATED if stop else main.DONE)
        shutil.copy(folder / "stopped" / "last.pt", folder / next(names, "later.pt"))


def state_of(folder: Path) -> dict:
    return torch.load(folder / "last.pt")


def idle_run(data: Path, output: Path, *more: str) -> tuple[int, int]:
    """Exit status of a run whose training steps do nothing, and how many there were."""
    nothing = LossParts(torch.ones(()), torch.ones(()))
    with mock.patch.object(Trainer, "step", return_value=nothing) as step:
        status = main.main(["--data", str(data), "--output", str(output), "--epochs", "2", *FLAGS, *more])
        return status, step.call_count


def run_as_rank(rank: int, data: Path, folder: Path, ports: list[int]) -> None:
    """All runs of two processes, one after another, as their launcher would start this one each time."""
    torch.set_num_threads(1)
    environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(environment)
    numbers = iter(ports)

    def start(data: Path, output: Path, *more: str, signalled_at: int | None = None) -> int:
        os.environ["MASTER_PORT"] = str(next(numbers))
        fetching = mock.patch("src.training.resume.load_backbone_weights", wraps=load_backbone_weights)
        with use_tiny_model(), fetching as fetched:
            status = run_two_epochs(data, output, *setting, *more, signalled_at=signalled_at if rank == 1 else None)
        assert fetched.call_count == int(rank == 0 and "--resume" not in more)
        if dist.is_initialized():
            dist.destroy_process_group()
        return status

    for pipeline, half in PAIR_SETTINGS:
        setting = pipeline_flags(pipeline, half)
        run_and_stop(data, folder / f"{pipeline} {half}", [1, 1, None], start)  # they stop an iteration later
