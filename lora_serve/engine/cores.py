"""How many compute threads this machine gives the engine: physical cores that this process may use.

Two threads on one physical core slow dense maths down, and a container's quota is invisible to the libraries that
would otherwise choose; so it is counted here, once.
"""

from __future__ import annotations

import os
from pathlib import Path

SYSTEM = Path("/sys")


def physical_cores(system: Path = SYSTEM, allowed: set[int] | None = None) -> int:
    """Distinct physical cores among the allowed processors, no more than the container's quota; at least 1.

    Args:
        system: where the kernel's description is mounted; a machine without one counts its processors.
        allowed: processors that may be used (default: this process's own set).
    """
    processors = _affinity() if allowed is None else allowed
    cores = {_core(system, processor) for processor in processors}
    quota = _quota(system)
    return max(1, len(cores) if quota is None else min(len(cores), quota))


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _core(system: Path, processor: int) -> tuple[str, str]:
    topology = system / f"devices/system/cpu/cpu{processor}/topology"
    try:
        return (topology / "physical_package_id").read_text().strip(), (topology / "core_id").read_text().strip()
    except OSError:
        return "", str(processor)


def _quota(system: Path) -> int | None:
    """Whole processors that the control group may use; None is no limit."""
    try:
        limit, period = (system / "fs/cgroup/cpu.max").read_text().split()
        return max(1, int(limit) // int(period))
    except (OSError, ValueError):  # no such file, or `max`
        return None
