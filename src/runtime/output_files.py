"""Files in --output: the lock of the folder, and atomic writes."""

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import BinaryIO
from uuid import uuid4

from src.runtime.errors import UserError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows lacks it, so nothing is locked there
    fcntl = None

LOCK = ".lock"
TEMPORARY_NAME = re.compile(r"\..*\.[0-9a-f]{8}\.part", re.DOTALL)  # of a file that is being written
# File systems limit names to 255 bytes and a character has up to 4, so a longer name is cut to this many characters.
MAX_KEPT_CHARACTERS = 50


@contextmanager
def convert_write_errors(path: Path | str, *, remark: str = "") -> Iterator[None]:
    """Inside, errors of writing to `path` become a UserError; its line ends with `remark`."""
    try:
        yield
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"cannot write {path}: a file is in its place (--output names a folder)") from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}{remark}") from None


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A temporary file, which is renamed to `path` at the end of the block.

    An older file at `path` stays if the block or the process ends early.  Raises UserError if writing fails.
    """
    temporary = path.with_name(f".{path.name[:MAX_KEPT_CHARACTERS]}.{uuid4().hex[:8]}.part")
    with convert_write_errors(path, remark="; an earlier file there is as it was"), open(temporary, "xb") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            file.close()  # Windows renames no open file
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise


def make_folder(path: Path) -> Path:
    """The folder; makes it if it is missing.  Raises UserError."""
    with convert_write_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def lock_output_folder(folder: Path) -> Iterator[None]:
    """Inside, no other run can write into the folder.

    Raises UserError if another run has locked it.  On a file system without locks it only makes the folder.
    """
    make_folder(folder)
    with ExitStack() as stack:
        with convert_write_errors(folder):
            file = stack.enter_context(open(folder / LOCK, "ab"))
        if _lock(file, folder):
            _remove_leftovers(folder)
        yield


def _lock(file: BinaryIO, folder: Path) -> bool:
    """Locks the file; False if the system has no locks.  Raises UserError if another run has locked it.

    Uses lockf, because its lock works on NFS and worker processes, which may outlive a killed run, do not inherit it.
    """
    if fcntl is None:
        return False
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"{folder} is in use by another run: give this one its own --output") from None
    except OSError:
        return False
    return True


def _remove_leftovers(folder: Path) -> None:
    """Removes temporary files of runs that were killed while writing."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if TEMPORARY_NAME.fullmatch(entry.name):
                with suppress(OSError):
                    os.unlink(entry.path)
