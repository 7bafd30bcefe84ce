"""A server whose base two processes share: the same answers, and a lost process is an error and a restart."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from server_process import ADAPTERS, ServerProcess, status, until

from demo.tasks import heldout_prompts

TEXT = heldout_prompts(1, seed=25)[0]
NAMES = [None, "reverse", "json", "shout"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    options = ("--adapters", str(ADAPTERS), "--tensor-parallel", "2", "--device", "cpu", "--dtype", "float32")
    with ServerProcess(tmp_path_factory.mktemp("store"), *options) as server:
        yield server


def rank_pid(server: ServerProcess) -> int:
    """Process id of the engine's other rank."""
    children = psutil.Process(server.engine_pid).children()
    return next(child.pid for child in children if "lora_serve.engine.rank_main" in child.cmdline())


def test_answers_are_those_of_one_process(server: ServerProcess, tmp_path: Path) -> None:
    with ServerProcess(tmp_path, "--adapters", str(ADAPTERS), "--device", "cpu", "--dtype", "float32") as whole:
        wanted = [whole.complete(TEXT, name) for name in NAMES]
    assert [server.complete(TEXT, name) for name in NAMES] == wanted
    assert len(set(wanted)) == len(NAMES)


def test_a_killed_process_ends_streams_with_an_error_and_all_are_started_again(server: ServerProcess) -> None:
    before, first, engine = server.complete(TEXT, "reverse"), rank_pid(server), server.engine_pid
    outcome: list[str] = []

    def stream() -> None:
        body = {"prompt": TEXT, "max_tokens": 400, "ignore_eos": True, "stream": True, "adapter": "reverse"}
        try:
            with server.http.stream("POST", "/v1/completions", json=body) as answer:
                for line in answer.iter_lines():
                    outcome.append(line)
        except httpx.TransportError as error:
            outcome.append(repr(error))

    streaming = threading.Thread(target=stream)
    streaming.start()
    until(lambda: len(outcome) > 5)
    os.kill(first, signal.SIGKILL)
    streaming.join(20)
    assert not streaming.is_alive()
    assert any('"error"' in line for line in outcome), outcome[-3:]
    until(lambda: not psutil.pid_exists(engine), 10)
    until(lambda: status(server, "/ready") == 200, 60)
    assert server.complete(TEXT, "reverse") == before
    assert rank_pid(server) != first


def test_no_process_outlives_the_engine(server: ServerProcess) -> None:
    until(lambda: status(server, "/ready") == 200, 60)
    rank = rank_pid(server)
    os.kill(server.engine_pid, signal.SIGKILL)
    until(lambda: not psutil.pid_exists(rank), 5)
