"""Start a server on a free local port, wait until it answers, stop it at the end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

LORA_SERVE = (str(Path(sys.executable).with_name("lora-serve")), "serve")
STOP = 60.0  # seconds between SIGTERM and SIGKILL


@contextmanager
def launched(
    arguments: Sequence[str], *, command: Sequence[str] = LORA_SERVE, timeout: float = 300, log: Path | None = None
) -> Iterator[str]:
    """Run `lora-serve serve ARGUMENTS`; yields its URL once `/ready` answers 200. Otherwise as `run_server`."""
    with run_server([*command, *arguments, "--port", "{port}"], not_ready, timeout, log) as (url, _):
        yield url


@contextmanager
def run_server(
    command: Sequence[str], problem: Callable[[str], str | None], timeout: float, log: Path | None = None
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run a command, with `{port}` replaced by a free port of 127.0.0.1, in a session of its own.

    Args:
        problem: why the server at this URL cannot be used yet; None once it can.
        log: file that its output is written to (default: a temporary one).

    Yields: its URL and its process.
    Raises: RuntimeError with the end of its output, if it exits early or is not ready within `timeout` seconds.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    end = time.monotonic() + timeout
    with tempfile.TemporaryFile() if log is None else log.open("w+b") as output:
        process = subprocess.Popen(
            [word.replace("{port}", str(port)) for word in command],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while why := problem(url):
                if process.poll() is not None:
                    raise RuntimeError(f"{command[0]} exited with {process.returncode}:\n{_tail(output)}")
                if time.monotonic() > end:
                    raise RuntimeError(f"{command[0]} was not ready after {timeout:g} s ({why}):\n{_tail(output)}")
                time.sleep(0.1)
            yield url, process
        finally:
            _stop(process)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def not_ready(url: str) -> str | None:
    """Why `/ready` does not answer 200; None if it does."""
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5):
            return None
    except OSError as error:  # of which HTTP errors are a kind
        return str(error) or type(error).__name__


def _tail(output: IO[bytes]) -> str:
    output.seek(0)
    return output.read()[-3000:].decode(errors="replace")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
