"""The number of usable cores: the smaller of affinity and the CPU quota of a container."""

import os

import pytest

from src.runtime import cores
from src.runtime.cores import usable_cores


@pytest.fixture
def sixteen_cores(monkeypatch, tmp_path):
    """A process with affinity to 16 of 128 cores; returns the folder of its control group, which the test fills."""
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    monkeypatch.setattr(cores, "CGROUP", tmp_path)
    return tmp_path


def test_affinity_counts_and_not_the_cores_of_the_machine(sixteen_cores):
    assert usable_cores() == 16


def test_without_affinity_the_cores_of_the_machine_count(sixteen_cores, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores() == 128


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "max 100000\n"}, 16),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "5000 100000\n"}, 1),
        ({"cpu.max": "9900000 100000\n"}, 16),
        ({"cpu.max": "of another form"}, 16),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 16),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
    ],
    ids=str,
)
def test_a_containers_quota_limits_them(sixteen_cores, files, expected):
    for name, text in files.items():
        (sixteen_cores / name).parent.mkdir(exist_ok=True)
        (sixteen_cores / name).write_text(text)
    assert usable_cores() == expected
