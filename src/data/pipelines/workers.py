"""Worker processes of torch's DataLoader that leave no run waiting: what ends or stops one ends the run in a line."""

import atexit
import copy
import errno
import gc
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.context import BaseContext
from multiprocessing.queues import Queue
from pathlib import Path
from types import FrameType, ModuleType
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data.dataloader import _BaseDataLoaderIter, _MultiProcessingDataLoaderIter

from src.runtime.errors import UserError

resource: ModuleType | None
try:
    import resource
except ImportError:  # not on Windows, which has no such limits
    resource = None

SHARED_MEMORY = Path("/dev/shm")
PREFETCH = 2  # batches a worker prepares ahead
LONGEST_FOLDER = 70  # bytes of the path of a folder in which multiprocessing's sockets find room, on any system
SHORT_FOLDERS = ("/tmp", "/var/tmp", str(SHARED_MEMORY))
FILES, FILES_A_WORKER = 64, 3 + 5 * PREFETCH  # open ones: of a process, and its pipes to a worker and tensors from it
KILLED_LIMIT = 1  # seconds that a killed worker takes to be gone
FEWER = "use fewer workers or none (--num-workers 0)"
Shared = TypeVar("Shared", bound=tuple[Tensor, ...])


def data_loader(
    dataset: Dataset,
    collate: Callable[[list], object],
    workers: int,
    device: torch.device,
    *,
    batch_sampler: Iterable[list],
) -> DataLoader:
    """A DataLoader to be read through `guarded`.  Raises UserError where the system allows too few files for it."""
    # --num-workers is the user's word; torch's advice on it would stand in every log.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    allow_open_files(workers)
    context = _context() if workers else None
    with convert_worker_errors(workers):
        return _Loader(
            dataset,
            batch_sampler=batch_sampler,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            prefetch_factor=PREFETCH if workers else None,
            worker_init_fn=_WorkerStart(context) if context else None,
            multiprocessing_context=context,
        )


def guarded(loader: DataLoader) -> Iterator:
    """The loader's batches; raises a user's error that a worker returned or that killed it."""
    batches = None
    try:
        with convert_worker_errors(loader.num_workers):
            batches = iter(loader)
            for batch in batches:
                if isinstance(batch, Exception):
                    raise batch
                yield batch
    except Exception:
        end_workers(batches)
        raise


def end_workers(batches: Iterator | None) -> None:
    """Ends a loader's workers now: once the garbage collector has it, torch waits 10 s for each of them in vain."""
    if isinstance(batches, _Batches):  # not without workers
        batches._shutdown_workers()


def share(batch: Shared) -> Shared | UserError:
    """Moves a worker's batch, a tuple of tensors, into shared memory; a UserError where that is too small."""
    worker = get_worker_info()
    if worker is not None:
        try:
            for part in batch:
                part.share_memory_()
        except RuntimeError as error:
            told = explained(error, worker.num_workers)
            return told if isinstance(told, UserError) else _too_small(str(worker.num_workers))
    return batch


def allow_open_files(workers: int) -> None:
    """Raises this process's limit of open files as far as so many workers need; UserError where that is not allowed.

    Beforehand, because a process without files left cannot tell another, which would wait for it.
    """
    if resource is None or not workers:
        return
    needed = FILES + FILES_A_WORKER * workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"{workers} worker processes need {needed} open files and {hard} are allowed: raise the limit (ulimit -n "
            f"{needed}), or {FEWER}"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class _Loader(DataLoader):
    """Starts its workers through `_Batches`."""

    def _get_iterator(self) -> _BaseDataLoaderIter:
        return _Batches(self) if self.num_workers else super()._get_iterator()


class _Batches(_MultiProcessingDataLoaderIter):
    """Torch's iterator, of which no worker is left: not one that heeds nothing, nor where another could not start."""

    def __init__(self, loader: DataLoader) -> None:
        gc.freeze()  # a worker must not collect this process's garbage: an object of CUDA's would end it
        try:
            super().__init__(loader)
        except BaseException:
            self._shutdown_workers()
            raise
        finally:
            gc.unfreeze()

    def _shutdown_workers(self) -> None:
        if hasattr(self, "_workers_status"):  # it has started them all
            super()._shutdown_workers()
        for worker in multiprocessing.active_children():  # a worker's copy of this object has none
            if worker in getattr(self, "_workers", ()):  # not yet there where no queue could be made
                worker.kill()
                worker.join(KILLED_LIMIT)


