"""Which CPUs compute in half precision, and autocast on them."""

import pytest
import torch

from src.runtime.precision import autocast, half_is_fast

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [
        ({"avx2": True}, False),
        ({"avx2": True, "avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"bf16": True}, True),  # ARM's name
        ({"avx512_bf16": False, "amx_tile": True}, False),
    ],
)
def test_a_cpu_uses_bfloat16_if_it_has_the_arithmetic(monkeypatch, capabilities, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert half_is_fast(CPU) is fast
    assert half_is_fast(torch.device("cuda"))
    with autocast(CPU, amp=True):
        assert torch.is_autocast_enabled("cpu") is fast
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (torch.bfloat16 if fast else torch.float32)
    with autocast(CPU, amp=False):
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("fast", [True, False])
def test_an_older_torch_knows_the_capabilities_too(monkeypatch, fast):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert half_is_fast(CPU) is fast
