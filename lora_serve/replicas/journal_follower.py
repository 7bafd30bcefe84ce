"""The changes that one replica has made, and those of the journal that it makes up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from lora_serve.replicas.change_journal import ChangeJournal
from lora_serve.replicas.compaction import KeptChange
from lora_serve.replicas.forwarding import ForwardedRequest, ServerLost, WholeResponse

Ask = Callable[[ForwardedRequest], Awaitable[WholeResponse | ServerLost]]

log = logging.getLogger("ray.serve")


class JournalFollower:
    """What a replica has made of a journal.

    Args:
        replica: its name in the log.
        ask: sends a request to its server, with the server's own key.
    """

    def __init__(self, replica: str, journal: ChangeJournal, ask: Ask) -> None:
        self._replica, self._journal, self._ask = replica, journal, ask
        self._made: dict[str, int] = {}  # thing → number of the last change made here
        self._told: set[int] = set()  # changes that wait for an adapter, which the log says once

    def note(self, thing: str, number: int) -> None:
        """A change was made here."""
        self._made[thing] = number

    async def make_up(self) -> None:
        """Make the changes of the journal that were not made here, in order.

        One that needs an adapter which is not there is tried again after the others, and the next time.
        """
        waiting = await asyncio.to_thread(self._journal.read)
        while waiting:
            number_before = len(waiting)
            waiting = [change for change in waiting if self._is_due(change) and not await self._make(change)]
            if len(waiting) == number_before:
                return

    def _is_due(self, change: KeptChange) -> bool:
        return change.number > self._made.get(change.thing, 0)

    async def _make(self, change: KeptChange) -> bool:
        """Make a change; returns whether there is nothing left to try again at once."""
        try:
            body = await asyncio.to_thread(self._journal.body, change)
        except FileNotFoundError:
            return True  # a later change has made it needless
        result = await self._ask(change.request(body))
        if isinstance(result, ServerLost) or result.begin.status >= 500:
            log.warning("replica %s could not make a change, and tries again: %s", self._replica, change.thing)
            return True
        if result.begin.status == 404 and change.needs_adapter:
            if change.number not in self._told:
                self._told.add(change.number)
                log.warning("replica %s waits for an adapter to make a change: %s", self._replica, change.thing)
            return False
        if result.begin.status >= 400 and (change.method, result.begin.status) != ("DELETE", 404):
            log.warning("replica %s refused a change: %s, status %d", self._replica, change.thing, result.begin.status)
        self.note(change.thing, change.number)
        return True
