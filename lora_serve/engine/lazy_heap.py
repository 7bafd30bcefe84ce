"""A heap of items whose ranks grow while they are in it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from heapq import heapify, heappop, heappush, heapreplace
from itertools import count
from typing import Any, Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class LazyHeap(Generic[T]):
    """Items by rank, those of equal rank in the order in which they came.

    That a rank has grown is noticed when its item would be first; that it has shrunk must be told, by `add`.

    Args:
        rank: of an item, now.
    """

    def __init__(self, rank: Callable[[T], Any]) -> None:
        self._rank = rank
        self._heap: list[tuple[Any, int, T]] = []
        self._entries: dict[T, int] = {}  # item → number of its entry in the heap; others of it are void
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, item: T) -> bool:
        return item in self._entries

    def add(self, item: T) -> None:
        """Add an item, or tell that its rank has shrunk."""
        self._entries[item] = number = next(self._numbers)
        heappush(self._heap, (self._rank(item), number, item))
        self._drop_void()

    def discard(self, item: T) -> None:
        """Remove an item, if it is there."""
        self._entries.pop(item, None)
        self._drop_void()

    @property
    def first(self) -> T | None:
        """The item of the smallest rank; None if there is none."""
        while self._heap:
            rank, number, item = self._heap[0]
            if self._entries.get(item) != number:
                heappop(self._heap)
            elif (now := self._rank(item)) > rank:
                heapreplace(self._heap, (now, number, item))
            else:
                return item
        return None

    def _drop_void(self) -> None:
        """Rebuild the heap once most of its entries are void."""
        if len(self._heap) > 2 * len(self._entries) + 16:
            self._heap = [entry for entry in self._heap if self._entries.get(entry[2]) == entry[1]]
            heapify(self._heap)
