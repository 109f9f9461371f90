"""The line that a failing process prints, and when it prints it."""

import signal
from collections.abc import Iterator

import pytest
import torch
from torch import distributed as dist

from src.report.exit_status import BAD_INPUT, FAILED, report_error, report_error_before_cleanup
from src.runtime.distributed import Processes
from src.runtime.errors import UserError
from tests.helpers.collective_messages import DUPLICATE, FULL, GONE


@pytest.fixture
def processes() -> Iterator[Processes]:
    """Rank 0 of two; the other rank prints nothing."""
    handler = signal.getsignal(signal.SIGTERM)  # `report_error` ignores SIGTERM
    made = Processes(0, 1, torch.device("cpu"), dist.HashStore())
    made.world_size = 2
    yield made
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            DUPLICATE,
            "rank 0: NCCL cannot work here (Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000)",
        ),
        (FULL, "rank 0: NCCL cannot work here (Error while creating shared memory segment /dev/shm/nccl-"),
        (
            GONE,
            "rank 0: lost touch with rank 1 (socketPollConnect: connect to 10.0.0.2<41234> returned Connection refused",
        ),
    ],
    ids=["two ranks on a GPU", "full /dev/shm", "a rank is gone"],
)
def test_nccls_reason_is_printed_in_one_line(processes, capsys, text, message):
    assert report_error(dist.DistBackendError(text), processes) == FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"main.py: error: {message}")


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_failure_is_printed_once_before_contexts_close(processes, capsys, world_size):
    processes.world_size = world_size
    closed_after = []

    class Loader:
        def __enter__(self) -> None: ...

        def __exit__(self, *error) -> None:
            closed_after.append(capsys.readouterr().err)

    error = UserError("a bad file")
    with pytest.raises(UserError), Loader(), report_error_before_cleanup(processes):
        raise error
    who = "rank 0: " if world_size > 1 else ""
    assert closed_after == [f"main.py: error: {who}a bad file\n"]
    assert report_error(error, processes) == BAD_INPUT
    assert capsys.readouterr().err == ""
