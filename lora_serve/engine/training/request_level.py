"""How many requests there are, as a part of the most that there have been lately.

A server whose requests are as many as ever has no time to spare, whether that is one client or a hundred. With
fewer of them the streams of a batch may be slower: what a client loses in one answer is not lost to others, as long as
there are fewer requests than the server is known to carry.
"""

from __future__ import annotations

import math
from collections import deque

MEAN_OVER = 10.0  # seconds
BUCKET = 60.0  # seconds
BUCKETS = 10  # that the largest number is remembered for


class RequestLevel:
    """Numbers of unfinished requests over time."""

    def __init__(self) -> None:
        self._mean = 0.0
        self._seen: float | None = None
        self._most: deque[tuple[float, int]] = deque(maxlen=BUCKETS)  # begin of a minute, the most requests in it

    def observe(self, requests: int, now: float) -> float:
        """Record the number at a time, in seconds; returns the level, from 0 to 1.

        The mean or the present number counts, whichever is larger: a burst is no time to spare.
        """
        passed = None if self._seen is None else max(0.0, now - self._seen)
        self._seen = now
        keep = 0.0 if passed is None else math.exp(-passed / MEAN_OVER)
        self._mean = keep * self._mean + (1 - keep) * requests
        if not self._most or now - self._most[-1][0] >= BUCKET:
            self._most.append((now, requests))
        begin, most = self._most[-1]
        self._most[-1] = begin, max(most, requests)
        while now - self._most[0][0] > BUCKET * BUCKETS:
            self._most.popleft()
        highest = max(most for _, most in self._most)
        return max(self._mean, requests) / highest if highest else 0.0
