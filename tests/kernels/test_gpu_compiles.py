"""Every Triton kernel compiles for its GPUs, with vector loads, few spills and within shared memory; needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TABLE = Path(__file__).parent / "gpu_kernels_table.py"
ROOT = Path(__file__).parents[2]
SHARED_LIMIT = {80: 160 << 10, 89: 99 << 10, 90: 227 << 10}  # bytes of a block

MOST_SPILLED = 128  # bytes a thread; so few the compiler chooses, to fit one more program on a multiprocessor


@pytest.mark.parametrize(
    "targets", [pytest.param("newest", id="the newest"), pytest.param("all", id="all", marks=pytest.mark.slow)]
)
def test_every_kernel_compiles_and_fits_its_gpu(tmp_path: Path, targets: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(TABLE), targets]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert rows
    for row in rows:
        assert row["lacks"] == row["has"] == [], row
        assert row["spills"] <= MOST_SPILLED, row
        assert row["shared"] <= SHARED_LIMIT[row["capability"]], row
