"""Where a run writes; what keeps it from writing is told of in one line."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import BinaryIO
from uuid import uuid4

from src.runtime.errors import UserError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # not on Windows, where nothing is locked
    fcntl = None

PART = re.compile(r"\..*\.[0-9a-f]{8}\.part", re.DOTALL)  # the names of files that are being written
NAME_KEPT = 50  # characters of a name in one that is made of it, such as that of a file's part, and may not be longer

_locks: set[int] = set()  # of this process, open folders


@contextmanager
def writing(path: Path | str, *, remark: str = "") -> Iterator[None]:
    """Turns the errors of writing to `path` into a UserError, one line for the user, that ends in the remark."""
    try:
        yield
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"cannot write {path}: a file is in its place (--output names a folder)") from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}{remark}") from None


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` in one step at the end of the block.

    Raises UserError where that fails.  Then, and whenever the block or the process ends early, an older file stays.
    """
    with writing(path, remark="; an earlier file there is as it was"):
        _remove_left_overs(path.parent.absolute())
        with _new_part(path) as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                if fcntl is None:  # Windows renames no open file
                    file.close()
                os.replace(file.name, path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(file.name)
                raise


@contextmanager
def _new_part(path: Path) -> Iterator[BinaryIO]:
    """A new file beside `path`, which is locked as long as it is open: none that a killed process has left is."""
    while True:
        with open(path.with_name(f".{path.name[:NAME_KEPT]}.{uuid4().hex[:8]}.part"), "xb") as file:
            if _try_lock(file.fileno()) and os.path.exists(file.name):
                yield file
                return
            # another process has just taken it for a left-over


@cache
def _remove_left_overs(folder: Path) -> None:
    """Removes what killed processes have left of the files that they were writing; once for each folder."""
    if fcntl is None:
        return
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if PART.fullmatch(entry.name):
                with suppress(OSError), open(entry.path, "rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(entry.path)


def _try_lock(file: int) -> bool:
    """Locks an open file or folder; False where another process holds the lock, True too where nothing can lock."""
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass
    return True


def make_folder(path: Path) -> Path:
    """Makes the folder where it is missing; gives it.  Raises UserError."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def lock_output_folder(folder: Path) -> Iterator[None]:
    """Keeps other runs out of the folder, whose files they would move and mix; however this process ends, it is free.

    Raises UserError where another run is in it.  Where the file system cannot lock, nobody is kept out.
    """
    make_folder(folder)
    if fcntl is None:
        yield
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        _lock(lock, folder)
        _locks.add(lock)
        yield
    finally:
        _locks.discard(lock)
        os.close(lock)


def _lock(lock: int, folder: Path) -> None:
    assert fcntl is not None
    _close_locks_in_children()
    if not _try_lock(lock):
        raise UserError(f"{folder} is in use by another run: give this one its own --output")


@cache
def _close_locks_in_children() -> None:
    """Worker processes, which may outlive a killed run by seconds, must not hold its lock."""

    def close() -> None:
        for lock in _locks:
            with suppress(OSError):
                os.close(lock)
        _locks.clear()

    os.register_at_fork(after_in_child=close)
