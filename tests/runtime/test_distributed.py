"""Training, loaders and evaluation in real processes on gloo; rank_programs.py is what they run."""

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import main
from src.flags import parse_args
from src.runtime import distributed, launcher_env, process_group
from src.runtime.devices import gpu_identity
from src.runtime.distributed import Processes
from src.runtime.errors import SigtermReceived, UserError
from src.runtime.launcher_env import RankInfo
from src.ssd.loss import MultiBoxLoss
from tests.helpers import rank_programs
from tests.helpers.launch import TORCHRUN, command
from tests.helpers.preloaded_python import launch

ALONE = Processes.single(torch.device("cpu"))
LAUNCHERS = {
    2: ("-m", "torch.distributed.launch"),
    3: TORCHRUN,
}  # the former passes --local-rank=K, the latter does not


@pytest.fixture(scope="module", params=LAUNCHERS, ids="{} processes".format)
def launched(request, tmp_path_factory, oracle) -> tuple[Path, list[dict]]:
    """The folder in which the processes worked, and what each reports."""
    folder = tmp_path_factory.mktemp("processes")
    rank_programs.write_data(folder)
    np.save(folder / "default_boxes.npy", oracle("default_boxes.npz")["xywh"])
    script = ("-m", "tests.helpers.rank_programs", "--data", folder)
    done = launch(command(script, processes=request.param, launcher=LAUNCHERS[request.param]))
    assert done.returncode == 0, done.stderr
    return folder, [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(request.param)]


def test_every_process_knows_its_place(launched):
    _, reports = launched
    assert [report["world_size"] for report in reports] == [len(reports)] * len(reports)
    passed = len(reports) in LAUNCHERS and LAUNCHERS[len(reports)] is not TORCHRUN
    assert [report["local_rank"] for report in reports] == [rank * passed for rank in range(len(reports))]


def steps_by_hand(default_boxes: np.ndarray) -> dict[str, torch.Tensor]:
    """The weights after the steps of process_checks on the whole batch, by the formulas of SGD with momentum."""
    network, batch = rank_programs.small_network(), rank_programs.step_batch(default_boxes)
    rate = 2.6e-3 * rank_programs.STEP_BATCH / 32
    velocity = dict.fromkeys(dict(network.named_parameters()), 0)
    for _ in range(rank_programs.STEPS):
        loss = MultiBoxLoss()(*network(batch.images), batch.boxes, batch.labels)
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        with torch.no_grad():
            for (name, parameter), gradient in zip(network.named_parameters(), gradients, strict=True):
                decay = 5e-4 if parameter.dim() > 1 else 0
                velocity[name] = 0.9 * velocity[name] + gradient + decay * parameter
                parameter -= rate * velocity[name]
    return network.state_dict()


def test_two_processes_take_the_steps_of_one_on_the_whole_batch(launched, oracle):
    folder, reports = launched
    if len(reports) != 2:
        assert "weights" not in reports[0]  # 8 images are not shared among 3
        return
    assert reports[0]["weights"] == reports[1]["weights"]
    start = rank_programs.small_network().state_dict()
    expected = steps_by_hand(oracle("default_boxes.npz")["xywh"])
    for name, weights in torch.load(folder / "weights.pt").items():
        moved = (expected[name] - start[name]).double()
        assert (weights - expected[name]).double().norm() <= 1e-4 * moved.norm(), name
        assert moved.any() or "running" in name or "tracked" in name, name


