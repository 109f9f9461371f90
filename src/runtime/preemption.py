"""SIGTERM, by which schedulers and launchers stop a run: its handlers, and how the ranks agree to stop."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch import distributed as dist

from src.runtime.distributed import Processes
from src.runtime.environment import exit_at_once
from src.runtime.errors import SigtermReceived


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """Inside, SIGTERM raises SigtermReceived and SIGINT KeyboardInterrupt, unless the parent process ignores them."""
    process, received = os.getpid(), False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal received
        if os.getpid() != process:  # a forked worker inherits the handler, but catches no exception
            exit_at_once(number, frame)
        if not received:  # schedulers and launchers both send it; the second must not interrupt the cleanup
            received = True
            raise SigtermReceived

    if signal.getsignal(signal.SIGINT) is exit_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGTERM)
    if before is signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:  # a rank that has failed ignores it to its end
            signal.signal(signal.SIGTERM, before)


class GracefulShutdown:
    """Handles SIGTERM in a training: raises SigtermReceived, inside `defer_sigterm` only records the signal.

    Ranks agree to stop through one integer, which they reduce asynchronously and read an iteration later.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.received = False
        self._agreed = False  # all ranks know that they stop
        self._deferred = False
        self._flag = torch.zeros((), dtype=torch.int32)
        self._work: dist.Work | None = None
        self._previous = signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:  # schedulers and launchers both send it; the second must not interrupt the cleanup
            return
        self.received = True
        if not self._deferred:
            raise SigtermReceived

    @contextmanager
    def defer_sigterm(self) -> Iterator[None]:
        """Inside, SIGTERM is only recorded; the end raises SigtermReceived on all ranks if any rank received it."""
        self._deferred = True
        try:
            yield
            stop = self.processes.all_reduce_max(int(self.received))
        finally:
            self._deferred = False
        if stop or self.received:
            self._agreed = True
            raise SigtermReceived

    def poll_all_ranks(self) -> bool:
        """Whether any rank had received SIGTERM at its previous call; all ranks must call this in every iteration."""
        if self.processes.world_size == 1:
            return self.received
        stop = self.finish_poll()
        self._flag.fill_(int(self.received))
        self._work = self.processes.start_all_reduce_max(self._flag)
        return stop

    def finish_poll(self) -> bool:
        """Ends the reduction that `poll_all_ranks` started; whether any rank had received SIGTERM by then."""
        if self._work is None:
            return self.processes.world_size == 1 and self.received
        self._work.wait()
        self._work = None
        self._agreed = self._agreed or bool(self._flag)
        return bool(self._flag)

    def close(self) -> None:
        """Restores the previous handler, unless this rank has received SIGTERM or all ranks have agreed to stop.

        Then further SIGTERMs stay without effect: a launcher sends one to all ranks once one exits, and each rank must
        finish its own cleanup.
        """
        if self._agreed and self.processes.world_size > 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        elif not self.received:
            signal.signal(signal.SIGTERM, self._previous)
