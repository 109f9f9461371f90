"""Training that breaks down: losses, gradients and weights that are not finite, memory that is too small."""

import io
import multiprocessing
import os
import re
import signal
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import main
from src.benchmark import random_batch
from src.data.pipelines.loader_config import LoaderConfig
from src.data.pipelines.torch_pipeline import EvaluationLoader
from src.data.pipelines.workers import convert_worker_errors
from src.report.report import Report
from src.runtime.distributed import Processes
from src.runtime.errors import DivergenceError, UserError
from src.runtime.preemption import GracefulShutdown
from src.ssd.default_boxes import NUM_DEFAULT_BOXES
from src.training.checkpoint import Position
from src.training.divergence import NEVER, NonFiniteLossMonitor
from src.training.loop import train_epoch
from src.training.schedule import Schedule
from src.training.step import Trainer
from tests.helpers.both_pipelines import CPU, train_loader
from tests.helpers.datasets import annotation, read, write_coco
from tests.helpers.small_runs import error_line, metrics, run
from tests.helpers.trainers import ScalarReads, make_trainer

pytestmark = pytest.mark.usefixtures("tiny_model")

ALONE = Processes.single(CPU)


def test_weights_that_are_not_finite_are_not_saved(pipeline, tmp_path, capsys):
    data = write_coco(tmp_path / "data", [annotation(1), annotation(2)], images=2)
    assert run(pipeline, data, tmp_path / "output", "--lr", "1e38", "--evaluation") == 1
    said = (
        "the weights or batch-norm statistics are not finite after epoch 0, iteration 0 (learning rate 6.25e+36): lower"
    )
    assert said in error_line(capsys)
    assert not (tmp_path / "output" / "last.pt").exists()


class Steep(nn.Module):
    """A network whose outputs are a million times its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.offsets = nn.Parameter(torch.zeros(1, 4, NUM_DEFAULT_BOXES))
        self.logits = nn.Parameter(torch.zeros(1, 3, NUM_DEFAULT_BOXES))

    def forward(self, images):
        return 1e6 * self.offsets.expand(len(images), -1, -1), 1e6 * self.logits.expand(len(images), -1, -1)


@pytest.fixture
def scaled_trainer(monkeypatch) -> Trainer:
    """A trainer with loss scaling, as on a GPU, from a scale at which the first gradients overflow."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    with monkeypatch.context() as patched:
        patched.setattr(torch.amp, "GradScaler", lambda *_, **__: scaler)
        return make_trainer(Steep())


def test_steps_that_loss_scaling_skips_are_counted_and_reported(scaled_trainer, tmp_path):
    batch = random_batch(2, 3, device=CPU, dtype=torch.float32)
    lines = io.StringIO()
    report, stop = Report(tmp_path, append=False, stream=lines), GracefulShutdown(ALONE)
    try:
        schedule = Schedule(base_learning_rate=1e-9, global_batch_size=2)
        for position, iterations in ((Position(0), 21), (Position(1, iteration=21), 1)):
            train_epoch(scaled_trainer, [batch] * iterations, schedule, position=position, shutdown=stop, report=report)
            assert (position.iteration, position.iteration_in_epoch) == (21 + position.epoch, iterations)
    finally:
        stop.close()
        report.close()
    skipped = round(np.log2(2.0**127 / scaled_trainer.scaler.get_scale()))  # each halves the scale
    assert skipped > 0
    first, last = (entry for entry in metrics(tmp_path) if entry["kind"] == "iteration")
    assert (first["skipped_steps"], last["skipped_steps"]) == (1, skipped)
    assert lines.getvalue().count("skipped") == 1
    assert f"Epoch  0: {skipped} steps skipped because float16 gradients overflowed\n" in lines.getvalue()
    plain = make_trainer(Steep())
    for _ in range(22 - skipped):
        plain.step(batch, schedule.learning_rate(0, 0))
    assert skipped < 20 and plain.model.logits.any()
    for ours, theirs in zip(scaled_trainer.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-12)


