"""Tells a lost rank from an NCCL that cannot work on this machine, by the errors of a process group."""

import re

from torch import distributed as dist

from src.runtime.errors import ENLARGE_SHARED_MEMORY_HINT, SHARED_MEMORY, UserError

# Gloo raises plain RuntimeErrors that begin with a line of its source: "[/pytorch/third_party/gloo/gloo/pair.cc:56]".
GLOO_PATTERN = re.compile(r"(Gloo \w+ failed with )?\[[^\]]*/gloo/[^\]]*\.\w+:\d+\]")
# NCCL's errors with a local cause: two ranks on one GPU, a full /dev/shm, the driver.  (Another rank causes
# ncclRemoteError.)
SETUP_ERROR_NAMES = ("ncclInvalidUsage", "ncclInvalidArgument", "ncclSystemError", "ncclUnhandledCudaError")
LAST_ERROR = "Last error:"  # NCCL writes the cause after it


def is_peer_lost(error: Exception) -> bool:
    """Whether the error says that another rank is lost."""
    if isinstance(error, UserError) or is_setup_error(error):
        return False
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and GLOO_PATTERN.match(str(error)) is not None
    )


def is_setup_error(error: Exception) -> bool:
    """Whether the error says that NCCL cannot work here."""
    return isinstance(error, dist.DistError) and any(name in str(error) for name in SETUP_ERROR_NAMES)


def short_reason(error: Exception) -> str:
    """The sentence of a library's message that says what happened, without file and line of its source."""
    text, _, last = str(error).partition(LAST_ERROR)
    if last.strip():
        return last.strip().splitlines()[0].rstrip(". ")
    nccl_lines = [line for line in text.splitlines() if line.startswith("nccl")]
    line = (nccl_lines or text.splitlines() or [repr(error)])[0]
    return re.sub(r"^(\[[^\]]*\.\w+:\d+\]\s*)+", "", line).split(". ")[0].rstrip(". ")


def hint(error: Exception) -> str:
    """What to do about a setup error, as the end of a line; empty if no remedy is known."""
    return f": {ENLARGE_SHARED_MEMORY_HINT}" if SHARED_MEMORY in short_reason(error) else ""
