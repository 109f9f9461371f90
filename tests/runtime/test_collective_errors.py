"""The messages are NCCL's and gloo's own."""

import pytest
from torch import distributed as dist

from src.runtime.collective_errors import advice, is_peer_lost, is_setup_error, reason

NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, "
DUPLICATE = NCCL + (
    "invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.28.9\n"
    "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\nLast error:\n"
    "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000\n"
)
FULL = NCCL + (
    "unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.28.9\n"
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error. \n"
    "Last error:\nError while creating shared memory segment /dev/shm/nccl-2hXk8u (size 9637888), error: No space left "
    "on device (28)"
)
GONE = NCCL + (
    "remote process exited or there was a network error, NCCL version 2.28.9\n"
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.\n"
    "Last error:\nsocketPollConnect: connect to 10.0.0.2<41234> returned Connection refused, exceeded error retry count"
)
SILENT = (
    NCCL
    + "unhandled cuda error, NCCL version 2.28.9\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
)
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Connection closed by peer [10.0.0.2]:37. This is"


@pytest.mark.parametrize(
    ("text", "setup", "expected"),
    [
        (DUPLICATE, True, "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000"),
        (
            FULL,
            True,
            "Error while creating shared memory segment /dev/shm/nccl-2hXk8u (size 9637888), error: No space left on "
            "device (28)",
        ),
        (
            GONE,
            False,
            "socketPollConnect: connect to 10.0.0.2<41234> returned Connection refused, exceeded error retry count",
        ),
        (SILENT, True, "ncclUnhandledCudaError: Call to CUDA function failed"),
        (GLOO, False, "Connection closed by peer [10.0.0.2]:37"),
    ],
    ids=["two ranks on a GPU", "full /dev/shm", "a rank is gone", "no last error", "gloo"],
)
def test_the_librarys_own_reason_is_shown_and_a_loss_told_from_a_bad_setup(text, setup, expected):
    error = dist.DistBackendError(text) if text.startswith("NCCL") else RuntimeError(text)
    assert reason(error) == expected
    assert is_setup_error(error) == setup
    assert is_peer_lost(error) != setup
    assert ("--shm-size" in advice(error)) == ("/dev/shm" in text)


def test_other_errors_are_neither():
    error = KeyError("a mistake")
    assert not is_peer_lost(error)
    assert not is_setup_error(error)


def test_a_librarys_message_is_cut_to_what_happened():
    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Connection closed by peer [10.0.0.2]:37. This is"
    assert reason(RuntimeError(gloo)) == "Connection closed by peer [10.0.0.2]:37"
    assert reason(RuntimeError("Timed out.\nframe #0")) == "Timed out"
    assert reason(RuntimeError()) == "RuntimeError()"
