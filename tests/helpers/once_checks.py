"""What each rank does in test_once_a_machine.py: a launcher starts `-m tests.helpers.once_checks --data FOLDER`.

FOLDER holds a data set in the COCO 2017 layout; every process leaves rank-K.json beside it.
"""

import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np

from benchmarks.annotations import private
from src.data.annotations.coco import Annotations
from src.data.annotations.dataset import read_dataset
from src.flags import parse_args
from src.runtime import distributed
from src.runtime.distributed import PeerLostError, Processes
from src.runtime.errors import UserError

LARGE = 2**24  # float64, 134 MB


def arrays(annotations: Annotations) -> dict[str, np.ndarray]:
    values = {field.name: getattr(annotations, field.name) for field in fields(annotations)}
    return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}


def digest(annotations: Annotations) -> str:
    """Of all that they are: the arrays with type and shape, and the rest as text."""
    content = hashlib.sha256()
    for field in fields(annotations):
        value = getattr(annotations, field.name)
        is_array = isinstance(value, np.ndarray)
        content.update(f"{field.name} {(value.dtype, value.shape) if is_array else value!r}".encode())
        content.update(value.tobytes() if is_array else b"")
    return content.hexdigest()


@contextmanager
def files_looked_at(folder: Path) -> Iterator[list[str]]:
    """Files below the folder that this process opens, and folders that it lists, while it lasts (PEP 578)."""
    seen: list[str] = []
    watching = threading.Event()
    watching.set()

    def hook(event: str, arguments: tuple) -> None:
        if watching.is_set() and event in ("open", "os.scandir", "os.listdir"):
            path = os.fspath(arguments[0]) if isinstance(arguments[0], str | os.PathLike) else ""
            if path.startswith(str(folder)):
                seen.append(str(Path(path).relative_to(folder)))

    sys.addaudithook(hook)
    try:
        yield seen
    finally:
        watching.clear()


def refused(*_: object) -> None:
    raise PermissionError(13, "Permission denied")


def read_shared(processes: Processes, folder: Path) -> dict:
    """What this process looked at for the data set, and what it has got."""
    with files_looked_at(folder) as seen:
        data = processes.once_a_machine(partial(read_dataset, folder, evaluating=True, upright=False))
    values = [array for annotations in data for array in arrays(annotations).values()]
    return {
        "looked at": seen,
        "digests": [digest(annotations) for annotations in data],
        "writeable": any(array.flags.writeable for array in values),
        "aligned": all(array.flags.aligned for array in values),
    }


def maker(processes: Processes) -> int:
    """The rank that has made what this one gets."""
    return processes.once_a_machine(lambda: [None, processes.rank])[1]


def growth(processes: Processes) -> float:
    """MB that this process comes to own with a value of 134 MB, all of which it has looked at."""
    before = private()
    large = processes.once_a_machine(lambda: {"rows": [np.arange(LARGE, dtype=np.float64)]})["rows"][0]
    assert large.sum() == LARGE * (LARGE - 1) / 2
    processes.maximum(0)  # pages that only one process has looked at would count as its own
    grown = private() - before
    processes.maximum(0)  # nor may one be gone
    return grown


def fault(processes: Processes, error: Exception) -> str:
    """What this process ends with where the first one of the machine fails."""

    def make() -> None:
        if processes.rank:
            raise AssertionError("it was not to make anything")
        raise error

    try:
        processes.once_a_machine(make)
    except (UserError, PeerLostError, ZeroDivisionError) as told:
        if isinstance(told, ZeroDivisionError):
            processes.report_failure()  # as main.py does
        return repr(told)
    return "none"


def elsewhere(processes: Processes, rank: int) -> AbstractContextManager:
    """Has this rank, and no other, on another machine."""
    return patch.object(distributed, "machine", lambda: "another") if processes.rank == rank else nullcontext()


def main(folder: Path, local_rank: int) -> None:
    last = int(os.environ["WORLD_SIZE"]) - 1
    with distributed.start(local_rank) as processes:
        report = {"shared": read_shared(processes, folder)}
        with patch.object(distributed, "attach", refused) if processes.rank == last else nullcontext():
            report["last cannot attach"] = read_shared(processes, folder)
        with patch.object(os, "memfd_create", refused):
            report["cannot share"] = read_shared(processes, folder)
        with patch.object(distributed, "machine", lambda: None):
            report["unknown machine"] = maker(processes)
        with elsewhere(processes, last):
            report["last elsewhere"] = maker(processes)
        with elsewhere(processes, 0):
            report["first elsewhere"] = maker(processes)
        report["grown"] = growth(processes)
        report["lost"] = fault(processes, UserError("a file: is bad"))
        (folder.parent / f"rank-{processes.rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    args = parse_args()
    main(args.data, args.local_rank)
