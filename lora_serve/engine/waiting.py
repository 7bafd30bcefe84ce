"""The queue of waiting sequences by adapter set and age, so that a step never iterates over all of them."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator
from heapq import merge
from operator import attrgetter

from lora_serve.engine.fairness import AdapterSet
from lora_serve.engine.sequence import Sequence

_order = attrgetter("order")


class WaitingQueue:
    """Waiting sequences; iterates over all of them, oldest first."""

    def __init__(self) -> None:
        self._by_set: dict[AdapterSet, list[Sequence]] = {}  # oldest first
        self._length = 0

    def __repr__(self) -> str:
        return f"<WaitingQueue {self._length} sequences, {len(self._by_set)} adapter sets>"

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sequence]:
        return self.oldest_first(self._by_set)

    def add(self, seq: Sequence) -> None:
        """Insert a sequence by age: a preempted one comes before those admitted after it."""
        insort(self._by_set.setdefault(seq.digests, []), seq, key=_order)
        self._length += 1

    def remove(self, seq: Sequence) -> None:
        """Remove a sequence. Raises ValueError if it is not in the queue."""
        queue = self._by_set.get(seq.digests, [])
        queue.remove(seq)
        self._length -= 1
        if not queue:
            del self._by_set[seq.digests]

    def of(self, adapter_set: AdapterSet) -> list[Sequence]:
        """Sequences that need exactly these adapters, oldest first."""
        return list(self._by_set.get(adapter_set, ()))

    def count(self, adapter_sets: Iterable[AdapterSet]) -> int:
        """How many sequences need one of these sets."""
        return sum(len(self._by_set.get(adapter_set, ())) for adapter_set in adapter_sets)

    def oldest_first(self, adapter_sets: Iterable[AdapterSet]) -> Iterator[Sequence]:
        """Sequences that need one of these sets, oldest first; the queue must not change meanwhile."""
        queues = [self._by_set[adapter_set] for adapter_set in adapter_sets if adapter_set in self._by_set]
        return iter(queues[0]) if len(queues) == 1 else merge(*queues, key=_order)
