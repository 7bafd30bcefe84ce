"""Load generator: streaming completions in a closed loop or with Poisson arrivals, reproducible from a seed.

All requests of a load follow from its seed (`Load.jobs`). In a closed loop each client sends its next request when its
last one ended; in an open loop requests arrive at random times, whatever the server does.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, count
from typing import Literal, get_args

from bench.serving.client import Job, Server, Timing, stream
from bench.serving.summary import Summary, summarise

Send = Callable[[Job], Awaitable[Timing]]
Mix = Literal["none", "one", "distinct", "uniform", "zipf"]


@dataclass(frozen=True)
class Load:
    """Parameters of a load; equal loads are the same requests.

    Attributes:
        mix: adapter of each request: none (the base), one for all, distinct (one per client), or drawn at random,
            uniformly or by the power law 1 / popularity^alpha.
        clients: concurrent clients of a closed loop; in an open loop `distinct` cycles through as many adapters.
        rate: requests per second of an open loop; None for a closed loop.
        prompt, output: tokens, as an inclusive range.
        requests, seconds: limits of a run; no request starts after either is reached.
        timeout: seconds per request.
        token_ids: inclusive range that prompt tokens are drawn from.
        seed, salt: the seed sets lengths, adapters and arrivals; another salt gives other prompt tokens of the same
            lengths, so that the prefix cache does not help a repeat.
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
        """All requests in order; in a closed loop client c sends c, c + clients, and so on."""
        if self.mix != "none" and not self.adapters:
            raise ValueError(f"mix {self.mix!r} needs adapters")
        if self.mix == "distinct" and len(self.adapters) < self.clients:
            raise ValueError(f"{self.clients} clients cannot have {len(self.adapters)} adapters all distinct")
        draw = random.Random(self.seed)
        weights = list(accumulate(1 / nth**self.alpha for nth in range(1, len(self.adapters) + 1)))
        tokens = random.Random(f"{self.seed}/{self.salt}")
        return [self._job(index, draw, tokens, weights) for index in range(self.requests)]

    def _job(self, index: int, draw: random.Random, tokens: random.Random, weights: list[float]) -> Job:
        prompt = tokens.choices(range(self.token_ids[0], self.token_ids[1] + 1), k=draw.randint(*self.prompt))
        adapter: str | None = None
        if self.mix == "one":
            adapter = self.adapters[0]
        elif self.mix == "distinct":
            adapter = self.adapters[index % self.clients]
        elif self.mix == "uniform":
            adapter = draw.choice(self.adapters)
        elif self.mix == "zipf":
            adapter = draw.choices(self.adapters, cum_weights=weights)[0]
        return Job(prompt, draw.randint(*self.output), adapter)


async def run(server: Server, load: Load) -> list[Timing]:
    """Run the load against a server; returns the timing of every request that was sent."""
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
    """Poisson arrivals at fixed times, so that a late one does not delay those after it."""
    due = time.perf_counter()
    running = []
    for job in jobs:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        if due >= end:
            break
        running.append(asyncio.ensure_future(one(job)))
        due += draw.expovariate(rate)
    return list(await asyncio.gather(*running))


def run_interleaved(
    targets: Mapping[str, tuple[Server, Load]], *, repeats: int, warm_up: int, seed: int = 0
) -> dict[str, list[Summary]]:
    """Run several loads in turns, in reverse order on every second repeat, so that noise of the machine hits all alike.

    Args:
        targets: server and load by the scenario's name. Prompts are new in every run, so the prefix cache never helps;
            lengths and adapters are the same for all scenarios in a repeat.
        warm_up: short requests of each load before anything is measured.
    """
    found: dict[str, list[Summary]] = {name: [] for name in targets}
    salt = count()
    if warm_up:
        for server, load in targets.values():
            asyncio.run(run(server, replace(load, requests=warm_up, rate=None, output=(4, 4), salt=next(salt))))
    for repeat in range(repeats):
        for name in list(targets) if repeat % 2 == 0 else reversed(list(targets)):
            server, load = targets[name]
            timings = asyncio.run(run(server, replace(load, seed=seed + repeat, salt=next(salt))))
            found[name].append(summarise(timings))
            print(f"# {repeat + 1}/{repeats} {name}: {found[name][-1].throughput:.1f} tok/s", file=sys.stderr)
    return found


def token_range(text: str) -> tuple[int, int]:
    """Parse `64` or `32-96` (inclusive)."""
    low, _, high = text.partition("-")
    return int(low), int(high or low)


def mixes(text: str) -> list[Mix]:
    """Parse a comma-separated list of mixes, in the order given."""
    found = [mix for mix in get_args(Mix) if mix in text.split(",")]
    if set(found) != set(text.split(",")):
        raise argparse.ArgumentTypeError(f"mixes are {', '.join(get_args(Mix))}")
    return sorted(found, key=text.split(",").index)


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that every command with a load has."""
    parser.add_argument("--clients", type=int, default=8, help="concurrent clients of the closed loop")
    parser.add_argument("--prompt", type=token_range, default=(64, 64), help="prompt tokens: 64 or 32-96")
    parser.add_argument("--output", type=token_range, default=(64, 64), help="output tokens: 64 or 32-96")
    parser.add_argument("--requests", type=int, default=24, help="requests per run")
    parser.add_argument("--seconds", type=float, default=120, help="no request of a run starts later than this")
    parser.add_argument("--timeout", type=float, default=300, help="seconds per request")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=None, help="warm-up requests per load (default: --clients)")
    parser.add_argument("--token-ids", type=token_range, default=(300, 1999), help="range of prompt token ids")
    parser.add_argument("--seed", type=int, default=0)


def load_from(args: argparse.Namespace) -> Load:
    """The load that the options of `add_load_arguments` describe."""
    return Load(
        clients=args.clients,
        prompt=args.prompt,
        output=args.output,
        requests=args.requests,
        seconds=args.seconds,
        timeout=args.timeout,
        token_ids=args.token_ids,
    )
