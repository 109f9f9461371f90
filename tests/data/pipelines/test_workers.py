"""Worker processes that die, fail or hang, in training and evaluation: the run ends with a line and does not wait."""

import errno
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
from multiprocessing import connection
from pathlib import Path

import pytest
import torch
from torch.utils.data import _utils

import main
from src.data.pipelines import torch_pipeline, workers
from src.data.pipelines.loader_config import LoaderConfig
from src.data.pipelines.torch_pipeline import EvaluationLoader, TorchTrainLoader
from src.runtime.errors import UserError
from tests.helpers.both_pipelines import CPU
from tests.helpers.datasets import annotation, read, write_coco
from tests.helpers.small_runs import error_line, flags

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the faults are put into forked processes")
IMAGES = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_coco(tmp_path_factory.mktemp("data"), [annotation(i) for i in range(1, IMAGES + 1)], images=IMAGES)


def batches(kind: str, data: Path, num_workers: int = 2) -> list[torch.Tensor]:
    """The images of a whole pass, in batches of two."""
    config = LoaderConfig(batch_size=2, num_workers=num_workers, device=CPU)
    if kind == "evaluation":
        return [images for images, _ in EvaluationLoader(read(data), config)]
    loader = TorchTrainLoader(read(data), config)
    try:
        return [batch.images for batch in loader]
    finally:
        loader.close()


@pytest.fixture(params=["training", "evaluation"])
def kind(request) -> str:
    return request.param


@pytest.fixture
def in_workers(monkeypatch):
    """`in_workers(act)`: every worker calls `act` instead of reading an image."""

    def replace_reader(act):
        monkeypatch.setattr(torch_pipeline, "read_image", lambda *_: act())

    return replace_reader


def test_a_folder_whose_path_is_too_long_for_sockets(kind, data, tmp_path, monkeypatch):
    folder = tmp_path / ("x" * 80)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    alone, shared = batches(kind, data, 0), batches(kind, data, 1)
    assert len(alone) == len(shared) == IMAGES // 2
    assert all(map(torch.equal, alone, shared))


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (errno.EMFILE, "too many open files .*: raise their limit"),
        (errno.ENOSPC, "no space is left for the worker processes' sockets in "),
        (errno.EACCES, r"one of 1 worker processes cannot hand its images over \(\[Errno 13\] Permission denied\)"),
    ],
)
def test_an_error_while_a_batch_is_sent_ends_the_run_in_a_line(kind, data, monkeypatch, number, line):
    """Pickling the first batch opens a socket."""

    def no_listener(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(connection, "Listener", no_listener)
    with pytest.raises(UserError, match=line):
        batches(kind, data, 1)


def test_a_batch_that_cannot_be_pickled_raises(kind, data, monkeypatch):
    collate = {"training": "collate_training", "evaluation": "collate_evaluation"}[kind]
    monkeypatch.setattr(torch_pipeline, collate, lambda _: lambda: None)
    with pytest.raises((AttributeError, pickle.PicklingError), match=r"pickle|get local object"):  # by Python's version
        batches(kind, data, 1)


@pytest.mark.parametrize("end", [lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: os._exit(0)])
def test_a_worker_that_ends_before_its_first_batch(kind, data, monkeypatch, in_workers, end):
    monkeypatch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 0.5)
    in_workers(end)
    with pytest.raises(UserError, match=r"one of 2 worker processes was killed \(.*--num-workers 0"):
        batches(kind, data)
    assert multiprocessing.active_children() == []


def test_a_worker_that_finds_shared_memory_full(kind, data, in_workers):
    in_workers(lambda: os.kill(os.getpid(), signal.SIGBUS))
    with pytest.raises(UserError, match=r"/dev/shm \(.*\) is too small for 1 worker processes: "):
        batches(kind, data, 1)


