"""Figures of the adapter laws, from the times of requests: pure functions over `Timing`s, without a server."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import pairwise

from bench.serving.client import Timing

Window = tuple[float, float]  # seconds of `time.perf_counter`


def throughput(timings: Sequence[Timing], window: Window) -> float:
    """Tokens per second that arrived in a window, of requests that may have begun before it or end after it.

    A chunk counts as many tokens as those of finished requests had on average: one, unless several are sent at once.
    """
    done = [timing for timing in timings if timing.tokens]
    each = sum(t.tokens for t in done) / sum(len(t.chunks) for t in done) if done else 1.0
    begin, end = window
    arrived = sum(begin <= chunk < end for timing in timings for chunk in timing.chunks)
    return each * arrived / (end - begin)


def ttfts(timings: Sequence[Timing], window: Window) -> list[float]:
    """TTFT of every request that waited in a window, so that the longest waits are not left out.

    Raises RuntimeError if one has had no token.
    """
    begin, end = window
    waited = [t for t in timings if t.sent < end and not (t.chunks and t.chunks[0] < begin)]
    if not all(timing.chunks for timing in waited):
        raise RuntimeError("a request was sent and had no token")
    return [timing.ttft for timing in waited]


def worst_gap(timings: Sequence[Timing], window: Window) -> float:
    """The longest gap between two tokens of any stream that overlaps a window; NaN without one."""
    begin, end = window
    gaps = (pair for timing in timings for pair in pairwise(timing.chunks))
    return max((after - before for before, after in gaps if before < end and after > begin), default=float("nan"))


def of_equal_length(one: Window, other: Window) -> tuple[Window, Window]:
    """Both windows, as long as the longer one: the worst gap grows with the length of a window."""
    length = max(one[1] - one[0], other[1] - other[0])
    return (one[0], one[0] + length), (other[0], other[0] + length)


def fair_shares(clients: Sequence[int], rows: int) -> list[float]:
    """Max-min fair shares of a batch of `rows` between adapters, none more rows than its clients, as fractions."""
    rows = min(rows, sum(clients))
    given = [0.0] * len(clients)
    wanting = set(range(len(clients)))
    left = float(rows)
    while wanting:
        each = left / len(wanting)
        content = {index for index in wanting if clients[index] <= each}
        for index in content or wanting:
            given[index] = min(float(clients[index]), each)
            left -= given[index]
        wanting -= content or wanting
    return [share / rows for share in given]


def median(values: Sequence[float]) -> float:
    """The median; NaN of none."""
    return statistics.median(values) if values else float("nan")


def log_times(log: str, stage: str) -> list[float]:
    """When a server's log says that it entered a stage of its start-up, in seconds since the epoch."""
    return list(_log_times(log, stage))


def _log_times(log: str, stage: str) -> Iterator[float]:
    pattern = rf"^(\S+ \S+) INFO \S+: {re.escape(stage)}"
    for time in re.findall(pattern, log, re.MULTILINE):
        yield datetime.strptime(time, "%Y-%m-%d %H:%M:%S,%f").timestamp()
