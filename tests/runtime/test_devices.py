"""Two processes on one GPU are refused; test_process_group.py has which GPU a process takes."""

from types import SimpleNamespace

import pytest
import torch

from src.runtime.devices import GpuIdentity, gpu_identity, require_distinct_gpus
from src.runtime.distributed import Processes
from src.runtime.errors import UserError


def gpus(*uuids: str | None) -> list[GpuIdentity | None]:
    return [uuid and GpuIdentity(f"host{rank // 2}", uuid, "NVIDIA H100") for rank, uuid in enumerate(uuids)]


@pytest.mark.parametrize("uuids", [("a", "b", "c", "d"), ("a",), (None, None)], ids=str)
def test_distinct_gpus_and_cpus_are_accepted(uuids):
    require_distinct_gpus(gpus(*uuids))


def test_the_first_two_ranks_on_one_gpu_are_named():
    with pytest.raises(UserError, match=r"^ranks 1 and 3 are on one GPU, NVIDIA H100 \(b\) of host1, "):
        require_distinct_gpus(gpus("a", "b", "c", "b", "b"))


def test_a_cpu_has_no_identity():
    assert gpu_identity(torch.device("cpu")) is None


def test_both_ranks_on_one_gpu_raise(monkeypatch):
    """Both raise the same error."""
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
