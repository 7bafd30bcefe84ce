"""Turns of adapters on the device when more are needed than there are slots.

Pure decisions over plain state. An adapter set is all adapters that one sequence needs at the same time (mostly one).
Sets without slots wait; the next turn is that of the set that is owed most (`fairness.py`). A set keeps its slots for
at least a quantum of steps; then it yields to a set that is owed as much or more, and after some quanta to any. So
every set gets its turn, and no turn is so short that copying adapters costs more than running them. The work of a step
depends on the number of slots only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Set

from lora_serve.engine.fairness import AdapterSet, Fairness, Rank, Share, ShareQueue

log = logging.getLogger(__name__)

LONGEST = 4  # quanta for which a set keeps its slots while one waits that is owed less


class SlotRotation:
    """Assignment of device slots to adapter sets, in turns.

    Attributes:
        began: adapters whose turn began in the last `assign`.

    Args:
        fairness: which sets are owed most; all needed ones are active there.
        slots: maximum number of adapters on the device.
        quantum: steps for which a resident adapter keeps its slot while others wait.
        capacity: maximum bytes of adapters on the device; None: no limit.
        size: bytes of an adapter, by digest.
    """

    def __init__(
        self,
        fairness: Fairness,
        slots: int,
        quantum: int,
        capacity: int | None = None,
        size: Callable[[str], int] = lambda digest: 0,
    ) -> None:
        self.slots = slots
        self.capacity = capacity
        self.began: list[str] = []
        self._quantum = quantum
        self._size = size
        self._fairness = fairness
        self._wanted: dict[str, dict[AdapterSet, None]] = {}  # adapter → needed sets that contain it
        self._queue: set[AdapterSet] = set()  # needed sets that wait for slots
        self._shares = ShareQueue()  # of these
        self._since: dict[str, int] = {}  # resident adapter → step at which its turn began, in that order
        self._pinned: Set[str] = frozenset()
        self._stale = False  # some resident adapter may no longer be needed

    def __repr__(self) -> str:
        return f"<SlotRotation {len(self._since)} of {self.slots} slots assigned, {len(self._queue)} sets wait>"

    def add(self, adapter_set: AdapterSet) -> None:
        """Add a set that some sequence needs and that is in host memory."""
        for digest in adapter_set:
            self._wanted.setdefault(digest, {})[adapter_set] = None
        if adapter_set:
            self._wait(adapter_set)

    def update(self, adapter_set: AdapterSet) -> None:
        """Note that other shares than before may be active in a set."""
        if adapter_set in self._queue:
            self._wait(adapter_set)

    def forget(self, share: Share) -> None:
        """Note that a share is not active any more."""
        self._shares.discard(share)

    def remove(self, adapter_set: AdapterSet) -> None:
        """Remove a set that no sequence needs any more, or that is no longer in host memory."""
        for digest in adapter_set:
            del self._wanted[digest][adapter_set]
            if not self._wanted[digest]:
                del self._wanted[digest]
        self._stop_waiting(adapter_set)
        self._stale = True

    def assign(
        self,
        step: int,
        pinned: Set[str] = frozenset(),
        is_loaded: Callable[[AdapterSet], bool] = lambda adapter_set: True,
    ) -> set[str]:
        """The adapters that have a slot in this step, pinned ones included.

        Args:
            step: number of this step; grows.
            pinned: adapters that always have a slot; fewer than there are slots.
            is_loaded: whether a set is still in host memory; asked before it gets slots. One that is not must have been
                removed when this returns.
        """
        self.began = []
        if pinned != self._pinned:
            self._repin(pinned)
        if self._stale:
            self._release()
        waiting: list[AdapterSet] = []  # again after this step
        while (first := self._first()) is not None:
            if not is_loaded(first):
                continue  # it was removed
            if not self.fits(set(first), self._pinned):  # its sequences are about to be ended: it must not block others
                waiting.append(first)
            # Strictly in order: if the first set does not fit, no later one may take the slots that it waits for.
            elif not self._is_resident(first) and not self._admit(step, first, waiting):
                break
            self._stop_waiting(first)
        self._queue_again(waiting)
        return set(self._since) | pinned

    def resident_sets(self) -> list[AdapterSet]:
        """Needed sets whose adapters all have a slot, including the empty set of the base."""
        found = dict.fromkeys(
            each
            for digest in (*self._since, *self._pinned)
            for each in self._wanted.get(digest, ())
            if self._is_resident(each)
        )
        return [(), *found]

    def holds(self, digest: str) -> bool:
        """Whether an adapter has a slot, pinned ones included."""
        return digest in self._since or digest in self._pinned

    def fits(self, digests: Set[str], pinned: Set[str] = frozenset()) -> bool:
        """Whether these adapters fit on the device together with the pinned ones."""
        together = digests | pinned
        few = len(together) <= self.slots
        return few and (self.capacity is None or sum(map(self._size, together)) <= self.capacity)

    def _is_resident(self, adapter_set: AdapterSet) -> bool:
        return all(map(self.holds, adapter_set))

    def _admit(self, step: int, adapter_set: AdapterSet, yielding: list[AdapterSet]) -> bool:
        """Assign slots to a set if enough are free or held by adapters whose turn is over; adds the sets that yield."""
        members = [digest for digest in adapter_set if digest not in self._pinned]
        done = [
            digest for digest in self._since if digest not in members and self._turn_is_over(step, digest, adapter_set)
        ]
        done.sort(key=self._rank_of, reverse=True)  # those owed least go first, of equals the longest resident
        staying = self._since.keys() | set(members)
        leaving = []
        while not self.fits(staying, self._pinned):
            if not done:
                return False
            leaving.append(done.pop(0))
            staying = staying - {leaving[-1]}
        if leaving and log.isEnabledFor(logging.DEBUG):
            turns = ", ".join(f"{digest[:12]} after {step - self._since[digest]} steps" for digest in leaving)
            log.debug("rotated at step %d: the turn of %s begins; %s yielded", step, _short(members), turns)
        for digest in leaving:
            del self._since[digest]
            yielding += self._wanted.get(digest, ())
            self._stale = True
        for digest in members:  # the turn of the whole set begins now
            self._since.pop(digest, None)
            self._since[digest] = step
        self.began += members
        return True

    def _turn_is_over(self, step: int, digest: str, following: AdapterSet) -> bool:
        held = step - self._since[digest]
        return held >= self._quantum and (
            held >= LONGEST * self._quantum or self._fairness.rank(following) <= self._rank_of(digest)
        )

    def _rank_of(self, digest: str) -> Rank:
        """Rank of the set, of those that need an adapter, that is owed most."""
        return min(map(self._fairness.rank, self._wanted.get(digest, ())), default=())

    def _first(self) -> AdapterSet | None:
        """The waiting set that is owed most."""
        share = self._shares.first
        return None if share is None else share.name

    def _wait(self, adapter_set: AdapterSet) -> None:
        self._queue.add(adapter_set)
        for share in self._fairness.shares(adapter_set):
            self._shares.add(share)

    def _stop_waiting(self, adapter_set: AdapterSet) -> None:
        self._queue.discard(adapter_set)
        for share in self._fairness.shares(adapter_set):
            self._shares.discard(share)

    def _queue_again(self, adapter_sets: list[AdapterSet]) -> None:
        for adapter_set in adapter_sets:
            if not self._is_resident(adapter_set):
                self._wait(adapter_set)

    def _release(self) -> None:
        """Free the slots of adapters that belong to no completely resident set."""
        self._since = {
            digest: since
            for digest, since in self._since.items()
            if any(map(self._is_resident, self._wanted.get(digest, ())))
        }
        self._stale = False

    def _repin(self, pinned: Set[str]) -> None:
        """Change the pinned adapters, whose slots are not part of the rotation."""
        before, self._pinned = self._pinned, frozenset(pinned)
        for digest in pinned:
            self._since.pop(digest, None)
        leaving = list(before - pinned)
        while self._since and not self.fits(self._since.keys(), self._pinned):  # the latest to come are the first to go
            leaving.append(self._since.popitem()[0])
        self._queue_again([each for digest in leaving for each in self._wanted.get(digest, ())])
        self._stale = True


def _short(digests: list[str]) -> str:
    return "+".join(digest[:12] for digest in digests)