class ErrorForwardingQueue(Queue):
    """A queue that gives the error in place of what its thread cannot hand over, for which the reader would wait."""

    def _on_queue_feeder_error(self, error: Exception, item: object) -> None:
        worker = get_worker_info()
        if worker is None:  # the process that has the workers
            if not self._closed:  # type: ignore[attr-defined]  # until Python 3.10 that breaks what is being sent
                super()._on_queue_feeder_error(error, item)  # type: ignore[misc]
            return
        if not isinstance(item, tuple):  # it was being sent
            os._exit(1)
        told = explained(error, worker.num_workers)
        self.put((item[0], told if isinstance(told, UserError) else RuntimeError(repr(error))))


def _context() -> BaseContext:
    """The system's way of starting processes, with queues that tell.

    On Linux a fork, since Python 3.14 too: a worker then has the arrays of all images in common with this process, and
    torch is imported already.
    """
    context = copy.copy(multiprocessing.get_context("fork" if sys.platform == "linux" else None))
    context.Queue = lambda maxsize=0: ErrorForwardingQueue(maxsize, ctx=context)  # type: ignore[method-assign]
    return context


class _WorkerStart:
    """Sets a worker's signals and its folder of temporary files.

    A signal to the whole process group must not end it, as the run finishes its iteration.  Only once the run itself
    leaves does SIGTERM end the worker.
    """

    def __init__(self, context: BaseContext) -> None:
        self._leaving = context.Event()
        # Runs before multiprocessing ends the workers that are left, since that was registered earlier.
        atexit.register(self._leaving.set)

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._handle)
        _choose_short_folder()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._leaving.is_set():
            os._exit(128 + number)


def _choose_short_folder() -> None:
    """Has this process's sockets in a folder whose path is short enough for them, whatever TMPDIR says."""
    if len(os.fsencode(tempfile.gettempdir())) <= LONGEST_FOLDER:
        return
    for folder in SHORT_FOLDERS:
        with suppress(OSError), tempfile.TemporaryFile(dir=folder):
            tempfile.tempdir = folder
            return


@contextmanager
def convert_worker_errors(workers: int | None = None) -> Iterator[None]:
    """Turns errors of making and using worker processes into a UserError, where a user can do something about them.

    workers: how many there are; None where that is unknown: torch raises the loss of one anywhere, from a signal.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        told = explained(error, workers)
        if told is error:
            raise
        raise told from None


def explained(error: Exception, workers: int | None = None) -> Exception:
    """A UserError where this one of worker processes is one that a user can do something about; else itself.

    workers: how many there are, None where that is not known: torch raises the loss of one anywhere, from a signal.
    """
    text, number = str(error), getattr(error, "errno", None)
    first = (text.splitlines() or [type(error).__name__])[0].rstrip(". ")
    some = "the" if workers is None else str(workers)
    if isinstance(error, UserError):
        return error
    if number in (errno.EMFILE, errno.ENFILE) or "Too many open files" in text:
        return UserError(
            f"too many open files ({first}): raise their limit (ulimit -n {_open_files_to_ask_for()}), or {FEWER}"
        )
    of_workers = workers is not None or text.startswith("DataLoader worker")  # GPUs have shared memory, too
    if of_workers and ("Bus error" in text or "shared memory" in text):
        return _too_small(some)
    if "killed by signal" in text or "exited unexpectedly" in text:
        return UserError(f"one of {some} worker processes was killed ({first}): where memory is short, {FEWER}")
    if number in (errno.EAGAIN, errno.ENOMEM) or "can't start new thread" in text:
        limit = "raise the limit of processes (ulimit -u, or the container's)"
        return UserError(f"cannot start {some} worker processes ({first}): {limit}, or {FEWER}")
    if not workers or not isinstance(error, OSError | EOFError) or text.startswith("Caught "):  # the last: of a worker
        return error
    if number == errno.ENOSPC:
        place = f"the worker processes' sockets in {tempfile.gettempdir()}"
        return UserError(f"no space is left for {place}: free some, set TMPDIR to another folder, or {FEWER}")
    return UserError(f"one of {some} worker processes cannot hand its images over ({first}): {FEWER}")


def _open_files_to_ask_for() -> int:
    """Twice the present limit, at least 1024."""
    return 1024 if resource is None else max(1024, 2 * resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _too_small(workers: str) -> UserError:
    size = f" ({shutil.disk_usage(SHARED_MEMORY).total / 2**20:.1f} MiB)" if SHARED_MEMORY.exists() else ""
    return UserError(
        f"{SHARED_MEMORY}{size} is too small for {workers} worker processes: enlarge it (docker run "
        f"--shm-size=1g), or {FEWER}"
    )
