"""Clients of the arrival law send at once, and a request that fails is not a fast one."""

from __future__ import annotations

import pytest
from fake_openai import FIRST, FakeServer

from bench.serving.arrival_law import arrive
from bench.serving.client import Job, Server


async def test_all_requests_wait_at_the_same_time(fake: tuple[FakeServer, Server]) -> None:
    seen, server = fake
    waits = await arrive(server, [Job([1, 2], 3, name) for name in ("a", "b", None)])
    assert seen.most == 3
    assert [body.get("adapter") for body in seen.bodies].count(None) == 1
    assert len(waits) == 3
    assert all(FIRST <= wait < 3 * FIRST for wait in waits)


async def test_a_failed_request_is_an_error(fake: tuple[FakeServer, Server]) -> None:
    _, server = fake
    with pytest.raises(RuntimeError, match="a request to refused failed: HTTP 404"):
        await arrive(server, [Job([1, 2], 3, name) for name in ("a", "refused")])
