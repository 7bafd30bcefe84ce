"""What one reader waits for until something arrives: `asyncio.Event` without its queue of waiters, for every token."""

from __future__ import annotations

import asyncio


class Arrival:
    """Wakes the one reader that waits; nothing is remembered where none does, so a reader looks before it waits."""

    def __init__(self) -> None:
        self._waiting: asyncio.Future[None] | None = None

    def wake(self) -> None:
        """Let the reader, if there is one, look again."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def wait(self) -> None:
        """Wait for the next `wake`."""
        self._waiting = asyncio.get_running_loop().create_future()
        await self._waiting
