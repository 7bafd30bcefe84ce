"""Tinker's own SDK against a real server on the demo model: training, sampling, and ends of its processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from server_process import ServerProcess
from tinker_clients import __file__ as CLIENTS

pytestmark = pytest.mark.slow
OPTIONS = ("--served-model-name", "demo", "--training-memory", "512MiB", "--threads", "1")
ENVIRONMENT = {**os.environ, "TINKER_API_KEY": "tml-any", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def start(name: str, url: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", str(CLIENTS), name, url],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(client: subprocess.Popen[str]) -> str:
    try:
        said, failed = client.communicate(timeout=200)
    finally:
        client.kill()
    assert client.returncode == 0, failed
    return said


@pytest.mark.parametrize("name", ["supervised", "reinforced"])
def test_training_changes_what_is_said(tmp_path: Path, name: str) -> None:
    with ServerProcess(tmp_path, *OPTIONS) as server:
        print(finish(start(name, server.url)))


def losses(text: str) -> list[float]:
    return [float(line) for line in text.split()]


@pytest.mark.timeout(600)
def test_training_goes_on_after_kills_of_engine_and_server(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "quiet", *OPTIONS) as server:
        expected = losses(finish(start("steady", server.url)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = (*OPTIONS, "--port", str(port))
    with ServerProcess(tmp_path / "store", *options) as server:
        client = start("steady", server.url)
        assert client.stdout is not None
        seen = [client.stdout.readline() for _ in range(3)]
        os.kill(server.engine_pid, signal.SIGKILL)
        seen += [client.stdout.readline() for _ in range(4)]
        engine = server.engine_pid
        server.signal(signal.SIGKILL)
        os.kill(engine, signal.SIGKILL)
        server.wait(10)
    with ServerProcess(tmp_path / "store", *options):
        assert losses("".join(seen) + finish(client)) == pytest.approx(expected, rel=1e-3)
