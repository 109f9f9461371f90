"""Batches from torch's DataLoader, whose worker processes never leave a run waiting.

A worker that fails, is killed or cannot start ends the run with a UserError.
"""

import atexit
import errno
import gc
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from types import FrameType, ModuleType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from src.runtime.errors import ENLARGE_SHARED_MEMORY, SHARED_MEMORY, UserError

resource: ModuleType | None
try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None

PREFETCH = 2  # batches a worker prepares ahead
SOCKET_FOLDER_BYTES = 70  # longer paths leave no room for the names of multiprocessing's sockets on some systems
SHORT_FOLDERS = ("/tmp", "/var/tmp", SHARED_MEMORY)
# Open files of this process: without workers, and for each worker its pipes and its batches' tensors.
OPEN_FILES, OPEN_FILES_PER_WORKER = 64, 3 + 5 * PREFETCH
KILL_SECONDS = 1  # until a killed worker is gone
FEWER_WORKERS_HINT = "use fewer workers or none (--num-workers 0)"
# Torch's iterator prints a traceback if it is collected before all its workers have started.  These errors hold such
# iterators until the process exits.
_FAILED_STARTS: list[Exception] = []


class CheckedLoader:
    """A DataLoader that raises errors of its worker processes as UserErrors; they stay alive until `close`."""

    def __init__(
        self,
        dataset: Dataset,
        collate: Callable[[list], object],
        num_workers: int,
        device: torch.device,
        *,
        batch_sampler: Iterable[list],
    ) -> None:
        """collate: makes a batch, or returns the UserError of a sample.

        Raises UserError if the system allows too few open files.
        """
        # The user has chosen --num-workers; torch's advice on it would stand in every log.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        allow_open_files(num_workers)
        # Linux forks, also since Python 3.14: workers then share the arrays of all images with this process.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else None) if num_workers else None
        self.num_workers = num_workers
        self._initialise_worker = _WorkerInitialiser(context) if context else None
        self._workers: list[BaseProcess] = []
        self._batches: Any = None  # torch's iterator
        self._loader: DataLoader
        with convert_worker_errors(num_workers):
            self._loader = DataLoader(
                dataset,
                batch_sampler=batch_sampler,
                num_workers=num_workers,
                collate_fn=_PicklingCollate(collate, num_workers) if num_workers else collate,
                pin_memory=device.type == "cuda",
                persistent_workers=num_workers > 0,
                prefetch_factor=PREFETCH if num_workers else None,
                worker_init_fn=self._initialise_worker,
                multiprocessing_context=context,
            )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator:
        """The batches; raises UserError if a worker returned one or was killed."""
        try:
            with convert_worker_errors(self.num_workers):
                self._start()
                for batch in self._batches:
                    if isinstance(batch, Exception):
                        raise batch
                    yield batch
        except Exception:
            self.close()
            raise

    def _start(self) -> None:
        """Starts the workers, or has them begin the next pass."""
        others = multiprocessing.active_children()
        gc.freeze()  # a worker must not collect this process's garbage: an object of CUDA's would end it
        try:
            self._batches = iter(self._loader)
        except Exception as error:
            _FAILED_STARTS.append(error)
            raise
        finally:
            gc.unfreeze()
            self._workers += [child for child in multiprocessing.active_children() if child not in others]

    def close(self) -> None:
        """Ends the worker processes, those too that hang."""
        if self._initialise_worker is None:
            return
        self._initialise_worker.let_sigterm_end_workers()
        if self._batches is not None:
            # Torch's public way is to drop all references to the iterator, but those of a traceback remain.
            self._batches._shutdown_workers()
        for worker in self._workers:
            worker.kill()
            worker.join(KILL_SECONDS)
        self._workers.clear()


def allow_open_files(num_workers: int) -> None:
    """Raises this process's limit of open files to what the workers need; UserError if the system forbids it.

    A process without free files cannot report an error to the process that waits for it, so this comes first.
    """
    if resource is None or not num_workers:
        return
    needed = OPEN_FILES + OPEN_FILES_PER_WORKER * num_workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"{num_workers} worker processes need {needed} open files and {hard} are allowed: raise the limit (ulimit "
            f"-n {needed}), or {FEWER_WORKERS_HINT}"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class _PicklingCollate:
    """Makes batches in a worker and pickles them; gives a UserError if the tensors cannot be shared."""

    def __init__(self, collate: Callable[[list], object], num_workers: int) -> None:
        self.collate = collate
        self.num_workers = num_workers

    def __call__(self, samples: list) -> object:
        batch = self.collate(samples)
        if isinstance(batch, UserError):
            return batch
        try:
            return _PickledBatch(batch)
        except (OSError, RuntimeError) as error:
            converted = to_user_error(error, self.num_workers)
            return converted if isinstance(converted, UserError) else _shared_memory_error(str(self.num_workers))


