"""Ranks and what they tell each other; start and end of a process group.

One process without a launcher opens no port and no group: every method then works on that process alone.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from src.runtime.collective_errors import is_peer_lost, reason
from src.runtime.devices import GpuIdentity, card, choose_device, require_distinct_gpus
from src.runtime.errors import ReportedElsewhereError, SigtermReceived, UserError
from src.runtime.launcher_env import ERROR_REPORT_GRACE_SECONDS, RankInfo, rank_info_from_env

GROUP_TIMEOUT = 120  # seconds after which a rank that does not answer is taken for lost
GROUP_TIMEOUT_VARIABLE = "SSD300_GROUP_TIMEOUT"
NCCL_PATIENCE = 2  # times that limit is NCCL's, which ends a process without a word: gloo's must be over before
PATIENCE = 15  # times that limit is how much longer than another a rank may take for its share of an evaluation
# Seconds that ranks wait for work that only one does (scoring, writing, fetching weights).
WAIT_LIMIT = 6 * 3600
POLL = 0.05  # seconds between looks at the store
FAILURES, TOLD, STOPPED = "failures", "told", "stopped"  # keys of the store
T = TypeVar("T")


class PeerLostError(Exception):
    """Another rank failed or does not answer; the message says what is known of it."""


class Shard(NamedTuple):
    """One process's part of work that all processes share."""

    rank: int
    world_size: int


