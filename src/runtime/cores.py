"""How many processor cores this process may use."""

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores by the process's affinity (taskset, Slurm) and the container's limit (docker run --cpus), at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _container_limit(CGROUP) or cores))


def _container_limit(cgroup: Path) -> int | None:
    """The CPU quota of the container's control group in cores, rounded up; None without a quota."""
    try:
        if (cgroup / "cpu.max").exists():  # version 2: "QUOTA PERIOD" in microseconds, or "max PERIOD"
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:  # version 1; a quota of -1 means no limit
            quota, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return -(-int(quota) // int(period)) if int(quota) > 0 else None
    except (OSError, ValueError):
        return None
