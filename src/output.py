"""The folder that a run writes into; what keeps it from writing is told of in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turns the errors of writing to `path` into a UserError, one line for the user."""
    try:
        yield
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"cannot write {path}: a file is in its place (--output names a folder)") from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def make_folder(path: Path) -> Path:
    """Makes the folder where it is missing; gives it.  Raises UserError."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path
