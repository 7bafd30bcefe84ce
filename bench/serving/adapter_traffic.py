"""Traffic for the adapter laws: closed loops for a fixed time, and streams that run while something else happens."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import accumulate

import aiohttp

from bench.serving.adapter_figures import Window
from bench.serving.client import Job, Server, Timing, stream_into

RAMP = 0.25  # share of a loop's time in which the clients begin, one after the other; it is not measured
PATIENCE = 120.0  # seconds after which a request has failed


@dataclass(frozen=True)
class Sizes:
    """Tokens of prompts and outputs, and ids of prompt tokens, as inclusive ranges."""

    prompt: tuple[int, int] = (32, 32)
    output: tuple[int, int] = (16, 48)
    token_ids: tuple[int, int] = (300, 1500)


class Requests:
    """Requests that follow from a seed; with another salt prompts differ, so that the prefix cache never helps."""

    def __init__(self, sizes: Sizes, seed: str, salt: str) -> None:
        self._sizes = sizes
        self._lengths, self._tokens = random.Random(seed), random.Random(f"{seed}/{salt}")

    def next(self, adapter: str | None, output: int | None = None) -> Job:
        """The next request, of this adapter and number of tokens (default: drawn)."""
        first, last = self._sizes.token_ids
        prompt = self._tokens.choices(range(first, last + 1), k=self._lengths.randint(*self._sizes.prompt))
        tokens = self._lengths.randint(*self._sizes.output)
        return Job(prompt, tokens if output is None else output, adapter)

    def all(self, adapter: str | None, output: int | None = None) -> Iterator[Job]:
        """Requests of one client, without end."""
        while True:
            yield self.next(adapter, output)


def zipf(seed: str, count: int) -> Iterator[int]:
    """Numbers below `count` without end, the n-th (from 1) with a frequency of 1 / n."""
    draw = random.Random(seed)
    weights = list(accumulate(1 / nth for nth in range(1, count + 1)))
    while True:
        yield from draw.choices(range(count), cum_weights=weights, k=64)


@dataclass(frozen=True)
class Traffic:
    """What was measured: requests by client, and the window in which they count."""

    clients: list[list[Timing]]
    window: Window

    @property
    def timings(self) -> list[Timing]:
        return [timing for client in self.clients for timing in client]


async def closed_loop(server: Server, clients: Sequence[Iterator[Job]], seconds: float) -> Traffic:
    """Let each client send its requests one after the other for a time; raises RuntimeError if one fails.

    The clients begin one by one, so that they are out of step. The load goes on until every request of the window has
    had a token, and what then runs is aborted.
    """
    taken: list[list[Timing]] = [[] for _ in clients]
    async with server.session() as session:
        begin = time.perf_counter()
        tasks = [
            asyncio.ensure_future(_client(session, server, jobs, timings, RAMP * seconds * index / len(clients)))
            for index, (jobs, timings) in enumerate(zip(clients, taken, strict=True))
        ]
        end = begin + seconds
        while not any(task.done() for task in tasks):
            await asyncio.sleep(0.01)
            if time.perf_counter() > end and all(t.chunks for timings in taken for t in timings if t.sent < end):
                break
        await _cancel(tasks)
    return Traffic(taken, (begin + RAMP * seconds, end))


@asynccontextmanager
async def running_streams(
    session: aiohttp.ClientSession, server: Server, clients: Sequence[Iterator[Job]]
) -> AsyncIterator[list[Timing]]:
    """Streams that run as long as the context; a client whose stream ends sends its next job."""
    taken: list[list[Timing]] = [[] for _ in clients]
    tasks = [
        asyncio.ensure_future(_client(session, server, jobs, timings))
        for jobs, timings in zip(clients, taken, strict=True)
    ]
    merged: list[Timing] = []
    try:
        while not all(timings and len(timings[0].chunks) > 4 for timings in taken):
            await asyncio.sleep(0.01)
            if any(task.done() for task in tasks):
                break
        yield merged
    finally:
        await _cancel(tasks)
        merged.extend(timing for timings in taken for timing in timings)


async def _client(
    session: aiohttp.ClientSession, server: Server, jobs: Iterator[Job], taken: list[Timing], delay: float = 0.0
) -> None:
    await asyncio.sleep(delay)
    for job in jobs:
        timing = Timing(job, time.perf_counter())
        taken.append(timing)
        await stream_into(session, server, timing, PATIENCE)
        if timing.error is not None:
            raise RuntimeError(f"a request to {job.adapter or 'the base'} failed: {timing.error}")


async def _cancel(tasks: Sequence[asyncio.Future[None]]) -> None:
    """Cancel all; raises what one of them had raised before."""
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Exception):
            raise outcome
