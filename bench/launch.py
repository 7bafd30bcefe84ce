"""A server of our own for the length of a bench: started on a free port, waited for, stopped whatever happens."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

LORA_SERVE = (str(Path(sys.executable).with_name("lora-serve")), "serve")
STOP = 60.0  # seconds between the polite signal and the other one


@contextmanager
def launched(arguments: Sequence[str], *, command: Sequence[str] = LORA_SERVE, timeout: float = 300) -> Iterator[str]:
    """Run a server; yields its URL once `/ready` answers 200.

    Raises: RuntimeError with the end of what it printed, if it exits before or is not ready within `timeout` seconds.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(
            [*command, *arguments, "--port", str(port)],
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait(process, url, printed, timeout)
            yield url
        finally:
            stop(process)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait(process: subprocess.Popen[bytes], url: str, printed: IO[bytes], timeout: float) -> None:
    end = time.monotonic() + timeout
    while True:
        status = process.poll()
        if status is not None:
            raise RuntimeError(f"the server exited with {status}:\n{tail(printed)}")
        if time.monotonic() > end:
            raise RuntimeError(f"the server was not ready after {timeout:g} s:\n{tail(printed)}")
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)


def tail(printed: IO[bytes]) -> str:
    printed.seek(0)
    return printed.read()[-3000:].decode(errors="replace")


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
