"""Turns of fetches from sources: some at a time of each source, fewer of each key, and an admin's beside them.

A source that is slow therefore keeps nobody from another one, and tenants keep no admin from any.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from weakref import WeakValueDictionary

from lora_serve.errors import Overloaded

OF_A_SOURCE = 8  # fetches at a time
OF_A_KEY = 4  # of one source
OF_ADMINS = 4  # of one source
LONGEST_WAIT = 60.0  # seconds for a turn


class FetchSlots:
    """Which fetches may run. Use it on one event loop."""

    def __init__(self) -> None:
        # An entry lives as long as a fetch holds it or waits for it.
        self._slots: WeakValueDictionary[tuple[str, ...], asyncio.Semaphore] = WeakValueDictionary()

    @asynccontextmanager
    async def take(self, source: str, key: str | None) -> AsyncIterator[None]:
        """A turn at a source as long as the context lasts. Raises Overloaded if none is had in time.

        Args:
            key: name of the key that asks for an adapter; None for what an admin publishes.
        """
        if key is None:
            wanted = [self._slot(OF_ADMINS, "admins", source)]
        else:
            wanted = [self._slot(OF_A_KEY, "key", source, key), self._slot(OF_A_SOURCE, "all", source)]
        async with AsyncExitStack() as taken:
            try:
                async with asyncio.timeout(LONGEST_WAIT):
                    for slot in wanted:
                        await taken.enter_async_context(slot)
            except TimeoutError:
                raise Overloaded(f"too many adapters of source {source} are being fetched", retry_after=10.0) from None
            yield

    def _slot(self, most: int, *of: str) -> asyncio.Semaphore:
        return self._slots.setdefault(of, asyncio.Semaphore(most))
