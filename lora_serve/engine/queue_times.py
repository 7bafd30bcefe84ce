"""How long sequences wait in the queue, from the rate at which they are started while some wait."""

from __future__ import annotations

from collections import deque

STARTS = 64  # that the rate is taken from


class QueueTimes:
    """Estimates the wait of a sequence that comes now."""

    def __init__(self) -> None:
        self._starts: deque[float] = deque(maxlen=STARTS)  # by the clock of `_busy`
        self._counted = 0
        self._busy = 0.0  # seconds in which sequences waited
        self._recorded = 0.0

    def record(self, started: int, waiting: int, now: float) -> None:
        """Record how many sequences have been started since the engine began, and how many wait."""
        if waiting:
            self._busy += now - self._recorded
        self._recorded = now
        for _ in range(min(STARTS, started - self._counted)):
            self._starts.append(self._busy)
        self._counted = started

    def expected(self, waiting: int) -> float:
        """Seconds that a sequence waits which comes after `waiting` others; 0 before the rate is known."""
        return waiting * (self._busy - self._starts[0]) / len(self._starts) if self._starts else 0.0