class Processes:
    """The processes of a run and this one's place among them."""

    def __init__(self, rank: int, world_size: int, device: torch.device, store: dist.Store | None) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.store = store
        # The integers and arrays below stay in the host's memory, whatever the gradients travel on.
        self.host_group: dist.ProcessGroup | None = None
        self.long_timeout_group: dist.ProcessGroup | None = None
        if world_size > 1:
            self.host_group = _gloo_group(_group_timeout())
            self.long_timeout_group = _gloo_group(PATIENCE * _group_timeout())
        self.failed = False  # whether the group is not to be trusted any more
        self._reported = False  # whether this rank has told of its failure
        self._messages = 0

    @classmethod
    def single(cls, device: torch.device) -> "Processes":
        """One process by itself, which needs no store and no group."""
        return cls(0, 1, device, None)

    @property
    def shard(self) -> Shard:
        """This process's part of what all processes share."""
        return Shard(self.rank, self.world_size)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints, writes, draws and scores."""
        return self.rank == 0

    @property
    def _shared(self) -> dist.Store:
        """The store of several processes."""
        assert self.store is not None
        return self.store

    def require_agreement(self, values: Mapping[str, object], *, remedy: str) -> None:
        """Raises UserError, on all ranks, if a rank has other values than rank 0; the line names rank, host and values.

        All ranks must call this, with the same names.
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
        """Raises UserError, on all ranks, where two of them compute on one GPU."""
        if self.world_size > 1:
            cards: list[GpuIdentity | None] = [None] * self.world_size
            dist.all_gather_object(cards, card(self.device), group=self.host_group)
            require_distinct_gpus(cards)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over all processes, the model itself where there is one process."""
        if self.world_size == 1:
            return model
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        parallel = DistributedDataParallel(model, device_ids=device_ids)
        # Batch-norm buffers are taken from rank 0 where they matter (`share_buffers`), not in every iteration. Said
        # afterwards, because the argument for it has another name before torch 2.12, and the start does share them.
        parallel.broadcast_buffers = False
        return parallel

    def share_buffers(self, model: nn.Module) -> None:
        """Gives every rank the batch-norm statistics of rank 0: each has seen other images, but one model is scored."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def gather(self, value: Any) -> list | None:
        """Every rank's `value` (anything that pickles, arrays included) in rank order on rank 0, None elsewhere."""
        return self._gather(value, self.host_group)

    def gather_arrays(self, arrays: Any) -> list | None:
        """`gather` of NumPy arrays in lists or tuples, which stay what they are, after work of very unequal length."""
        return self._gather(arrays, self.long_timeout_group)

    def _gather(self, value: Any, group: dist.ProcessGroup | None) -> list | None:
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, values, dst=0, group=group)
        return values

    def broadcast_object(self, value: Any = None) -> Any:
        """Rank 0's `value` on every rank; the others may wait hours for it, longer than a collective would."""
        if self.world_size == 1:
            return value
        self._wait_for_main()
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.host_group)
        return values[0]

    def scatter(self, values: list | None = None) -> Any:
        """This rank's own of rank 0's `values`, one for each rank; the others may wait hours for it, too."""
        if self.world_size == 1:
            assert values is not None
            return values[0]
        self._wait_for_main()
        own = [None]
        dist.scatter_object_list(own, values, src=0, group=self.host_group)
        return own[0]

    def on_all_ranks(self, work: Callable[[], T]) -> T:
        """What `work()` returns on this rank, once it has ended on every rank.

        All ranks must call this.  Where `work` raises UserError on some ranks, the first of them raises it here and
        all others raise ReportedElsewhereError, so that one line is printed.
        """
        if self.world_size == 1:
            return work()
        found, fault = None, None
        try:
            found = work()
        except UserError as error:
            fault = error
        faulty = [False] * self.world_size
        dist.all_gather_object(faulty, fault is not None, group=self.long_timeout_group)  # disks differ in speed
        if any(faulty):
            raise fault if fault and faulty.index(True) == self.rank else ReportedElsewhereError
        return cast(T, found)

    def _next_key(self) -> str:
        """The key of the store under which all ranks have the next of these messages."""
        self._messages += 1
        return f"message {self._messages}"

    def _wait_for_main(self) -> None:
        key = self._next_key()
        if self.is_main:
            self._shared.set(key, "ready")
        else:
            self._wait(key)

    def all_reduce_max(self, value: int) -> int:
        """The greatest of every rank's `value`."""
        if self.world_size == 1:
            return value
        number = torch.tensor(value)
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self.host_group)
        return int(number)

    def start_all_reduce_max(self, number: Tensor) -> dist.Work | None:
        """Starts replacing `number`, an integer tensor on the CPU, by the greatest of every rank's; wait() ends it."""
        if self.world_size == 1:
            return None
        return dist.all_reduce(number, dist.ReduceOp.MAX, group=self.host_group, async_op=True)

    def report_failure(self) -> bool:
        """Records that this rank fails; True where none has failed before: that one tells why, once.

        It calls `told` afterwards; the others come back when it has, because a launcher ends all when one is gone.
        """
        if self._reported:
            return False
        self.failed = self._reported = True
        if self.world_size == 1:
            return True
        try:
            if self._shared.add(FAILURES, 1) == 1:
                return True
            deadline = time.monotonic() + ERROR_REPORT_GRACE_SECONDS
            while not self._shared.check([TOLD]) and time.monotonic() < deadline:
                time.sleep(POLL)
            return False
        except (dist.DistError, RuntimeError):  # the process that keeps the store is gone: nobody else will tell
            return True

    def told(self) -> None:
        """Lets the ranks that fail as well go on to their end."""
        self._set(TOLD)

    def report_stop(self) -> None:
        """Records that this rank was told to stop, so that the others do not take it for lost."""
        self._set(STOPPED)

    def rank_that_was_stopped(self) -> int | None:
        """After a loss: the rank that was told to stop and has left, None where none was or nothing is known."""
        self.failed = True
        if self.world_size == 1:
            return None
        try:
            return int(self._shared.get(STOPPED)) if self._shared.check([STOPPED]) else None
        except (dist.DistError, RuntimeError):
            return None

    def _set(self, key: str) -> None:
        self.failed = True
        if self.world_size > 1:
            # Without the store nobody can be told.
            with suppress(dist.DistError, RuntimeError):
                self._shared.set(key, str(self.rank))

    def is_lost(self, error: Exception) -> bool:
        """Whether the error says that another rank is gone."""
        return self.world_size > 1 and (isinstance(error, PeerLostError) or is_peer_lost(error))

    def leave(self) -> None:
        """Ends the group."""
        if not self.failed:
            dist.destroy_process_group()
        elif self.device.type == "cuda":
            # That might wait for ranks which are gone.  Left as it is, NCCL prints a warning when the process ends.
            group = dist.group.WORLD
            assert group is not None
            group._get_backend(self.device).abort()

    def _wait(self, key: str) -> None:
        # Polling, because a wait inside the store would hold back signals.
        deadline = time.monotonic() + WAIT_LIMIT
        while True:
            # In this order: what a rank has left before it failed is seen.
            lost = self._shared.check([FAILURES]) or self._shared.check([STOPPED])
            if self._shared.check([key]):
                return
            if lost:
                raise PeerLostError("it has failed or was told to stop")
            if time.monotonic() > deadline:
                raise PeerLostError(f"it has not answered for {WAIT_LIMIT} s")
            time.sleep(POLL)


