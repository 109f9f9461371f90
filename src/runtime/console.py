"""Standard output and standard error that may go away while the program runs: a terminal, a pipe, a full disk."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

NAMES = ("standard output", "standard error")


class ConsoleStream:
    """A text stream that drops what it cannot write.

    The first write that fails turns the stream to the null device, for child processes and for Python's last flush too.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream = stream
        self._name = name
        self.failure: str | None = None  # why the stream is lost, until `take_failures` returns it

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.failure = f"cannot write to {self._name}: {error.strerror or error}; the program goes on without it"
        with suppress(OSError), open(os.devnull, "w") as null:
            os.dup2(null.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def robust_console() -> Iterator[None]:
    """Inside, printing raises no error: what cannot be written is dropped, what cannot be encoded is escaped."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_robust(stream, name) for stream, name in zip(before, NAMES, strict=True))
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _robust(stream: TextIO | None, name: str) -> Any:
    if stream is None:  # whoever started this process has closed it
        return io.StringIO()
    if isinstance(stream, io.TextIOWrapper):  # the terminal's encoding may lack letters of file and category names
        stream.reconfigure(errors="backslashreplace")
    return ConsoleStream(stream, name)


def take_failures() -> list[str]:
    """What has been lost since the last call, a sentence for each stream."""
    failures = []
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, ConsoleStream) and stream.failure:
            failures.append(stream.failure)
            stream.failure = None
    return failures
