"""Loads for the simulated device: what each is, what it must give, and how far that was reached."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, repeat

from bench.report import Goal
from bench.serving.adapter_figures import fair_shares, median
from bench.serving.adapter_traffic import zipf
from bench.serving.summary import percentile
from bench.simulation.best import best_throughput
from bench.simulation.costs import CPU_BF16, CPU_INT8, H200_INTENDED, H200_MEASURED, Costs
from bench.simulation.serving import Hardware, Job, Served, Simulation

MB = 1 << 20
POINTS = 100  # of a line in a plot
SIZES = {CPU_BF16.name: 18 * MB, CPU_INT8.name: 18 * MB, H200_MEASURED.name: 80 * MB, H200_INTENDED.name: 80 * MB}


@dataclass
class Outcome:
    """What a load gave: goals, figures for the table, and lines for the plots.

    Attributes:
        clients, with_adapters: of a load that is compared with the best schedule.
        gaps: between tokens: share of them that are at most so many ms.
        waits: for the first token: time in seconds, and median of the requests sent around then in ms.
    """

    name: str
    device: str
    goals: list[Goal] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    clients: int | None = None
    with_adapters: bool = False
    gaps: list[tuple[float, float]] = field(default_factory=list)
    waits: list[tuple[float, float]] = field(default_factory=list)

    def observe(self, served: Sequence[Served], window: tuple[float, float]) -> None:
        """Take figures from the requests in a window, and lines from all."""
        self.figures = figures(served, window)
        gaps = sorted(gap for each in served for gap in each.gaps)
        if gaps:
            self.gaps = [(n / POINTS, 1e3 * percentile(gaps, n / POINTS)) for n in range(1, POINTS + 1)]
        by_time = sorted((each.sent, each.ttft) for each in served if each.tokens)
        some = max(1, len(by_time) // POINTS)
        for begin in range(0, len(by_time), some):
            part = by_time[begin : begin + some]
            self.waits.append((part[len(part) // 2][0], 1e3 * median([wait for _, wait in part])))


def hardware(costs: Costs, **changes: object) -> Hardware:
    """The device of a cost model, with the limits that the server would have on it."""
    limits = Hardware(costs)
    if costs.overlaps:
        limits = replace(limits, seqs=256, tokens=2048, device=20 << 30, kv_tokens=800_000)
    return replace(limits, **changes)  # type: ignore[arg-type]


def figures(served: Sequence[Served], window: tuple[float, float]) -> dict[str, float]:
    """Throughput, waits and gaps of requests in a window."""
    begin, end = window
    arrived = sum(begin <= time < end for each in served for time in each.tokens)
    waits = [each.ttft for each in served if each.tokens and begin <= each.sent < end]
    gaps = [gap for each in served for gap, at in zip(each.gaps, each.tokens[1:], strict=True) if begin <= at < end]
    return {
        "tok/s": arrived / (end - begin),
        "TTFT p50": percentile(waits, 0.5) if waits else float("nan"),
        "TTFT p99": percentile(waits, 0.99) if waits else float("nan"),
        "ITL p50": percentile(gaps, 0.5) if gaps else float("nan"),
        "ITL p99": percentile(gaps, 0.99) if gaps else float("nan"),
        "ITL max": max(gaps, default=float("nan")),
    }


def _varied(job: Job, seed: int) -> Iterator[Job]:
    """Jobs of half to one and a half times the sizes."""
    draw = random.Random(seed)
    while True:
        yield job._replace(
            prompt=draw.randint(job.prompt // 2, job.prompt + job.prompt // 2),
            output=draw.randint(max(1, job.output // 2), job.output + job.output // 2),
        )


def throughput(costs: Costs, clients: int, adapters: int, prompt: int = 128, output: int = 128) -> Outcome:
    """Closed loops of one kind of request, in and out of step: throughput ÷ the best of all simple schedules."""
    size, device = SIZES[costs.name], hardware(costs)
    names = [f"a{number}" for number in range(adapters)]
    simulation = Simulation(device, dict.fromkeys(names, size))
    for client in range(clients):
        name = names[client % adapters] if adapters else None
        simulation.closed_loop(_varied(Job(prompt, output, name), client))
    draws = _varied(Job(prompt, output), 0)
    best = best_throughput(
        costs, seqs=device.seqs, tokens=device.tokens, clients=clients, adapters=min(adapters, clients), nbytes=size,
        sizes=[(job.prompt, job.output) for job in islice(draws, 500)],
    )  # fmt: skip
    seconds = 40 * output * costs.step(min(clients, device.seqs), 0, 0, [size] * min(adapters, clients))
    served = simulation.run(seconds)
    outcome = Outcome(f"{clients} clients, {adapters} adapters, {prompt} + {output} tokens", costs.name)
    outcome.observe(served, (0.25 * seconds, seconds))
    outcome.clients, outcome.with_adapters, outcome.figures["best tok/s"] = clients, adapters > 0, best
    reached = outcome.figures["tok/s"]
    of = f"{reached:.0f} ÷ {best:.0f} tok/s"
    outcome.goals.append(Goal(0, "throughput ÷ best schedule", reached / best, 0.9, of))
    return outcome


def long_prompts(costs: Costs) -> Outcome:
    """Streams beside long prompts: the gap that is allowed is kept, or said to be not kept, and prompts progress."""
    device = hardware(costs)
    simulation = Simulation(device, {})
    for client in range(7):
        simulation.closed_loop(repeat(Job(64, 2000)), start=0.01 * client)
    simulation.closed_loop(repeat(Job(4000, 4)), start=1.0, think=0.5)
    seconds = 600 * costs.step(8, 0, 0, [])
    served = simulation.run(max(20.0, seconds, 6000 * costs.token * 5))
    outcome = Outcome("7 streams beside prompts of 4,000 tokens", costs.name)
    outcome.observe([each for each in served if each.job.prompt == 64], (1.0, simulation.time.now))
    waits = [each.ttft for each in served if each.job.prompt == 4000 and each.tokens]
    alone = sum(costs.step(0, min(device.tokens, 4000 - done), 0, []) for done in range(0, 4000, device.tokens))
    outcome.figures["prompt"] = median(waits)
    gap = outcome.figures["ITL p99"]
    # Of 100 gaps one may be longer: where the pacer said of more steps that they are, it did not promise this p99.
    kept = simulation.engine._pacer.gaps_exceeded < 0.01 * len(simulation.runner.steps)
    allowed = max(0.025, 1.6 * costs.step(7, 0, 7 * 1100, []))  # their contexts grow to 2,000 tokens
    outcome.figures["gap kept"] = float(kept)
    if kept:
        of = f"{1e3 * gap:.0f} ÷ {1e3 * allowed:.0f} ms"
        outcome.goals.append(Goal(0, "p99 gap ÷ allowed", gap / allowed, 1.1, of, at_most=True))
    of = f"{median(waits):.2f} ÷ {alone:.2f} s"
    outcome.goals.append(Goal(0, "wait for a long prompt ÷ alone", median(waits) / alone, 6.0, of, at_most=True))
    return outcome


def burst(costs: Costs, adapters: bool) -> Outcome:
    """Eight clients that arrive together, all with adapters of their own in memory, or with none."""
    names = [f"a{number}" for number in range(8)]
    simulation = Simulation(hardware(costs), dict.fromkeys(names, SIZES[costs.name]))
    for client in range(8):
        jobs = repeat(Job(64, 64, names[client] if adapters else None))
        simulation.closed_loop(islice(jobs, 1), start=20.0 * client)  # so that adapters are in memory, and costs known
        simulation.closed_loop(islice(jobs, 4), start=200.0)
    served = simulation.run(1000.0)
    outcome = Outcome(f"8 arrive together, {'own adapters' if adapters else 'base'}", costs.name)
    outcome.observe(served, (200.0, simulation.time.now))
    return outcome


def power_law(costs: Costs, adapters: int, slots: int = 64) -> Outcome:
    """16 clients whose requests are for so many adapters, by a power law."""
    size = SIZES[costs.name] // 4
    simulation = Simulation(hardware(costs, slots=slots), {f"a{number}": size for number in range(2000)})
    numbers = zipf("popularity", 2000)

    def jobs() -> Iterator[Job]:
        while True:
            yield Job(64, 32, f"a{next(numbers) % adapters}")

    for client in range(16):
        simulation.closed_loop(jobs(), start=0.01 * client)
    seconds = 6000 * costs.step(16, 0, 0, [size] * 12)
    outcome = Outcome(f"{adapters} adapters by a power law, {slots} slots", costs.name)
    outcome.observe(simulation.run(seconds), (0.5 * seconds, seconds))  # most were loaded before
    return outcome


def hog(costs: Costs, by_key: bool, clients: Sequence[int] = (20, 2, 2)) -> tuple[Outcome, list[float]]:
    """One key, or adapter, with 20 clients beside two with 2 each, in batches of 8: throughput ÷ fair share."""
    names = [f"a{number}" for number in range(len(clients))]
    simulation = Simulation(hardware(costs, seqs=8), dict.fromkeys(names, SIZES[costs.name]))
    start = random.Random(0)
    for name, count in zip(names, clients, strict=True):
        for client in range(count):
            job = Job(32, 64, "a0" if by_key else name, key=name if by_key else "")
            simulation.closed_loop(_varied(job, client), start=start.random() * 0.01)
    seconds = 5000 * costs.step(8, 0, 0, [])
    served = simulation.run(seconds)
    window = (0.2 * seconds, seconds)
    groups = [[each for each in served if (each.job.key if by_key else each.job.adapter) == name] for name in names]
    speeds = [figures(group, window)["tok/s"] for group in groups]
    what = "keys" if by_key else "adapters"
    outcome = Outcome(f"{' : '.join(map(str, clients))} clients of {what}, batches of 8", costs.name)
    outcome.observe(served, window)
    shares = fair_shares(clients, 8)
    kept = min(speed / (share * sum(speeds)) for speed, share in zip(speeds[1:], shares[1:], strict=True))
    tokens = " : ".join(f"{speed:.0f}" for speed in speeds)
    outcome.goals.append(Goal(10, "the others' throughput ÷ fair share", kept, 0.95, f"{tokens} tok/s"))
    return outcome, speeds


def cliff(costs: Costs, tier: str) -> Outcome:
    """16 clients with 8 adapters, which fit slots or host memory, and with 16: median wait for the first token."""
    size = SIZES[costs.name]
    limits = hardware(costs, slots=8) if tier == "slots" else hardware(costs, host=int(8.5 * size))
    waits = []
    for hot in (8, 16):
        names = [f"a{number}" for number in range(hot)]
        simulation = Simulation(limits, dict.fromkeys(names, size))
        for client in range(16):
            simulation.closed_loop(_varied(Job(32, 32, names[client % hot]), client))
        seconds = 3000 * costs.step(8, 0, 0, [size] * 8)
        waits.append(figures(simulation.run(seconds), (0.2 * seconds, seconds))["TTFT p50"])
    outcome = Outcome(f"16 hot adapters, {tier} for 8, ÷ 8", costs.name)
    of = f"{waits[1]:.3f} ÷ {waits[0]:.3f} s"
    outcome.goals.append(Goal(5, "TTFT, twice as many as fit ÷ fitting", waits[1] / waits[0], 1.5, of, at_most=True))
    return outcome


def aborts(costs: Costs) -> Outcome:
    """Clients that lose patience: nothing is left of what they aborted, and the others are served."""
    simulation = Simulation(hardware(costs), {"a0": SIZES[costs.name]})
    for client in range(24):
        patience = None if client % 3 else 0.3
        simulation.closed_loop(islice(_varied(Job(200, 100, "a0", patience=patience), client), 20))
    served = simulation.run(10_000.0)
    outcome = Outcome("24 clients, a third of which lose patience", costs.name)
    outcome.observe(served, (0.0, simulation.time.now))
    whole = [each for each in served if each.job.patience is None]
    done = sum(each.finished is not None and len(each.tokens) == each.job.output for each in whole)
    left = simulation.scheduler.pool.used + len(simulation.scheduler.running) + len(simulation.scheduler.waiting)
    outcome.goals.append(Goal(0, "requests served whole", done / len(whole), 1.0, f"{done} of {len(whole)}"))
    outcome.goals.append(Goal(0, "KV blocks and sequences left", left, 0, "", at_most=True))
    return outcome


def all_outcomes(costs: Costs, *, quick: bool = False) -> Iterator[Outcome]:
    """Every load on a device."""
    loads = ((1, 0), (8, 8), (64, 0)) if quick else ((1, 0), (8, 0), (8, 8), (64, 0), (64, 64), (256, 0))
    for clients, adapters in loads:
        yield throughput(costs, clients, adapters)
    yield long_prompts(costs)
    base, own = burst(costs, adapters=False), burst(costs, adapters=True)
    ratio = own.figures["TTFT p99"] / base.figures["TTFT p99"]
    of = f"{own.figures['TTFT p99']:.2f} ÷ {base.figures['TTFT p99']:.2f} s"
    own.goals.append(Goal(0, "p99 of the first token ÷ the base's", ratio, 1.3, of, at_most=True))
    yield from (base, own)
    few, many = power_law(costs, 5), power_law(costs, 200 if quick else 2000)
    ratio = many.figures["tok/s"] / few.figures["tok/s"]
    of = f"{many.figures['tok/s']:.0f} ÷ {few.figures['tok/s']:.0f} tok/s"
    many.goals.append(Goal(4, "throughput ÷ that of 5 adapters", ratio, 0.94, of))
    yield from (few, many)
    for by_key in (False, True):
        uneven, speeds = hog(costs, by_key)
        _, even = hog(costs, by_key, (8, 8, 8))
        ratio = sum(speeds) / sum(even)
        of = f"{sum(speeds):.0f} ÷ {sum(even):.0f} tok/s"
        uneven.goals.append(Goal(10, "total ÷ of clients evenly spread", ratio, 0.99, of))
        yield uneven
    yield cliff(costs, "slots")
    if costs.copy_byte is None:  # on a GPU an adapter in a slot needs no host memory
        yield cliff(costs, "host memory")
    yield aborts(costs)
