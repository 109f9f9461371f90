"""Errors of NCCL and gloo: a lost rank, a bad setup, or neither."""

import pytest
from torch import distributed as dist

from src.runtime.collective_errors import hint, is_peer_lost, is_setup_error, short_reason
from src.runtime.errors import UserError
from tests.helpers.collective_messages import CLOSED, DUPLICATE, FULL, GONE, RESET, SILENT, SLOW, UNREACHABLE


@pytest.mark.parametrize(
    ("error", "is_setup", "expected"),
    [
        (
            dist.DistBackendError(DUPLICATE),
            True,
            "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000",
        ),
        (
            dist.DistBackendError(FULL),
            True,
            "Error while creating shared memory segment /dev/shm/nccl-2hXk8u (size 9637888), error: No space left on "
            "device (28)",
        ),
        (
            dist.DistBackendError(GONE),
            False,
            "socketPollConnect: connect to 10.0.0.2<41234> returned Connection refused, exceeded error retry count",
        ),
        (dist.DistBackendError(SILENT), True, "ncclUnhandledCudaError: Call to CUDA function failed"),
        (dist.DistNetworkError("Timed out.\nframe #0"), False, "Timed out"),
        (RuntimeError(CLOSED), False, "Connection closed by peer [10.0.0.2]:37"),
        (RuntimeError(RESET), False, "Read error [10.0.0.2]:37: Connection reset by peer"),
        (RuntimeError(SLOW), False, "Timed out waiting 6000ms for recv operation to complete"),
        (RuntimeError(UNREACHABLE), False, UNREACHABLE),
    ],
    ids=["two ranks on a GPU", "full /dev/shm", "a rank is gone", "no last error", "store", "gloo: closed",
         "gloo: reset", "gloo: slow", "gloo: unreachable"],
)  # fmt: skip
def test_a_lost_rank_and_a_bad_setup_are_told_apart_and_the_librarys_reason_is_shown(error, is_setup, expected):
    assert short_reason(error) == expected
    assert is_setup_error(error) == is_setup
    assert is_peer_lost(error) != is_setup
    assert ("--shm-size" in hint(error)) == ("/dev/shm" in str(error))


@pytest.mark.parametrize(
    "error",
    [
        KeyError("a mistake"),
        UserError("/data/gloo/NCCL/TCPStore/1.jpg: cannot be read as an image"),
        UserError(CLOSED),
        FileNotFoundError(2, "No such file or directory", "/data/gloo/a.pt"),
        RuntimeError("PytorchStreamReader failed reading zip archive /data/third_party/gloo/a.cc:1] of NCCL"),
        RuntimeError("/home/Gloo/ncclSystemError.pt is malformed"),
        OSError("Connection closed by peer"),
    ],
    ids=repr,
)
def test_other_errors_are_neither_whatever_they_name(error):
    assert not is_peer_lost(error)
    assert not is_setup_error(error)


def test_an_error_without_a_message_is_named():
    assert short_reason(RuntimeError()) == "RuntimeError()"
