"""The rank by a launcher's environment variables, and printing once per node."""

import pytest

from src.flags import parse_args
from src.runtime import launcher_env
from src.runtime.errors import UserError
from src.runtime.launcher_env import RankInfo, first_host, rank_info_from_env

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29400"}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
# As Slurm 22.05 sets them: in the script of a batch job, and in the last of four processes of its step.
BATCH = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7",
         "SLURM_JOB_NODELIST": "n[1-3]"}  # fmt: skip
STEP = {**BATCH, "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_NODELIST": "n[2-3]"}  # fmt: skip


def test_torchruns_rank():
    assert rank_info_from_env(0, TORCHRUN) == RankInfo(5, 8, 1, "node0", 29400)
    assert rank_info_from_env(0, {**STEP, **MPIRUN, **TORCHRUN}) == RankInfo(5, 8, 1, "node0", 29400)


def test_the_ranks_of_a_slurm_step():
    info = rank_info_from_env(0, STEP)
    assert info[:4] == (3, 4, 1, "n2")
    assert 20000 <= info.port < 32768
    assert rank_info_from_env(0, {**STEP, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}).port == info.port
    others = [{**STEP, "SLURM_JOB_ID": "8"}, {**STEP, "SLURM_STEP_ID": "1"}]
    assert len({info.port, *(rank_info_from_env(0, other).port for other in others)}) == 3
    assert rank_info_from_env(0, {**STEP, "MASTER_ADDR": "other", "MASTER_PORT": "1"}) == RankInfo(3, 4, 1, "other", 1)


@pytest.mark.parametrize("variables", [{}, BATCH, {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}])
def test_a_single_process_is_rank_0_of_1(variables):
    """Also in a batch job's script, and in a step of one process."""
    assert rank_info_from_env(0, variables) == RankInfo(0, 1, 0)


def test_a_launcher_of_one_process_wins_over_slurm():
    assert rank_info_from_env(0, {**STEP, "WORLD_SIZE": "1"}) == RankInfo(0, 1, 0)


def test_mpiruns_rank():
    assert rank_info_from_env(0, {**STEP, **MPIRUN, "MASTER_ADDR": "a"}) == RankInfo(3, 4, 1, "a", 29500)
    assert rank_info_from_env(0, {**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}) == RankInfo(3, 4, 1, "127.0.0.1", 29500)
    with pytest.raises(UserError, match="mpirun -x MASTER_ADDR=HOST"):
        rank_info_from_env(0, {**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"})


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK"])
def test_an_empty_variable_counts_as_missing(name):
    assert rank_info_from_env(2, {name: ""}) == RankInfo(0, 1, 2)
    assert rank_info_from_env(2, {name: " "}) == RankInfo(0, 1, 2)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two': expected a whole number from 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0': expected a whole number from 1"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1': expected a whole number from 0"),
        ({**TORCHRUN, "RANK": "1.0"}, "RANK is '1.0': expected a whole number"),
        ({**TORCHRUN, "RANK": "8"}, "RANK is 8: expected a rank from 0 to 7"),
        ({**TORCHRUN, "RANK": ""}, "RANK is not set: start the processes with torchrun"),
        ({**TORCHRUN, "MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, "MASTER_PORT is '70000': expected a whole number from 1 to 65535"),
        ({**TORCHRUN, "MASTER_PORT": "0"}, "MASTER_PORT is '0': expected a whole number from 1 to 65535"),
        ({**MPIRUN, "MASTER_ADDR": "a", "MASTER_PORT": "0"}, "MASTER_PORT is '0': expected a whole number from 1"),
        ({**STEP, "MASTER_PORT": "0"}, "MASTER_PORT is '0': expected a whole number from 1"),
        ({**STEP, "SLURM_PROCID": ""}, "SLURM_PROCID is '': expected a whole number"),
    ],
)
def test_bad_variables_are_named(variables, message):
    with pytest.raises(UserError, match=message):
        rank_info_from_env(0, variables)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node[001-003,7],x", "node001"),
        ("x,node[001-003]", "x"),
        ("n[7,9]", "n7"),
        ("rack[2-3]node[04-07]-ib,n1", "rack2node04-ib"),
    ],
)
def test_the_first_host_of_slurms_node_list(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(("rank", "printed"), [("0", "usage"), ("1", "")])
def test_only_the_first_process_of_a_node_prints(monkeypatch, capsys, rank, printed):
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(launcher_env, "ERROR_REPORT_GRACE_SECONDS", 0)
    with pytest.raises(SystemExit), launcher_env.print_once_per_node():
        parse_args(["--help"])
    assert capsys.readouterr().out.startswith(printed)
    with pytest.raises(SystemExit, match="2"), launcher_env.print_once_per_node():
        parse_args(["--no-such-flag"])
    assert bool(capsys.readouterr().err) == (rank == "0")
