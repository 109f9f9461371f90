"""Standard output and standard error that may fail while the program runs: a closed pipe or terminal, a full disk."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

NAMES = ("standard output", "standard error")


class ConsoleStream:
    """A text stream that drops what it cannot write.

    The first write that fails redirects the stream to the null device, also for child processes and Python's last
    flush.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream = stream
        self._name = name
        self.failure: str | None = None  # why the stream is lost, until `take_failures` returns it

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._redirect_to_null(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._redirect_to_null(error)

    def _redirect_to_null(self, error: OSError) -> None:
        self.failure = f"cannot write to {self._name}: {error.strerror or error}; the program continues without it"
        with suppress(OSError), open(os.devnull, "w") as null:
            os.dup2(null.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def tolerate_console_errors() -> Iterator[None]:
    """Inside, printing raises no error: unwritable text is dropped, characters without an encoding are escaped."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_tolerant_stream(stream, name) for stream, name in zip(before, NAMES, strict=True))
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _tolerant_stream(stream: TextIO | None, name: str) -> Any:
    if stream is None:  # the parent process has closed it
        return io.StringIO()
    if isinstance(stream, io.TextIOWrapper):  # its encoding may lack characters of file and category names
        stream.reconfigure(errors="backslashreplace")
    return ConsoleStream(stream, name)


def take_failures() -> list[str]:
    """A sentence for each stream that has failed since the last call."""
    failures = []
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, ConsoleStream) and stream.failure:
            failures.append(stream.failure)
            stream.failure = None
    return failures
