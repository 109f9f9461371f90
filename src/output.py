"""Where a run writes; what keeps it from writing is told of in one line."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

from .errors import UserError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # not on Windows, where nothing is locked
    fcntl = None

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
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` in one step at the end of the block.

    Raises UserError where that fails.  Then, and whenever the block or the process ends early, an older file stays.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with writing(path, remark="; an earlier file there is as it was"):
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def make_folder(path: Path) -> Path:
    """Makes the folder where it is missing; gives it.  Raises UserError."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def reserved(folder: Path) -> Iterator[None]:
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
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder} is in use by another run: give this one its own --output") from None
    except OSError:
        pass


@cache
def _close_locks_in_children() -> None:
    """Worker processes, which may outlive a killed run by seconds, must not hold its lock."""

    def close() -> None:
        for lock in _locks:
            with suppress(OSError):
                os.close(lock)
        _locks.clear()

    os.register_at_fork(after_in_child=close)
