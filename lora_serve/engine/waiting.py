"""The queue of waiting sequences, by adapter set and by who is owed most, so that a step never iterates over all."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterable, Iterator
from operator import attrgetter

from lora_serve.engine.fairness import AdapterSet, Rank, Share, ShareQueue
from lora_serve.engine.sequence import Sequence

_order = attrgetter("order")


class WaitingQueue:
    """Waiting sequences; iterates over all of them, share by share."""

    def __init__(self) -> None:
        self._by_share: dict[Share, deque[Sequence]] = {}  # oldest first
        self._by_set: dict[AdapterSet, ShareQueue] = {}
        self._counts: dict[AdapterSet, int] = {}
        self._sizes: dict[Sequence, int] = {}  # tokens when they came; they may grow meanwhile
        self._tokens = 0

    def __repr__(self) -> str:
        return f"<WaitingQueue {len(self)} sequences, {len(self._by_set)} adapter sets>"

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[Sequence]:
        return (seq for queue in self._by_share.values() for seq in queue)

    @property
    def oldest(self) -> Iterator[Sequence]:
        """The oldest sequence of each share."""
        return (queue[0] for queue in self._by_share.values())

    @property
    def mean_tokens(self) -> float:
        """Tokens of a waiting sequence, on average; 0 if there is none."""
        return self._tokens / len(self) if self._sizes else 0.0

    @property
    def adapter_sets(self) -> Iterable[AdapterSet]:
        """The adapter sets that waiting sequences need."""
        return self._by_set.keys()

    def add(self, seq: Sequence) -> None:
        """Insert a sequence into its share's queue by age: a preempted one comes before those admitted after it."""
        queue = self._by_share.get(seq.share)
        if queue is None:
            queue = self._by_share[seq.share] = deque()
            self._by_set.setdefault(seq.digests, ShareQueue()).add(seq.share)
        if queue and queue[-1].order > seq.order:
            insort(queue, seq, key=_order)
        else:
            queue.append(seq)
        self._counts[seq.digests] = self._counts.get(seq.digests, 0) + 1
        self._sizes[seq] = len(seq.tokens)
        self._tokens += len(seq.tokens)
        seq.share.begin_waiting()

    def remove(self, seq: Sequence) -> None:
        """Remove a sequence. Raises ValueError if it is not in the queue."""
        queue = self._by_share.get(seq.share, deque())
        queue.remove(seq)
        self._tokens -= self._sizes.pop(seq)
        seq.share.end_waiting()
        self._counts[seq.digests] -= 1
        if queue:
            return
        del self._by_share[seq.share]
        shares = self._by_set[seq.digests]
        shares.discard(seq.share)
        if not shares:
            del self._by_set[seq.digests], self._counts[seq.digests]

    def of(self, adapter_set: AdapterSet) -> list[Sequence]:
        """Sequences that need exactly these adapters, oldest first."""
        shares = self._by_set.get(adapter_set, ())
        return sorted((seq for share in shares for seq in self._by_share[share]), key=_order)

    def count(self, adapter_sets: Iterable[AdapterSet]) -> int:
        """How many sequences need one of these sets."""
        return sum(self._counts.get(adapter_set, 0) for adapter_set in adapter_sets)

    def in_turn(self, adapter_sets: Iterable[AdapterSet]) -> InTurn:
        """The sequences that need one of these sets, to be started in this step."""
        return InTurn(self, adapter_sets)

    def first_of(self, adapter_set: AdapterSet) -> Sequence | None:
        """Of the sequences that need exactly these adapters, the oldest of the share that is owed most."""
        shares = self._by_set.get(adapter_set)
        share = None if shares is None else shares.first
        return None if share is None else self._by_share[share][0]


class InTurn:
    """Waiting sequences of some adapter sets, those owed most first, while nobody is charged."""

    def __init__(self, queue: WaitingQueue, adapter_sets: Iterable[AdapterSet]) -> None:
        self._queue = queue
        self._firsts: dict[AdapterSet, tuple[Rank, int, Sequence]] = {}
        for adapter_set in adapter_sets:
            self._look_up(adapter_set)

    @property
    def first(self) -> Sequence | None:
        """The sequence that is next; None if none is left."""
        return min(self._firsts.values(), default=(None, None, None))[2]

    def first_entitled(self, rows: int) -> Sequence | None:
        """Of the first sequences of all sets, the next one that has a right to one of so many rows."""
        entitled = (entry for entry in self._firsts.values() if entry[2].share.is_entitled(rows))
        return min(entitled, default=(None, None, None))[2]

    def remove(self, seq: Sequence) -> None:
        """Remove a sequence that was first, from the queue too."""
        self._queue.remove(seq)
        self._look_up(seq.digests)

    def _look_up(self, adapter_set: AdapterSet) -> None:
        seq = self._queue.first_of(adapter_set)
        if seq is None:
            self._firsts.pop(adapter_set, None)
        else:
            self._firsts[adapter_set] = (seq.share.rank, seq.order, seq)
