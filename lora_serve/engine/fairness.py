"""Round-robin assignment of device slots to adapters when more adapters are needed than there are slots.

Pure decisions over plain state. An adapter set is all adapters that one sequence needs at the same time (mostly one).
Sets without slots wait in a FIFO queue. A set keeps its slots for at least a quantum of steps; then it yields to the
head of the queue and is queued again at the end. So every set gets its turn, and no turn is so short that copying
adapters costs more than running them. The work of a step depends on the number of slots only.
"""

from __future__ import annotations

from collections.abc import Callable, Set

AdapterSet = tuple[str, ...]


class SlotRotation:
    """Round-robin assignment of device slots to adapter sets.

    Args:
        slots: maximum number of adapters on the device.
        quantum: steps for which a resident adapter keeps its slot while others wait.
        capacity: maximum bytes of adapters on the device; None: no limit.
        size: bytes of an adapter, by digest.
    """

    def __init__(
        self, slots: int, quantum: int, capacity: int | None = None, size: Callable[[str], int] = lambda digest: 0
    ) -> None:
        self.slots = slots
        self.capacity = capacity
        self._quantum = quantum
        self._size = size
        self._wanted: dict[str, dict[AdapterSet, None]] = {}  # adapter → needed sets that contain it
        self._queue: dict[AdapterSet, None] = {}  # needed sets that wait for slots, first in, first out
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
            self._queue[adapter_set] = None

    def remove(self, adapter_set: AdapterSet) -> None:
        """Remove a set that no sequence needs any more, or that is no longer in host memory."""
        for digest in adapter_set:
            del self._wanted[digest][adapter_set]
            if not self._wanted[digest]:
                del self._wanted[digest]
        self._queue.pop(adapter_set, None)
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
        if pinned != self._pinned:
            self._repin(pinned)
        if self._stale:
            self._release()
        for _ in range(len(self._queue)):  # sets that yield in this step are queued again at the end
            first = next(iter(self._queue))
            if not is_loaded(first):
                continue  # it was removed
            if not self.fits(set(first), self._pinned):  # its sequences are about to be ended: it must not block others
                self._queue[first] = self._queue.pop(first)
                continue
            # Strictly in order: if the first set does not fit, no later one may take the slots that it waits for.
            if not self._is_resident(first) and not self._admit(step, first):
                break
            del self._queue[first]
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

    def fits(self, digests: Set[str], pinned: Set[str] = frozenset()) -> bool:
        """Whether these adapters fit on the device together with the pinned ones."""
        together = digests | pinned
        few = len(together) <= self.slots
        return few and (self.capacity is None or sum(map(self._size, together)) <= self.capacity)

    def _is_resident(self, adapter_set: AdapterSet) -> bool:
        return all(digest in self._since or digest in self._pinned for digest in adapter_set)

    def _admit(self, step: int, adapter_set: AdapterSet) -> bool:
        """Assign slots to a set if enough are free or held by adapters past their quantum."""
        members = [digest for digest in adapter_set if digest not in self._pinned]
        done = [  # longest resident first, which is the order of the dict
            digest for digest, since in self._since.items() if digest not in members and step - since >= self._quantum
        ]
        staying = self._since.keys() | set(members)
        leaving = []
        while not self.fits(staying, self._pinned):
            if not done:
                return False
            leaving.append(done.pop(0))
            staying = staying - {leaving[-1]}
        for digest in leaving:
            del self._since[digest]
            self._queue |= self._wanted.get(digest, {})
            self._stale = True
        for digest in members:  # the turn of the whole set begins now
            self._since.pop(digest, None)
            self._since[digest] = step
        return True

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
        for digest in leaving:
            self._queue |= self._wanted.get(digest, {})
        self._stale = True