@pytest.mark.parametrize("pipeline", ["dali", "no_dali"])
@pytest.mark.parametrize("count", rank_programs.SIZES)
def test_every_process_does_as_many_iterations_and_together_they_see_every_image(launched, pipeline, count):
    _, reports = launched
    epochs = [
        [report["images"][f"{pipeline} {count}"][epoch] for report in reports] for epoch in range(rank_programs.EPOCHS)
    ]
    share = -(-count // len(reports))
    places = -(-share // rank_programs.BATCH) * rank_programs.BATCH
    for ranks in epochs:
        assert [len(images) for images in ranks] == [places] * len(reports)
        assert set().union(*ranks) == set(range(count))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("pipeline", ["dali", "no_dali"])
def test_processes_and_epochs_augment_the_same_image_each_in_its_own_way(launched, pipeline):
    _, reports = launched
    digests = [digest for report in reports for digest in report["augmented"][pipeline]]
    assert len(digests) == len(reports) * rank_programs.EPOCHS * rank_programs.BATCH
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("count", [2, 8])
def test_evaluation_finds_on_any_number_of_processes_what_one_finds(launched, count):
    """With 2 images, 3 processes are more than images; of the other 9 images one has no boxes."""
    folder, reports = launched
    annotations = rank_programs.read(folder, count, "val")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = rank_programs.evaluation(annotations, ALONE)
    torch.set_num_threads(threads)
    assert [report["figures"][str(count)] for report in reports] == [alone.scores.metrics] * len(reports)
    assert alone.scores.metrics["AP50"] > 0
    with np.load(folder / f"results-{count}.npz") as results:
        assert results["image_ids"].dtype == np.int64
        assert sorted(set(results["image_ids"])) == [rank_programs.FIRST_ID + i for i in range(len(annotations))]
        for name, array in alone.results._asdict().items():
            assert np.array_equal(results[name], array), name


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
def test_the_only_gpu_that_a_process_sees_is_its_own_whatever_its_rank(no_launcher, monkeypatch, local_rank):
    """As srun --gpus-per-task=1 has it, and CUDA_VISIBLE_DEVICES set for each process."""
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


def test_half_set_variables_of_a_launcher_are_an_error(no_launcher, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with (
        pytest.raises(UserError, match="MASTER_ADDR is not set: start the processes with torchrun"),
        process_group.start(0),
    ):
        pass


@pytest.mark.parametrize("limit", ["soon", "0", "-1", "inf", "nan", ""])
def test_a_time_limit_that_is_none_is_an_error(no_launcher, monkeypatch, limit):
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


def test_a_rank_whose_rank_0_never_comes_prints_one_line(tmp_path):
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


@pytest.mark.parametrize(("rank", "printed"), [("0", "usage"), ("1", "")])
def test_what_all_would_print_is_printed_by_the_first_of_a_machine(monkeypatch, capsys, rank, printed):
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(launcher_env, "ERROR_REPORT_GRACE_SECONDS", 0)
    with pytest.raises(SystemExit), launcher_env.print_once_per_node():
        parse_args(["--help"])
    assert capsys.readouterr().out.startswith(printed)
    with pytest.raises(SystemExit, match="2"), launcher_env.print_once_per_node():
        parse_args(["--no-such-flag"])
    assert bool(capsys.readouterr().err) == (rank == "0")


def test_every_restart_on_the_same_store_has_its_number():
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
        (SigtermReceived(), "cpu", []),  # gloo would wait for ranks that are gone, and prints nothing
    ],
    ids=repr,
)
def test_every_way_out_ends_nccls_group(monkeypatch, error, device, ended):
    """Where it is not ended, NCCL prints a warning when the process ends."""
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
def test_nccls_limit_is_longer_than_the_one_that_is_told_of(monkeypatch, device, factor):
    """NCCL's watchdog ends the process without the program's message."""
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


def test_two_ranks_on_one_gpu_are_told_so(monkeypatch):
    """Both know, and say the same."""
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"GPU-{device.index}", name="H100")
    )
    own = gpu_identity(torch.device("cuda", 0))
    processes = Processes(1, 1, torch.device("cuda", 0), None)
    processes.check_devices()  # one process has no group to ask
    processes.world_size = 2

    def gather(found: list, mine, group) -> None:
        found[:] = [own, mine]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(UserError, match=r"^ranks 0 and 1 are on one GPU, H100 \(GPU-0\) of .+: start one process for"):
        processes.check_devices()
    processes.device = torch.device("cuda", 1)
    processes.check_devices()
