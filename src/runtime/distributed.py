"""The ranks of a run and the values that they exchange; `process_group.start` makes a `Processes`.

A single process has no group: every method then works on that process alone.
"""

import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from src.runtime.collective_errors import is_peer_lost
from src.runtime.devices import GpuIdentity, gpu_identity, require_distinct_gpus
from src.runtime.errors import ReportedElsewhereError, UserError
from src.runtime.launcher_env import ERROR_REPORT_GRACE_SECONDS

GROUP_TIMEOUT = 120  # seconds after which a rank that does not answer counts as lost
GROUP_TIMEOUT_VARIABLE = "SSD300_GROUP_TIMEOUT"  # environment variable that replaces GROUP_TIMEOUT
# The slowest rank may finish its images of an evaluation this many group timeouts after the fastest rank.
EVALUATION_TIMEOUT_FACTOR = 15
MAIN_WORK_TIMEOUT = 6 * 3600  # seconds that ranks wait while rank 0 works alone (scores, writes, fetches weights)
POLL_SECONDS = 0.05  # between reads of the store
FAILURES, REPORTED, STOPPED = "failures", "reported", "stopped"  # keys of the store
T = TypeVar("T")


class PeerLostError(Exception):
    """Another rank has failed or does not answer; the message says which of the two."""


class Shard(NamedTuple):
    """Which part of divided work a rank does."""

    rank: int
    world_size: int


