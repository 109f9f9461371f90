"""What the benchmarks were run on, and how large a batch its GPU's memory holds."""

import math
import platform
from typing import Any

import torch
from torch.utils import collect_env

from src.report.run_folder import versions

GPU_BATCH = 128  # the figures to reach are stated for it
# Of a training step of ResNet-50: the peaks at batch 128 on an H100, less the reserve; cuDNN's trials are the greater
# part in float32.
MIB_AN_IMAGE = {"float32": 330, "--fp16": 117}
RESERVE = 3072  # MiB: weights, momentum, cuDNN's workspaces, what CUDA itself takes


def describe(device: torch.device) -> dict[str, Any]:
    """The device, its driver and the versions of what runs on it; plain values."""
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
    """Images of a training step of ResNet-50 that `free` bytes hold: a power of two, 2 to GPU_BATCH."""
    images = (free / 2**20 - RESERVE) / MIB_AN_IMAGE[precision]
    return min(GPU_BATCH, 2 ** int(math.log2(max(2.0, images))))
