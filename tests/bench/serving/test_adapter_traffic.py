"""Traffic of the adapter laws lasts as long as it should, and no request of it is forgotten."""

from __future__ import annotations

import asyncio
from collections import Counter
from itertools import islice

import pytest
from fake_openai import FIRST, GAP, FakeServer

from bench.serving.adapter_figures import throughput, ttfts
from bench.serving.adapter_traffic import RAMP, Requests, Sizes, closed_loop, running_streams, zipf
from bench.serving.client import Server


def requests(salt: str = "") -> Requests:
    return Requests(Sizes(prompt=(4, 8), output=(3, 9)), "seed", salt)


async def test_a_closed_loop_ends_once_all_of_its_requests_had_a_token(fake: tuple[FakeServer, Server]) -> None:
    seen, server = fake
    traffic = await closed_loop(server, [requests().all(name, 500) for name in ("a", "b")], 0.03)
    assert [len(client) for client in traffic.clients] == [1, 1]
    assert all(timing.ttft >= FIRST for timing in traffic.timings)
    begin, end = traffic.window
    assert end - begin == pytest.approx(0.03 * (1 - RAMP))
    assert {body["adapter"] for body in seen.bodies} == {"a", "b"}


async def test_each_client_sends_one_request_after_the_other(fake: tuple[FakeServer, Server]) -> None:
    seen, server = fake
    traffic = await closed_loop(server, [requests().all("a", 4)] * 3, 0.6)
    assert seen.most == 3
    assert len(ttfts(traffic.timings, traffic.window)) >= 6
    assert 0 < throughput(traffic.timings, traffic.window) < 3 * 4 / (FIRST + 3 * GAP)


async def test_a_failed_request_ends_the_loop_with_its_reason(fake: tuple[FakeServer, Server]) -> None:
    _, server = fake
    with pytest.raises(RuntimeError, match="refused failed: HTTP 404"):
        await closed_loop(server, [requests().all("a"), requests().all("refused")], 5)


async def test_streams_run_beside_what_is_done_meanwhile(fake: tuple[FakeServer, Server]) -> None:
    _, server = fake
    async with server.session() as session:
        async with running_streams(session, server, [requests().all(name, 12) for name in ("a", "b")]) as streams:
            await asyncio.sleep(0.4)
        assert {timing.job.adapter for timing in streams} == {"a", "b"}
        assert len(streams) >= 4  # the next one begins when one ends
        with pytest.raises(RuntimeError, match="the stream broke off"):
            async with running_streams(session, server, [requests().all("broken", 9)]):
                pass


def test_requests_of_a_seed_differ_by_salt_in_their_prompts_only() -> None:
    one, same, salted = (list(islice(requests(salt).all("a"), 40)) for salt in ("", "", "other"))
    assert one == same
    assert [(len(job.prompt), job.max_tokens) for job in one] == [(len(job.prompt), job.max_tokens) for job in salted]
    assert not any(mine.prompt == other.prompt for mine, other in zip(one, salted, strict=True))
    assert {len(job.prompt) for job in one} == {4, 5, 6, 7, 8}


def test_popularity_follows_a_power_law() -> None:
    drawn = Counter(islice(zipf("seed", 2000), 20_000))
    assert drawn[0] / drawn[1] == pytest.approx(2, rel=0.15)
    assert drawn[0] / drawn[9] == pytest.approx(10, rel=0.3)
    assert max(drawn) > 1900
