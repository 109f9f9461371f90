"""Which device a process computes on, and whether two processes share a GPU."""

import socket
from collections.abc import Sequence
from typing import NamedTuple

import torch

from src.runtime.errors import UserError


class GpuIdentity(NamedTuple):
    """A GPU as the processes of all machines know it."""

    host: str
    uuid: str
    name: str


def choose_device(local_rank: int) -> torch.device:
    """The GPU of that number, the only one where a process sees no other, the CPU where there is none.

    Raises UserError where the machine has fewer GPUs than that.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # Slurm, and CUDA_VISIBLE_DEVICES set for each process, show each one its own GPU, which is number 0 to it.
    number = 0 if count == 1 else local_rank
    if number >= count:
        raise UserError(
            f"local rank {local_rank} has no GPU: this machine has {count}; start at most that many processes "
            "(--nproc_per_node)"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def card(device: torch.device) -> GpuIdentity | None:
    """The GPU that a device is, None for a CPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return GpuIdentity(socket.gethostname(), str(properties.uuid), properties.name)


def require_distinct_gpus(cards: Sequence[GpuIdentity | None]) -> None:
    """Raises UserError that names the first two ranks on one GPU.  cards: every rank's, in their order."""
    first: dict[str, int] = {}
    for rank, one in enumerate(cards):
        if one is None:
            continue
        other = first.setdefault(one.uuid, rank)
        if other != rank:
            raise UserError(
                f"ranks {other} and {rank} are on one GPU, {one.name} ({one.uuid}) of {one.host}, which NCCL refuses: "
                "start one process for each GPU (--nproc_per_node)"
            )


def configure(device: torch.device) -> None:
    """Lets a GPU choose its fastest convolutions, and TF32 where float32 is asked for."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
