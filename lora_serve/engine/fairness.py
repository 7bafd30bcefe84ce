"""Weighted fair queueing over served tokens: who is owed most.

Every token that is computed for a sequence is charged to its key, within the key to its priority level, and within that
to its adapters, each time divided by a weight. Whoever was charged least is served next (the virtual token counter of
Sheng et al., "Fairness in Serving Large Language Models", 2024, on three levels). Who asked for less than its share and
now asks for more begins where those are who wait: what was not asked for is not made up for. So nobody waits for ever,
whatever others send and whatever their priority.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from lora_serve.engine.lazy_heap import LazyHeap

PROMPT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0  # of a token; each of the output needs a step of its own
LEVEL = 4.0  # a priority level gets so many times the share of the next one
MOST_IDLE = 4096  # siblings that are remembered while nothing is asked for

AdapterSet = tuple[str, ...]  # digests; empty: the base alone
Rank = tuple[float, ...]  # smaller is owed more; grows only while its share is active


@dataclass(eq=False)
class Share:
    """A key, a priority level of one, or the adapters of one.

    Attributes:
        served: tokens charged, divided by the weight.
        floor: the least that a child with waiting sequences was served, or had been when the last one left: where one
            begins that asked for less than it could have had.
        active: sequences that wait or hold KV; of a share with children, those of them that are active.
        active_weight: of the active children. Weights are multiples of a power of two, so that this is exact.
        waiting: sequences that wait; of a share with children, those of them in which some do.
        holders: its sequences that hold KV blocks.
    """

    name: Any
    parent: Share | None
    weight: float = 1.0
    served: float = 0.0
    floor: float = 0.0
    active: int = 0
    active_weight: float = 0.0
    waiting: int = 0
    waiting_children: LazyHeap[Share] = field(default_factory=lambda: LazyHeap(attrgetter("served")))
    holders: int = 0
    children: dict[Any, Share] = field(default_factory=dict)

    @property
    def rank(self) -> Rank:
        """Order in which shares are served."""
        return tuple(share.served for share in self.line())[::-1]

    def line(self) -> Iterator[Share]:
        """This share and those above it, without the root."""
        share = self
        while share.parent is not None:
            yield share
            share = share.parent

    def charge(self, prompt: int, output: int) -> None:
        """Charge tokens that were computed."""
        cost = PROMPT_WEIGHT * prompt + OUTPUT_WEIGHT * output
        for share in self.line():
            share.served += cost / share.weight

    def begin_waiting(self) -> None:
        """Count one more sequence that waits. Where none did, what was not asked for until now is not made up for."""
        for share in self.line():
            parent = share.parent
            assert parent is not None
            share.waiting += 1
            if share.waiting > 1:
                return
            parent._raise_floor(None)
            share.served = max(share.served, parent.floor)
            parent.waiting_children.add(share)

    def end_waiting(self) -> None:
        """Count one sequence less that waits."""
        for share in self.line():
            parent = share.parent
            assert parent is not None
            share.waiting -= 1
            if share.waiting:
                return
            parent.waiting_children.discard(share)
            parent._raise_floor(share)

    def add_holders(self, count: int) -> None:
        """Count sequences that got KV blocks, or with a negative number lost them."""
        for share in self.line():
            share.holders += count

    def is_entitled(self, rows: int) -> bool:
        """Whether one more of its sequences has a right to one of so many rows, however many others wait or run.

        That is so if a share on its line, however all shares were used, would have one more row.
        """
        own = float(rows)
        for share in reversed(list(self.line())):
            assert share.parent is not None
            own *= share.weight / share.parent.active_weight
            if share.holders + 1 <= own + 1e-9:
                return True
        return False

    def _raise_floor(self, last: Share | None) -> None:
        """Raise the floor to what a waiting child was served least, or if none waits to what the last one was."""
        least = self.waiting_children.first or last
        if least is not None:
            self.floor = max(self.floor, least.served)


class ShareQueue:
    """Some active shares of adapter sets, the one that is owed most first. What is not served costs nothing to keep."""

    def __init__(self) -> None:
        self._heaps: dict[Share, LazyHeap[Share]] = {}  # parent → those of its children that are, or contain, some
        self._root: Share | None = None
        self._shares: set[Share] = set()

    def __len__(self) -> int:
        return len(self._shares)

    def __iter__(self) -> Iterator[Share]:
        return iter(self._shares)

    def __contains__(self, share: Share) -> bool:
        return share in self._shares

    def add(self, share: Share) -> None:
        """Add a share, if it is not there."""
        if share in self._shares:
            return
        self._shares.add(share)
        for each in share.line():
            assert each.parent is not None
            heap = self._heaps.get(each.parent)
            if heap is not None:
                heap.add(each)
                return
            heap = self._heaps[each.parent] = LazyHeap(attrgetter("served"))
            heap.add(each)
            if each.parent.parent is None:
                self._root = each.parent

    def discard(self, share: Share) -> None:
        """Remove a share, if it is there."""
        if share not in self._shares:
            return
        self._shares.remove(share)
        for each in share.line():
            assert each.parent is not None
            heap = self._heaps[each.parent]
            heap.discard(each)
            if heap:
                return
            del self._heaps[each.parent]

    @property
    def first(self) -> Share | None:
        """The share that is owed most; None if there is none."""
        share = self._root if self._shares else None
        while share in self._heaps:
            share = self._heaps[share].first
        return share


class Fairness:
    """The shares of all keys, their priority levels, and their adapter sets."""

    def __init__(self) -> None:
        self._root = Share(None, None)
        self._by_set: dict[AdapterSet, ShareQueue] = {}  # active ones

    def __repr__(self) -> str:
        return f"<Fairness {self._root.active} of {len(self._root.children)} keys active>"

    def enter(self, key: str, weight: float, priority: int, adapter_set: AdapterSet) -> Share:
        """The share of a sequence, which counts as active from now on.

        Args:
            weight: of the key from now on, relative to other keys'; a multiple of 1 / 1024.
            priority: among the key's sequences, within ±`MOST_PRIORITY`; smaller is more urgent.
        """
        share = self._root
        for name, relative in ((key, weight), (priority, LEVEL**-priority), (adapter_set, 1.0)):
            child = share.children.get(name)
            if child is None:
                child = share.children[name] = Share(name, share)
            if child.active:
                share.active_weight += relative - child.weight
            child.weight = relative
            share = child
        share.active += 1
        if share.active == 1:
            for each in share.line():
                parent = each.parent
                assert parent is not None
                parent.active += 1
                parent.active_weight += each.weight
                if parent.active > 1:
                    break
            self._by_set.setdefault(adapter_set, ShareQueue()).add(share)
        return share

    def leave(self, share: Share) -> None:
        """Count a sequence as gone, which does not wait any more."""
        share.active -= 1
        if share.active:
            return
        shares = self._by_set[share.name]
        shares.discard(share)
        if not shares:
            del self._by_set[share.name]
        for each in list(share.line()):
            parent = each.parent
            if each.active or parent is None:
                return
            parent.active -= 1
            parent.active_weight -= each.weight
            if each.served <= parent.floor or len(parent.children) > MOST_IDLE:  # it would begin there anyway
                del parent.children[each.name]

    @property
    def adapter_sets(self) -> Collection[AdapterSet]:
        """The adapter sets of all active sequences."""
        return self._by_set.keys()

    def rank(self, adapter_set: AdapterSet) -> Rank:
        """The rank of an active set: that of the share in it that is owed most."""
        share = self._by_set[adapter_set].first
        assert share is not None
        return share.rank

    def shares(self, adapter_set: AdapterSet) -> Iterable[Share]:
        """The active shares of a set."""
        return self._by_set.get(adapter_set, ())