class Processes:
    """This process's rank, and its exchange of values with the other ranks."""

    def __init__(self, rank: int, world_size: int, device: torch.device, store: dist.Store | None) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.store = store
        # Gloo exchanges integers and objects in host memory, even if NCCL exchanges the gradients.
        self.host_group: dist.ProcessGroup | None = None
        self.long_timeout_group: dist.ProcessGroup | None = None
        if world_size > 1:
            self.host_group = _gloo_group(group_timeout())
            self.long_timeout_group = _gloo_group(EVALUATION_TIMEOUT_FACTOR * group_timeout())
        self.failed = False  # a rank is lost or exits early, so collectives may never end
        self._reported = False  # this rank has called `report_failure`
        self._num_keys = 0

    @classmethod
    def single(cls, device: torch.device) -> "Processes":
        """A single process, which needs no store and no group."""
        return cls(0, 1, device, None)

    @property
    def shard(self) -> Shard:
        """The part of divided work that this rank does."""
        return Shard(self.rank, self.world_size)

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    @property
    def _group_store(self) -> dist.Store:
        """The store that all ranks reach; a single process has none."""
        assert self.store is not None
        return self.store

    def require_agreement(self, values: Mapping[str, object], *, remedy: str) -> None:
        """Raises UserError on all ranks if a rank's values differ from rank 0's; the line names rank, host and values.

        All ranks must call this, with the same names.  remedy: what a user can do, the end of the line.
        """
        if self.world_size == 1:
            return
        found: list = [None] * self.world_size
        dist.all_gather_object(found, (socket.gethostname(), dict(values)), group=self.host_group)
        main_host, expected = found[0]
        for rank, (host, others) in enumerate(found):
            differences = [
                f"{name} = {others[name]}, not {expected[name]}" for name in expected if others[name] != expected[name]
            ]
            if differences:
                raise UserError(
                    f"rank {rank} ({host}) differs from rank 0 ({main_host}): {'; '.join(differences)}: {remedy}"
                )

    def check_devices(self) -> None:
        """Raises UserError on all ranks if two of them compute on one GPU."""
        if self.world_size > 1:
            gpus: list[GpuIdentity | None] = [None] * self.world_size
            dist.all_gather_object(gpus, gpu_identity(self.device), group=self.host_group)
            require_distinct_gpus(gpus)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over all ranks; the model itself if there is one process."""
        if self.world_size == 1:
            return model
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        parallel = DistributedDataParallel(model, device_ids=device_ids)
        # DDP need not copy the batch-norm buffers in every iteration: `broadcast_buffers` does before they matter.  Set
        # after the constructor, which copies them once and names this argument differently before torch 2.12.
        parallel.broadcast_buffers = False
        return parallel

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Copies rank 0's batch-norm statistics to every rank, so that all ranks evaluate and save one model."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def gather(self, value: Any, *, long_timeout: bool = False) -> list | None:
        """Every rank's `value` (anything that pickles) in rank order on rank 0, None elsewhere.

        long_timeout: for ranks that reach this call at very different times, as after their images of an evaluation.
        """
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size if self.is_main else None
        group = self.long_timeout_group if long_timeout else self.host_group
        dist.gather_object(value, values, dst=0, group=group)
        return values

    def broadcast_object(self, value: Any = None) -> Any:
        """Rank 0's `value` on every rank.  The others wait up to MAIN_WORK_TIMEOUT, longer than in a collective."""
        if self.world_size == 1:
            return value
        self._wait_for_main()
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.host_group)
        return values[0]

    def scatter(self, values: list | None = None) -> Any:
        """This rank's value of rank 0's `values`, one for each rank.  The others wait up to MAIN_WORK_TIMEOUT."""
        if self.world_size == 1:
            assert values is not None
            return values[0]
        self._wait_for_main()
        received = [None]
        dist.scatter_object_list(received, values, src=0, group=self.host_group)
        return received[0]

    def run_on_all_ranks(self, work: Callable[[], T]) -> T:
        """What `work()` returns on this rank, after it has ended on every rank.

        All ranks must call this.  If `work` raises UserError on some ranks, the lowest of them raises it here and all
        others raise ReportedElsewhereError, so that one line is printed.
        """
        if self.world_size == 1:
            return work()
        result, error = None, None
        try:
            result = work()
        except UserError as user_error:
            error = user_error
        failed = [False] * self.world_size
        # The long timeout, because disks differ in speed.
        dist.all_gather_object(failed, error is not None, group=self.long_timeout_group)
        if any(failed):
            raise error if error and failed.index(True) == self.rank else ReportedElsewhereError
        return cast(T, result)

    def _next_key(self) -> str:
        """An unused key of the store; the n-th call returns the same key on all ranks."""
        self._num_keys += 1
        return f"message {self._num_keys}"

    def _wait_for_main(self) -> None:
        key = self._next_key()
        if self.is_main:
            self._group_store.set(key, "ready")
        else:
            self._wait(key)

    def all_reduce_max(self, value: int) -> int:
        """The greatest `value` of all ranks."""
        if self.world_size == 1:
            return value
        number = torch.tensor(value)
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self.host_group)
        return int(number)

    def start_all_reduce_max(self, number: Tensor) -> dist.Work | None:
        """Starts to replace `number`, an integer tensor on the CPU, by the greatest of all ranks.

        It is replaced once the returned work's `wait` returns; a single process returns None.
        """
        if self.world_size == 1:
            return None
        return dist.all_reduce(number, dist.ReduceOp.MAX, group=self.host_group, async_op=True)

    def report_failure(self) -> bool:
        """Records that this rank fails; returns True on the first rank to fail, which prints why.

        The first rank then calls `mark_failure_reported`.  The others wait here up to 5 s for that call, because a
        launcher kills all ranks once one exits.
        """
        if self._reported:
            return False
        self.failed = self._reported = True
        if self.world_size == 1:
            return True
        try:
            if self._group_store.add(FAILURES, 1) == 1:
                return True
            deadline = time.monotonic() + ERROR_REPORT_GRACE_SECONDS
            while not self._group_store.check([REPORTED]) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            return False
        except (dist.DistError, RuntimeError):  # the store ended with rank 0, so no rank can know who prints
            return True

    def mark_failure_reported(self) -> None:
        """Lets the other failing ranks, which wait in `report_failure`, exit."""
        self._set_and_mark_failed(REPORTED)

    def report_stop(self) -> None:
        """Records that this rank was stopped (SIGTERM, Ctrl-C), so that the others do not report it as lost."""
        self._set_and_mark_failed(STOPPED)

    def rank_that_was_stopped(self) -> int | None:
        """The rank that was stopped and has exited; None if no rank was, or if the store ended with rank 0."""
        self.failed = True
        if self.world_size == 1:
            return None
        try:
            return int(self._group_store.get(STOPPED)) if self._group_store.check([STOPPED]) else None
        except (dist.DistError, RuntimeError):
            return None

    def _set_and_mark_failed(self, key: str) -> None:
        self.failed = True
        if self.world_size > 1:
            with suppress(dist.DistError, RuntimeError):  # the store ended with rank 0
                self._group_store.set(key, str(self.rank))

    def is_peer_lost(self, error: Exception) -> bool:
        """Whether the error says that another rank is lost."""
        return self.world_size > 1 and (isinstance(error, PeerLostError) or is_peer_lost(error))

    def shutdown(self) -> None:
        """Ends the group."""
        if not self.failed:
            dist.destroy_process_group()
        elif self.device.type == "cuda":
            # `destroy_process_group` might wait for lost ranks.  Torch before 2.8 has no public way to abort; without
            # one NCCL prints a warning when the process ends.
            getattr(dist.group.WORLD, "abort", lambda: None)()

    def _wait(self, key: str) -> None:
        # Polls, because Python handles no signal during a wait inside the store.
        deadline = time.monotonic() + MAIN_WORK_TIMEOUT
        while True:
            # Read failures before the key, so that a key which a rank set before it failed still counts.
            failed = self._group_store.check([FAILURES]) or self._group_store.check([STOPPED])
            if self._group_store.check([key]):
                return
            if failed:
                raise PeerLostError("it has failed or was stopped")
            if time.monotonic() > deadline:
                raise PeerLostError(f"it has not answered for {MAIN_WORK_TIMEOUT} s")
            time.sleep(POLL_SECONDS)


def _gloo_group(timeout: timedelta) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)  # new_group returns a number only to ranks outside the group
    return group


def group_timeout() -> timedelta:
    """How long ranks wait for one that does not answer.

    Raises UserError if SSD300_GROUP_TIMEOUT is no number of seconds.
    """
    text = os.environ.get(GROUP_TIMEOUT_VARIABLE, str(GROUP_TIMEOUT))
    with suppress(ValueError):
        if 0 < float(text) < MAIN_WORK_TIMEOUT:
            return timedelta(seconds=float(text))
    raise UserError(
        f"the variable {GROUP_TIMEOUT_VARIABLE} is {text!r}: expected a number of seconds below {MAIN_WORK_TIMEOUT}"
    )
