"""Start and end of the process group that a launcher's processes form."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed as dist

from src.runtime.collective_errors import short_reason
from src.runtime.devices import choose_device
from src.runtime.distributed import POLL_SECONDS, PeerLostError, Processes, group_timeout
from src.runtime.errors import SigtermReceived, UserError
from src.runtime.launcher_env import RankInfo, rank_info_from_env

# NCCL's timeout in group timeouts.  NCCL ends the process without our message, so gloo must time out first.
NCCL_TIMEOUT_FACTOR = 2
STARTS = "ssd300 starts"  # key in the launcher's store


@contextmanager
def start(local_rank: int, device: torch.device | None = None) -> Iterator[Processes]:
    """The processes that a launcher started; leaving the context ends their group.

    Without a launcher it is this process alone, which opens no port and no group.
    local_rank: the launcher's flag; the LOCAL_RANK variable wins.  device: for tests; by default the GPU of that rank,
    or the CPU if there are no GPUs.  Raises UserError if the group cannot be formed.
    """
    info = rank_info_from_env(local_rank)
    device = device or choose_device(info.local_rank)
    if info.world_size == 1:
        yield Processes.single(device)
        return
    processes = _join(device, info)
    try:
        yield processes
    except BaseException as error:
        processes.failed = True
        if isinstance(error, (KeyboardInterrupt, SigtermReceived)):
            processes.report_stop()
        raise
    finally:
        processes.shutdown()


def _join(device: torch.device, info: RankInfo) -> Processes:
    os.environ |= {"MASTER_ADDR": info.address, "MASTER_PORT": str(info.port)}
    timeout = group_timeout()
    try:
        store, rank, world_size = next(dist.rendezvous("env://", info.rank, info.world_size, timeout=timeout))
        store.set_timeout(timeout)
        store = dist.PrefixStore(f"ssd300 start {restart_index(store, rank, timeout)}", store)
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=world_size,
            timeout=NCCL_TIMEOUT_FACTOR * timeout if device.type == "cuda" else timeout,
        )
        return Processes(rank, world_size, device, dist.PrefixStore("run", store))
    except (ValueError, RuntimeError, PeerLostError) as error:
        why = "the address is already in use" if "EADDRINUSE" in str(error) else short_reason(error)
        raise UserError(
            f"rank {info.rank} of {info.world_size} cannot join the others at {info.address}:{info.port} ({why}): is "
            "another job on that port? Choose one with the launcher's --master_port (or the MASTER_PORT variable)"
        ) from error


def restart_index(store: dist.Store, rank: int, timeout: timedelta) -> int:
    """The number of this start, from 1; a launcher keeps the store when it restarts the ranks.

    Rank 0 increases the number.  Each other rank waits until a number exists that no process of its rank has taken.
    (The launcher's own count of restarts differs between nodes.)  Raises PeerLostError if rank 0 does not start.
    """
    if rank == 0:
        return store.add(STARTS, 1)
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        number = store.add(STARTS, 0)
        if number > 0 and store.add(f"ssd300 start {number} of rank {rank}", 1) == 1:
            return number
        time.sleep(POLL_SECONDS)
    raise PeerLostError(f"rank 0 has not started for {timeout.total_seconds():g} s")
