"""A bound on what runs at once, whose slots go to keys in turn: one with much to do does not keep others waiting."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class FairSlots:
    """So many slots; a key's own requests get them in the order in which they came."""

    def __init__(self, most: int) -> None:
        self._free = most
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # the key whose turn is next comes first

    def __repr__(self) -> str:
        return f"<FairSlots {self._free} free, {sum(map(len, self._waiting.values()))} waiting>"

    @asynccontextmanager
    async def slot(self, owner: str) -> AsyncIterator[None]:
        """Wait for a slot, and hold it meanwhile."""
        if self._free and not self._waiting:
            self._free -= 1
        else:
            given = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(owner, deque()).append(given)
            try:
                await given
            except asyncio.CancelledError:
                if given.cancelled():
                    self._forget(owner, given)
                else:  # it was given at this moment
                    self._release()
                raise
        try:
            yield
        finally:
            self._release()

    def _release(self) -> None:
        self._free += 1
        while self._free and self._waiting:
            owner = next(iter(self._waiting))
            own = self._waiting.pop(owner)
            given = own.popleft()
            if own:
                self._waiting[owner] = own  # at the end
            if not given.done():
                given.set_result(None)
                self._free -= 1

    def _forget(self, owner: str, given: asyncio.Future[None]) -> None:
        own = self._waiting.get(owner)
        if own is not None and given in own:
            own.remove(given)
            if not own:
                del self._waiting[owner]
