"""Figures of the adapter laws follow from the times of requests."""

from __future__ import annotations

import math

import pytest

from bench.serving.adapter_figures import fair_shares, log_times, median, of_equal_length, throughput, ttfts, worst_gap
from bench.serving.client import Job, Timing


def timing(sent: float, *chunks: float, tokens: int = 0) -> Timing:
    """A request; one with tokens has ended."""
    return Timing(Job([1], 8), sent, list(chunks), chunks[-1] if tokens else 0.0, tokens)


def test_throughput_counts_what_arrives_in_the_window() -> None:
    running, ended = timing(0.0, 0.5, 1.0, 1.9, 2.0), timing(0.5, 1.5, 2.5, tokens=2)
    assert throughput([running, ended], (1.0, 2.0)) == 3.0
    assert throughput([running], (1.0, 3.0)) == 1.5
    assert throughput([], (0.0, 1.0)) == 0.0


def test_throughput_counts_tokens_that_arrive_together() -> None:
    assert throughput([timing(0.0, 0.1, 0.2, tokens=6)], (0.0, 1.0)) == 6.0


def test_ttft_is_that_of_the_requests_that_waited_in_the_window() -> None:
    requests = [timing(0.8, 0.9, 1.1), timing(0.2, 1.2), timing(1.0, 1.5), timing(1.8, 3.0, 3.1), timing(2.0, 2.1)]
    assert ttfts(requests, (1.0, 2.0)) == pytest.approx([1.0, 0.5, 1.2])


def test_a_request_without_a_token_is_not_left_out_of_ttft() -> None:
    with pytest.raises(RuntimeError, match="no token"):
        ttfts([timing(1.0, 1.5), timing(1.1)], (1.0, 2.0))


def test_the_worst_gap_is_any_streams_longest_that_overlaps_the_window() -> None:
    one, other = timing(0.0, 1.0, 2.0, 5.0), timing(0.0, 2.1, 2.2, 4.4)
    assert worst_gap([one, other], (0.0, 1.5)) == 1.0
    assert worst_gap([one, other], (2.15, 2.19)) == 3.0  # it began before and ended after
    assert worst_gap([other], (2.1, 2.2)) == pytest.approx(0.1)
    assert math.isnan(worst_gap([one, other], (6.0, 7.0)))


def test_windows_that_are_compared_are_as_long_as_the_longer() -> None:
    assert of_equal_length((1.0, 2.0), (5.0, 8.0)) == ((1.0, 4.0), (5.0, 8.0))
    assert of_equal_length((1.0, 3.0), (5.0, 6.0)) == ((1.0, 3.0), (5.0, 7.0))


@pytest.mark.parametrize(
    ("clients", "rows", "shares"),
    [
        ((20, 2, 2), 8, [4, 2, 2]),  # two clients cannot use more than two rows
        ((20, 5, 5), 9, [3, 3, 3]),
        ((20, 1, 5), 9, [4, 1, 4]),
        ((8, 8, 8), 8, [8 / 3, 8 / 3, 8 / 3]),
        ((2, 1, 1), 8, [2, 1, 1]),
    ],
)
def test_a_fair_share_is_equal_unless_an_adapter_has_too_few_clients(
    clients: tuple[int, ...], rows: int, shares: list[float]
) -> None:
    assert fair_shares(clients, rows) == pytest.approx([share / sum(shares) for share in shares])


def test_the_median_of_nothing_is_nan() -> None:
    assert median([3.0, 1.0, 9.0]) == 3.0
    assert math.isnan(median([]))


def test_stages_of_the_start_are_found_in_the_servers_log() -> None:
    log = (
        "2026-11-27 10:59:51,238 INFO lora_serve.server: opening the adapter store (92 %)\n"
        "something else\n"
        "2026-11-27 10:59:58,173 INFO lora_serve.server: lowering adapters (1 of 6) (93 %)\n"
        "2026-11-27 10:59:58,245 INFO lora_serve.server: lowering adapters (2 of 6) (95 %)\n"
    )
    (opening,) = log_times(log, "opening the adapter store")
    lowering = log_times(log, "lowering adapters (")
    assert [time - opening for time in lowering] == pytest.approx([6.935, 7.007])
    assert log_times(log, "warming up") == []
