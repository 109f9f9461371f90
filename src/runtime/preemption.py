"""The scheduler's notice to stop, and how all ranks come to act on it together."""

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

import torch
from torch import distributed as dist

from src.runtime.distributed import Processes
from src.runtime.errors import SigtermReceived

DATA_LIMIT = 20  # seconds that SIGTERM lets a run wait for its next images; launchers kill after 30
HAS_ALARM = hasattr(signal, "setitimer")  # not on Windows
T = TypeVar("T")


class GracefulShutdown:
    """SIGTERM, a scheduler's notice: within `deferred` it is noted, elsewhere it raises Terminated at once.

    What is deferred is let finish unless it waits for images: see `watched`.
    All ranks learn of it by one integer that is reduced asynchronously and read an iteration later.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.received = False
        self._over = False  # all ranks have agreed to stop
        self._deferred = False
        self._waiting = False  # for images, while what is deferred
        self._flag = torch.zeros((), dtype=torch.int32)
        self._work: dist.Work | None = None
        self._previous = [(signal.SIGTERM, signal.signal(signal.SIGTERM, self._handle))]
        if HAS_ALARM:
            self._previous.append((signal.SIGALRM, signal.signal(signal.SIGALRM, self._give_up)))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:  # schedulers and launchers both send it; what follows the first is not to be cut short
            return
        self.received = True
        if not self._deferred:
            raise SigtermReceived
        if HAS_ALARM:
            signal.setitimer(signal.ITIMER_REAL, DATA_LIMIT, 1)

    def _give_up(self, number: int, frame: FrameType | None) -> None:
        """The iteration would never end where a disk or a worker process hangs."""
        if self._waiting:
            raise SigtermReceived(f" (the next images had not come after {DATA_LIMIT} s)")

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """SIGTERM is only noted inside; at the end any rank's note that was not acted on raises Terminated on all."""
        self._deferred = True
        try:
            yield
            stop = self.processes.maximum(int(self.received))
        finally:
            self._deferred = False
        if stop or self.received:
            self._over = True
            raise SigtermReceived

    def watched(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches; once SIGTERM has come, waiting too long for the next one raises Terminated."""
        iterator = iter(batches)
        while True:
            self._waiting = True
            try:
                batch = next(iterator, None)
            finally:
                self._waiting = False
            if batch is None:
                return
            yield batch

    def agreed(self) -> bool:
        """Whether any rank had been told to stop by its last call; to be called by all ranks in every iteration."""
        if self.processes.world_size == 1:
            return self.received
        stop = self.finish_poll()
        self._flag.fill_(int(self.received))
        self._work = self.processes.start_all_reduce_max(self._flag)
        return stop

    def finish_poll(self) -> bool:
        """Waits for what the last `agreed` started; whether any rank had been told to stop by then."""
        if self._work is None:
            return self.processes.world_size == 1 and self.received
        self._work.wait()
        self._work = None
        self._over = self._over or bool(self._flag)
        return bool(self._flag)

    def close(self) -> None:
        """Gives the signals back to whoever had them.

        After an agreed stop it is ignored: a launcher sends it to all when one has ended, and each is to end by itself.
        """
        if HAS_ALARM:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._previous:
            signal.signal(number, handler)
        if self._over and self.processes.world_size > 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
