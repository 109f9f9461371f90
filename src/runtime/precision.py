"""Half precision and where it pays.

`python -m src.runtime.precision` prints `--fp16` where this machine computes in it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

SLOW_HALF = "--fp16: this CPU has no bfloat16 arithmetic, so it computes in float32"


def half_is_fast(device: torch.device) -> bool:
    """Whether the device computes in half precision itself: any GPU, and a CPU with bfloat16 arithmetic."""
    return device.type == "cuda" or any(_cpu_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _cpu_capabilities() -> Mapping[str, Any]:
    """What torch says of the processor; an older one has no `get_capabilities`."""
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    return {
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx_bf16": torch.cpu._is_amx_tile_supported(),
    }


def autocast(device: torch.device, half: bool) -> torch.autocast:
    """float16 on a GPU, bfloat16 on a CPU; nothing where `half` is false or the CPU has no bfloat16 arithmetic.

    Emulated, bfloat16 takes 70 times as long as float32.
    """
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=half and half_is_fast(device))


@contextmanager
def full_float32_products() -> Iterator[None]:
    """Products of float32 matrices have all 24 bits inside; `configure` allows a GPU TF32, which has 11."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def image_dtype(device: torch.device, half: bool) -> torch.dtype:
    """Of a batch's images: float16 in half precision on a GPU; on a CPU autocast takes float32 ones."""
    return torch.float16 if half and device.type == "cuda" else torch.float32


if __name__ == "__main__":
    print("--fp16" if half_is_fast(torch.device("cuda" if torch.cuda.is_available() else "cpu")) else "")
