"""How the program ends: exit statuses, and the line that says why."""

import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from src.data.pipelines.workers import explained
from src.report.progress import Bar
from src.report.report import Report
from src.runtime.collective_errors import advice, is_setup_error, reason
from src.runtime.distributed import Processes
from src.runtime.errors import DivergenceError, ReportedElsewhereError, UserError

DONE, FAILED, BAD_INPUT, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143  # exit statuses


@contextmanager
def report_error_before_cleanup(processes: Processes) -> Iterator[None]:
    """What fails inside is told of before anything outside is closed, which may wait for a GPU that hangs."""
    try:
        yield
    except Exception as error:
        fail(error, processes)
        raise


def fail(error: Exception, processes: Processes) -> int:
    """Tells why this process ends, unless another has told before; the exit status."""
    if processes.world_size > 1:  # a launcher that has seen another process end does not wait for the message
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if isinstance(error, ReportedElsewhereError):
        return BAD_INPUT
    lost = processes.is_lost(error)
    error = error if lost or is_setup_error(error) else explained(error)
    if lost and processes.rank_that_was_stopped() is not None:
        return TERMINATED
    if processes.report_failure():
        with Bar.external_write_mode(sys.stderr):
            _tell(error, processes, lost=lost)
        processes.told()
    return BAD_INPUT if isinstance(error, UserError) else FAILED


def _tell(error: Exception, processes: Processes, *, lost: bool) -> None:
    """Says what happened on standard error.  lost: another process is gone, which is why this one fails."""
    who = f"rank {processes.rank}: " if processes.world_size > 1 else ""
    if lost:
        other = f"rank {1 - processes.rank}" if processes.world_size == 2 else "another process"
        print(f"main.py: error: {who}lost touch with {other} ({reason(error)})", file=sys.stderr)
    elif isinstance(error, (UserError, DivergenceError)):
        print(f"main.py: error: {who}{error}", file=sys.stderr)
    elif _is_out_of_memory(error):
        remedy = "lower --batch-size, --eval-batch-size or --num-workers, or use --fp16"
        detail = (str(error).splitlines() or ["MemoryError"])[0]
        print(f"main.py: error: {who}out of memory ({detail}): {remedy}", file=sys.stderr)
    elif is_setup_error(error):
        print(f"main.py: error: {who}NCCL cannot work here ({reason(error)}){advice(error)}", file=sys.stderr)
    else:
        print(f"main.py: error: {who}a fault of the program:", file=sys.stderr)
        traceback.print_exception(error)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU's or the host's memory was too small; for the host's, torch raises plain RuntimeErrors."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def meets_target(accuracy: float | None, target: float | None, report: Report) -> int:
    """The exit status after an evaluation that ended with `accuracy`; a warning where that is below the target."""
    if target is None or (accuracy is not None and accuracy >= target):
        return DONE
    which = "there is no final mAP to reach" if accuracy is None else "the final mAP is below"
    report.warn(f"{which} --target {target}")
    return FAILED
