"""Whose operation the trainer carries out next: priority first, then equal time for owners, then who came first."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class RunTurn(NamedTuple):
    """An operation that could be carried out: its run, the run's owner and priority, and when it came (a number)."""

    run: str
    owner: str
    priority: int
    order: int


class RunTurns:
    """Seconds that each owner's runs have taken. An owner who comes back starts level with who was served least."""

    def __init__(self) -> None:
        self._used: dict[str, float] = {}
        self._active: set[str] = set()

    def __repr__(self) -> str:
        return f"<RunTurns {len(self._active)} owners wait>"

    def in_order(self, turns: Iterable[RunTurn]) -> list[RunTurn]:
        """The operations in the order in which they should be carried out."""
        turns = list(turns)
        owners = {turn.owner for turn in turns}
        level = min((self._used[owner] for owner in owners & self._active), default=0.0)
        if not self._active & owners:
            level = max(self._used.values(), default=0.0)
        for owner in owners - self._active:
            self._used[owner] = max(self._used.get(owner, 0.0), level)
        self._active = owners
        return sorted(turns, key=lambda turn: (-turn.priority, self._used[turn.owner], turn.order))

    def lead(self, owner: str, others: Iterable[str]) -> float:
        """Seconds that an owner has had more than the one of the others who had least; 0 without others."""
        used = self._used.get(owner, 0.0)
        return used - min((self._used.get(other, 0.0) for other in others), default=used)

    def charge(self, owner: str, seconds: float) -> None:
        """An operation of this owner has taken so long."""
        self._used[owner] = self._used.get(owner, 0.0) + seconds

    def forget(self, owner: str) -> None:
        """The owner has no run any more."""
        self._used.pop(owner, None)
        self._active.discard(owner)
