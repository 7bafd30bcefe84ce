"""A real server process on the bundled demo model, for end-to-end tests."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import httpx
import psutil

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "demo" / "model"
ADAPTERS = ROOT / "adapters"


class ServerProcess:
    """`lora-serve serve` on a free port; use as a context manager.

    Args:
        descriptors: how many file descriptors the server may have open.
    """

    def __init__(self, store: Path, *options: str, model: Path = DEMO, descriptors: int | None = None) -> None:
        self.store = store

        def limit() -> None:
            if descriptors is not None:
                resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))

        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "lora_serve",
                "serve",
                str(model),
                "--port",
                "0",
                "--store",
                str(store),
                *options,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            preexec_fn=limit,
        )
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        self.url = self._await_url()
        self.http = httpx.Client(base_url=self.url, timeout=120)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.close()
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(5)
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    @property
    def memory(self) -> int:
        """Resident bytes of the API process."""
        return psutil.Process(self._process.pid).memory_info().rss

    @property
    def engine_pid(self) -> int:
        """Process id of the engine: the server's only Python child."""
        found = subprocess.run(
            ["pgrep", "-P", str(self._process.pid), "-f", "lora_serve.engine"],
            capture_output=True,
            text=True,
            check=True,
        )
        return int(found.stdout.split()[0])

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, timeout: float) -> int:
        return self._process.wait(timeout)

    def complete(self, text: str, adapter: str | None = None, **body: object) -> str:
        """Greedy completion of a demo sentence; the text alone."""
        answer = self.http.post(
            "/v1/completions",
            json={"prompt": text + "\n", "max_tokens": 48, "temperature": 0, "adapter": adapter, **body},
        )
        answer.raise_for_status()
        found: str = answer.json()["choices"][0]["text"]
        return found

    def metric(self, name: str) -> float:
        """Sum of a metric over its label sets."""
        lines = self.http.get("/metrics").text.splitlines()
        values = [float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"{re.escape(name)}(\{{|\s)", line)]
        assert values, f"no metric {name}"
        return sum(values)

    def _read_log(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.log.append(line)

    def _await_url(self) -> str:
        assert self._process.stdout is not None
        deadline = time.monotonic() + 120
        for line in self._process.stdout:
            if found := re.search(r"http://\S+", line):
                return found.group()
            if time.monotonic() > deadline:
                break
        self._process.kill()
        raise RuntimeError("the server did not start:\n" + "".join(self.log))


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)


def status(server: ServerProcess, path: str) -> int:
    try:
        return server.http.get(path).status_code
    except httpx.TransportError:
        return 0
