"""Throughput of the engine in this process, without HTTP, and its decode step beside the roofline.

    python -m bench.serving.engine_throughput --folder .bench/qwen2.5-0.5b --serve "--threads 2"

runs one closed loop (`bench.serving.load`) per mix of adapters and prints one line of JSON: tokens per second, the
median decode step beside its lower bound (`bench.roofline`), and with `--memory` the bytes that adapters use and free.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from pydantic_settings import CliApp, get_subcommand

from bench import roofline
from bench.report import json_line
from bench.serving.client import Job
from bench.serving.load import Load, add_load_arguments, load_from, mixes
from lora_serve.cli import Cli
from lora_serve.config import ServeConfig
from lora_serve.engine.engine import Engine
from lora_serve.engine.process_main import EngineCore
from lora_serve.messages import (
    Call,
    EngineInfo,
    EvictAdapter,
    Generate,
    LoadAdapter,
    Operation,
    Update,
)
from lora_serve.request import AdapterUse, Finished, Request, Sampling, Tokens


@dataclass(frozen=True)
class RunResult:
    """Output tokens, seconds from first request to last token, and seconds of each decode step with all clients."""

    tokens: int
    seconds: float
    decode_steps: list[float]

    @property
    def throughput(self) -> float:
        return self.tokens / self.seconds


class Driver:
    """A closed loop of clients around one engine, in place of the server's engine process.

    Args:
        wake: set by the engine's threads when there is new work.
    """

    def __init__(self, engine: EngineCore, wake: threading.Event) -> None:
        self._engine = engine
        self._wake = wake
        self._ids = count()

    def run(self, load: Load) -> RunResult:
        """Run a closed loop to its end. Raises RuntimeError if any request fails."""
        jobs = load.jobs()
        clients = [iter(jobs[client :: load.clients]) for client in range(load.clients)]
        running: dict[str, Iterator[Job]] = {}
        tokens = 0
        steps = []
        begin = time.perf_counter()
        for client in clients:
            self._send_next(client, running)
        while running:
            before = time.perf_counter()
            update = self._step()
            now = time.perf_counter()
            if update.step is not None and update.step.tokens == update.step.sequences == load.clients:
                steps.append(now - before)
            for event in update.events:
                if isinstance(event, Tokens):
                    tokens += len(event.token_ids)
                elif isinstance(event, Finished):
                    if event.failure is not None:
                        raise RuntimeError(event.failure.message)
                    client = running.pop(event.request_id)
                    if now - begin < load.seconds:
                        self._send_next(client, running)
        return RunResult(tokens, time.perf_counter() - begin, steps)

    def call(self, operation: Operation) -> Any:
        """Run one adapter operation and return its result. Raises RuntimeError if it fails."""
        id = next(self._ids)
        self._engine.receive(Call(id, operation))
        while True:
            for reply in self._engine.replies():
                if reply.id == id:
                    if reply.failure is not None:
                        raise RuntimeError(reply.failure.message)
                    return reply.result
            self._step()

    def memory_bytes(self) -> int:
        """Bytes in all memory tiers, as the engine counts them."""
        return sum(self._engine.stats().bytes.values())

    def _step(self) -> Update:
        if not self._engine.busy:
            self._wake.wait(0.05)
            self._wake.clear()
        return self._engine.step()

    def _send_next(self, client: Iterator[Job], running: dict[str, Iterator[Job]]) -> None:
        job = next(client, None)
        if job is None:
            return
        id = f"bench-{next(self._ids)}"
        sampling = Sampling(max_tokens=job.max_tokens, temperature=0.0, ignore_eos=True)
        uses = () if job.adapter is None else (AdapterUse(job.adapter),)
        running[id] = client
        self._engine.receive(Generate(Request(id, job.prompt, sampling, uses)))


def memory(driver: Driver, names: Sequence[str], folder: Path) -> dict[str, Any]:
    """Load adapters one by one, then evict them: bytes used, over the file's size, and bytes freed."""
    for name in names:
        driver.call(EvictAdapter(name))
    begin = driver.memory_bytes()
    ratios = []
    for name in names:
        version = driver.call(LoadAdapter(name))["versions"][0]
        ratios.append(version["memory_bytes"] / (folder / name / "adapter_model.safetensors").stat().st_size)
    taken = driver.memory_bytes() - begin
    for name in names:
        driver.call(EvictAdapter(name))
    freed = taken - (driver.memory_bytes() - begin)
    return {"bytes_over_file": max(ratios), "taken": taken, "freed": freed, "adapters": len(names)}


