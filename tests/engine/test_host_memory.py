"""Host memory as the system says it: the machine's, and limits of control groups of both versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_serve.engine.host_memory import HostMemory, host_memory, process_memory

GIB = 1 << 30
LINES = {"v2": "0::/pods/one\n", "v1": "3:cpu,cpuacct:/\n2:memory:/docker/abc\n1:name=systemd:/\n0::/\n"}


class System:
    """Files as Linux has them: 16 GiB, of which 12 are available."""

    def __init__(self, folder: Path, version: str) -> None:
        self.proc, self.cgroups, self._version = folder / "proc", folder / "cgroup", version
        (self.proc / "self").mkdir(parents=True)
        self.cgroups.mkdir()
        (self.proc / "meminfo").write_text(f"MemTotal:  {16 << 20} kB\nMemFree: 1 kB\nMemAvailable:  {12 << 20} kB\n")
        (self.proc / "self" / "cgroup").write_text(LINES[version])
        (self.proc / "self" / "status").write_text("Name:\tpython\nVmRSS:\t 9000 kB\nRssAnon:\t    5000 kB\n")

    def limit(self, group: str, limit: str, used: int, cached: int) -> None:
        """Write a group's files."""
        v2 = self._version == "v2"
        folder = (self.cgroups if v2 else self.cgroups / "memory") / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ("memory.max" if v2 else "memory.limit_in_bytes")).write_text(f"{limit}\n")
        (folder / ("memory.current" if v2 else "memory.usage_in_bytes")).write_text(f"{used}\n")
        field = "inactive_file" if v2 else "total_inactive_file"
        (folder / "memory.stat").write_text(f"anon 1\n{field} {cached}\nfile 7\n")

    def read(self) -> HostMemory | None:
        return host_memory(self.proc, self.cgroups)


@pytest.fixture(params=["v1", "v2"])
def system(request: pytest.FixtureRequest, tmp_path: Path) -> System:
    return System(tmp_path, request.param)


def test_without_a_limit_it_is_the_machines(system: System) -> None:
    assert system.read() == HostMemory(16 * GIB, 12 * GIB)
    system.limit("", "max" if system._version == "v2" else str((1 << 63) - 4096), 4 * GIB, 0)
    assert system.read() == HostMemory(16 * GIB, 12 * GIB)


def test_a_limit_counts_and_what_caches_files_is_free(system: System) -> None:
    group = "pods/one" if system._version == "v2" else "docker/abc"
    system.limit(group, str(4 * GIB), 3 * GIB, GIB)
    assert system.read() == HostMemory(4 * GIB, 2 * GIB)


def test_the_least_limit_on_the_way_up_counts(system: System) -> None:
    group = "pods/one" if system._version == "v2" else "docker/abc"
    system.limit(group, str(8 * GIB), GIB, 0)
    system.limit(group.partition("/")[0], str(2 * GIB), GIB, 0)
    assert system.read() == HostMemory(2 * GIB, GIB)


def test_in_a_container_the_limit_is_at_the_mount(system: System) -> None:
    system.limit("", str(3 * GIB), 4 * GIB, 0)  # the group's own path is the host's
    assert system.read() == HostMemory(3 * GIB, 0)


def test_memory_of_the_process_is_without_files(system: System, tmp_path: Path) -> None:
    assert process_memory(system.proc) == 5000 << 10
    assert process_memory(tmp_path / "none") is None
    assert host_memory(tmp_path / "none", system.cgroups) is None


def test_this_machine_says_what_it_has() -> None:
    found = host_memory()
    assert found is None or 0 < found.free <= found.total
