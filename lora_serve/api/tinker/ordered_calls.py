"""The calls of one model in the order of their numbers; those that come early are held until the gap closes."""

from __future__ import annotations

import asyncio

import msgspec

from lora_serve.api.tinker.tinker_errors import TooMuchWaits
from lora_serve.errors import BadRequest

MOST_HELD = 2048  # calls of one model
HELD_BYTES = 64 << 20  # of one model
ALL_HELD_BYTES = 256 << 20  # of all models
HIGHEST = (1 << 31) - 1


class ModelCall(msgspec.Struct, frozen=True, array_like=True):
    """A call of a model as it came.

    Attributes:
        seq: its number; 0 makes the model.
        kind: which route, or `refused`.
        body: of the request; of a refused one, the `Failure` as JSON.
    """

    seq: int
    kind: str
    body: bytes


class HeldBytes:
    """Bytes of the calls of all models that wait."""

    def __init__(self) -> None:
        self.count = 0


class OrderedCalls:
    """Calls that wait for their turn.

    Args:
        first: the number of the next call to be carried out.
        all_held: of all models.

    Attributes:
        next: the number of the call that is carried out, or awaited.
    """

    def __init__(self, first: int = 0, all_held: HeldBytes | None = None) -> None:
        self.next = first
        self._all = all_held or HeldBytes()
        self._held: dict[int, ModelCall] = {}
        self._bytes = 0
        self._arrived = asyncio.Event()

    def __repr__(self) -> str:
        return f"<OrderedCalls at {self.next}, {len(self._held)} held with {self._bytes:,} bytes>"

    def add(self, call: ModelCall) -> bool:
        """Hold a call; False if it came before. Raises TooMuchWaits, unless it is the one that is awaited."""
        if call.seq < self.next or call.seq in self._held:
            return False
        if call.seq > HIGHEST:
            raise BadRequest("seq_id is too large", param="seq_id")
        size = len(call.body)
        full = (
            len(self._held) >= MOST_HELD or self._bytes + size > HELD_BYTES or self._all.count + size > ALL_HELD_BYTES
        )
        if full and self._held and call.seq != self.next:
            raise TooMuchWaits("too many calls of this model wait already", retry_after=1)
        self._held[call.seq] = call
        self._bytes += size
        self._all.count += size
        self._arrived.set()
        return True

    async def awaited(self) -> ModelCall:
        """The call whose turn it is, once it has come; it stays held until `finish`."""
        while self.next not in self._held:
            self._arrived.clear()
            await self._arrived.wait()
        return self._held[self.next]

    def finish(self) -> None:
        """The call whose turn it was is done."""
        size = len(self._held.pop(self.next).body)
        self._bytes -= size
        self._all.count -= size
        self.next += 1

    def clear(self) -> None:
        """Hold no calls any more."""
        self._all.count -= self._bytes
        self._bytes = 0
        self._held.clear()

    def held(self) -> list[ModelCall]:
        """All calls that are not done, in order."""
        return [self._held[seq] for seq in sorted(self._held)]