def config_of(arguments: str) -> ServeConfig:
    """The options of `lora-serve serve ARGUMENTS`, as the command parses them."""
    chosen = get_subcommand(CliApp.run(Cli, cli_args=["serve", *shlex.split(arguments)]))
    if not isinstance(chosen, ServeConfig):
        raise TypeError("not the options of a server")
    return chosen


@contextmanager
def started_engine(
    model: str | Path, serve: str = "", adapters: Path | None = None
) -> Iterator[tuple[Engine, threading.Event]]:
    """Start an engine with a temporary store; yields it and the event that its threads set. Start-up errors are raised.

    Args:
        serve: further options of `lora-serve serve`.
        adapters: folder of adapters to publish at start.
    """
    with tempfile.TemporaryDirectory() as store:
        given = [str(model), "--store", store, *([] if adapters is None else ["--adapters", str(adapters)])]
        wake = threading.Event()
        config = config_of(f"{shlex.join(given)} {serve}")
        engine = Engine.build(config, wake=wake.set, progress=lambda stage, done: None)
        try:
            yield engine, wake
        finally:
            engine.close()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="what bench.make_model wrote")
    parser.add_argument("--serve", default="", metavar="ARGS", help="further options of `lora-serve serve`")
    parser.add_argument("--mix", type=mixes, default=["none", "one", "distinct"])
    parser.add_argument("--memory", action="store_true", help="also the bytes that adapters use and free")
    add_load_arguments(parser)
    args = parser.parse_args(arguments)
    folder = args.folder / "adapters"
    adapters = tuple(sorted(path.name for path in folder.iterdir()))
    with started_engine(args.folder / "model", args.serve, folder) as (engine, wake):
        load = replace(load_from(args), adapters=adapters, seed=args.seed)
        print(json_line(_measure(Driver(engine, wake), engine.info, load, args)))


def _measure(driver: Driver, info: EngineInfo, load: Load, args: argparse.Namespace) -> dict[str, Any]:
    dtype: torch.dtype = getattr(torch, info.dtype)
    runs = {}
    for mix in args.mix:
        driver.run(replace(load, mix=mix, requests=load.clients, output=(4, 4), salt=1))
        runs[mix] = driver.run(replace(load, mix=mix, salt=2 + args.mix.index(mix)))
    result: dict[str, Any] = {"engine": {mix: run.throughput for mix, run in runs.items()}, "decode": {}}
    peak = roofline.measure_peak(torch.device(info.device), dtype)
    scheme = config_of(f"{shlex.quote(str(args.folder))} {args.serve}").quantize
    for mix, run in runs.items():
        if not run.decode_steps:
            continue
        jobs = replace(load, mix=mix, requests=load.clients).jobs()
        cost = roofline.decode_cost(
            args.folder / "model",
            [args.folder / "adapters" / job.adapter for job in jobs if job.adapter is not None],
            batch=load.clients,
            context=sum(load.prompt) / 2 + sum(load.output) / 4,
            itemsize=dtype.itemsize,
            scheme=scheme,
        )
        result["decode"][mix] = roofline.compare(statistics.median(run.decode_steps), cost, peak)
    if args.memory:
        result["memory"] = memory(driver, load.adapters[: info.adapter_slots], args.folder / "adapters")
    return result


if __name__ == "__main__":
    main()
