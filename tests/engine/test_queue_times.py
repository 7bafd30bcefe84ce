"""QueueTimes: the wait of one that comes now follows from how many wait and how quickly they are started."""

from __future__ import annotations

import pytest

from lora_serve.engine.queue_times import QueueTimes


def test_the_expected_wait_follows_the_rate_at_which_sequences_are_started() -> None:
    times = QueueTimes()
    assert times.expected(5) == 0.0
    for second in range(1, 101):
        times.record(2 * second, 3, now=float(second))
    assert times.expected(10) == pytest.approx(5.0, rel=0.05)
    assert times.expected(0) == 0.0
    times.record(200, 10, now=200.0)
    assert times.expected(10) > 15.0  # nothing was started since


def test_time_in_which_nothing_waited_does_not_count() -> None:
    times = QueueTimes()
    for second in range(1, 101):
        times.record(2 * second, 3, now=float(second))
    times.record(200, 0, now=30_000.0)
    assert times.expected(10) == pytest.approx(5.0, rel=0.05)
