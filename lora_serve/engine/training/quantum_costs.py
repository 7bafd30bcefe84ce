"""What quanta of training cost, learnt from their durations: for each kind, seconds = fixed + size · seconds per size.

The last durations count most. Where sizes hardly differed, it is not known what is fixed: then a smaller quantum is
taken to cost as much as those that were seen, a larger one in proportion.
"""

from __future__ import annotations

from dataclasses import dataclass

FORGET = 0.95  # weight of a duration, at the next one
SPREAD = 0.1  # standard deviation of sizes, of their mean, from which they tell what is fixed


@dataclass
class _Sums:
    """Weighted sums over durations y of quanta of sizes x."""

    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, x: float, y: float) -> None:
        for name, value in (("weight", 1.0), ("x", x), ("y", y), ("xx", x * x), ("xy", x * y)):
            setattr(self, name, getattr(self, name) * FORGET + value)

    @property
    def line(self) -> tuple[float, float] | None:
        """Seconds that are fixed and seconds per size; None while sizes hardly differ."""
        mean = self.x / self.weight
        variance = self.xx / self.weight - mean * mean
        if variance <= (SPREAD * mean) ** 2:
            return None
        slope = max(0.0, (self.xy / self.weight - mean * self.y / self.weight) / variance)
        fixed = self.y / self.weight - slope * mean
        return (fixed, slope) if fixed >= 0 else (0.0, self.y / self.x)


class QuantumCosts:
    """Durations of quanta by kind and size."""

    def __init__(self) -> None:
        self._sums: dict[str, _Sums] = {}

    def record(self, kind: str, size: int, seconds: float) -> None:
        """Learn from a quantum that was run."""
        self._sums.setdefault(kind, _Sums()).add(max(1, size), seconds)

    def seconds(self, kind: str, size: int) -> float | None:
        """What a quantum is expected to take; None if none of its kind was seen."""
        sums = self._sums.get(kind)
        if sums is None:
            return None
        line = sums.line
        if line is None:
            return sums.y / sums.weight * max(1.0, size * sums.weight / sums.x)
        return line[0] + line[1] * size

    def size_within(self, kind: str, seconds: float) -> int | None:
        """The largest size of quanta that take so long, at least 0; None if none of the kind was seen."""
        sums = self._sums.get(kind)
        if sums is None:
            return None
        fixed, slope = sums.line or (0.0, sums.y / sums.x)
        return int(max(0.0, (seconds - fixed) / max(slope, 1e-12)))
