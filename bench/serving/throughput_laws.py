"""Adapter laws of throughput and latency under load: registry (4), cliff (5), rank isolation (8), fairness (10)."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from bench.report import Goal
from bench.serving.adapter_figures import fair_shares, median, throughput, ttfts
from bench.serving.adapter_server import Workspace
from bench.serving.adapter_sets import elements
from bench.serving.adapter_traffic import Requests, Traffic, closed_loop, zipf
from bench.serving.client import Job, Server
from bench.serving.summary import percentile

Figures = dict[str, Any]
Law = Callable[[Workspace], tuple[list[Goal], Figures]]
Clients = Callable[[str, str], Sequence[Iterator[Job]]]  # the clients of a load, by seed and salt

MIXED_RANKS = (8, 16, 32, 48, 64)
REGISTRIES = {"rank 8": ((8,), 0.97), "mixed ranks": (MIXED_RANKS, 0.94)}  # ranks, and the goal
TIERS = ("slots", "host memory")
FEW = len(MIXED_RANKS)
SHORT = (4, 12)  # output tokens where many requests are needed, rather than long ones
LONG = (48, 80)  # where a client's own time between two requests must not count
LARGE_SET = 2 << 30  # bytes that a large set of adapters should not exceed


def registry(workspace: Workspace, kinds: Sequence[str] = tuple(REGISTRIES)) -> tuple[list[Goal], Figures]:
    """Throughput with many adapters in use ÷ with five, popularity by a power law, rank 8 and mixed ranks.

    Both loads are the same requests with the same ranks: adapter n of the many is adapter n mod 5 of the few.
    """
    many, folder = workspace.scale.adapters, workspace.folder / "registry"
    modules: Figures = {}
    for kind in kinds:
        ranks = REGISTRIES[kind][0]
        cycle = [ranks[index % len(ranks)] for index in range(many)]
        targets = workspace.maker.targets_within(LARGE_SET, cycle)
        modules[kind] = targets or "all linear"
        for index, rank in enumerate(cycle):
            workspace.maker.make(_name(kind, index), rank, targets=targets, folder=folder)
    os.sync()  # so that no writing goes on beside the loads

    def load(kind: str | None, count: int) -> Clients:
        def jobs(seed: str, salt: str) -> Iterator[Job]:
            requests = Requests(workspace.scale.sizes, seed, salt)
            for index in zipf(seed, many):
                yield requests.next(None if kind is None else _name(kind, index % count))

        return lambda seed, salt: [jobs(seed, salt)] * workspace.scale.clients  # they share one sequence of requests

    loads = {"base": load(None, 1)}
    for kind in modules:
        loads |= {f"{kind}, {FEW}": load(kind, FEW), f"{kind}, {many}": load(kind, many)}
    with workspace.serving(adapters=folder, store="registry-store") as (server, _):
        runs = in_turns(workspace, server, loads)
    for path in (folder, workspace.folder / "registry-store"):
        shutil.rmtree(path)
    speed = _throughputs(runs)
    goals = []
    for kind in kinds:
        above, below = speed[f"{kind}, {many}"], speed[f"{kind}, {FEW}"]
        of = f"{above:.1f} ÷ {below:.1f} tok/s, base {speed['base']:.1f}"
        goals.append(Goal(4, f"registry: {many} ÷ {FEW} adapters, {kind}", above / below, REGISTRIES[kind][1], of))
    waits = {name: [wait for run in each for wait in ttfts(run.timings, run.window)] for name, each in runs.items()}
    ttft = {name: {"median": median(each), "p99": percentile(each, 0.99)} for name, each in waits.items()}
    return goals, {"throughput": speed, "ttft": ttft, "modules": modules}


def cliff(workspace: Workspace, tiers: Sequence[str] = TIERS) -> tuple[list[Goal], Figures]:
    """Median TTFT with twice as many hot adapters as fit ÷ with all fitting: slots, then host memory."""
    names, fit = workspace.rank16, workspace.scale.clients

    def load(hot: int) -> Clients:
        return by_client(workspace, [names[client % hot] for client in range(2 * workspace.scale.clients)])

    loads = {"fitting": load(fit), "twice": load(2 * fit)}
    goals, figures = [], {}
    memory = int((fit + 0.5) * elements(workspace.make_common() / names[0]) * workspace.dtype.itemsize)
    options = {"slots": ("--adapter-slots", str(fit)), "host memory": ("--adapter-cache-memory", str(memory))}
    for tier in tiers:
        with workspace.serving(*options[tier]) as (server, _):
            runs = in_turns(workspace, server, loads)
        ttft = {name: median([median(ttfts(run.timings, run.window)) for run in each]) for name, each in runs.items()}
        of = f"{ttft['twice']:.2f} ÷ {ttft['fitting']:.2f} s, {fit} fit, {2 * workspace.scale.clients} clients"
        goals.append(Goal(5, f"cliff: TTFT, {tier}", ttft["twice"] / ttft["fitting"], 1.5, of, at_most=True))
        figures[tier] = {"ttft": ttft, "throughput": _throughputs(runs)}
    return goals, figures


def rank_isolation(workspace: Workspace) -> tuple[list[Goal], Figures]:
    """P95 TTFT of rank-8 requests while half of the clients use rank 128 ÷ while all use rank 8, over all repeats."""
    small, large, half = workspace.rank8, workspace.rank128, workspace.scale.clients // 2

    def load(others: Sequence[str]) -> Clients:
        chosen = [*small[:half], *(others[index % len(others)] for index in range(half))]
        return by_client(workspace, chosen, output=SHORT)

    with workspace.serving() as (server, _):
        runs = in_turns(workspace, server, {"alone": load(small[half:]), "beside": load(large)})

    def p95(name: str) -> float:
        waits = [wait for run in runs[name] for client in run.clients[:half] for wait in ttfts(client, run.window)]
        return percentile(waits, 0.95)

    above, below = p95("beside"), p95("alone")
    of = f"{above:.2f} ÷ {below:.2f} s, {half} + {half} clients"
    goal = Goal(8, "rank isolation: P95 TTFT of rank 8 beside 128 ÷ alone", above / below, 1.1, of, at_most=True)
    return [goal], {"ttft_p95": {"beside": above, "alone": below}, "throughput": _throughputs(runs)}


def fairness(workspace: Workspace) -> tuple[list[Goal], Figures]:
    """Throughput of two adapters with 2 clients each beside one with 20 ÷ their max-min fair share of the batch.

    The total is compared with that of as many clients evenly spread, to whom first come, first served is fair. Outputs
    are long: a client that has its answer is in no batch for a step or two, which is no fault of the scheduler's.
    """
    names, rows = workspace.rank16[:3], workspace.scale.clients
    uneven, even = (20, 2, 2), (8, 8, 8)

    def load(clients: Sequence[int]) -> Clients:
        adapters = [name for name, count in zip(names, clients, strict=True) for _ in range(count)]
        random.Random(0).shuffle(adapters)  # all begin at once: the first batch, too, is a fair draw
        return by_client(workspace, adapters, output=LONG)

    with workspace.serving("--max-num-seqs", str(rows)) as (server, _):
        runs = in_turns(workspace, server, {"uneven": load(uneven), "even": load(even)}, longer=3)

    def speed(run: Traffic, adapter: str) -> float:
        return throughput([timing for timing in run.timings if timing.job.adapter == adapter], run.window)

    shares = fair_shares(uneven, rows)
    by_adapter = [median([speed(run, name) for run in runs["uneven"]]) for name in names]
    totals = _throughputs(runs)
    kept = [
        median([speed(run, name) / (share * throughput(run.timings, run.window)) for run in runs["uneven"]])
        for name, share in zip(names[1:], shares[1:], strict=True)
    ]
    tokens = " : ".join(f"{each:.0f}" for each in by_adapter)
    goals = [
        Goal(10, "fairness: the others' throughput ÷ fair share", min(kept), 0.95, f"{tokens} tok/s, 20 : 2 : 2"),
        Goal(
            10,
            "fairness: total ÷ of clients evenly spread",
            totals["uneven"] / totals["even"],
            0.99,
            f"{totals['uneven']:.1f} ÷ {totals['even']:.1f} tok/s",
        ),
    ]
    wait = {name: median([median(ttfts(run.timings, run.window)) for run in each]) for name, each in runs.items()}
    return goals, {"by_adapter": by_adapter, "fair_shares": shares, "total": totals, "ttft": wait}


def by_client(workspace: Workspace, adapters: Sequence[str], output: tuple[int, int] | None = None) -> Clients:
    """A client per entry, each with that adapter."""
    sizes = workspace.scale.sizes if output is None else replace(workspace.scale.sizes, output=output)
    return lambda seed, salt: [
        Requests(sizes, f"{seed}/{client}", salt).all(name) for client, name in enumerate(adapters)
    ]


def in_turns(
    workspace: Workspace, server: Server, loads: Mapping[str, Clients], *, longer: float = 1
) -> dict[str, list[Traffic]]:
    """Run loads in turns, in reverse order in every second repeat; in a repeat all have the same seed.

    Args:
        longer: how many times as long as usual.
    """
    found: dict[str, list[Traffic]] = {name: [] for name in loads}
    seconds = longer * workspace.scale.seconds

    def once(name: str, seed: str, seconds: float) -> Traffic:
        return asyncio.run(closed_loop(server, loads[name](seed, name), seconds))

    for name in loads:
        once(name, "warm up", workspace.scale.seconds / 2)
    for repeat in range(workspace.scale.repeats):
        for name in loads if repeat % 2 == 0 else reversed(list(loads)):
            found[name].append(once(name, str(repeat), seconds))
    return found


def _throughputs(runs: Mapping[str, Sequence[Traffic]]) -> dict[str, float]:
    return {name: median([throughput(run.timings, run.window) for run in each]) for name, each in runs.items()}


def _name(kind: str, index: int) -> str:
    return f"{kind.replace(' ', '-')}-{index:04}"
