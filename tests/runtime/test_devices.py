"""Whether two processes share a GPU; which one a process takes is in test_distributed.py."""

import pytest
import torch

from src.runtime.devices import GpuIdentity, gpu_identity, require_distinct_gpus
from src.runtime.errors import UserError


def gpus(*uuids: str | None) -> list[GpuIdentity | None]:
    return [uuid and GpuIdentity(f"host{rank // 2}", uuid, "NVIDIA H100") for rank, uuid in enumerate(uuids)]


@pytest.mark.parametrize("uuids", [("a", "b", "c", "d"), ("a",), (None, None)], ids=str)
def test_a_gpu_each_is_fine_and_so_are_cpus(uuids):
    require_distinct_gpus(gpus(*uuids))


def test_the_first_two_ranks_on_one_gpu_are_named():
    with pytest.raises(UserError, match=r"^ranks 1 and 3 are on one GPU, NVIDIA H100 \(b\) of host1, "):
        require_distinct_gpus(gpus("a", "b", "c", "b", "b"))


def test_a_cpu_has_no_identity():
    assert gpu_identity(torch.device("cpu")) is None
