"""Adapter law of arrival (16): the last first token of clients that arrive together, each with another adapter."""

from __future__ import annotations

import asyncio

from bench.report import Goal
from bench.serving.adapter_figures import median
from bench.serving.adapter_server import Workspace
from bench.serving.adapter_traffic import PATIENCE, Requests, Sizes
from bench.serving.client import Job, Server, stream
from bench.serving.throughput_laws import Figures

PROMPTS = (64, 512)  # tokens
OUTPUT = 16  # tokens: those that are answered first decode while the others wait
ROUNDS = 3  # per repeat


def arrival(workspace: Workspace) -> tuple[list[Goal], Figures]:
    """The longest TTFT of clients that arrive together with distinct adapters ÷ the same on the base.

    One client each, nothing else runs, rank 16, adapters resident. The longest wait of a round is its P99; figures are
    medians over rounds, in turns. Prompts that do not fit the model's context are left out.
    """
    names = workspace.rank16[: workspace.scale.clients]
    goals: list[Goal] = []
    figures: Figures = {}
    with workspace.serving() as (server, _):
        for tokens in [each for each in PROMPTS if each + OUTPUT <= workspace.context]:
            sizes = Sizes((tokens, tokens), (OUTPUT, OUTPUT), workspace.scale.sizes.token_ids)
            loads: dict[str, list[str | None]] = {"adapters": [*names], "base": [None] * len(names)}
            found: dict[str, list[list[float]]] = {kind: [] for kind in loads}
            for round in range(-1, ROUNDS * workspace.scale.repeats):
                for kind in loads if round % 2 == 0 else reversed(loads):
                    requests = Requests(sizes, str(round), f"{kind} {tokens}")
                    waits = asyncio.run(arrive(server, [requests.next(name) for name in loads[kind]]))
                    if round >= 0:  # the first one warms up
                        found[kind].append(waits)
            longest = {kind: median([max(waits) for waits in rounds]) for kind, rounds in found.items()}
            of = f"{longest['adapters']:.2f} ÷ {longest['base']:.2f} s, {len(names)} clients at once"
            ratio = longest["adapters"] / longest["base"]
            goals.append(
                Goal(16, f"arrival: last TTFT, {tokens} tokens, distinct ÷ base", ratio, 1.3, of, at_most=True)
            )
            figures[f"{tokens} tokens"] = found
    return goals, figures


async def arrive(server: Server, jobs: list[Job]) -> list[float]:
    """TTFT of requests that are sent at once; raises RuntimeError if one fails."""
    async with server.session() as session:
        timings = await asyncio.gather(*(stream(session, server, job, PATIENCE) for job in jobs))
    for timing in timings:
        if timing.error is not None:
            raise RuntimeError(f"a request to {timing.job.adapter or 'the base'} failed: {timing.error}")
    return [timing.ttft for timing in timings]
