"""The machine that the benchmarks run on, and the batch that its GPU's memory holds."""

import math
import platform
from typing import Any

import torch
from torch.utils import collect_env

from src.report.run_folder import versions

GPU_BATCH = 128  # the goals are stated for it
# MiB an image of a training step of ResNet-50: the peak at batch 128 on an H100 without the reserve.  In float32 the
# greater part is for cuDNN's trials.
MIB_AN_IMAGE = {"float32": 330, "--fp16": 117}
RESERVE = 3072  # MiB: weights, momentum, cuDNN's workspaces and CUDA itself


def describe(device: torch.device) -> dict[str, Any]:
    """The device, its driver and the versions of the libraries, as plain values."""
    machine: dict[str, Any] = {"device": platform.processor() or platform.machine(), "versions": versions()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "device": properties.name,
            "memory (MiB)": properties.total_memory // 2**20,
            "compute capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "driver": collect_env.get_nvidia_driver_version(collect_env.run),
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
        }
    return machine


def fitting_batch(free: int, precision: str) -> int:
    """The batch size of ResNet-50 for which `free` bytes suffice: a power of two from 2 to GPU_BATCH."""
    images = (free / 2**20 - RESERVE) / MIB_AN_IMAGE[precision]
    return min(GPU_BATCH, 2 ** int(math.log2(max(2.0, images))))
