"""Round-robin assignment of device slots to adapters when more adapters are wanted than there are slots.

Pure decisions over plain state. An adapter set is what one sequence needs at the same time (mostly one adapter). Sets
that have no slots wait in a line, first in, first out. A set keeps its slots for at least a quantum of steps; then it
yields to the first one in the line, and joins the line again behind it. So every set's turn comes, and no turn is so
short that copying adapters outweighs running them. The work of a step depends on the number of slots only.
"""

from __future__ import annotations

from collections.abc import Callable, Set

AdapterSet = tuple[str, ...]


class SlotRotation:
    """Which adapters are resident on the device, step by step.

    Args:
        slots: adapters on the device at once.
        quantum: steps for which a resident adapter stays while others wait.
        capacity: bytes of them at once; None: however many the slots hold.
        size: bytes of an adapter.
    """

    def __init__(
        self, slots: int, quantum: int, capacity: int | None = None, size: Callable[[str], int] = lambda digest: 0
    ) -> None:
        self.slots = slots
        self.capacity = capacity
        self._quantum = quantum
        self._size = size
        self._wanted: dict[str, dict[AdapterSet, None]] = {}  # adapter → wanted sets with it
        self._line: dict[AdapterSet, None] = {}  # wanted sets that wait for slots, in order
        self._since: dict[str, int] = {}  # resident adapter → step at which its turn began, in that order
        self._pinned: Set[str] = frozenset()
        self._stale = False  # some resident adapter may not be wanted any more

    def __repr__(self) -> str:
        return f"<SlotRotation {len(self._since)} of {self.slots} slots assigned, {len(self._line)} sets wait>"

    def want(self, adapter_set: AdapterSet) -> None:
        """Some sequence needs these adapters from now on, and they are in host memory."""
        for digest in adapter_set:
            self._wanted.setdefault(digest, {})[adapter_set] = None
        if adapter_set:
            self._line[adapter_set] = None

    def unwant(self, adapter_set: AdapterSet) -> None:
        """No sequence needs these adapters any more, or they are no longer in host memory."""
        for digest in adapter_set:
            del self._wanted[digest][adapter_set]
            if not self._wanted[digest]:
                del self._wanted[digest]
        self._line.pop(adapter_set, None)
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
            is_loaded: whether a set is still in host memory, asked before it gets slots; if not, it must be unwanted now.
        """
        if pinned != self._pinned:
            self._repin(pinned)
        if self._stale:
            self._release()
        for _ in range(len(self._line)):  # those that yield in this step join the line behind
            first = next(iter(self._line))
            if not is_loaded(first):
                continue  # it has left the line
            # Strictly in line: where the first has no room, nobody behind it takes what it waits for.
            if not self._is_resident(first) and not self._admit(step, first):
                break
            del self._line[first]
        return set(self._since) | pinned

    def resident_sets(self) -> list[AdapterSet]:
        """Wanted sets whose adapters all have a slot; the base's empty set is one."""
        found = dict.fromkeys(
            each
            for digest in (*self._since, *self._pinned)
            for each in self._wanted.get(digest, ())
            if self._is_resident(each)
        )
        return [(), *found]

    def fits(self, digests: Set[str], pinned: Set[str] = frozenset()) -> bool:
        """Whether these can be on the device at once, beside the pinned ones."""
        together = digests | pinned
        few = len(together) <= self.slots
        return few and (self.capacity is None or sum(map(self._size, together)) <= self.capacity)

    def _is_resident(self, adapter_set: AdapterSet) -> bool:
        return all(digest in self._since or digest in self._pinned for digest in adapter_set)

    def _admit(self, step: int, adapter_set: AdapterSet) -> bool:
        """Assign slots to a set if there is room, or if enough others have had their quantum."""
        members = [digest for digest in adapter_set if digest not in self._pinned]
        done = [  # longest resident first: that is the order of the dict
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
            self._line |= self._wanted.get(digest, {})
            self._stale = True
        for digest in members:  # a turn is the set's: it begins now for all of it
            self._since.pop(digest, None)
            self._since[digest] = step
        return True

    def _release(self) -> None:
        """Take slots back from adapters of which no wanted set is resident as a whole."""
        self._since = {
            digest: since
            for digest, since in self._since.items()
            if any(map(self._is_resident, self._wanted.get(digest, ())))
        }
        self._stale = False

    def _repin(self, pinned: Set[str]) -> None:
        """Other adapters are pinned now: their slots are no longer, or again, part of the rotation."""
        before, self._pinned = self._pinned, frozenset(pinned)
        for digest in pinned:
            self._since.pop(digest, None)
        for digest in before - pinned:
            self._line |= self._wanted.get(digest, {})
        self._stale = True
