"""Adapter laws of loading and publishing: stall (6), cold start (7), memory (9), time to publish (15)."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.report import Goal
from bench.serving.adapter_figures import Window, log_times, median, of_equal_length, worst_gap
from bench.serving.adapter_server import AdapterRoutes, Workspace, upload_form
from bench.serving.adapter_sets import copy_to_disk, elements, files
from bench.serving.adapter_traffic import PATIENCE, Requests, running_streams
from bench.serving.client import Server, Timing, stream

Figures = dict[str, Any]
LOADS = 4  # per repeat
STREAM_TOKENS = 2000  # a new stream begins with a prefill, which is a gap of its own
SETTLE = 0.5  # seconds between two events beside streams
OPENING, LOWERING = "opening the adapter store", "lowering adapters ("  # stages in the server's log


def stall(workspace: Workspace) -> tuple[list[Goal], Figures]:
    """Worst token gap of running streams while an adapter is loaded, or published, ÷ that of as long without.

    A load is compared with the same request to the adapter when it is resident, an upload with nothing, right after it.
    """
    with workspace.serving() as (server, routes):
        return measure_stall(workspace, server, routes, uploads=True)


def measure_stall(
    workspace: Workspace, server: Server, routes: AdapterRoutes, *, uploads: bool
) -> tuple[list[Goal], Figures]:
    """`stall` on a running server; without `uploads`, of loads only."""
    measured = asyncio.run(_stall(workspace, server, routes, uploads))
    goals = []
    for event, pairs in measured.items():
        above, below = median([pair["with"] for pair in pairs]), median([pair["without"] for pair in pairs])
        seconds = median([pair["seconds"] for pair in pairs])
        of = f"{1e3 * above:.0f} ÷ {1e3 * below:.0f} ms, median of {len(pairs)}, {seconds:.2f} s each"
        goals.append(Goal(6, f"stall: worst gap, {event} ÷ without", above / below, 1.1, of, at_most=True))
    return goals, measured


async def _stall(
    workspace: Workspace, server: Server, routes: AdapterRoutes, uploads: bool
) -> dict[str, list[dict[str, float]]]:
    names, count = workspace.rank16, max(2, workspace.scale.clients // 2)
    cold, streaming = names[count], names[:count]
    tokens = min(STREAM_TOKENS, workspace.context - 2 * workspace.scale.sizes.prompt[1])
    requests = Requests(workspace.scale.sizes, "stall", "")
    forms = [_upload_forms(workspace) if uploads else {} for _ in range(workspace.scale.repeats)]
    windows: dict[str, list[tuple[Window, Window]]] = {"load": [], **{kind: [] for kind in forms[0]}}

    async with server.session() as session:

        async def request() -> Window:
            timing = _checked(await stream(session, server, requests.next(cold, 4), PATIENCE))
            return timing.sent, timing.finished

        async def request_cold() -> Window:
            await asyncio.to_thread(routes.evict, cold)
            await asyncio.sleep(SETTLE)
            return await request()

        clients = [Requests(workspace.scale.sizes, f"stream {name}", "").all(name, tokens) for name in streaming]
        async with running_streams(session, server, clients) as streams:
            await request()
            for repeat in range(workspace.scale.repeats):
                for _ in range(LOADS):
                    windows["load"].append(await _in_order(repeat, request_cold, request))
                for kind, form in forms[repeat].items():
                    window = await routes.upload(form)
                    await asyncio.to_thread(routes.delete, "uploaded")
                    await asyncio.sleep(SETTLE)
                    begin = time.perf_counter()
                    await asyncio.sleep(window[1] - window[0])
                    windows[kind].append((window, (begin, time.perf_counter())))
    return {name: [_gaps(streams, *pair) for pair in pairs] for name, pairs in windows.items()}


def _upload_forms(workspace: Workspace) -> dict[str, bytes]:
    """Uploads of float32 adapters of rank 16, by what they are: one of them takes seconds of CPU time to lower."""
    kinds: dict[str, dict[str, Any]] = {
        "rank 16": {},
        "PiSSA on q_proj": {"targets": ("q_proj",), "init_lora_weights": "pissa"},
    }
    forms = {}
    for kind, options in kinds.items():
        folder = workspace.maker.make("uploaded", 16, dtype=torch.float32, folder=workspace.folder, **options)
        form = upload_form("uploaded", folder)
        forms[f"upload, {kind}, {len(form) / 1e6:.1f} MB"] = form
    return forms


def _gaps(streams: list[Timing], event: Window, quiet: Window) -> dict[str, float]:
    with_event, without = of_equal_length(event, quiet)
    return {
        "with": worst_gap(streams, with_event),
        "without": worst_gap(streams, without),
        "seconds": event[1] - event[0],
    }


async def _in_order(
    repeat: int, event: Callable[[], Awaitable[Window]], without: Callable[[], Awaitable[Window]]
) -> tuple[Window, Window]:
    """Both windows, the event's first; in every second repeat it comes last."""
    if repeat % 2 == 0:
        first = await event()
        await asyncio.sleep(SETTLE)
        return first, await without()
    second = await without()
    await asyncio.sleep(SETTLE)
    return await event(), second


