"""The fetch process: forks one child for every adapter that is fetched, with bounds on what the child may take.

It imports the libraries of the sources once, while the server starts, so that a fetch begins in milliseconds and no
import computes beside requests. A child can be ended at any moment, and none outlives the server: the process ends when
its standard input does, and its children with it.

Started as `python -m lora_serve.sources.fetch_process SCHEME,…`; messages are lines (`fetch_messages.py`).
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import resource
import select
import signal
import sys
import time
from contextlib import suppress

from lora_serve.errors import Failure, ServeError, Unavailable
from lora_serve.sources.fetch import fetch
from lora_serve.sources.fetch_messages import (
    LONGEST_LINE,
    CancelFetch,
    FetchFailed,
    FetchJob,
    FetchProgress,
    FromFetcher,
    decode_to_fetcher,
    line_of,
)

LIBRARIES = {
    "s3": ("lora_serve.sources.object_files", "s3fs"),
    "gs": ("lora_serve.sources.object_files", "gcsfs"),
    "hf": ("lora_serve.sources.hub_files",),
    "https": ("lora_serve.sources.web_files",),
    "http": ("lora_serve.sources.web_files",),
    "file": (),
}
MEMORY = 1 << 30  # bytes that a child may take beyond what it begins with
SLACK = 1 << 20  # bytes by which a file may exceed the limit before the kernel ends the child
PROGRESS_EVERY = 0.2  # seconds
WATCH_EVERY = 0.05  # seconds
_PR_SET_PDEATHSIG = 1  # of Linux's prctl
_output = 1  # descriptor that messages are written to


def main(schemes: list[str]) -> int:
    """Serve jobs until the standard input ends."""
    global _output
    _output = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no message
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, to all; the server ends this process
    os.nice(10)
    for scheme in schemes:
        for library in LIBRARIES[scheme]:
            importlib.import_module(library)
    gc.collect()
    gc.freeze()  # so that children share it
    children: dict[int, int] = {}  # process id → job
    received = bytearray()
    while True:
        ready, _, _ = select.select([0], [], [], WATCH_EVERY if children else None)
        if ready:
            data = os.read(0, 1 << 16)
            if not data:
                break
            received += data
            *lines, rest = received.split(b"\n")
            received = bytearray(rest)
            for line in lines:
                message = decode_to_fetcher(line)
                if isinstance(message, CancelFetch):
                    _kill([child for child, job in children.items() if job == message.id])
                else:
                    children[_fork(message)] = message.id
        _reap(children)
    _kill(children)
    return 0


def _fork(job: FetchJob) -> int:
    """Begin a job in a child; returns its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        _run(job)
        status = 0
    finally:
        os._exit(status)


def _run(job: FetchJob) -> None:
    with suppress(AttributeError):  # Linux has it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.close(0)
    _bound(job.most + SLACK)
    reported = 0.0
    expected: int | None = None

    def report(received: int, size: int | None) -> None:
        nonlocal reported, expected
        expected = expected if size is None else size
        if time.monotonic() - reported >= PROGRESS_EVERY:
            reported = time.monotonic()
            _send(FetchProgress(job.id, received, expected))

    try:
        _send(fetch(job, report))
    except ServeError as error:
        _send(FetchFailed(job.id, Failure.of(error)))
    except MemoryError:
        failure = Unavailable(f"source {job.location.source} cannot be read: it needs too much memory", param="source")
        _send(FetchFailed(job.id, Failure.of(failure)))


def _bound(file_size: int) -> None:
    """Let this process grow no larger, and write no larger file, than allowed."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError, ValueError):
        pages = int(open("/proc/self/statm").read().split()[5])  # noqa: SIM115  # data and stack
        memory = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))


def _reap(children: dict[int, int]) -> None:
    """Report children that ended without a word."""
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if not child:
            return
        job = children.pop(child)
        if status:
            reason = f"the process that fetched it ended ({os.waitstatus_to_exitcode(status)})"
            _send(FetchFailed(job, Failure(Unavailable.kind, reason, "source")))


def _kill(children: list[int] | dict[int, int]) -> None:
    for child in children:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def _send(message: FromFetcher) -> None:
    line = line_of(message)
    if len(line) > LONGEST_LINE and isinstance(message, FetchFailed):
        line = line_of(FetchFailed(message.id, Failure(message.failure.kind, message.failure.message[:200])))
    os.write(_output, line)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1].split(",")))
