"""A value whose arrays one process has made and others of its machine map, so that they are in memory once.

On Linux alone: the arrays lie in a file without a name (memfd_create(2)), which is gone with the last process that has
it open or mapped, however that ends.
"""

import mmap
import os
import pickle
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

ALIGNMENT = 64  # bytes, of an array's beginning
MARK = 16  # bytes
BOOT = Path("/proc/sys/kernel/random/boot_id")
PROCESS_IDS = Path("/proc/self/ns/pid")


class Notice(NamedTuple):
    """What another process must know to attach."""

    process: int  # id of the one that keeps the file open
    descriptor: int  # the file's, there
    mark: bytes  # how the file begins, and no other
    content: bytes  # the pickled value, without its arrays
    places: list[tuple[int, int]]  # where the bytes of each array start and stop in the file


def machine() -> str | None:
    """A text that is the same for those processes that know each other by their ids, and for no others.

    Those of several containers on one machine do not.  None where the system does not tell, or has no such files.
    """
    if not hasattr(os, "memfd_create"):
        return None
    try:
        return f"{BOOT.read_text().strip()} {PROCESS_IDS.stat().st_ino}"
    except OSError:
        return None


@contextmanager
def shared(value: Any) -> Iterator[Notice | None]:
    """While it lasts, other processes can `attach` to a copy of the value; None where the system refuses.

    value: anything that pickles; what counts is NumPy arrays of plain numbers, at any depth.
    """
    notice = None
    with ExitStack() as stack:
        with suppress(OSError):  # a container may forbid the call, or limit its memory
            file = stack.enter_context(open(os.memfd_create("ssd300-arrays"), "wb"))
            notice = _write(value, file)
        yield notice


def _write(value: Any, file: BinaryIO) -> Notice:
    arrays: list[pickle.PickleBuffer] = []
    content = pickle.dumps(value, protocol=5, buffer_callback=arrays.append)
    mark, places = secrets.token_bytes(MARK), []
    file.write(mark)
    for array in arrays:
        start = file.seek(-(-file.tell() // ALIGNMENT) * ALIGNMENT)
        file.write(array.raw())
        places.append((start, file.tell()))
    file.flush()
    return Notice(os.getpid(), file.fileno(), mark, content, places)


def attach(notice: Notice) -> Any:
    """The value, whose arrays cannot be written to; it lasts longer than the process that shared it.

    Raises OSError where this process cannot come by the file: it is another user's, or ids mean other processes here.
    """
    # Should it be another file after all, a pipe for one, opening it must not wait.
    descriptor = os.open(f"/proc/{notice.process}/fd/{notice.descriptor}", os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        data = memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
    except ValueError as error:  # it is empty
        raise FileNotFoundError(str(error)) from None
    finally:
        os.close(descriptor)
    if data[:MARK] != notice.mark:
        raise FileNotFoundError("the file is another")
    return pickle.loads(notice.content, buffers=[data[start:stop] for start, stop in notice.places])