def cold_start(workspace: Workspace) -> tuple[list[Goal], Figures]:
    """TTFT on an idle server of an adapter in host memory, and of one on the disk, ÷ resident.

    From the disk, the time to read the same file is subtracted; both find it in the page cache.
    """
    with workspace.serving("--adapter-slots", "2") as (server, routes):
        return measure_cold_start(workspace, server, routes, slots=2)


def measure_cold_start(
    workspace: Workspace, server: Server, routes: AdapterRoutes, *, slots: int
) -> tuple[list[Goal], Figures]:
    """`cold_start` on a running server with so many slots."""
    ttft = asyncio.run(_cold_start(workspace, server, routes, slots))
    middle = {name: median(values) for name, values in ttft.items()}
    resident, host = middle["resident"], middle["host"]
    disk = middle["disk"] - middle["read"]
    times = f"÷ {1e3 * resident:.1f} ms"
    read = f"({1e3 * middle['disk']:.1f} − {1e3 * middle['read']:.1f}) {times}"
    return [
        Goal(7, "cold start: TTFT, host ÷ resident", host / resident, 1.1, f"{1e3 * host:.1f} {times}", at_most=True),
        Goal(7, "cold start: TTFT, disk − read ÷ resident", disk / resident, 1.1, read, at_most=True),
    ], {"seconds": middle, "all": ttft}


async def _cold_start(
    workspace: Workspace, server: Server, routes: AdapterRoutes, slots: int
) -> dict[str, list[float]]:
    measured, *others = workspace.rank16[: 1 + slots]
    lowered = _lowered_file(workspace, routes.info(measured)["digest"])
    requests = Requests(workspace.scale.sizes, "cold start", "")
    found: dict[str, list[float]] = {"resident": [], "host": [], "disk": [], "read": []}

    async with server.session() as session:

        async def ttft(name: str) -> float:
            return _checked(await stream(session, server, requests.next(name, 2), PATIENCE)).ttft

        async def expect(*tiers: str) -> None:
            """Check where the adapter is, so that each figure is of what it is said to be."""
            seen = (await asyncio.to_thread(routes.info, measured))["tiers"]
            if seen != ["disk", *tiers]:
                raise RuntimeError(f"{measured} is in {seen} instead of {['disk', *tiers]}")

        await ttft(measured)
        for _ in range(5 * workspace.scale.repeats):
            for name in others:  # now all slots are theirs
                await ttft(name)
            await expect("host")
            found["host"].append(await ttft(measured))
            await expect("host", "device")
            found["resident"].append(await ttft(measured))
            await asyncio.to_thread(routes.evict, measured)
            await expect()
            found["disk"].append(await ttft(measured))
            begin = time.perf_counter()
            lowered.read_bytes()
            found["read"].append(time.perf_counter() - begin)
    return found


def memory(workspace: Workspace) -> tuple[list[Goal], Figures]:
    """Bytes in memory ÷ the file's at the same dtype, of the worst of three ranks, and bytes freed ÷ taken."""
    names = [*workspace.rank8[:2], *workspace.rank16[:2], workspace.rank128[0]]
    ratios, taken, freed = {}, {}, {}
    with workspace.serving() as (_, routes):
        for name in names:
            size = elements(workspace.maker.folder / name) * workspace.dtype.itemsize
            ratios[name] = routes.info(name)["memory_bytes"] / size
        before = {tier: routes.tier_bytes(tier) for tier in ("host", "device")}
        for name in names:
            routes.load(name)
        loaded = {tier: routes.tier_bytes(tier) for tier in before}
        for name in names:
            routes.evict(name)
        for tier, bytes_before in before.items():
            taken[tier] = loaded[tier] - bytes_before
            freed[tier] = loaded[tier] - routes.tier_bytes(tier)
    goals = [Goal(9, "memory: bytes ÷ file bytes", max(ratios.values()), 1.05, "worst adapter", at_most=True)]
    for tier, size in taken.items():
        if not size:
            raise RuntimeError(f"{len(names)} adapters were loaded and took no bytes in the tier {tier}")
        of = f"{freed[tier]:,} ÷ {size:,} bytes, {len(names)} adapters"
        goals.append(Goal(9, f"memory: freed ÷ taken, {tier}", freed[tier] / size, 1.0, of))
    return goals, {"bytes_over_file": ratios, "taken": taken, "freed": freed}


