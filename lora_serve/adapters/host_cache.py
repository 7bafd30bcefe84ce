"""LRU cache of adapters in host memory, bounded by bytes. Not thread-safe."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

from lora_serve.adapters.adapter import Adapter
from lora_serve.errors import TooLarge


def adapters_to_evict(
    sizes: Mapping[str, int], needed: int, capacity: int, keep: Callable[[str], bool]
) -> list[str] | None:
    """Adapters to evict so that `needed` more bytes fit: the first of `sizes` (least recently used first) not kept.

    None if evicting all of them would not be enough.
    """
    excess = sum(sizes.values()) + needed - capacity
    evicted = []
    for digest, size in sizes.items():
        if excess <= 0:
            break
        if not keep(digest):
            evicted.append(digest)
            excess -= size
    return evicted if excess <= 0 else None


class HostCache:
    """Adapters by digest, most recently used last.

    Args:
        capacity: bytes; exceeded only by adapters that must not be evicted.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()
        self.evictions = 0

    def __repr__(self) -> str:
        return f"<HostCache {len(self._adapters)} adapters, {self.bytes} of {self.capacity} bytes>"

    def __contains__(self, digest: str) -> bool:
        return digest in self._adapters

    @property
    def bytes(self) -> int:
        return sum(adapter.nbytes for adapter in self._adapters.values())

    def get(self, digest: str) -> Adapter | None:
        """The adapter, if cached; marks it as most recently used."""
        adapter = self._adapters.get(digest)
        if adapter is not None:
            self._adapters.move_to_end(digest)
        return adapter

    def put(self, adapter: Adapter, keep: Callable[[str], bool]) -> None:
        """Add an adapter and evict others for it (LRU), except those that `keep` names.

        Raises TooLarge if the adapter alone exceeds the capacity.
        """
        if adapter.nbytes > self.capacity:
            raise TooLarge(f"the adapter takes {adapter.nbytes} bytes; --adapter-cache-memory is {self.capacity}")
        sizes = {digest: other.nbytes for digest, other in self._adapters.items() if digest != adapter.digest}
        evicted = adapters_to_evict(sizes, adapter.nbytes, self.capacity, keep)
        if evicted is None:  # exceeding the budget for a while is better than failing a request
            evicted = [digest for digest in sizes if not keep(digest)]
        for digest in evicted:
            self.evict(digest)
        self._adapters[adapter.digest] = adapter
        self._adapters.move_to_end(adapter.digest)

    def evict(self, digest: str) -> None:
        """Drop an adapter, if it is cached."""
        if self._adapters.pop(digest, None) is not None:
            self.evictions += 1
