"""Work that a process of its own does beside this one: a fresh Python that imports only what the work needs.

Neither fork, which is delicate beside a GPU and threads, nor multiprocessing, which would import main.py and with it
torch: that takes seconds.
"""

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

PATIENCE = 5  # seconds that a process which is told to end may take to put things in order
START = "import sys; sys.path[:] = {path!r}; from src.runtime.background_process import serve; serve({niceness})"


class ErrandLostError(RuntimeError):
    """The process ended before its work was done; the message says how."""


class Errand:
    """One call of a function in another process: `send`, then `answer`; a context that leaves no process behind."""

    def __init__(self, *, niceness: int = 0) -> None:
        """Starts the process.  niceness: how much it stands back behind others where cores are short."""
        # In a session of its own it gets no Ctrl-C: its end is this process's to choose.
        self._process = subprocess.Popen(
            [sys.executable, "-c", START.format(path=sys.path, niceness=niceness)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        self._sent = False

    def __enter__(self) -> "Errand":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def send(self, function: Callable, *arguments: Any) -> None:
        """Hands over the work; function and arguments must pickle.  Raises ErrandLostError."""
        try:
            pickle.dump((function, arguments), self._to, pickle.HIGHEST_PROTOCOL)
            self._to.flush()
        except (BrokenPipeError, ValueError):  # it has ended, or was stopped by another thread
            raise self._lost() from None
        self._sent = True

    def answer(self) -> Any:
        """Waits for what the function returned.  Raises ErrandLostError; of an exception there the process has told."""
        try:
            return pickle.load(self._from)
        except (EOFError, pickle.UnpicklingError):
            raise self._lost() from None

    def stop(self) -> None:
        """Kills the process; `output_files.atomic_write` leaves no part of a file that it was writing."""
        if not self._sent:
            self._process.kill()
        with suppress(BrokenPipeError):
            self._to.close()  # the process sees that and leaves
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._from.close()

    def _lost(self) -> ErrandLostError:
        status = self._process.wait()
        how = f"was killed by signal: {signal.strsignal(-status)}" if status < 0 else f"ended with status {status}"
        return ErrandLostError(f"a helper process {how}")


def spare_cores() -> int:
    """Cores that this process may use beside its own."""
    return len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)) - 1


def serve(niceness: int) -> None:
    """The other side: does the work that standard input holds and answers on standard output."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a scheduler's notice, which may reach every process of a job
    signal.signal(signal.SIGINT, _leave)
    if niceness and hasattr(os, "nice"):
        os.nice(niceness)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2 if sys.stderr else os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints is no answer
    function, arguments = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        pickle.dump(function(*arguments), answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()
    finally:  # it ends by itself from here on; an exit on top of that would be printed as a fault
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _leave_with_parent() -> None:
    """The other end of standard input is closed when the parent says so, and when it is gone."""
    os.read(0, 1)
    signal.raise_signal(signal.SIGINT)


def _leave(number: int, frame: object) -> None:
    sys.exit(128 + number)
