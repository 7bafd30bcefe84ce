"""How long sequences wait in the queue: the oldest one, and one that comes now."""

from __future__ import annotations

from collections import deque

STARTS = 64  # that the rate is taken from


class QueueTimes:
    """Estimates waits from the rate at which sequences are started."""

    def __init__(self) -> None:
        self._starts: deque[float] = deque(maxlen=STARTS)
        self._counted = 0

    def record(self, started: int, now: float) -> None:
        """Record how many sequences have been started since the engine began."""
        for _ in range(min(STARTS, started - self._counted)):
            self._starts.append(now)
        self._counted = started

    def expected(self, waiting: int, now: float) -> float:
        """Seconds that a sequence waits which comes after `waiting` others; 0 before the rate is known."""
        if not waiting or len(self._starts) < 2:
            return 0.0
        return waiting * (now - self._starts[0]) / len(self._starts)
