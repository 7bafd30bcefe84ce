"""Images and containers of podman, as the tests use them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
IMAGE = "localhost/lora-serve"
BASE = "docker.io/library/python:3.11-slim"
# A daemon's defaults that a machine without systemd refuses.
CONFIGURATION = """
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
"""


def podman(*arguments: str, timeout: float = 900, check: bool = True) -> str:
    """The standard output of a podman command."""
    done = subprocess.run(["podman", *arguments], capture_output=True, text=True, timeout=timeout, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done.stdout.strip()


def configure(folder: Path) -> None:
    """Let podman run where there is no systemd, unless it is configured already."""
    if not Path("/run/systemd/private").exists() and "CONTAINERS_CONF" not in os.environ:
        (folder / "containers.conf").write_text(CONFIGURATION)
        os.environ["CONTAINERS_CONF"] = str(folder / "containers.conf")


def free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return int(own.getsockname()[1])


def build_image(folder: Path) -> str:
    """The image of the Dockerfile as it is; its base is made here where no registry has it."""
    if shutil.which("podman") is None:
        pytest.skip("there is no podman")
    configure(folder)
    exists = subprocess.run(["podman", "image", "exists", BASE], check=False).returncode == 0
    if not exists and subprocess.run(["podman", "pull", "--quiet", BASE], check=False, timeout=120).returncode:
        subprocess.run(["bash", str(Path(__file__).parent / "base_image.sh"), sys.executable, BASE], check=True)
    podman("build", "--format", "docker", "--network", "host", "--tag", IMAGE, str(ROOT))
    return IMAGE


class Container:
    """A started container; `url` is where its server's port can be reached."""

    def __init__(self, name: str, url: str) -> None:
        self.name, self.url = name, url

    def logs(self) -> str:
        done = subprocess.run(["podman", "logs", self.name], capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    def inspect(self, part: str) -> object:
        return json.loads(podman("inspect", self.name, "--format", f"{{{{json {part}}}}}"))

    def wait_until_ready(self, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if httpx.get(self.url + "/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            assert "true" in podman("inspect", self.name, "--format", "{{.State.Running}}"), self.logs()
            time.sleep(0.5)
        raise AssertionError(f"not ready after {seconds} s: {self.logs()}")


@contextmanager
def running(image: str, options: list[str], command: list[str], port: int) -> Iterator[Container]:
    """A container whose server listens on `port`, published on a free one of the loopback interface."""
    name = podman("run", "--detach", "--publish", f"127.0.0.1::{port}", *options, image, *command)
    try:
        yield Container(name, "http://" + podman("port", name, f"{port}/tcp"))
    finally:
        podman("rm", "--force", "--volumes", "--time", "0", name)
