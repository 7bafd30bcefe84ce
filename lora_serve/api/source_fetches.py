"""Adapters that are fetched from the operator's sources: on the first request for one, and for admins.

A request for a name that is not published waits while the sources are asked for it, in their order, once for all that
wait; then it goes on as any other. Requests for published adapters never come here. A fetch that began goes on if
everybody who waits for it leaves.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

from lora_serve.adapter_sources import AdapterLocation, NamedSource, find_location, is_adapter_name
from lora_serve.api.access_log import write_audit
from lora_serve.api.fetch_slots import FetchSlots
from lora_serve.api.negative_cache import NegativeCache
from lora_serve.api.request_record import Change
from lora_serve.api.upload import staging_folder
from lora_serve.errors import (
    AdapterExists,
    AdapterInvalid,
    AdapterNotFound,
    Overloaded,
    ServeError,
    TooLarge,
    Unavailable,
)
from lora_serve.messages import DescribeAdapter, DescribeAlias, Operation, Publish
from lora_serve.names import adapter_not_found
from lora_serve.sources.fetch_messages import FetchDone
from lora_serve.sources.fetcher import Fetcher
from lora_serve.sources.totals import RunningFetch, SourceTotals

MOST_PENDING = 256  # names that are being fetched or are to be
MOST_PENDING_OF_ONE = 32  # of one key
ABSENT = (AdapterNotFound, AdapterExists)  # no source has it, or the name is one that may not be published
LASTING = (*ABSENT, AdapterInvalid, TooLarge)  # would be the same if it was fetched again
LOOK_EVERY = 0.5  # seconds between looks whether the server still takes requests

log = logging.getLogger(__name__)


class EngineCalls(Protocol):
    """What is needed of the engine."""

    @property
    def ready(self) -> bool:
        """Whether requests are accepted."""

    async def call(self, operation: Operation) -> Any:
        """Run an admin operation; raises its `ServeError`."""


class SourceFetches:
    """The sources of one server, and the fetches that run.

    Args:
        staging: folder for what is fetched, on the store's file system; raises Unavailable while there is none.
        most: bytes of an adapter.
        seconds: that looking for one adapter, and fetching it, may take.
    """

    def __init__(
        self,
        sources: Sequence[NamedSource],
        engine: EngineCalls,
        fetcher: Fetcher,
        staging: Callable[[], Path],
        totals: SourceTotals,
        *,
        most: int,
        seconds: float,
        failures: NegativeCache | None = None,
    ) -> None:
        self._sources, self._engine, self._fetcher, self._staging = sources, engine, fetcher, staging
        self._totals, self._most, self._seconds = totals, most, seconds
        self._failures = NegativeCache() if failures is None else failures
        self._pending: dict[str, asyncio.Task[None]] = {}
        self._pending_of: Counter[str] = Counter()  # by key
        self._slots = FetchSlots()

    def describe(self) -> str:
        """Where an adapter was looked for besides those that are published; empty without sources."""
        names = ", ".join(source.name for source in self._sources)
        return f"; looked in source{'s' if len(self._sources) > 1 else ''} {names}" if names else ""

    async def start(self) -> None:
        """Start what fetches, so that its imports do not compute beside requests."""
        if self._sources:
            await self._fetcher.start()

    async def close(self) -> None:
        """End all fetches."""
        for task in self._pending.values():
            task.cancel()
        await asyncio.gather(*self._pending.values(), return_exceptions=True)
        await self._fetcher.close()

    # --- on demand ---------------------------------------------------------------------------------------------------

    async def fetch_missing(self, names: Iterable[str], key: str) -> bool:
        """Fetch those of these adapters that are not published; returns whether the request should be tried again.

        Args:
            key: name of the key that asks, and may use them.

        Raises: the ServeError for which one cannot be had, other than that there is none.
        """
        if not self._sources:
            return False
        fetched = False
        for name in dict.fromkeys(names):
            if is_adapter_name(name) and not await self._is_known(name):
                if not await self._fetch_once(name, key):
                    return False
                fetched = True
        return fetched

    async def _is_known(self, name: str) -> bool:
        """Whether an adapter is published under this name, or it is an alias, whose adapters are."""
        return await self._is_published(name) or await self._exists(DescribeAlias(name))

    async def _is_published(self, name: str) -> bool:
        return await self._exists(DescribeAdapter(name))

    async def _exists(self, operation: DescribeAdapter | DescribeAlias) -> bool:
        try:
            await self._engine.call(operation)
        except AdapterNotFound:
            return False
        return True

    async def _fetch_once(self, name: str, key: str) -> bool:
        """Wait for the fetch of a name, which this call begins if nobody did; returns whether a source had it."""
        if (error := self._failures.find(name)) is not None:
            self._totals.remembered += 1
            if isinstance(error, ABSENT):
                return False
            raise error
        task = self._pending.get(name)
        if task is None:
            if len(self._pending) >= MOST_PENDING or self._pending_of[key] >= MOST_PENDING_OF_ONE:
                raise Overloaded("too many adapters are being fetched already", retry_after=1.0)
            task = self._pending[name] = asyncio.create_task(self._fetch_and_publish(name, key))
            self._pending_of[key] += 1
            task.add_done_callback(lambda ended: self._end(name, key, ended))
        self._totals.waiting += 1
        try:
            await self._wait(task)
        finally:
            self._totals.waiting -= 1
        try:
            task.result()
        except ABSENT:
            return False
        except asyncio.CancelledError:
            raise Unavailable("the server is shutting down", retry_after=5.0) from None
        return True

    def _end(self, name: str, key: str, task: asyncio.Task[None]) -> None:
        del self._pending[name]
        self._pending_of[key] -= 1
        if not self._pending_of[key]:
            del self._pending_of[key]
        if not task.cancelled():
            task.exception()  # also if nobody waits for it any more

    async def _fetch_and_publish(self, name: str, key: str) -> None:
        """Fetch and publish the adapter of the first source that has it. Raises what is the matter; remembers it."""
        try:
            await self._fetch_from_any(name, key)
        except ServeError as error:
            if not isinstance(error, AdapterNotFound):
                log.warning("adapter %s is not fetched: %s", name, error.message)
            # What only the engine or the disk could not do now may be possible in a moment.
            if isinstance(error, LASTING) or error.param == "source":
                self._failures.add(name, error)
            raise

    async def _fetch_from_any(self, name: str, key: str) -> None:
        left = self._seconds  # of all sources together, without the waits for a turn
        for source in self._sources:
            location = source.locate(name)
            try:
                async with self._slots.take(source.name, key):
                    begun = time.monotonic()
                    async with self._fetch(location, left) as folder:
                        publish = Publish(name, str(folder), source=location.label, unless_known=True, local=True)
                        info = await self._published(publish)
            except AdapterNotFound:
                left -= time.monotonic() - begun
                continue
            digest = info["versions"][0]["digest"]
            write_audit(Change("publish", name, digest), key=key or None, source=location.label)
            return
        raise adapter_not_found(name)

    async def _published(self, publish: Publish) -> Any:
        try:
            return await self._engine.call(publish)
        except AdapterExists as error:
            if await self._is_published(publish.name):  # by somebody else meanwhile
                return await self._engine.call(DescribeAdapter(publish.name))
            raise error

    # --- for admins --------------------------------------------------------------------------------------------------

    def find(self, given: str, name: str) -> AdapterLocation:
        """Where the `source` of a request is, for an adapter of this name. Raises BadRequest if it is in no source."""
        return find_location(self._sources, given, name)

    @asynccontextmanager
    async def fetch_for_admin(self, location: AdapterLocation, name: str) -> AsyncIterator[Path]:
        """A folder with the adapter's files until the context ends. Raises the ServeError for which there is none."""
        async with AsyncExitStack() as stack:
            begun = asyncio.create_task(stack.enter_async_context(self._fetch_in_turn(location)))
            try:
                await self._wait(begun)
            finally:
                begun.cancel()  # unless it has ended
                await asyncio.wait({begun})  # so that it leaves nothing behind
            yield begun.result()
        self._failures.forget(name)

    @asynccontextmanager
    async def _fetch_in_turn(self, location: AdapterLocation) -> AsyncIterator[Path]:
        async with self._slots.take(location.source, None), self._fetch(location, self._seconds) as folder:
            yield folder

    # --- both --------------------------------------------------------------------------------------------------------

    async def _wait(self, task: asyncio.Task[Any]) -> None:
        """Wait for the end of a task. Raises Unavailable if the server stops before."""
        while not task.done():
            await asyncio.wait({task}, timeout=LOOK_EVERY)
            if not task.done() and not self._engine.ready:
                raise Unavailable("the server is not accepting requests at the moment", retry_after=5.0)

    @asynccontextmanager
    async def _fetch(self, location: AdapterLocation, seconds: float) -> AsyncIterator[Path]:
        """A folder with the adapter's files, or its archive; fetching them may take so many seconds."""
        async with staging_folder(self._staging()) as root:
            folder = root / "adapter"
            await asyncio.to_thread(folder.mkdir)
            begun = time.monotonic()
            done = await self._counted(location, folder, max(0.0, seconds))
            took = time.monotonic() - begun
            totals, source = self._totals, location.source
            totals.seconds[source] = totals.seconds.get(source, 0.0) + took
            at = f" at {done.revision[:12]}" if done.revision else ""
            log.info("fetched %s%s: %d bytes in %.2f s", location.label, at, done.received, took)
            yield folder

    async def _counted(self, location: AdapterLocation, folder: Path, seconds: float) -> FetchDone:
        running, totals = RunningFetch(location.source), self._totals
        totals.running.append(running)
        outcome = "cancelled"
        try:
            done = await self._fetcher.fetch(
                location,
                str(folder),
                most=self._most,
                seconds=seconds,
                limit=self._seconds,
                on_progress=lambda received, expected: totals.progress(running, received, expected),
            )
            totals.progress(running, done.received, None)
            outcome = "fetched"
            return done
        except ServeError as error:
            outcome = error.kind
            raise
        finally:
            totals.running.remove(running)
            totals.fetches[location.source, outcome] += 1
