"""SIGTERM, a scheduler's notice to stop: what it does in each mode, and how all ranks of a training act on it."""

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
    """Inside, SIGTERM raises SigtermReceived and SIGINT KeyboardInterrupt, except where the parent has them ignored."""
    process, received = os.getpid(), False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal received
        if os.getpid() != process:  # a forked worker inherits the handler, and nothing there catches the exception
            exit_at_once(number, frame)
        if not received:  # schedulers and launchers both send it; the second must not cut the cleanup short
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
    """SIGTERM in a training: inside `defer_sigterm` it is only recorded, elsewhere it raises SigtermReceived at once.

    All ranks learn of it through one integer that they reduce asynchronously and read an iteration later.
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
        if self.received:  # schedulers and launchers both send it; the second must not cut short what the first began
            return
        self.received = True
        if not self._deferred:
            raise SigtermReceived

    @contextmanager
    def defer_sigterm(self) -> Iterator[None]:
        """Inside, SIGTERM is only recorded; the end raises SigtermReceived on all ranks if any rank received one."""
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
        """Whether any rank had received SIGTERM by its last call; all ranks must call this in every iteration."""
        if self.processes.world_size == 1:
            return self.received
        stop = self.finish_poll()
        self._flag.fill_(int(self.received))
        self._work = self.processes.start_all_reduce_max(self._flag)
        return stop

    def finish_poll(self) -> bool:
        """Waits for the reduction that `poll_all_ranks` started; whether any rank had received SIGTERM by then."""
        if self._work is None:
            return self.processes.world_size == 1 and self.received
        self._work.wait()
        self._work = None
        self._agreed = self._agreed or bool(self._flag)
        return bool(self._flag)

    def close(self) -> None:
        """Restores the previous handler, unless SIGTERM has come: then this one goes on ignoring the signal.

        After an agreed stop every rank ignores it: a launcher sends it to all ranks when one has exited, and each is
        to reach its own end.
        """
        if self._agreed and self.processes.world_size > 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        elif not self.received:
            signal.signal(signal.SIGTERM, self._previous)