class _PickledBatch:
    """A pickled batch, which the reader of the DataLoader's queue receives as the batch itself.

    The queue would pickle the batch in a thread, whose errors are only printed, while the run waits for the batch.
    """

    def __init__(self, batch: object) -> None:
        self._pickled = bytes(ForkingPickler.dumps(batch))  # moves tensors into shared memory

    def __reduce__(self) -> tuple:
        return pickle.loads, (self._pickled,)


class _WorkerInitialiser:
    """Sets a worker's signal handlers and its folder of temporary files.

    A signal to the whole process group must not end a worker, because the run finishes its iteration.  SIGTERM ends
    workers only once the run closes its loader or exits.
    """

    def __init__(self, context: BaseContext) -> None:
        self._closing = context.Event()
        # This runs before multiprocessing sends SIGTERM to its remaining children, whose exit handler is older.
        atexit.register(self._closing.set)

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._handle_sigterm)
        _choose_short_folder()

    def let_sigterm_end_workers(self) -> None:
        self._closing.set()

    def _handle_sigterm(self, number: int, frame: FrameType | None) -> None:
        if self._closing.is_set():
            os._exit(128 + number)


def _choose_short_folder() -> None:
    """Puts this process's sockets into a folder whose path is short enough for them, if TMPDIR's is too long."""
    if len(os.fsencode(tempfile.gettempdir())) <= SOCKET_FOLDER_BYTES:
        return
    for folder in SHORT_FOLDERS:
        with suppress(OSError), tempfile.TemporaryFile(dir=folder):
            tempfile.tempdir = folder
            return


@contextmanager
def convert_worker_errors(num_workers: int | None = None) -> Iterator[None]:
    """Raises errors of worker processes as UserErrors; see `to_user_error`."""
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        converted = to_user_error(error, num_workers)
        if converted is error:
            raise
        raise converted from None


def to_user_error(error: Exception, num_workers: int | None = None) -> Exception:
    """A UserError for an error of worker processes that a user can do something about; any other error unchanged.

    num_workers: None if unknown, because torch raises the loss of a worker anywhere, from a signal handler.
    """
    # Torch raises "exited unexpectedly" from an error that names the signal, if it was waiting for a batch.
    text = str(error.__cause__ if isinstance(error.__cause__, RuntimeError) else error)
    number = getattr(error, "errno", None)
    reason = (text.splitlines() or [type(error).__name__])[0].rstrip(". ")
    count = "the" if num_workers is None else str(num_workers)
    if isinstance(error, UserError):
        return error
    if number in (errno.EMFILE, errno.ENFILE) or "Too many open files" in text:
        return UserError(
            f"too many open files ({reason}): raise their limit (ulimit -n {_open_files_to_ask_for()}), or "
            f"{FEWER_WORKERS_HINT}"
        )
    is_of_worker = num_workers is not None or text.startswith("DataLoader worker")  # GPUs have shared memory, too
    if is_of_worker and ("Bus error" in text or "shared memory" in text):
        return _shared_memory_error(count)
    if "killed by signal" in text or "exited unexpectedly" in text:
        return UserError(
            f"one of {count} worker processes was killed ({reason}): where memory is short, {FEWER_WORKERS_HINT}"
        )
    if number in (errno.EAGAIN, errno.ENOMEM) or "can't start new thread" in text:
        limit = "raise the limit of processes (ulimit -u, or the container's)"
        return UserError(f"cannot start {count} worker processes ({reason}): {limit}, or {FEWER_WORKERS_HINT}")
    is_raised_in_worker = text.startswith("Caught ")  # while it read a sample
    if not num_workers or not isinstance(error, OSError | EOFError) or is_raised_in_worker:
        return error
    if number == errno.ENOSPC:
        sockets = f"the worker processes' sockets in {tempfile.gettempdir()}"
        return UserError(
            f"no space is left for {sockets}: free some, set TMPDIR to another folder, or {FEWER_WORKERS_HINT}"
        )
    return UserError(f"one of {count} worker processes cannot hand its images over ({reason}): {FEWER_WORKERS_HINT}")


def _open_files_to_ask_for() -> int:
    """Twice the current limit, at least 1024."""
    return 1024 if resource is None else max(1024, 2 * resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _shared_memory_error(num_workers: str) -> UserError:
    size = ""
    if os.path.exists(SHARED_MEMORY):
        size = f" ({shutil.disk_usage(SHARED_MEMORY).total / 2**20:.1f} MiB)"
    return UserError(
        f"{SHARED_MEMORY}{size} is too small for {num_workers} worker processes: {ENLARGE_SHARED_MEMORY}, or "
        f"{FEWER_WORKERS_HINT}"
    )
