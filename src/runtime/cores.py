"""How many processor cores this process may use."""

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores that affinity (taskset, Slurm) and the container's CPU limit (docker run --cpus) leave, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _container_limit(CGROUP) or cores))


def _container_limit(cgroup: Path) -> int | None:
    """Whole cores of the CPU quota that a container's control group has, rounded up; None without a quota."""
    try:
        if (cgroup / "cpu.max").exists():  # version 2: "QUOTA PERIOD" in microseconds, or "max PERIOD"
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:  # version 1; a quota of -1 is none
            quota, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return -(-int(quota) // int(period)) if int(quota) > 0 else None
    except (OSError, ValueError):
        return None
