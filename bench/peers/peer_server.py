"""Any server under comparison: started by its own command, with its start-up time, memory and CPU time.

A server is the process of its command and all of that one's children: one session. Their memory is the proportional set
size (PSS), so shared pages count once. It is read from /proc; where there is none, the figures are NaN.
"""

from __future__ import annotations

import asyncio
import http.client
import math
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import sysconf
from pathlib import Path

from bench.serving.client import Server, list_models
from bench.serving.launch import run_server
from bench.serving.load import Load, run


@dataclass(frozen=True)
class Peer:
    """A server that is up.

    Attributes:
        session: id of the session of its processes; None if it was not started here.
        ready: seconds from its command to its first answer; NaN if it was not started here.
    """

    url: str
    session: int | None = None
    ready: float = math.nan

    def memory(self) -> float:
        """Bytes of memory of its processes (PSS)."""
        shares = [_pss(process) for process in self._processes()]
        return sum(shares) if shares else math.nan

    def cpu(self) -> float:
        """Seconds of CPU time that its processes have used."""
        used = [sum(map(int, _stat(process)[11:13])) for process in self._processes()]
        return sum(used) / sysconf("SC_CLK_TCK") if used else math.nan

    def _processes(self) -> list[Path]:
        folders = Path("/proc").glob("[0-9]*")
        return [each for each in folders if (stat := _stat(each)) and int(stat[3]) == self.session]


@contextmanager
def started_peer(command: str, *, timeout: float = 900) -> Iterator[Peer]:
    """Run a command, with `{port}` replaced by a free port; yields once the server completes a prompt.

    Raises: RuntimeError with the end of its output, if it exits early or is not ready within `timeout` seconds.
    """
    begin = time.monotonic()
    with run_server(shlex.split(command), _not_generating, timeout) as (url, process):
        yield Peer(url, process.pid, time.monotonic() - begin)


def _not_generating(url: str) -> str | None:
    """Why the base does not generate a token yet; None if it does. Some servers list models before they can."""
    try:
        base, _ = list_models(url)
    except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
        return f"{type(error).__name__}: {error}"
    return asyncio.run(run(Server(url, base), Load(clients=1, requests=1, prompt=(8, 8), output=(1, 1))))[0].error


def _stat(process: Path) -> list[str]:
    """Fields of /proc/PID/stat after the name; empty if the process has ended."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _pss(process: Path) -> float:
    try:
        lines = (process / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(1024.0 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
