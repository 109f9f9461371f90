"""Whether half precision pays on this machine: `python -m src.half` prints `--fp16` where it does."""

import torch


def half_is_fast(device: torch.device) -> bool:
    """Whether the device computes in half precision itself: any GPU, and a CPU with bfloat16 arithmetic."""
    capabilities = torch.cpu.get_capabilities()
    return device.type == "cuda" or any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def image_dtype(device: torch.device, half: bool) -> torch.dtype:
    """Of a batch's images: float16 in half precision on a GPU; on a CPU autocast takes float32 ones."""
    return torch.float16 if half and device.type == "cuda" else torch.float32


if __name__ == "__main__":
    print("--fp16" if half_is_fast(torch.device("cuda" if torch.cuda.is_available() else "cpu")) else "")
