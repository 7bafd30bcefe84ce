"""What load is put on a server, and what its streams add up to.

A load is decided ahead from its seed (`jobs`), then run as a closed loop (each client sends its next request when the
last one ended) or an open one (requests come at random times, whatever the server does).
"""

from __future__ import annotations

import asyncio
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from bench.client import Job, Server, Timing, stream

Send = Callable[[Job], Awaitable[Timing]]
Mix = Literal["none", "one", "distinct", "uniform", "zipf"]


@dataclass(frozen=True)
class Load:
    """A load, whole in itself: the same value is the same work.

    Attributes:
        mix: which adapter a request names: none (the base), one and the same, distinct (every client another),
            or drawn, uniformly or by the power law 1 / rank^alpha.
        clients: of a closed loop; in an open loop, how many turns `distinct` deals adapters in.
        rate: requests a second of an open loop; None is a closed one.
        prompt, output: tokens, as an inclusive range.
        requests, seconds: no request begins after either is used up.
        timeout: seconds that one request may take.
        token_ids: inclusive range that prompts are drawn from.
        seed, salt: the same seed means the same lengths, adapters and arrivals; with another salt the prompts are other
            tokens, so that no prefix cache helps the second of two runs of the same work.
    """

    mix: Mix = "none"
    adapters: tuple[str, ...] = ()
    clients: int = 8
    rate: float | None = None
    prompt: tuple[int, int] = (64, 64)
    output: tuple[int, int] = (64, 64)
    requests: int = 24
    seconds: float = 120.0
    timeout: float = 300.0
    alpha: float = 1.0
    token_ids: tuple[int, int] = (300, 1999)
    seed: int = 0
    salt: int = 0

    def jobs(self) -> list[Job]:
        """Every request in order; in a closed loop client c takes c, c + clients, and so on."""
        if self.mix != "none" and not self.adapters:
            raise ValueError(f"mix {self.mix!r} needs adapters")
        if self.mix == "distinct" and len(self.adapters) < self.clients:
            raise ValueError(f"{self.clients} clients cannot have {len(self.adapters)} adapters all distinct")
        draw = random.Random(self.seed)
        popularity = list(accumulate(1 / place**self.alpha for place in range(1, len(self.adapters) + 1)))
        tokens = random.Random(f"{self.seed}/{self.salt}")
        return [self._job(index, draw, tokens, popularity) for index in range(self.requests)]

    def _job(self, index: int, draw: random.Random, tokens: random.Random, popularity: list[float]) -> Job:
        prompt = tokens.choices(range(self.token_ids[0], self.token_ids[1] + 1), k=draw.randint(*self.prompt))
        adapter: str | None = None
        if self.mix == "one":
            adapter = self.adapters[0]
        elif self.mix == "distinct":
            adapter = self.adapters[index % self.clients]
        elif self.mix == "uniform":
            adapter = draw.choice(self.adapters)
        elif self.mix == "zipf":
            adapter = draw.choices(self.adapters, cum_weights=popularity)[0]
        return Job(prompt, draw.randint(*self.output), adapter)


@dataclass(frozen=True)
class Summary:
    """A run in figures: tokens a second over all of it, seconds elsewhere. NaN where nothing was measured."""

    throughput: float
    ttft_median: float
    ttft_p99: float
    itl_median: float
    itl_p99: float
    itl_worst: float
    e2e_median: float
    e2e_p99: float
    requests: int
    errors: int
    tokens: int
    seconds: float
    failures: tuple[tuple[str, int], ...] = ()


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest-rank percentile: a value that was measured; NaN of none."""
    if not values:
        return float("nan")
    return sorted(values)[max(0, math.ceil(len(values) * share) - 1)]


def summarise(timings: Sequence[Timing]) -> Summary:
    """Figures of one run; what failed counts as an error and in the time it took, nowhere else."""
    good = [timing for timing in timings if timing.error is None]
    seconds = max(t.finished for t in timings) - min(t.sent for t in timings) if timings else 0.0
    tokens = sum(timing.tokens for timing in good)
    ttft = [timing.ttft for timing in good]
    gaps = [gap for timing in good for gap in timing.gaps]
    e2e = [timing.finished - timing.sent for timing in good]
    failures = Counter(timing.error for timing in timings if timing.error is not None)
    return Summary(
        throughput=tokens / seconds if seconds else float("nan"),
        ttft_median=_median(ttft),
        ttft_p99=percentile(ttft, 0.99),
        itl_median=_median(gaps),
        itl_p99=percentile(gaps, 0.99),
        itl_worst=max(gaps, default=float("nan")),
        e2e_median=_median(e2e),
        e2e_p99=percentile(e2e, 0.99),
        requests=len(timings),
        errors=len(timings) - len(good),
        tokens=tokens,
        seconds=seconds,
        failures=tuple(failures.most_common(3)),
    )


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("nan")


async def run(server: Server, load: Load) -> list[Timing]:
    """Put the load on the server; returns what became of every request that was sent."""
    jobs = load.jobs()
    async with server.session() as session:

        async def one(job: Job) -> Timing:
            return await stream(session, server, job, load.timeout)

        end = time.perf_counter() + load.seconds
        if load.rate is not None:
            return await _open(jobs, load.rate, random.Random(load.seed + 1), one, end)
        taken = await asyncio.gather(
            *(_client(iter(jobs[client :: load.clients]), one, end) for client in range(load.clients))
        )
    return [timing for timings in taken for timing in timings]


async def _client(jobs: Iterator[Job], one: Send, end: float) -> list[Timing]:
    timings = []
    for job in jobs:
        if time.perf_counter() >= end:
            break
        timings.append(await one(job))
    return timings


async def _open(jobs: Sequence[Job], rate: float, draw: random.Random, one: Send, end: float) -> list[Timing]:
    """Poisson arrivals: each is due at its own time, so a late one does not delay those after it."""
    due = time.perf_counter()
    running = []
    for job in jobs:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        if due >= end:
            break
        running.append(asyncio.ensure_future(one(job)))
        due += draw.expovariate(rate)
    return list(await asyncio.gather(*running))
