"""The bounded buffer between the engine and one reader.

The engine's side never waits for a reader; a reader that falls behind gets its tokens in fewer, larger pieces, and one
that falls too far behind is cut off. Knows neither sockets nor HTTP.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import TypeVar

from lora_serve.request import Event, Tokens

T = TypeVar("T")


class EventBuffer:
    """Events of one request, waiting to be read by one reader.

    Args:
        limit: tokens that may wait unread.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: deque[Event] = deque()
        self._tokens = 0
        self._arrived = asyncio.Event()

    def __repr__(self) -> str:
        return f"<EventBuffer {len(self._waiting)} events, {self._tokens}/{self._limit} tokens waiting>"

    def put(self, event: Event) -> bool:
        """Add an event. False if the reader is too far behind: the event was not taken, the stream is to be ended.

        The end is always taken, so a slow reader still learns of it.
        """
        if isinstance(event, Tokens):
            if self._tokens + len(event.token_ids) > self._limit and self._tokens:
                return False
            self._tokens += len(event.token_ids)
        self._waiting.append(event)
        self._arrived.set()
        return True

    async def get(self) -> Event:
        """The next event; token events that wait together come as one."""
        while not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        event = self._waiting.popleft()
        if not isinstance(event, Tokens):
            return event
        run = [event]
        while self._waiting and isinstance(following := self._waiting[0], Tokens):
            run.append(following)
            self._waiting.popleft()
        self._tokens = 0
        return joined(run)


def joined(run: list[Tokens]) -> Tokens:
    """Consecutive token events as one; what is meaningful on the first only is the first's."""
    first = run[0]
    if len(run) == 1:
        return first
    logprobs = None if first.logprobs is None else _flat(piece.logprobs or [] for piece in run)
    return Tokens(
        first.request_id,
        _flat(piece.token_ids for piece in run),
        logprobs,
        next((piece.prompt_logprobs for piece in run if piece.prompt_logprobs is not None), None),
        first.cached,
    )


def _flat(lists: Iterable[list[T]]) -> list[T]:
    return [item for one in lists for item in one]
