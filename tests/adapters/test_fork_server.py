"""Processes that a server forks: started in milliseconds, bounded by the server's life, their end is known."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import psutil
import pytest

from lora_serve.adapters.fork_server import ForkServer


def echo(connection: Connection) -> None:
    """Send back what comes; a number is an exit status, a negative one a signal."""
    received = connection.recv()
    if isinstance(received, int) and received < 0:
        os.kill(os.getpid(), -received)
    if isinstance(received, int):
        os._exit(received)
    connection.send((received, os.getppid()))


@pytest.fixture(params=["forked from here", "started as a program"])
def server(request: pytest.FixtureRequest) -> Iterator[ForkServer]:
    server = ForkServer(echo)
    if request.param == "forked from here":
        server.fork()
    yield server
    server.close()


def _ask(server: ForkServer, question: object) -> tuple[object, int]:
    process = server.start()
    process.connection.send(question)
    answer: tuple[object, int] = process.connection.recv()
    assert process.close() == 0
    return answer


def test_a_process_runs_the_target_and_its_end_is_known(server: ForkServer) -> None:
    assert _ask(server, "a")[0] == "a"
    for status in (3, -signal.SIGXCPU, -signal.SIGKILL):
        process = server.start()
        process.connection.send(int(status))
        assert process.close() == status


def test_many_at_once_are_of_one_server(server: ForkServer) -> None:
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda number: _ask(server, str(number)), range(40)))
    assert [answer for answer, _ in answers] == [str(number) for number in range(40)]
    assert len({parent for _, parent in answers}) == 1


def test_a_process_that_cannot_be_started_costs_no_other(server: ForkServer) -> None:
    running, (_, parent) = server.start(), _ask(server, "")
    for limited in (parent, os.getpid()):  # to as many open files as it has
        limits = resource.prlimit(limited, resource.RLIMIT_NOFILE)
        resource.prlimit(limited, resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            with pytest.raises((EOFError, OSError)):
                server.start()
        finally:
            resource.prlimit(limited, resource.RLIMIT_NOFILE, limits)
        assert _ask(server, "b") == ("b", parent)
    running.connection.send("a")
    assert running.connection.recv() == ("a", parent)
    assert running.close() == 0


def test_a_killed_server_takes_its_processes_along_and_is_started_again(server: ForkServer) -> None:
    process, (_, parent) = server.start(), _ask(server, "")
    os.kill(process.pid, signal.SIGSTOP)
    running = psutil.Process(process.pid)
    os.kill(parent, signal.SIGKILL)
    with pytest.raises(EOFError):
        process.connection.recv()
    assert process.close() is None
    assert _ask(server, "b")[0] == "b"
    deadline = time.monotonic() + 5
    while running.is_running() and running.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not running.is_running() or running.status() == psutil.STATUS_ZOMBIE
