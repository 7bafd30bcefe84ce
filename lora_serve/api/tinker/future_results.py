"""Results of accepted requests, for `retrieve_future`: kept a while after they are there, within a bound on bytes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lora_serve.api.tinker.tinker_errors import TooMuchWaits, category, described
from lora_serve.errors import EngineFault, ServeError

JSON, PROTOBUF = "application/json", "application/x-protobuf"
KEPT_SECONDS = 900.0  # a result, from when it is there
FETCHED_SECONDS = 60.0  # one that the client had, for a response that was lost on its way
KEPT_BYTES = 256 << 20  # all results together
MOST_KEPT = 100_000  # results
MOST_OF_OWNER = 20_000  # requests of one key whose results are awaited
SWEEP_EVERY = 1.0  # seconds


@dataclass(frozen=True)
class FutureResult:
    """The body of a response."""

    media_type: str
    body: bytes

    @classmethod
    def of(cls, content: dict[str, Any]) -> FutureResult:
        return cls(JSON, json.dumps(content).encode())

    @classmethod
    def failed(cls, error: ServeError) -> FutureResult:
        """The only form of an error with which clients do not ask again."""
        return cls.of({"error": described(error), "category": category(error)})


LOST = FutureResult.failed(EngineFault("the result is no longer kept; it was not asked for in time"))


@dataclass
class PendingResult:
    """A request that was accepted; `result` is None until it is done, `finished` when that was.

    Attributes:
        fetched: whether the client has had the result.
    """

    owner: str
    result: FutureResult | None = None
    finished: float = 0.0
    fetched: bool = False
    done: asyncio.Event = field(default_factory=asyncio.Event)


class FutureResults:
    """The results of all requests.

    Args:
        clock: seconds.
    """

    def __init__(
        self,
        kept_bytes: int = KEPT_BYTES,
        kept_seconds: float = KEPT_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._kept_bytes, self._kept_seconds, self._clock = kept_bytes, kept_seconds, clock
        self._entries: dict[str, PendingResult] = {}
        self._finished: dict[str, None] = {}  # ids in the order in which they were finished
        self._bytes = 0
        self._awaited: dict[str, int] = {}  # by owner
        self._swept = 0.0

    def __repr__(self) -> str:
        waiting = len(self._entries) - len(self._finished)
        return f"<FutureResults {waiting} awaited, {len(self._finished)} kept with {self._bytes:,} bytes>"

    def open(self, id_: str, owner: str) -> None:
        """Expect a result; nothing happens if it is expected already. Raises TooMuchWaits."""
        if id_ in self._entries:
            return
        self._sweep()
        if self._awaited.get(owner, 0) >= MOST_OF_OWNER:
            raise TooMuchWaits(f"{MOST_OF_OWNER:,} requests of this key wait already", retry_after=1)
        self._entries[id_] = PendingResult(owner)
        self._awaited[owner] = self._awaited.get(owner, 0) + 1

    def expects(self, id_: str) -> bool:
        """Whether a request is known."""
        return id_ in self._entries

    def is_of(self, id_: str, owner: str) -> bool:
        """Whether a request is known and this key's."""
        entry = self._entries.get(id_)
        return entry is not None and entry.owner == owner

    def finish(self, id_: str, result: FutureResult) -> None:
        """Give the result of a request, if it is awaited."""
        entry = self._entries.get(id_)
        if entry is None or entry.result is not None:
            return
        entry.result, entry.finished = result, self._clock()
        entry.done.set()
        self._finished[id_] = None
        self._bytes += len(result.body)
        self._awaited[entry.owner] -= 1
        if not self._awaited[entry.owner]:
            del self._awaited[entry.owner]
        for oldest in list(self._finished):
            if self._bytes <= self._kept_bytes or oldest == id_:
                break
            self._lose(oldest)

    async def wait(self, id_: str, owner: str, seconds: float) -> FutureResult | None:
        """The result once it is there, or None after so many seconds. Raises KeyError for an unknown request."""
        entry = self._entries[id_]
        if entry.owner != owner:
            raise KeyError(id_)
        if entry.result is None:
            try:
                await asyncio.wait_for(entry.done.wait(), seconds)
            except TimeoutError:
                return None
        entry.fetched = entry.result is not None
        return entry.result

    def discard(self, id_: str) -> None:
        """Expect a result no more."""
        self.finish(id_, LOST)
        self._drop(id_)

    def kept(self, id_: str) -> FutureResult | None:
        """A result that was not fetched yet, if there is one."""
        entry = self._entries.get(id_)
        return None if entry is None or entry.fetched else entry.result

    def forget(self, prefix: str) -> None:
        """Drop all requests whose id begins so; who waits for one gets an error."""
        for id_ in [each for each in self._entries if each.startswith(prefix)]:
            self.discard(id_)

    def _sweep(self) -> None:
        now = self._clock()
        if now - self._swept < SWEEP_EVERY:
            return
        self._swept = now
        left = len(self._finished)
        for id_ in list(self._finished):
            entry = self._entries[id_]
            age = now - entry.finished
            if age < FETCHED_SECONDS and left <= MOST_KEPT:
                break
            if entry.fetched or age >= self._kept_seconds or left > MOST_KEPT:
                self._drop(id_)
                left -= 1

    def _drop(self, id_: str) -> None:
        entry = self._entries.pop(id_)
        del self._finished[id_]
        self._bytes -= len(entry.result.body) if entry.result is not None else 0

    def _lose(self, id_: str) -> None:
        """Free a result's bytes; who asks for it is told so."""
        entry = self._entries[id_]
        if entry.result is not None and entry.result is not LOST:
            self._bytes -= len(entry.result.body) - len(LOST.body)
            entry.result = LOST
