"""The device of a process, and the check that no two processes share a GPU."""

import socket
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from src.runtime.errors import UserError


class GpuIdentity(NamedTuple):
    """A GPU; no two GPUs on any machines have equal identities."""

    host: str
    uuid: str
    name: str


def choose_device(local_rank: int) -> torch.device:
    """The GPU with index `local_rank`; the only GPU if the process sees one; the CPU if it sees none.

    Raises UserError if the process sees several GPUs but none with that index.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # Slurm, and CUDA_VISIBLE_DEVICES set for each process, show each process its own GPU as number 0.
    number = 0 if count == 1 else local_rank
    if number >= count:
        raise UserError(
            f"local rank {local_rank} has no GPU: this machine has {count}; start at most that many processes "
            "(--nproc_per_node)"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def gpu_identity(device: torch.device) -> GpuIdentity | None:
    """The identity of the device's GPU; None for a CPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return GpuIdentity(socket.gethostname(), str(properties.uuid), properties.name)


def require_distinct_gpus(gpus: Sequence[GpuIdentity | None]) -> None:
    """Raises UserError, which names two ranks, if these are on one GPU.  gpus: of all ranks, in rank order."""
    first_rank: dict[str, int] = {}
    for rank, gpu in enumerate(gpus):
        if gpu is None:
            continue
        other = first_rank.setdefault(gpu.uuid, rank)
        if other != rank:
            raise UserError(
                f"ranks {other} and {rank} are on one GPU, {gpu.name} ({gpu.uuid}) of {gpu.host}, which NCCL refuses: "
                "start one process for each GPU (--nproc_per_node)"
            )


def configure_backends(device: torch.device) -> None:
    """On a GPU, lets cuDNN choose the fastest convolution algorithms and allows TF32 in float32 matrix products."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")


def copy_to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor on the device; the host does not wait for the copy to a GPU."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":  # only copies from pinned memory do not block the host
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
