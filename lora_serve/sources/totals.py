"""What was fetched from sources, for metrics."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class RunningFetch:
    """Bytes of a fetch so far, and in all if the source says."""

    source: str
    received: int = 0
    expected: int | None = None


@dataclass
class SourceTotals:
    """Since the server started, by source.

    Attributes:
        fetches: (source, outcome) → how many; an outcome is "fetched" or the kind of an error.
        bytes: received, those of fetches that failed included.
        seconds: that successful fetches took.
        running: fetches under way.
        waiting: requests that wait for one.
        remembered: requests that were answered from what is remembered of failed fetches.
    """

    fetches: Counter[tuple[str, str]] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    running: list[RunningFetch] = field(default_factory=list)
    waiting: int = 0
    remembered: int = 0

    def progress(self, fetch: RunningFetch, received: int, expected: int | None) -> None:
        """A running fetch has received so many bytes in all."""
        self.bytes[fetch.source] += max(0, received - fetch.received)
        fetch.received = received
        fetch.expected = expected if expected is not None else fetch.expected
