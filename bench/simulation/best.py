"""The best throughput that any simple schedule reaches, as a yardstick: whole prompts, so many of them together."""

from __future__ import annotations

import random
from collections.abc import Iterator
from heapq import heappop, heappush

from bench.simulation.costs import Costs

Sizes = tuple[int, int]  # tokens of a prompt, and of an output


def best_throughput(
    costs: Costs, *, seqs: int, tokens: int, clients: int, sizes: list[Sizes], adapters: int = 0, nbytes: int = 0
) -> float:
    """Output tokens per second of closed loops, with the best number of prompts to wait for, tried one by one.

    Args:
        seqs, tokens: limits of a step.
        clients: each with one request at a time, of sizes drawn from `sizes`.
        adapters, nbytes: distinct ones in every step, and bytes of each.
    """
    rows = min(seqs, clients)
    together = {1, rows, *(round(rows**0.5 * 2 ** (n / 2)) for n in range(-8, 9))}
    numbers = sorted(number for number in together if 1 <= number <= rows)
    return max(_throughput(costs, rows, tokens, _draws(sizes), [nbytes] * adapters, number) for number in numbers)


def _draws(sizes: list[Sizes]) -> Iterator[Sizes]:
    draw = random.Random(0)
    while True:
        yield draw.choice(sizes)


def _throughput(
    costs: Costs, rows: int, budget: int, sizes: Iterator[Sizes], adapters: list[int], together: int
) -> float:
    """Throughput if prompts wait until so many can be computed, then are computed whole."""
    running: list[tuple[int, int]] = []  # step at which a sequence has ended, and its mean context; soonest first
    waiting = [next(sizes) for _ in range(rows)]
    now, produced, step = 0.0, 0, 0
    begun, produced_before, context = 0.0, 0, 0
    while step < 6000:
        if step == 2000:
            begun, produced_before = now, produced
        prompt = 0
        if waiting and (len(waiting) >= together or not running):
            while waiting and prompt + waiting[-1][0] <= budget - len(running):
                tokens, output = waiting.pop()
                prompt += tokens
                heappush(running, (step + output, tokens + output // 2))
                context += tokens + output // 2
        now += costs.step(len(running), prompt, context, adapters)
        produced += len(running)
        step += 1
        while running and running[0][0] <= step:
            context -= heappop(running)[1]
            waiting.append(next(sizes))
    return (produced - produced_before) / (now - begun)
