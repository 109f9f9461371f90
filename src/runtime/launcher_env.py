"""Rank, world size and rendezvous address of this process, from the environment variables of a launcher."""

import io
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import NamedTuple

from src.runtime.errors import UserError

MAX_INT, MAX_PORT = 2**31 - 1, 65535
MPI_PORT = 29500  # torchrun's default; mpirun sets none
# Other ranks wait up to 5 s before they exit, because launchers kill all ranks once one exits.
ERROR_REPORT_GRACE_SECONDS = 5
# Each job has ports for 8 steps.  Systems give ports from 32768 on to any program that asks for one.
SLURM_PORTS, PORTS_PER_JOB = range(20000, 32000), 8


class RankInfo(NamedTuple):
    """A process's rank, and the address at which all ranks meet."""

    rank: int
    world_size: int
    local_rank: int  # index among the processes of its machine
    address: str = ""  # of rank 0's machine; empty for a single process
    port: int = 0


def rank_info_from_env(local_rank: int = 0, variables: Mapping[str, str] = os.environ) -> RankInfo:
    """The rank by the variables of torchrun, else mpirun, else srun; without any of them a single process.

    local_rank: the launcher's flag; the LOCAL_RANK variable wins.  An empty variable counts as missing.
    Raises UserError if variables are missing or out of range.
    """
    given = {name: value for name, value in variables.items() if value.strip()}
    if "WORLD_SIZE" in given:
        return _torchrun(given, local_rank)
    if "OMPI_COMM_WORLD_SIZE" in given:
        return _mpirun(given)
    if env_int(given, "SLURM_STEP_NUM_TASKS", 1) > 1:  # srun sets it, a batch script does not
        return _srun(given)
    return RankInfo(0, 1, env_int(given, "LOCAL_RANK", local_rank))


def _torchrun(given: Mapping[str, str], local_rank: int) -> RankInfo:
    size, local_rank = env_int(given, "WORLD_SIZE", low=1), env_int(given, "LOCAL_RANK", local_rank)
    if size == 1:
        return RankInfo(0, 1, local_rank)
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in given:
            raise UserError(
                f"the variable WORLD_SIZE is {size}, but {name} is not set: start the processes with torchrun, "
                "which sets all of them, or unset WORLD_SIZE for one process"
            )
    return check_rank(RankInfo(env_int(given, "RANK"), size, local_rank, given["MASTER_ADDR"], _port(given)), "RANK")


def _mpirun(given: Mapping[str, str]) -> RankInfo:
    """The rank by Open MPI's variables, which hold no address."""
    name = "OMPI_COMM_WORLD_{}".format
    size, local_size = env_int(given, name("SIZE"), low=1), env_int(given, name("LOCAL_SIZE"), 1)
    local_rank = env_int(given, name("LOCAL_RANK"), 0)
    if size == 1:
        return RankInfo(0, 1, local_rank)
    address = given.get("MASTER_ADDR", "127.0.0.1" if size == local_size else None)
    if address is None:
        raise UserError("mpirun on several machines: name that of rank 0 (mpirun -x MASTER_ADDR=HOST)")
    info = RankInfo(env_int(given, name("RANK")), size, local_rank, address, _port(given, MPI_PORT))
    return check_rank(info, name("RANK"))


def _srun(given: Mapping[str, str]) -> RankInfo:
    """The rank by the variables of a Slurm step.

    The port depends on job and step, so that two jobs on one machine use different ports.
    """
    nodes = given.get("SLURM_STEP_NODELIST") or given.get("SLURM_JOB_NODELIST", "127.0.0.1")
    step = env_int(given, "SLURM_JOB_ID", 0) * PORTS_PER_JOB + env_int(given, "SLURM_STEP_ID", 0) % PORTS_PER_JOB
    return check_rank(
        RankInfo(
            rank=env_int(given, "SLURM_PROCID"),
            world_size=env_int(given, "SLURM_STEP_NUM_TASKS"),
            local_rank=env_int(given, "SLURM_LOCALID"),
            address=given.get("MASTER_ADDR", first_host(nodes)),
            port=_port(given, SLURM_PORTS[step % len(SLURM_PORTS)]),
        ),
        "SLURM_PROCID",
    )


def first_host(nodes: str) -> str:
    """The first host of a list in Slurm's syntax: node001 of "node[001-003,7],x"."""
    lowest = re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", nodes)  # each pair of brackets becomes its first number
    return lowest.split(",")[0]


def check_rank(info: RankInfo, name: str) -> RankInfo:
    """`info`.  Raises UserError, which names the variable, if the rank is not below the world size."""
    if info.rank >= info.world_size:
        raise UserError(f"the variable {name} is {info.rank}: expected a rank from 0 to {info.world_size - 1}")
    return info


def _port(given: Mapping[str, str], default: int | None = None) -> int:
    return env_int(given, "MASTER_PORT", default, low=1, high=MAX_PORT)


def env_int(
    given: Mapping[str, str], name: str, default: int | None = None, *, low: int = 0, high: int = MAX_INT
) -> int:
    """The variable as an int.  Raises UserError if it is out of range or no number, or missing without a default."""
    text = given.get(name, "" if default is None else str(default))
    if not text.isdecimal() or not low <= int(text) <= high:
        raise UserError(
            f"the variable {name} is {text!r}: expected a whole number from {low} to {high}; launchers set it, for a "
            "single process unset it"
        )
    return int(text)


@contextmanager
def print_once_per_node() -> Iterator[None]:
    """Inside, only the first process of each machine prints, because all would print the same.

    The others delay an exit by 5 s, because launchers kill all ranks once one exits.
    """
    if _is_first_of_node():
        yield
        return
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            yield
        except SystemExit:
            time.sleep(ERROR_REPORT_GRACE_SECONDS)
            raise


def _is_first_of_node() -> bool:
    try:
        return rank_info_from_env().local_rank == 0
    except UserError:  # `process_group.start` will raise it
        return True
