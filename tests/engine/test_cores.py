"""The number of compute threads: physical cores, within CPU affinity and CPU quota."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_serve.engine.cores import physical_cores


@pytest.mark.parametrize(
    ("quota", "cores"), [(None, 2), ("max 100000", 2), ("150000 100000", 1), ("400000 100000", 2), ("50000 100000", 1)]
)
def test_hyperthreads_of_one_core_count_once_and_a_containers_quota_is_a_limit(
    tmp_path: Path, quota: str | None, cores: int
) -> None:
    for processor in range(4):
        topology = tmp_path / f"devices/system/cpu/cpu{processor}/topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text("0\n")
        (topology / "core_id").write_text(f"{processor // 2}\n")
    if quota:
        (tmp_path / "fs/cgroup").mkdir(parents=True)
        (tmp_path / "fs/cgroup/cpu.max").write_text(quota + "\n")
    assert physical_cores(tmp_path, {0, 1, 2, 3}) == cores


def test_without_sysfs_the_logical_cpus_are_counted(tmp_path: Path) -> None:
    assert physical_cores(tmp_path, {0, 1, 2}) == 3


def test_cores_outside_the_cpu_affinity_do_not_count() -> None:
    cpu = min(os.sched_getaffinity(0))
    program = f"import os; os.sched_setaffinity(0, [{cpu}]); from lora_serve.engine.cores import *; "
    asked = [sys.executable, "-c", program + "print(physical_cores())"]
    assert subprocess.run(asked, check=True, capture_output=True, text=True).stdout == "1\n"


def test_without_an_affinity_all_physical_cores_of_the_machine_count(tmp_path: Path) -> None:
    if len(os.sched_getaffinity(0)) < (os.cpu_count() or 1):
        pytest.skip("this process may not use every CPU")
    cores = subprocess.run(["lscpu", "--parse=SOCKET,CORE"], check=True, capture_output=True, text=True).stdout
    assert physical_cores(tmp_path) == len({line for line in cores.splitlines() if not line.startswith("#")})
