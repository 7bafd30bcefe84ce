"""Processor, memory, package versions and commit of a measurement."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("lora-serve", "torch", "transformers", "safetensors", "aiohttp")


def describe() -> dict[str, Any]:
    """All of it for `report.json_line`."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": _first("/proc/cpuinfo", r"model name\s*:\s*(.+)") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": _commit(),
    }


def _first(file: str, pattern: str) -> str | None:
    path = Path(file)
    found = re.search(pattern, path.read_text()) if path.is_file() else None
    return found[1].strip() if found else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """The repository's commit, with a plus sign if there are uncommitted changes."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        return (
            subprocess.run(
                command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
            ).stdout.strip()
            or "unknown"
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