def test_a_queue_that_cannot_be_made_ends_the_run_but_no_other_process(kind, data, monkeypatch):
    living = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    living.start()

    def no_queue(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(multiprocessing.context.BaseContext, "Queue", no_queue)
    try:
        with pytest.raises(UserError, match="no space is left for the worker processes' sockets"):
            batches(kind, data, 1)
        assert living.is_alive()
    finally:
        living.kill()
        living.join()


def test_the_shared_memory_of_a_gpu_is_not_that_of_workers():
    error = RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376.")
    assert workers.to_user_error(error) is error


def test_a_killed_worker_gives_the_same_line_outside_the_loader():
    """Torch raises it from its handler of SIGCHLD, anywhere in the program."""
    error = workers.to_user_error(RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. "))
    assert str(error).startswith(
        "one of the worker processes was killed (DataLoader worker (pid 7) is killed by signal"
    )


def test_a_worker_that_cannot_be_started(kind, data, monkeypatch):
    fork, calls = os.fork, iter(range(9))

    def limited() -> int:
        if next(calls) == 1:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return fork()

    monkeypatch.setattr(os, "fork", limited)
    with pytest.raises(UserError, match=r"cannot start 2 worker processes .*ulimit -u"):
        batches(kind, data)
    assert multiprocessing.active_children() == []


def test_an_interrupt_while_workers_start_prints_no_traceback(kind, data, monkeypatch):
    """Torch's half-made iterator would print one when it is collected."""
    fork, calls, unraisable = os.fork, iter(range(9)), []

    def interrupted() -> int:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return fork()

    monkeypatch.setattr(os, "fork", interrupted)
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    with pytest.raises(KeyboardInterrupt):
        batches(kind, data)
    gc.collect()
    assert unraisable == []
    for worker in multiprocessing.active_children():  # the program's own context closes the loader
        worker.kill()
        worker.join()


def test_the_limit_of_open_files_is_raised_or_named(kind, data, monkeypatch):
    limits = [(64, 1024), (64, 64)]
    given = []
    monkeypatch.setattr(workers.resource, "getrlimit", lambda _: limits[len(given)])
    monkeypatch.setattr(workers.resource, "setrlimit", lambda _, pair: given.append(pair))
    assert len(batches(kind, data, 1)) == IMAGES // 2
    assert given == [(77, 1024)]
    with pytest.raises(UserError, match=r"2 worker processes need 90 open files and 64 are allowed: .*ulimit -n 90"):
        batches(kind, data, 2)


@pytest.mark.usefixtures("tiny_model")
def test_an_interrupt_ends_a_run_that_waits_for_a_hanging_worker(data, tmp_path, monkeypatch, in_workers, capsys):
    monkeypatch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    in_workers(lambda: time.sleep(600))
    sender = threading.Thread(target=send_once_a_worker_is_there, args=(signal.SIGINT,))
    sender.start()
    assert main.main(flags(data, tmp_path, "--num-workers", "1", "--evaluation")) == main.INTERRUPTED
    sender.join()
    assert capsys.readouterr().err == ""
    assert multiprocessing.active_children() == []


def send_once_a_worker_is_there(number: int) -> None:
    while not multiprocessing.active_children():
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(os.getpid(), number)


def test_too_few_open_files_end_the_program_in_a_line(data, tmp_path, monkeypatch, capsys):
    def none_left(*_, **__):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "a file")

    monkeypatch.setattr("src.evaluation.validation.load_checkpoint_or_export", none_left)
    assert main.main(flags(data, tmp_path, "--mode", "evaluation", "--checkpoint", "x.pt")) == main.BAD_INPUT
    assert "too many open files ([Errno 24] Too many open files: 'a file'): raise their limit" in error_line(capsys)


class Cyclic:
    """An object that only the garbage collector frees; it records the process that does."""

    def __init__(self, file: Path) -> None:
        self.itself, self.file = self, file

    def __del__(self) -> None:
        with self.file.open("a") as file:
            file.write(f"{os.getpid()} ")


def test_workers_do_not_collect_garbage_of_the_main_process(data, tmp_path, in_workers, kind):
    """Collecting one of DALI's objects on a GPU would end the worker."""
    file = tmp_path / "collected"
    in_workers(lambda: [gc.collect(), torch.zeros(3, 120, 160, dtype=torch.uint8)][1])
    gc.disable()
    try:
        Cyclic(file)
        batches(kind, data)
        assert not file.exists()
    finally:
        gc.enable()
    gc.collect()
    assert file.read_text().split() == [str(os.getpid())]
