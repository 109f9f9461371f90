"""`launch` and `started` of tests.helpers.launch, with processes that are forked from a ready Python.

A fresh Python imports the program for seconds of processor time, and a launcher's every process anew. Here one process
of the standard library's fork server has imported launcher and program; the launcher's process and those that it starts
are forked. The launcher is torch's own all the same, with its command line, environment, signals and restarts.
"""

import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest import mock

import torch

from src.runtime.distributed import GROUP_TIMEOUT_VARIABLE
from tests.helpers.launch import HERE, LIMIT, TINY_MODEL, VARIABLES, free_ports

PRELOADED = ["main", "nvidia.dali", "torch.distributed.run", "torch.distributed.launch", "torch.utils.tensorboard"]
POPEN = "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler.Popen"  # the launcher's
EXIT = 0.5  # seconds that a Python which has imported torch takes to end; a launcher is not to see one end sooner


@cache
def context() -> ForkServerContext:
    """Of multiprocessing; its server imports when it starts its first process, or never where it cannot."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def be_python(line: Sequence[str], variables: dict[str, str]) -> None:
    """What a Python with these variables does.  line: a command line that begins with sys.executable."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # a launcher's are its own
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.freeze()  # as in conftest.py
    os.environ.clear()
    os.environ.update(variables)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=True)
    sys.argv = [argument for argument in line[1:] if argument != "-u"]
    if sys.argv[0] == "-c":
        code = sys.argv.pop(1)
        exec(code, {"__name__": "__main__"})
    elif sys.argv[0] == "-m":
        del sys.argv[0]
        sys.modules.pop(sys.argv[0], None)  # runpy warns of what is imported already
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


def be_in_session(line: Sequence[str], variables: dict[str, str]) -> None:
    os.setsid()
    try:
        be_python(line, variables)
    finally:
        time.sleep(EXIT)


class Forked:
    """As much of subprocess.Popen as torch's launcher needs of its processes."""

    def __init__(self, args: Sequence[str], env: dict[str, str], start_new_session: bool, **nothing: None) -> None:
        assert args[0] == sys.executable and start_new_session and not any(nothing.values())
        self.process = multiprocessing.get_context("fork").Process(target=be_in_session, args=(args, env))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout)
        return self.process.exitcode


def be_launched(line: Sequence[str], variables: dict[str, str], texts: tuple[Path, Path]) -> None:
    for number, text in enumerate(texts, 1):
        os.dup2(os.open(text, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(HERE)
    with mock.patch(POPEN, Forked):
        be_in_session(line, variables)


class Started:
    """A running process, a launcher or the program itself."""

    def __init__(self, line: Sequence[str], variables: dict[str, str], folder: Path) -> None:
        self.texts = folder / "stdout", folder / "stderr"
        for text in self.texts:
            text.touch()
        arguments = list(map(str, line)), {**os.environ, **VARIABLES, **variables}, self.texts
        self.process = context().Process(target=be_launched, args=arguments)
        with mock.patch.dict(os.environ, VARIABLES):  # the server's, if it is not there yet
            self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def wait_for(self, beginning: str) -> None:
        """Returns when a line of standard output begins so."""
        deadline = time.monotonic() + LIMIT
        while not any(line.startswith(beginning) for line in self.texts[0].read_text().splitlines()):
            assert self.returncode is None and time.monotonic() < deadline, self.texts[1].read_text()
            time.sleep(0.02)

    def communicate(self) -> tuple[str, str]:
        """What it printed, when it has ended; LIMIT is the proof that nothing hangs."""
        self.process.join(LIMIT)
        assert self.returncode is not None
        return self.texts[0].read_text(), self.texts[1].read_text()


@contextmanager
def started(line: Sequence[str], **variables: str) -> Iterator[Started]:
    """In a session of its own; ended where it is still there afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        process = Started(line, variables, Path(folder))
        try:
            yield process
        finally:
            if process.returncode is None:
                process.process.terminate()
                process.process.join(LIMIT)


def launch(line: Sequence[str], **variables: str) -> subprocess.CompletedProcess:
    """Starts and waits for the end."""
    with started(line, **variables) as process:
        out, err = process.communicate()
        return subprocess.CompletedProcess(line, process.returncode, out, err)


def launch_ranks(*flags: Sequence, **variables: str) -> tuple[list[int], list[str]]:
    """Starts a rank of TINY_MODEL for each of the lists of flags, as srun does; their exit statuses and error texts.

    The time limit of the group is beyond LIMIT: no rank waits for it.
    """
    (port,) = free_ports(1)
    common = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(flags)),
        GROUP_TIMEOUT_VARIABLE: str(2 * LIMIT), **variables,
    }  # fmt: skip
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(started(["python", *TINY_MODEL, *own], RANK=str(rank), LOCAL_RANK=str(rank), **common))
            for rank, own in enumerate(flags)
        ]
        texts = [rank.communicate()[1] for rank in ranks]
        return [rank.returncode for rank in ranks], texts


def spawn(function: Callable, arguments: tuple, *, processes: int) -> None:
    """`function(rank, *arguments)` in processes of their own; raises where one of them fails."""
    context()
    with mock.patch.dict(os.environ, VARIABLES):
        torch.multiprocessing.start_processes(function, arguments, nprocs=processes, start_method="forkserver")
