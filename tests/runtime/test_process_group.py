"""Start and end of a process group: variables of launchers, ports, timeouts, restarts."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch

import main
from src.runtime import distributed, process_group
from src.runtime.distributed import Processes
from src.runtime.errors import SigtermReceived, UserError
from src.runtime.launcher_env import RankInfo


@pytest.fixture
def no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def sockets() -> set[str]:
    links = (path for path in Path("/proc/self/fd").iterdir() if path.is_symlink())
    return {target for target in (os.readlink(link) for link in links) if target.startswith("socket:")}


def test_one_process_opens_no_port_and_no_group(no_launcher):
    before = sockets()
    with process_group.start(0) as processes:
        assert (processes.rank, processes.world_size, processes.store) == (0, 1, None)
        assert not torch.distributed.is_initialized()
        assert sockets() == before
        assert processes.gather("mine") == ["mine"]
        assert processes.broadcast_object("mine") == "mine"
        assert processes.all_reduce_max(3) == 3


@pytest.mark.parametrize(("variable", "flag", "expected"), [("3", 1, 3), (None, 1, 1), ("0", 1, 0)])
def test_the_variable_wins_over_the_flag(no_launcher, monkeypatch, variable, flag, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    if variable is not None:
        monkeypatch.setenv("LOCAL_RANK", variable)
    with process_group.start(flag) as processes:
        assert processes.device == torch.device("cuda", expected)


@pytest.mark.parametrize("local_rank", ["0", "5"])
def test_a_process_takes_the_only_gpu_that_it_sees(no_launcher, monkeypatch, local_rank):
    """As with srun --gpus-per-task=1, or CUDA_VISIBLE_DEVICES set for each process."""
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with process_group.start(0) as processes:
        assert processes.device == torch.device("cuda", 0)
    assert taken == [0]


def test_more_processes_than_gpus_is_an_error(no_launcher, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="local rank 2 has no GPU: this machine has 2"), process_group.start(2):
        pass


def test_missing_variables_of_a_launcher_are_an_error(no_launcher, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with (
        pytest.raises(UserError, match="MASTER_ADDR is not set: start the processes with torchrun"),
        process_group.start(0),
    ):
        pass


@pytest.mark.parametrize("limit", ["soon", "0", "-1", "inf", "nan", ""])
def test_an_invalid_group_timeout_is_an_error(no_launcher, monkeypatch, limit):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(distributed.GROUP_TIMEOUT_VARIABLE, limit)
    with pytest.raises(UserError, match="SSD300_GROUP_TIMEOUT is"), process_group.start(0):
        pass


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="another system may share ports")
def test_a_taken_port_is_named(no_launcher, monkeypatch):
    """Under a launcher that only sets variables; torchrun looks for a port itself."""
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(UserError) as raised, process_group.start(0):
            pass
    assert f"rank 0 of 2 cannot join the others at localhost:{port} (the address is already in use)" in str(
        raised.value
    )
    assert "--master_port" in str(raised.value)


def test_a_rank_without_a_rank_0_prints_one_line(tmp_path):
    """Without the C++ frames that torch logs, so in a process that imports torch anew."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]  # nobody listens there once it is closed
    variables = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    variables |= {distributed.GROUP_TIMEOUT_VARIABLE: "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_CPP_LOG_LEVEL"} | variables
    done = subprocess.run(
        [sys.executable, main.__file__, "--data", str(tmp_path)], env=environment, capture_output=True, text=True
    )
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"main.py: error: rank 1 of 2 cannot join the others at 127.0.0.1:{port} (")
    assert (done.returncode, done.stdout) == (2, "")


def test_restarts_on_one_store_are_numbered():
    store, limit = torch.distributed.HashStore(), timedelta(seconds=30)
    assert [process_group.restart_index(store, rank, limit) for rank in range(3)] == [1, 1, 1]
    with ThreadPoolExecutor() as others:  # rank 1 is back before rank 0
        early = others.submit(process_group.restart_index, store, 1, limit)
        with pytest.raises(FutureTimeoutError):
            early.result(0.2)
        assert process_group.restart_index(store, 0, limit) == 2
        assert early.result() == 2
    assert process_group.restart_index(store, 2, limit) == 2
    with pytest.raises(distributed.PeerLostError, match=r"rank 0 has not started for 0\.1 s"):
        process_group.restart_index(store, 2, timedelta(seconds=0.1))


class FakeGroup:
    """A process group of GPUs, which records how it is ended."""

    def __init__(self) -> None:
        self.ended: list[str] = []
        self.WORLD = self
        self.DistError = torch.distributed.DistError

    def abort(self) -> None:
        self.ended.append("aborted")

    def destroy_process_group(self) -> None:
        self.ended.append("destroyed")


@pytest.mark.parametrize(
    ("error", "device", "ended"),
    [
        (None, "cuda", ["destroyed"]),
        (None, "cpu", ["destroyed"]),
        (SigtermReceived(), "cuda", ["aborted"]),
        (KeyboardInterrupt(), "cuda", ["aborted"]),
        (ZeroDivisionError(), "cuda", ["aborted"]),
        (SigtermReceived(), "cpu", []),  # gloo would wait for lost ranks, and prints nothing
    ],
    ids=repr,
)
def test_every_exit_ends_the_nccl_group(monkeypatch, error, device, ended):
    """NCCL prints a warning when a process exits with an open group."""
    group = FakeGroup()
    group.group = group
    processes = Processes(0, 1, torch.device(device), torch.distributed.HashStore())
    processes.world_size = 2
    monkeypatch.setattr(distributed, "dist", group)
    monkeypatch.setattr(process_group, "rank_info_from_env", lambda local_rank: RankInfo(0, 2, 0))
    monkeypatch.setattr(process_group, "_join", lambda device, info: processes)
    with pytest.raises(type(error)) if error else nullcontext(), process_group.start(0, torch.device(device)):
        if error:
            raise error
    assert group.ended == ended
    assert processes.store.check([distributed.STOPPED]) == isinstance(error, (SigtermReceived, KeyboardInterrupt))


@pytest.mark.parametrize(("device", "factor"), [("cpu", 1), ("cuda", 2)])
def test_nccls_timeout_is_longer_than_gloos(monkeypatch, device, factor):
    """NCCL's watchdog ends the process without the program's message, so gloo must time out first."""
    made = []

    def begin(**options) -> None:
        made.append(options)
        raise RuntimeError("enough")

    monkeypatch.setattr(torch.distributed, "init_process_group", begin)
    monkeypatch.setattr(
        torch.distributed, "rendezvous", lambda *_, **options: iter([(torch.distributed.HashStore(), 0, 2)])
    )
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="enough"), process_group.start(0, torch.device(device)):
        pass
    assert made[0]["timeout"] == factor * timedelta(seconds=distributed.GROUP_TIMEOUT)
    assert ("nccl" in made[0]["backend"]) == (device == "cuda")