@contextmanager
def start(local_rank: int, device: torch.device | None = None) -> Iterator[Processes]:
    """The processes that a launcher started, or this one alone; ends the group on leaving.

    local_rank: the launcher's flag; its variable wins.  device: for tests; by default the GPU of that
    rank where there are GPUs, else the CPU.  Raises UserError where the group cannot be formed.
    """
    place = rank_info_from_env(local_rank)
    device = device or choose_device(place.local_rank)
    if place.world_size == 1:
        yield Processes.single(device)
        return
    processes = _join(device, place)
    try:
        yield processes
    except BaseException as error:
        processes.failed = True
        if isinstance(error, (KeyboardInterrupt, SigtermReceived)):
            processes.report_stop()
        raise
    finally:
        processes.leave()


def _gloo_group(timeout: timedelta) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)  # it is a number only for a rank that is not in it
    return group


def _join(device: torch.device, place: RankInfo) -> Processes:
    os.environ |= {"MASTER_ADDR": place.address, "MASTER_PORT": str(place.port)}
    timeout = _group_timeout()
    try:
        store, rank, world_size = next(dist.rendezvous("env://", place.rank, place.world_size, timeout=timeout))
        store.set_timeout(timeout)
        store = dist.PrefixStore(f"ssd300 start {restart_index(store, rank, timeout)}", store)
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=world_size,
            timeout=NCCL_PATIENCE * timeout if device.type == "cuda" else timeout,
        )
        return Processes(rank, world_size, device, dist.PrefixStore("run", store))
    except (ValueError, RuntimeError, PeerLostError) as error:
        address = f"{place.address}:{place.port}"
        why = "the address is already in use" if "EADDRINUSE" in str(error) else reason(error)
        raise UserError(
            f"rank {place.rank} of {place.world_size} cannot join the others at {address} ({why}): is another job on "
            "that port? Choose one with the launcher's --master_port (or the MASTER_PORT variable)"
        ) from error


def restart_index(store: dist.Store, rank: int, timeout: timedelta) -> int:
    """The number of this start of all ranks: a launcher that restarts them keeps the store and what stands in it.

    Rank 0 counts on. Another rank takes the number with which no process of its rank has started before. (The
    launcher's own count of restarts differs between nodes.) Raises LostRankError where rank 0 does not come.
    """
    if rank == 0:
        return store.add("ssd300 starts", 1)
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        number = store.add("ssd300 starts", 0)
        if number > 0 and store.add(f"ssd300 start {number} of rank {rank}", 1) == 1:
            return number
        time.sleep(POLL)
    raise PeerLostError(f"rank 0 has not started for {timeout.total_seconds():g} s")


def _group_timeout() -> timedelta:
    text = os.environ.get(GROUP_TIMEOUT_VARIABLE, str(GROUP_TIMEOUT))
    with suppress(ValueError):
        if 0 < float(text) < WAIT_LIMIT:
            return timedelta(seconds=float(text))
    raise UserError(f"the variable {GROUP_TIMEOUT_VARIABLE} is {text!r}, not a number of seconds below {WAIT_LIMIT}")
