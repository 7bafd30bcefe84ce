"""When the engine counts as silent, and how long to wait before it is started again. Pure; the client acts on it."""

from __future__ import annotations

LONGEST_BACKOFF = 30.0  # seconds
SOUND_LIFE = 60.0  # seconds; an engine that lived this long after a start had no trouble with starting


class Pulse:
    """Seconds of engine silence, by a clock that stops while this process itself does not run.

    After a suspended machine or a blocked event loop the engine's beats wait unread; counting that gap as silence
    would kill a healthy engine. So one tick adds at most twice the interval at which ticks should come.
    """

    def __init__(self, interval: float, now: float) -> None:
        self._most = 2 * interval
        self._last = now
        self.silence = 0.0

    def tick(self, now: float) -> None:
        self.silence += min(now - self._last, self._most)
        self._last = now

    def beat(self) -> None:
        self.silence = 0.0


def backoff(failures: int) -> float:
    """Seconds before the next start after `failures` ends in a row (1 or more): 0, 1, 2, 4 … 30."""
    return 0.0 if failures <= 1 else min(LONGEST_BACKOFF, 2.0 ** (min(failures, 10) - 2))


def failures_after(failures: int, lived: float) -> int:
    """How many ends in a row it is, when an engine ends `lived` seconds after it was ready (0: it never was)."""
    return 1 if lived >= SOUND_LIFE else failures + 1
