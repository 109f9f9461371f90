"""This process's place among those that a launcher started, as its environment variables tell."""

import io
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import NamedTuple

from src.runtime.errors import UserError

LARGEST, LARGEST_PORT = 2**31 - 1, 65535
MPI_PORT = 29500  # where mpirun's user names none; it is torchrun's, too
ERROR_REPORT_GRACE_SECONDS = 5  # seconds that a process which fails after another waits for that one to have told why
SLURM_PORTS, PORTS_A_JOB = range(20000, 32000), 8  # below those that systems give away; one for each step of a job


class RankInfo(NamedTuple):
    """Where a process stands, and where it meets the others."""

    rank: int
    world_size: int
    local_rank: int  # among the processes of its machine
    address: str = ""  # of rank 0's machine; not where there is one process
    port: int = 0


def rank_info_from_env(local_rank: int = 0, variables: Mapping[str, str] = os.environ) -> RankInfo:
    """The place that torchrun, mpirun or srun gave this process, the first of them that has; else a lone one.

    local_rank: the launcher's flag, over which its variable wins.  An empty variable counts as none.
    Raises UserError where variables are missing or hold nonsense.
    """
    given = {name: value for name, value in variables.items() if value.strip()}
    if "WORLD_SIZE" in given:
        return _torchrun(given, local_rank)
    if "OMPI_COMM_WORLD_SIZE" in given:
        return _mpirun(given)
    if _whole(given, "SLURM_STEP_NUM_TASKS", 1) > 1:  # srun alone sets it, and not in the script of a batch job
        return _srun(given)
    return RankInfo(0, 1, _whole(given, "LOCAL_RANK", local_rank))


def _torchrun(given: Mapping[str, str], local_rank: int) -> RankInfo:
    size, local_rank = _whole(given, "WORLD_SIZE", least=1), _whole(given, "LOCAL_RANK", local_rank)
    if size == 1:
        return RankInfo(0, 1, local_rank)
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in given:
            raise UserError(
                f"the variable WORLD_SIZE is {size}, but {name} is not set: start the processes with torchrun, "
                "which sets all of them, or unset WORLD_SIZE for one process"
            )
    return _among(RankInfo(_whole(given, "RANK"), size, local_rank, given["MASTER_ADDR"], _port(given)), "RANK")


def _mpirun(given: Mapping[str, str]) -> RankInfo:
    """Open MPI's variables; it tells nothing of the address."""
    name = "OMPI_COMM_WORLD_{}".format
    size, local_size = _whole(given, name("SIZE"), least=1), _whole(given, name("LOCAL_SIZE"), 1)
    local_rank = _whole(given, name("LOCAL_RANK"), 0)
    if size == 1:
        return RankInfo(0, 1, local_rank)
    address = given.get("MASTER_ADDR", "127.0.0.1" if size == local_size else None)
    if address is None:
        raise UserError("mpirun on several machines: name that of rank 0 (mpirun -x MASTER_ADDR=HOST)")
    place = RankInfo(_whole(given, name("RANK")), size, local_rank, address, _port(given, MPI_PORT))
    return _among(place, name("RANK"))


def _srun(given: Mapping[str, str]) -> RankInfo:
    """The variables of a Slurm step; the port is the step's own among those of the machines' other jobs."""
    nodes = given.get("SLURM_STEP_NODELIST") or given.get("SLURM_JOB_NODELIST", "127.0.0.1")
    step = _whole(given, "SLURM_JOB_ID", 0) * PORTS_A_JOB + _whole(given, "SLURM_STEP_ID", 0) % PORTS_A_JOB
    return _among(
        RankInfo(
            rank=_whole(given, "SLURM_PROCID"),
            world_size=_whole(given, "SLURM_STEP_NUM_TASKS"),
            local_rank=_whole(given, "SLURM_LOCALID"),
            address=given.get("MASTER_ADDR", first_host(nodes)),
            port=_port(given, SLURM_PORTS[step % len(SLURM_PORTS)]),
        ),
        "SLURM_PROCID",
    )


def first_host(nodes: str) -> str:
    """The first of a list as Slurm writes it: node001 of "node[001-003,7],x"."""
    lowest = re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", nodes)  # of each pair of brackets, in which commas stand as well
    return lowest.split(",")[0]


def _among(place: RankInfo, name: str) -> RankInfo:
    if place.rank >= place.world_size:
        raise UserError(f"the variable {name} is {place.rank}, but there are {place.world_size} processes, from 0 on")
    return place


def _port(given: Mapping[str, str], default: int | None = None) -> int:
    return _whole(given, "MASTER_PORT", default, least=1, most=LARGEST_PORT)


def _whole(
    given: Mapping[str, str], name: str, default: int | None = None, *, least: int = 0, most: int = LARGEST
) -> int:
    """A variable's number; raises UserError where it is none, or is missing and has no default."""
    text = given.get(name, "" if default is None else str(default))
    if not text.isdecimal() or not least <= int(text) <= most:
        raise UserError(
            f"the variable {name} is {text!r}, not a whole number from {least} to {most}: launchers set it; for one "
            "process unset it"
        )
    return int(text)


@contextmanager
def print_once_per_node() -> Iterator[None]:
    """Inside, only the first process of a machine prints, where all would print the same.

    An exit of the others is held back until it has, because a launcher ends all when one is gone.
    """
    if _is_first_of_machine():
        yield
        return
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            yield
        except SystemExit:
            time.sleep(ERROR_REPORT_GRACE_SECONDS)
            raise


def _is_first_of_machine() -> bool:
    try:
        return rank_info_from_env().local_rank == 0
    except UserError:  # which `start` will raise
        return True