def publish(workspace: Workspace) -> tuple[list[Goal], Figures]:
    """Time to publish a folder of adapters at start ÷ to copy its files to the same disk, and once more unchanged.

    Half of the adapters are bf16, half float32. The time is from opening the store, by the server's log, to ready. Then
    single uploads to the idle server; the first one also starts what lowers adapters.
    """
    count, folder = workspace.scale.started, workspace.folder / "publish"
    for index in range(count):
        dtype = (torch.bfloat16, torch.float32)[index % 2]
        workspace.maker.make(f"published{index:02}", 16, dtype=dtype, folder=folder)
    os.sync()  # so that only what is measured is written
    size = sum(path.stat().st_size for path in files(folder))
    empty = workspace.folder / "empty"
    empty.mkdir(exist_ok=True)
    seconds: dict[str, list[float]] = {name: [] for name in ("copy", "empty", "first", "lowering", "again")}
    uploads: dict[str, list[float]] = {"first, bfloat16": [], "bfloat16": [], "float32": []}
    for repeat in range(workspace.scale.repeats):
        store = f"publish-store-{repeat}"
        seconds["copy"].append(_timed_copy(folder, workspace.folder / "copy"))
        with _started(workspace, empty, f"{store}-empty") as start:
            seconds["empty"].append(start.opening)
        with _started(workspace, folder, store) as start:
            seconds["first"].append(start.opening)
            seconds["lowering"].append(start.lowering)
        with _started(workspace, folder, store) as start:
            seconds["again"].append(start.opening)
            for name, times in uploads.items():
                path = workspace.maker.make(
                    "uploaded", 16, dtype=getattr(torch, name.split()[-1]), folder=workspace.folder
                )
                begin, end = asyncio.run(start.routes.upload(upload_form("uploaded", path)))
                times.append(end - begin)
                start.routes.delete("uploaded")
        shutil.rmtree(workspace.folder / store)
    middle = {name: median(values) for name, values in seconds.items()}
    single = {name: median(values) for name, values in uploads.items()}
    of = f"{middle['first']:.1f} ÷ {middle['copy']:.1f} s, {count} adapters, {size / 1e6:,.0f} MB"
    goals = [Goal(15, "publish: at start ÷ copying the files", middle["first"] / middle["copy"], 2.0, of, at_most=True)]
    each = 1e3 * middle["again"] / count
    return goals, {"seconds": middle, "all": seconds, "unchanged_ms_each": each, "upload_seconds": single}


class _Start(NamedTuple):
    """Seconds from opening the store to ready, and of them those since the first adapter was lowered."""

    opening: float
    lowering: float
    routes: AdapterRoutes


@contextmanager
def _started(workspace: Workspace, adapters: Path, store: str) -> Iterator[_Start]:
    """A server that has just become ready with a folder's adapters."""
    log = workspace.folder / "log"
    with workspace.serving(adapters=adapters, store=store, log=log) as (_, routes):
        ready, text = time.time(), log.read_text()
        (opening,) = log_times(text, OPENING)
        lowered = log_times(text, LOWERING)
        yield _Start(ready - opening, ready - lowered[0] if lowered else 0.0, routes)


def _timed_copy(source: Path, target: Path) -> float:
    """Seconds to read and write a folder's files."""
    begin = time.perf_counter()
    copy_to_disk(source, target)
    seconds = time.perf_counter() - begin
    shutil.rmtree(target)
    return seconds


def _lowered_file(workspace: Workspace, digest: str) -> Path:
    """The file that is read to load a version."""
    return max(
        files(workspace.folder / "store" / "versions" / digest / "lowered"), key=lambda path: path.stat().st_size
    )


def _checked(timing: Timing) -> Timing:
    if timing.error is not None:
        raise RuntimeError(f"a request to {timing.job.adapter} failed: {timing.error}")
    return timing
