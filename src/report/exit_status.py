"""Exit statuses, and the line that says why the program ends."""

import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from src.report.progress import Bar
from src.report.report import Report
from src.runtime.collective_errors import hint, is_setup_error, short_reason
from src.runtime.distributed import Processes
from src.runtime.errors import DivergenceError, ReportedElsewhereError, UserError

DONE, FAILED, BAD_INPUT, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143  # exit statuses


@contextmanager
def report_error_before_cleanup(processes: Processes) -> Iterator[None]:
    """Prints an error before outer contexts close, because closing may block on a GPU that hangs."""
    try:
        yield
    except Exception as error:
        report_error(error, processes)
        raise


def report_error(error: Exception, processes: Processes) -> int:
    """The exit status of an error; prints the error unless another rank has done so."""
    if processes.world_size > 1:  # a launcher sends SIGTERM once another rank has exited, and does not wait
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if isinstance(error, ReportedElsewhereError):
        return BAD_INPUT
    peer_lost = processes.is_peer_lost(error)
    if peer_lost and processes.rank_that_was_stopped() is not None:
        return TERMINATED
    if processes.report_failure():
        with Bar.external_write_mode(sys.stderr):
            _print_error(error, processes, peer_lost=peer_lost)
        processes.mark_failure_reported()
    return BAD_INPUT if isinstance(error, UserError) else FAILED


def _print_error(error: Exception, processes: Processes, *, peer_lost: bool) -> None:
    rank = f"rank {processes.rank}: " if processes.world_size > 1 else ""
    shortage = _memory_shortage(error)
    if peer_lost:
        other = f"rank {1 - processes.rank}" if processes.world_size == 2 else "another process"
        text = f"lost touch with {other} ({short_reason(error)})"
    elif isinstance(error, (UserError, DivergenceError)):
        text = str(error)
    elif shortage is not None:
        detail = (str(shortage).splitlines() or ["MemoryError"])[0]
        remedy = "lower --batch-size, --eval-batch-size or --num-workers, or use --fp16"
        text = f"out of memory ({detail}): {remedy}"
    elif is_setup_error(error):
        text = f"NCCL cannot work here ({short_reason(error)}){hint(error)}"
    else:
        print(f"main.py: error: {rank}a fault of the program:", file=sys.stderr)
        traceback.print_exception(error)
        return
    print(f"main.py: error: {rank}{text}", file=sys.stderr)


def _memory_shortage(error: BaseException | None) -> BaseException | None:
    """The error, or the one that led to it, that says that memory of a GPU or the host is too small; else None.

    torch.save turns a MemoryError into a RuntimeError with the MemoryError as its context.  For host memory torch
    raises plain RuntimeErrors.
    """
    while error is not None:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            return error
        error = error.__cause__ or error.__context__
    return None


def target_exit_status(accuracy: float | None, target: float | None, report: Report) -> int:
    """The exit status after a final mAP of `accuracy` (None: not defined); warns if it is below the target."""
    if target is None or (accuracy is not None and accuracy >= target):
        return DONE
    which = "there is no final mAP to reach" if accuracy is None else "the final mAP is below"
    report.warn(f"{which} --target {target}")
    return FAILED
