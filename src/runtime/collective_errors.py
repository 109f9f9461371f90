"""What the errors of a process group say: another rank is gone, or the group cannot work on this machine."""

import re

from torch import distributed as dist

PEER_LOST_PATTERNS = (
    "gloo",
    "Gloo",
    "Connection closed by peer",
    "NCCL",
    "TCPStore",
)  # gloo raises plain RuntimeErrors
# NCCL's names of what is no other rank's fault (ncclRemoteError is): two ranks on one GPU, a full /dev/shm, the driver.
SETUP_MARKS = ("ncclInvalidUsage", "ncclInvalidArgument", "ncclSystemError", "ncclUnhandledCudaError")
LAST_ERROR = "Last error:"  # after it NCCL says what happened
SHARED_MEMORY = "/dev/shm"


def is_peer_lost(error: Exception) -> bool:
    """Whether the error says that another rank is gone."""
    if is_setup_error(error):
        return False
    return isinstance(error, dist.DistError) or any(mark in str(error) for mark in PEER_LOST_PATTERNS)


def is_setup_error(error: Exception) -> bool:
    """Whether it says that NCCL cannot work here."""
    return any(mark in str(error) for mark in SETUP_MARKS)


def reason(error: Exception) -> str:
    """The sentence of a library's message that says what happened, without the place in its source."""
    text, _, last = str(error).partition(LAST_ERROR)
    if last.strip():
        return last.strip().splitlines()[0].rstrip(". ")
    named = [line for line in text.splitlines() if line.startswith("nccl")]
    line = (named or text.splitlines() or [repr(error)])[0]
    return re.sub(r"^(\[[^\]]*\.\w+:\d+\]\s*)+", "", line).split(". ")[0].rstrip(". ")


def advice(error: Exception) -> str:
    """What to do about a setup error, as the end of a line."""
    return ": enlarge it (docker run --shm-size=1g)" if SHARED_MEMORY in reason(error) else ""
