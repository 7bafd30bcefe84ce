"""Asyncio client of the fetch process, which is started with the first fetch and again whenever it has ended."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec

from lora_serve.adapter_sources import AdapterLocation, NamedSource, options_variable
from lora_serve.errors import BadRequest, Failure, Unavailable
from lora_serve.sources.fetch_messages import (
    CancelFetch,
    FetchDone,
    FetchJob,
    FetchProgress,
    decode_from_fetcher,
    line_of,
)

NEEDED = {"s3": ("s3fs",), "gs": ("gcsfs",), "https": ("aiohttp",), "http": ("aiohttp",)}  # modules, by scheme
GRACE = 2.0  # seconds beyond a fetch's time after which it is ended from outside
OnProgress = Callable[[int, int | None], None]  # bytes received, and bytes in all if known

log = logging.getLogger(__name__)


def check_sources(sources: Iterable[NamedSource], environment: Iterable[str]) -> None:
    """Check that what the sources need is there. Raises BadRequest that says what to install or to rename."""
    for source in sources:
        missing = [name for name in NEEDED.get(source.scheme, ()) if find_spec(name) is None]
        if missing:
            raise BadRequest(
                f"source {source.name} needs {', '.join(missing)}: pip install 'lora-serve[sources]'",
                param="adapter_source",
            )
    known = {options_variable(source.name) for source in sources}
    for variable in sorted(environment):
        if variable.startswith(options_variable("")) and variable not in known:
            raise BadRequest(f"environment: {variable} is of no --adapter-source", param="adapter_source")


@dataclass
class _Running:
    """A fetch; `ended` once nothing more is written for it."""

    answer: asyncio.Future[FetchDone]
    on_progress: OnProgress
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Fetcher:
    """Fetches adapters from sources. Use it on one event loop.

    Args:
        schemes: of the sources.
    """

    def __init__(self, schemes: Iterable[str]) -> None:
        self._schemes = ",".join(sorted(set(schemes)))
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._running: dict[int, _Running] = {}
        self._ids = itertools.count(1)
        self._closed = False

    async def start(self) -> None:
        """Start the process unless it runs; it imports what it needs meanwhile."""
        async with self._starting:
            if self._closed:
                raise Unavailable("the server is shutting down", retry_after=5)
            if self._reader is not None and not self._reader.done():
                return
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "lora_serve.sources.fetch_process",
                self._schemes,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            self._reader = asyncio.create_task(self._read(self._process))

    async def fetch(
        self,
        location: AdapterLocation,
        folder: str,
        *,
        most: int,
        seconds: float,
        limit: float,
        on_progress: OnProgress,
    ) -> FetchDone:
        """Copy an adapter into an empty folder. Cancelled, or when its time is over, it is ended.

        Args:
            seconds: that it may take: of the configured limit, what other sources have left.
            limit: the configured one, for messages.

        Raises: AdapterNotFound if the source does not have it; AdapterInvalid, TooLarge, StorageFull; Unavailable.
        """
        await self.start()
        assert self._process is not None
        assert self._process.stdin is not None
        id = next(self._ids)
        running = _Running(asyncio.get_running_loop().create_future(), on_progress)
        self._running[id] = running
        try:
            self._process.stdin.write(line_of(FetchJob(id, location, folder, most, seconds)))
            async with asyncio.timeout(seconds + GRACE):
                return await running.answer
        except TimeoutError:
            raise Unavailable(
                f"source {location.source} did not answer in time: the limit is {limit:g} s (--source-timeout)",
                param="source",
                retry_after=30,
            ) from None
        finally:
            if not running.ended.is_set():
                self._process.stdin.write(line_of(CancelFetch(id)))
                with suppress(TimeoutError):
                    await asyncio.wait_for(running.ended.wait(), GRACE)
            del self._running[id]

    async def close(self) -> None:
        """End the process and all fetches."""
        self._closed = True
        process = self._process
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        try:
            async with asyncio.timeout(GRACE):
                await process.wait()
        except TimeoutError:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            await process.wait()
        if self._reader is not None:
            await self._reader

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            message = decode_from_fetcher(line)
            running = self._running.get(message.id)
            if running is None:
                continue
            if isinstance(message, FetchProgress):
                running.on_progress(message.received, message.expected)
                continue
            running.ended.set()
            if running.answer.done():  # cancelled
                continue
            if isinstance(message, FetchDone):
                running.answer.set_result(message)
            else:
                running.answer.set_exception(message.failure.error())
        status = await process.wait()
        if not self._closed:
            log.error("the fetch process ended (%d); the next fetch starts it again", status)
        failure = Failure(Unavailable.kind, "the fetch process ended", "source", 1.0)
        for running in self._running.values():
            running.ended.set()
            if not running.answer.done():
                running.answer.set_exception(failure.error())
