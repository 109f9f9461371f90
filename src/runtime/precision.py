"""Half precision: which devices compute in it, and autocast.

`python -m src.runtime.precision` prints `--fp16` if this machine computes in half precision.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

NO_FAST_HALF = "--fp16: this CPU has no bfloat16 arithmetic, so it computes in float32"


def half_is_fast(device: torch.device) -> bool:
    """Whether the device has half-precision arithmetic: any GPU, and a CPU with bfloat16 arithmetic."""
    return device.type == "cuda" or any(_cpu_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _cpu_capabilities() -> Mapping[str, Any]:
    """The processor's capabilities by name, as far as they matter here; an older torch has no `get_capabilities`."""
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    return {
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx_bf16": torch.cpu._is_amx_tile_supported(),
    }


def autocast(device: torch.device, amp: bool) -> torch.autocast:
    """Autocast to float16 on a GPU and to bfloat16 on a CPU; disabled without `amp`.

    Also disabled on a CPU without bfloat16 arithmetic, because emulated bfloat16 takes 70 times as long as float32.
    """
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=amp and half_is_fast(device))


@contextmanager
def full_float32_products() -> Iterator[None]:
    """Inside, float32 matrix products have all 24 bits, where a GPU otherwise uses TF32 with 11."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def image_dtype(device: torch.device, amp: bool) -> torch.dtype:
    """The dtype of a batch's images: float16 with `amp` on a GPU, else float32, which a CPU's autocast takes."""
    return torch.float16 if amp and device.type == "cuda" else torch.float32


if __name__ == "__main__":
    print("--fp16" if half_is_fast(torch.device("cuda" if torch.cuda.is_available() else "cpu")) else "")
