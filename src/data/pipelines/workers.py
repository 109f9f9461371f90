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

from src.runtime.errors import ENLARGE_SHARED_MEMORY_HINT, SHARED_MEMORY, UserError

resource: ModuleType | None
try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None

PREFETCH = 2  # batches a worker prepares ahead
# In bytes.  On some systems longer paths leave no room for the names of multiprocessing's sockets.
MAX_SOCKET_FOLDER_LENGTH = 70
SHORT_FOLDERS = ("/tmp", "/var/tmp", SHARED_MEMORY)
# Open files of this process: without workers, and for each worker its pipes and its batches' tensors.
OPEN_FILES, OPEN_FILES_PER_WORKER = 64, 3 + 5 * PREFETCH
KILL_SECONDS = 1  # until a killed worker is gone
FEWER_WORKERS_HINT = "use fewer workers or none (--num-workers 0)"
# Torch's iterator prints a traceback if it is collected before all its workers have started.  The tracebacks of these
# errors keep such iterators alive until the process exits.
_FAILED_STARTS: list[BaseException] = []


class CheckedLoader:
    """A DataLoader that raises errors of its workers as UserErrors; the worker processes stay alive until `close`."""

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
        # On Linux workers are forked, even with Python 3.14, which defaults to forkserver: forked workers share the
        # arrays of all images with this process.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else None) if num_workers else None
        self.num_workers = num_workers
        self._worker_setup = _WorkerSetup(context) if context else None
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
                worker_init_fn=self._worker_setup,
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
        """Starts the workers, or the next pass of running workers."""
        others = multiprocessing.active_children()
        # A worker must not collect this process's garbage: collecting a CUDA object would end the worker.
        gc.freeze()
        try:
            self._batches = iter(self._loader)
        except BaseException as error:  # Ctrl-C and SIGTERM, too
            _FAILED_STARTS.append(error)
            raise
        finally:
            gc.unfreeze()
            self._workers += [child for child in multiprocessing.active_children() if child not in others]

    def close(self) -> None:
        """Ends the worker processes, even if they hang."""
        if self._worker_setup is None:
            return
        self._worker_setup.let_sigterm_end_workers()
        if self._batches is not None:
            # Torch ends workers when no reference to the iterator is left, but a traceback may still hold one.
            self._batches._shutdown_workers()
        for worker in self._workers:
            worker.kill()
            worker.join(KILL_SECONDS)
        self._workers.clear()


def allow_open_files(num_workers: int) -> None:
    """Increases this process's limit of open files to what the workers need; raises UserError if that is forbidden.

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


class _WorkerSetup:
    """Sets a worker's signal handlers and its folder of temporary files.

    A signal to the whole process group must not end a worker, because the run finishes its iteration.  SIGTERM ends
    workers only once the run closes its loader or exits.
    """

    def __init__(self, context: BaseContext) -> None:
        self._closing = context.Event()
        # Exit handlers run last in, first out, so this one runs before multiprocessing's, which sends SIGTERM to the
        # workers that still run.
        atexit.register(self._closing.set)

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._handle_sigterm)
        _choose_short_folder()

    def let_sigterm_end_workers(self) -> None:
        self._closing.set()

    def _handle_sigterm(self, signal_number: int, frame: FrameType | None) -> None:
        if self._closing.is_set():
            os._exit(128 + signal_number)


def _choose_short_folder() -> None:
    """Puts this process's sockets into a folder whose path is short enough for them, if TMPDIR's is too long."""
    if len(os.fsencode(tempfile.gettempdir())) <= MAX_SOCKET_FOLDER_LENGTH:
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

    num_workers: None if unknown: torch's signal handler may raise the error of a lost worker anywhere in the program.
    """
    # Torch raises "exited unexpectedly" from an error that names the signal, if it was waiting for a batch.
    text = str(error.__cause__ if isinstance(error.__cause__, RuntimeError) else error)
    error_number = getattr(error, "errno", None)
    reason = (text.splitlines() or [type(error).__name__])[0].rstrip(". ")
    count_text = "the" if num_workers is None else str(num_workers)
    if isinstance(error, UserError):
        return error
    if error_number in (errno.EMFILE, errno.ENFILE) or "Too many open files" in text:
        return UserError(
            f"too many open files ({reason}): raise their limit (ulimit -n {_open_files_to_ask_for()}), or "
            f"{FEWER_WORKERS_HINT}"
        )
    is_of_worker = num_workers is not None or text.startswith("DataLoader worker")  # GPUs have shared memory, too
    if is_of_worker and ("Bus error" in text or "shared memory" in text):
        return _shared_memory_error(count_text)
    if "killed by signal" in text or "exited unexpectedly" in text:
        return UserError(
            f"one of {count_text} worker processes was killed ({reason}): where memory is short, {FEWER_WORKERS_HINT}"
        )
    if error_number in (errno.EAGAIN, errno.ENOMEM) or "can't start new thread" in text:
        hint = "raise the limit of processes (ulimit -u, or the container's)"
        return UserError(f"cannot start {count_text} worker processes ({reason}): {hint}, or {FEWER_WORKERS_HINT}")
    is_raised_in_worker = text.startswith("Caught ")  # while it read a sample
    if not num_workers or not isinstance(error, OSError | EOFError) or is_raised_in_worker:
        return error
    if error_number == errno.ENOSPC:
        sockets = f"the worker processes' sockets in {tempfile.gettempdir()}"
        return UserError(
            f"no space is left for {sockets}: free some, set TMPDIR to another folder, or {FEWER_WORKERS_HINT}"
        )
    return UserError(
        f"one of {count_text} worker processes cannot hand its images over ({reason}): {FEWER_WORKERS_HINT}"
    )


def _open_files_to_ask_for() -> int:
    """Twice the current limit, at least 1024."""
    return 1024 if resource is None else max(1024, 2 * resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _shared_memory_error(count_text: str) -> UserError:
    size = ""
    if os.path.exists(SHARED_MEMORY):
        size = f" ({shutil.disk_usage(SHARED_MEMORY).total / 2**20:.1f} MiB)"
    return UserError(
        f"{SHARED_MEMORY}{size} is too small for {count_text} worker processes: {ENLARGE_SHARED_MEMORY_HINT}, or "
        f"{FEWER_WORKERS_HINT}"
    )
