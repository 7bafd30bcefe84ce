"""Hostile requests to a real server: a neighbour's stream goes on, health checks answer, and memory comes back."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

import httpx
import pytest
import yaml
from server_process import ServerProcess

from lora_serve.api.key_file import hash_key

KEY = {"Authorization": "Bearer sk-neighbour"}
MB = 1 << 20
LONGEST_GAP = 1.0  # seconds that are not held against the server: this machine may be busy
MISTAKES = b'{"prompt":[' + b",".join([b"[1]"] * (6 * MB // 4)) + b"]}"
LONG_PROMPT = json.dumps({"prompt": "count to ten " * (4 * MB // 13)}).encode()
LONG_CHAT = json.dumps({"messages": [{"role": "user", "content": "count to ten " * (4 * MB // 13)}]}).encode()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("hostile")
    keys = folder / "keys.yaml"
    keys.write_text(yaml.safe_dump({"neighbour": hash_key("sk-neighbour")}))
    options = ("--api-key-file", str(keys), "--drain-timeout", "1")
    with ServerProcess(folder / "store", *options, descriptors=256) as server:
        server.http.headers.update(KEY)
        yield server


@pytest.fixture(scope="module")
def usual_gap(server: ServerProcess) -> float:
    """The longest gap in a stream of a server that has nothing else to do; also loads what the first request loads."""
    neighbour = Neighbour(server)
    neighbour.stream()
    return max(neighbour.gaps)


class Neighbour:
    """Streams completions; `gaps` are the seconds between events of one stream."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self.gaps: list[float] = []

    def stream(self, stop: Callable[[], bool] = lambda: False) -> None:
        body = {"prompt": "count: ten\n", "max_tokens": 60, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{self._server.url}/v1/completions", json=body, headers=KEY, timeout=60) as answer:
            assert answer.status_code == 200
            last = time.monotonic()
            for _ in answer.iter_raw():
                now = time.monotonic()
                self.gaps.append(now - last)
                last = now
                if stop():
                    return

    @contextmanager
    def streaming(self) -> Iterator[None]:
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                self.stream(stop.is_set)

        with ThreadPoolExecutor(1) as thread:
            streams = thread.submit(work)
            try:
                yield
            finally:
                stop.set()
            streams.result()


def post(server: ServerProcess, path: str, body: bytes) -> httpx.Response:
    headers = {"Content-Type": "application/json", **KEY}
    return httpx.post(f"{server.url}{path}", content=body, headers=headers, timeout=60)


def at_once(times: int, work: Callable[[], httpx.Response]) -> list[httpx.Response]:
    with ThreadPoolExecutor(times) as threads:
        return [running.result() for running in [threads.submit(work) for _ in range(times)]]


@contextmanager
def sockets(server: ServerProcess, count: int, text: bytes) -> Iterator[list[socket.socket]]:
    """Connections that have sent `text`, as far as the server took it."""
    address = urlsplit(server.url)
    opened = []
    for _ in range(count):
        connection = socket.create_connection((address.hostname, address.port), timeout=5)
        connection.setblocking(False)
        with suppress(OSError):
            connection.send(text)
        opened.append(connection)
    try:
        yield opened
    finally:
        for connection in opened:
            connection.close()


@contextmanager
def nobody_is_harmed(server: ServerProcess, usual_gap: float) -> Iterator[None]:
    """A neighbour's stream goes on, health checks are answered, and memory is afterwards what it was before."""
    memory = server.memory
    neighbour = Neighbour(server)
    with neighbour.streaming():
        yield
        assert server.http.get("/health").status_code == 200
    assert max(neighbour.gaps) <= max(2 * usual_gap, LONGEST_GAP)
    deadline = time.monotonic() + 10
    while server.memory > memory + 64 * MB and time.monotonic() < deadline:
        time.sleep(0.1)
    assert server.memory <= memory + 64 * MB


def test_bodies_of_many_mistakes(server: ServerProcess, usual_gap: float) -> None:
    with nobody_is_harmed(server, usual_gap):
        answers = at_once(8, lambda: post(server, "/v1/completions", MISTAKES))
        small = post(server, "/v1/completions", MISTAKES[:40_000].rpartition(b",")[0] + b"]}")
    assert {answer.status_code for answer in (*answers, small)} == {400}
    assert small.elapsed.total_seconds() < 1
    assert "[1]" not in "".join(server.log)


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", LONG_PROMPT), ("/v1/chat/completions", LONG_CHAT)])
def test_prompts_far_longer_than_the_context(server: ServerProcess, usual_gap: float, path: str, body: bytes) -> None:
    with nobody_is_harmed(server, usual_gap):
        answers = at_once(8, lambda: post(server, path, body))
    assert {answer.json()["error"]["code"] for answer in answers} == {"context_length_exceeded"}
    assert "count to ten" not in "".join(server.log)


def test_unfinished_bodies_without_a_key(server: ServerProcess, usual_gap: float) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: %d\r\n\r\n"
    with (
        nobody_is_harmed(server, usual_gap),
        sockets(server, 100, head % (8 * MB) + b'{"prompt":"' + b"x" * MB) as opened,
    ):
        time.sleep(0.2)
        for connection in opened:
            assert connection.recv(12) == b"HTTP/1.1 401"


def test_endless_headers(server: ServerProcess, usual_gap: float) -> None:
    with nobody_is_harmed(server, usual_gap), sockets(server, 50, b"GET /health HTTP/1.1\r\nX: " + b"y" * MB) as opened:
        time.sleep(0.2)
        for connection in opened:
            assert connection.recv(12) == b"HTTP/1.1 431"


def test_more_half_sent_requests_than_descriptors(server: ServerProcess, usual_gap: float) -> None:
    with nobody_is_harmed(server, usual_gap), sockets(server, 300, b"GET /health HTTP/1.1\r\nHost: localhost\r\n"):
        for _ in range(5):
            assert httpx.get(f"{server.url}/health", timeout=5).status_code == 200


def test_sigterm_beside_all_that_ends_the_server(server: ServerProcess) -> None:
    with ThreadPoolExecutor(9) as threads, suppress(httpx.HTTPError):
        running = [threads.submit(post, server, "/v1/completions", MISTAKES) for _ in range(4)]
        running += [threads.submit(post, server, "/v1/chat/completions", LONG_CHAT) for _ in range(4)]
        streaming = threads.submit(Neighbour(server).stream)
        time.sleep(0.2)
        began = time.monotonic()
        server.signal(signal.SIGTERM)
        assert server.wait(10) == 0
        assert time.monotonic() - began < 1 + 5
        for each in (*running, streaming):
            with suppress(httpx.HTTPError, AssertionError):
                each.result()
    assert "is killed" not in "".join(server.log)
    assert "count to ten" not in "".join(server.log)
