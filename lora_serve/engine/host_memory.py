"""Host memory that this process may use: the machine's, or less where a control group has a limit, as in containers.

Linux only; elsewhere nothing is known. Mounts of control groups elsewhere than in /sys/fs/cgroup are not found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class HostMemory:
    """Bytes of memory.

    Attributes:
        total: that all processes under the limit may take together.
        free: that none of them takes now; what only caches files counts as free.
    """

    total: int
    free: int


class _Files(NamedTuple):
    """What a control group's files about memory are called."""

    limit: str
    used: str
    cached: str  # a field of memory.stat


_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Files("memory.max", "memory.current", "inactive_file")


def host_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> HostMemory | None:
    """What there is now; None if the system does not say."""
    try:
        text = (proc / "meminfo").read_text()
    except OSError:
        return None
    total, free = (_kilobytes(text, field) for field in ("MemTotal", "MemAvailable"))
    if total is None or free is None:
        return None
    for folder, files in _groups(proc, cgroups):
        try:
            limit = int((folder / files.limit).read_text())
            used = int((folder / files.used).read_text())
            found = re.search(rf"^{files.cached} (\d+)$", (folder / "memory.stat").read_text(), flags=re.MULTILINE)
        except (OSError, ValueError):  # none, or "max"
            continue
        total = min(total, limit)
        free = min(free, max(0, limit - used + (int(found[1]) if found else 0)))
    return HostMemory(total, free)


def process_memory(proc: Path = PROC) -> int | None:
    """Bytes that only this process takes: without what it has mapped from files; None if the system does not say."""
    try:
        text = (proc / "self" / "status").read_text()
    except OSError:
        return None
    return _kilobytes(text, "RssAnon")


def _groups(proc: Path, cgroups: Path) -> Iterator[tuple[Path, _Files]]:
    """The control groups that this process is in, from its own one up to that at the mount."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            root, files = cgroups, _V2
        elif "memory" in controllers.split(","):
            root, files = cgroups / "memory", _V1
        else:
            continue
        folder = root / path.strip("/")
        yield from ((each, files) for each in (folder, *folder.parents) if each.is_relative_to(root))


def _kilobytes(text: str, field: str) -> int | None:
    """A field of a file in /proc, in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", text, flags=re.MULTILINE)
    return None if found is None else int(found[1]) << 10
