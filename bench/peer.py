"""A server of any make for the length of a bench: started by its own command, and what it takes besides the work.

A server is what its command started and all its children: one session of processes. Their memory is the proportional
share (PSS), so pages that they have in common count once. Reading it needs Linux; elsewhere the figures are NaN.
"""

from __future__ import annotations

import asyncio
import http.client
import math
import shlex
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import sysconf
from pathlib import Path

from bench.client import Server
from bench.launch import free_port, stop, tail
from bench.load import Load, run
from bench.serve import discover


@dataclass(frozen=True)
class Peer:
    """A server that answers.

    Attributes:
        session: of its processes; None if it was running before.
        ready: seconds from its command to its first answer; NaN if it was running before.
    """

    url: str
    session: int | None = None
    ready: float = math.nan

    def memory(self) -> float:
        """Bytes that its processes hold."""
        shares = [_share(process) for process in self._processes()]
        return sum(shares) if shares else math.nan

    def cpu(self) -> float:
        """Seconds of CPU that its living processes have used."""
        used = [sum(map(int, _stat(process)[11:13])) for process in self._processes()]
        return sum(used) / sysconf("SC_CLK_TCK") if used else math.nan

    def _processes(self) -> list[Path]:
        folders = Path("/proc").glob("[0-9]*")
        return [each for each in folders if (stat := _stat(each)) and int(stat[3]) == self.session]


@contextmanager
def started(command: str, *, timeout: float = 900) -> Iterator[Peer]:
    """Run a command, `{port}` in it replaced by a free port of 127.0.0.1; yields once a completion was answered there.

    Raises: RuntimeError with the end of what it printed, if it exits before or takes longer than `timeout` seconds.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    begin = time.monotonic()
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(
            [word.replace("{port}", str(port)) for word in shlex.split(command)],
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while complaint := _complaint(url):
                if process.poll() is not None:
                    raise RuntimeError(f"{command}\nexited with {process.returncode}:\n{tail(printed)}")
                if time.monotonic() - begin > timeout:
                    raise RuntimeError(f"{command}\ngave no answer for {timeout:g} s ({complaint}):\n{tail(printed)}")
                time.sleep(0.1)
            yield Peer(url, process.pid, time.monotonic() - begin)
        finally:
            stop(process)


def _complaint(url: str) -> str | None:
    """Why the base does not give one token yet; None if it does. Some servers list their models before they can."""
    try:
        base, _ = discover(url, None)
    except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
        return f"{type(error).__name__}: {error}"
    return asyncio.run(run(Server(url, base), Load(clients=1, requests=1, prompt=(8, 8), output=(1, 1))))[0].error


def _stat(process: Path) -> list[str]:
    """Fields of /proc/PID/stat after the name, from the state on; empty if the process has ended."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _share(process: Path) -> float:
    try:
        lines = (process / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(1024.0 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