def test_counting_skipped_steps_reads_nothing_from_the_device(scaled_trainer):
    batch = random_batch(2, 3, device=CPU, dtype=torch.float32)
    with ScalarReads() as reads:
        scaled_trainer.step(batch, 1e-9)
        assert reads.count == 0
        assert scaled_trainer.skipped_steps() == 1
        assert reads.count == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_an_error(scaled_trainer, value):
    scaled_trainer.check_weights(epoch=0, iteration=0, learning_rate=0.1)
    with torch.no_grad():
        scaled_trainer.model.offsets[0, 0, 7] = value
    with pytest.raises(DivergenceError, match="epoch 3, iteration 41"):
        scaled_trainer.check_weights(epoch=3, iteration=41, learning_rate=0.1)


def test_batch_norm_statistics_that_are_not_finite_are_an_error(scaled_trainer):
    """Loss scaling leaves the step out, and keeps what the forward pass has done to them."""
    scaled_trainer.model.append = nn.BatchNorm2d(3)
    scaled_trainer.check_weights(epoch=0, iteration=0, learning_rate=0.1)
    scaled_trainer.model.append.running_var[1] = float("inf")
    with pytest.raises(DivergenceError, match="batch-norm statistics are not finite after epoch 0"):
        scaled_trainer.check_weights(epoch=0, iteration=0, learning_rate=0.1)


@pytest.mark.parametrize("others", [-7, -5, -NEVER])
def test_the_first_bad_iteration_of_all_processes_is_named(others):
    """Each says the negative of its own first one, the greatest of which is the first."""
    watch = NonFiniteLossMonitor(SimpleNamespace(all_reduce_max=lambda own: max(own, others)), CPU, tolerate_one=False)
    watch.observe(torch.tensor(float("nan")), 6)
    with pytest.raises(DivergenceError, match=f"iteration {min(6, -others)} "):
        watch.check(epoch=0, iteration=0, learning_rate=0.1)


# --- memory ----------------------------------------------------------------------------------------------------------


@contextmanager
def files_no_larger_than(size: int):
    """What a process can write into a file, one in /dev/shm too; forked processes inherit it."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/shm is Linux's")
@pytest.mark.parametrize("training", [True, False])
def test_shared_memory_that_is_too_small_names_its_size_and_the_flag(tmp_path, training):
    annotations = read(write_coco(tmp_path, [annotation(image) for image in (1, 2, 3, 4)]))
    if training:
        loader = train_loader("no_dali", annotations, batch_size=4, num_workers=1)
    else:
        loader = EvaluationLoader(annotations, LoaderConfig(batch_size=4, num_workers=1, device=CPU))
    said = r"^/dev/shm \(\d+\.\d MiB\) is too small for 1 worker processes: .*--num-workers 0\)$"
    with files_no_larger_than(4 * 300 * 300), pytest.raises(UserError, match=said):
        next(iter(loader))


def test_a_killed_worker_is_a_user_error(tmp_path, capsys):
    annotations = read(write_coco(tmp_path, [annotation(image) for image in (1, 2, 3, 4)]))
    loader = train_loader("no_dali", annotations, batch_size=2, num_workers=1)
    others = set(multiprocessing.active_children())
    batches = iter(loader)
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - others
    os.kill(worker.pid, signal.SIGKILL)
    # torch raises its own error from a signal handler, anywhere
    with pytest.raises(UserError) as raised, convert_worker_errors():
        time.sleep(10)
        for _ in range(10):
            loader.set_epoch(1)
            list(loader)
    loader.close()
    assert main.report_error(raised.value, Processes.single(CPU)) == 2
    assert re.search(r"worker processes was killed \(.*--num-workers 0", error_line(capsys))


def memory_error_of_torch_save() -> RuntimeError:
    class Full(io.BytesIO):
        def write(self, data: bytes) -> int:
            if self.tell() > 50:
                raise MemoryError
            return super().write(data)

    with pytest.raises(RuntimeError, match="unexpected pos") as raised:
        torch.save(torch.zeros(1000), Full())
    return raised.value


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
        memory_error_of_torch_save(),
    ],
)
def test_too_little_memory_names_the_flags(error, capsys):
    assert main.report_error(error, Processes.single(CPU)) == 1
    assert re.search(r"error: out of memory \(.*\): lower --batch-size", error_line(capsys))
