"""The bounded buffer between the engine and one reader.

The engine never waits for a reader: one that falls behind gets its tokens in fewer, larger events, and one that falls
too far behind is cut off.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TypeVar

from lora_serve.engine.arrival import Arrival
from lora_serve.request import Event, Tokens

T = TypeVar("T")


class EventBuffer:
    """Unread events of one request.

    Args:
        limit: unread tokens that are buffered at most.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: deque[Event] = deque()
        self._tokens = 0
        self._arrival = Arrival()

    def __repr__(self) -> str:
        return f"<EventBuffer {len(self._waiting)} events, {self._tokens}/{self._limit} tokens waiting>"

    def put(self, event: Event) -> bool:
        """Add an event. False if the reader is too far behind: the event is dropped and the stream should be ended.

        Only token events are ever dropped, so that a slow reader still gets the last event.
        """
        if isinstance(event, Tokens):
            if self._tokens + len(event.token_ids) > self._limit and self._tokens:
                return False
            self._tokens += len(event.token_ids)
        self._waiting.append(event)
        self._arrival.wake()
        return True

    async def get(self) -> Event:
        """Wait for the next event; consecutive unread token events are merged into one."""
        if not self._waiting:
            await self._arrival.wait()
        event = self._waiting.popleft()
        if not isinstance(event, Tokens):
            return event
        if not self._waiting:
            self._tokens = 0
            return event
        pieces = [event]
        while self._waiting and isinstance(following := self._waiting[0], Tokens):
            pieces.append(following)
            self._waiting.popleft()
        self._tokens = 0
        return merge_tokens(pieces)


def merge_tokens(pieces: list[Tokens]) -> Tokens:
    """Merge consecutive token events; `cached` and such, which only the first one has, are taken from it."""
    first = pieces[0]
    if len(pieces) == 1:
        return first
    logprobs = None if first.logprobs is None else _flat(piece.logprobs or [] for piece in pieces)
    return Tokens(
        first.request_id,
        _flat(piece.token_ids for piece in pieces),
        logprobs,
        next((piece.prompt_logprobs for piece in pieces if piece.prompt_logprobs is not None), None),
        first.cached,
        first.queued,
        first.started,
    )


def _flat(lists: Iterable[list[T]]) -> list[T]:
    return [item for one in lists for item in one]
