"""Who sits on the device when more adapters are wanted at once than there are slots.

Pure decisions over plain state. A *party* is the set of adapters that one sequence needs at the same time (mostly one).
Parties that wait are seated by age; a seated party keeps its seats for at least a quantum of steps, then yields to
one that has waited, and joins the line again behind it. So every adapter's turn comes, and nobody's is so short that
loading outweighs running.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set

AdapterSet = tuple[str, ...]


class SlotRotation:
    """Seats over time.

    Args:
        slots: adapters on the device at once.
        quantum: steps that a seated adapter keeps its seat while others wait.
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
        self._since: dict[str, int] = {}  # seated adapter → step at which its turn began, in that order
        self._tickets: dict[str, int] = {}  # wanted, unseated adapter → its number in the line
        self._issued = 0

    def __repr__(self) -> str:
        return f"<SlotRotation {len(self._since)} of {self.slots} seats taken, {len(self._tickets)} wait>"

    def assign_slots(self, step: int, adapter_sets: Iterable[AdapterSet], pinned: Set[str] = frozenset()) -> set[str]:
        """The adapters that are seated in this step.

        Args:
            step: number of this step; grows.
            parties: who could run now, oldest sequence first (duplicates allowed).
            pinned: adapters that always have a seat; fewer than there are slots.
        """
        adapter_sets = (tuple(digest for digest in adapter_set if digest not in pinned) for adapter_set in adapter_sets)
        line = [adapter_set for adapter_set in dict.fromkeys(adapter_sets) if adapter_set]
        wanted = dict.fromkeys(digest for adapter_set in line for digest in adapter_set)
        whole = {digest for adapter_set in line if self._since.keys() >= set(adapter_set) for digest in adapter_set}
        self._since = {digest: since for digest, since in self._since.items() if digest in whole}
        self._tickets = {digest: ticket for digest, ticket in self._tickets.items() if digest in wanted}
        for digest in wanted:
            if digest not in self._since and digest not in self._tickets:
                self._queue(digest)
        waiting = [adapter_set for adapter_set in line if any(digest in self._tickets for digest in adapter_set)]
        for adapter_set in sorted(
            waiting, key=lambda adapter_set: max(self._tickets.get(digest, -1) for digest in adapter_set)
        ):
            # Strictly in line: where the first cannot be seated, nobody behind it takes what it waits for.
            if not self._admit(step, adapter_set, pinned):
                break
        return set(self._since) | pinned

    def fits(self, digests: Set[str], pinned: Set[str] = frozenset()) -> bool:
        """Whether these can be on the device at once, beside the pinned ones."""
        together = digests | pinned
        few = len(together) <= self.slots
        return few and (self.capacity is None or sum(map(self._size, together)) <= self.capacity)

    def _admit(self, step: int, adapter_set: AdapterSet, pinned: Set[str]) -> bool:
        """Seat a party if there is room, or if enough others have sat out their quantum."""
        done = [  # longest seated first: that is the order of the dict
            digest
            for digest, since in self._since.items()
            if digest not in adapter_set and step - since >= self._quantum
        ]
        staying = self._since.keys() | set(adapter_set)
        leaving = []
        while not self.fits(staying, pinned):
            if not done:
                return False
            leaving.append(done.pop(0))
            staying = staying - {leaving[-1]}
        for digest in leaving:
            del self._since[digest]
            self._queue(digest)
        for digest in adapter_set:  # a turn is the party's: it begins now for all of it
            self._since.pop(digest, None)
            self._since[digest] = step
            self._tickets.pop(digest, None)
        return True

    def _queue(self, digest: str) -> None:
        self._issued += 1
        self._tickets[digest] = self._issued
