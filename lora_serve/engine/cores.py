"""Number of CPU compute threads: the physical cores that this process may use.

Two threads on one physical core slow dense maths down. psutil counts the physical cores of the whole machine; those
within a CPU affinity (taskset, cpuset) and the CPU quota of a container are counted here.
"""

from __future__ import annotations

from pathlib import Path

import psutil

SYSTEM = Path("/sys")


def compute_threads(configured: int, ranks: int) -> int:
    """Compute threads of each process of an engine: as configured, or one per core, divided among its ranks."""
    return max(1, (configured or physical_cores()) // ranks)


def physical_cores(system: Path = SYSTEM, allowed: set[int] | None = None) -> int:
    """Physical cores among the allowed CPUs, no more than the CPU quota of the cgroup; at least 1.

    Args:
        system: where sysfs is mounted.
        allowed: logical CPUs that may be used (default: this process's CPU affinity).
    """
    allowed = _affinity() if allowed is None else allowed
    if allowed is None:
        cores: int = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    else:
        cores = len({_core(system, cpu) for cpu in allowed})
    quota = _quota(system)
    return max(1, cores if quota is None else min(cores, quota))


def _affinity() -> set[int] | None:
    """The logical CPUs that this process is restricted to; None if it may use them all."""
    if not hasattr(psutil.Process, "cpu_affinity"):  # macOS has none
        return None
    allowed = set(psutil.Process().cpu_affinity())
    return None if len(allowed) == psutil.cpu_count() else allowed


def _core(system: Path, cpu: int) -> tuple[str, str]:
    """Socket and core of a logical CPU; a core of its own where sysfs does not say."""
    topology = system / f"devices/system/cpu/cpu{cpu}/topology"
    try:
        return (topology / "physical_package_id").read_text().strip(), (topology / "core_id").read_text().strip()
    except OSError:
        return "", str(cpu)


def _quota(system: Path) -> int | None:
    """Whole CPUs of the cgroup's (v2) CPU quota; None is no limit."""
    try:
        limit, period = (system / "fs/cgroup/cpu.max").read_text().split()
        return max(1, int(limit) // int(period))
    except (OSError, ValueError):  # no such file, or `max`
        return None
