"""The engine on a GPU without HTTP: start-up, decode steps, and token gaps of running streams while adapters load."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.gpu.figures import Stall, load_stall
from bench.gpu.forward_pass import random_weights_on
from bench.make_model import make_adapter
from bench.serving.engine_throughput import Driver
from bench.serving.load import Load, Mix
from bench.shapes import Shape
from lora_serve.config import ServeConfig
from lora_serve.engine.engine import Engine
from lora_serve.messages import Abort, Call, EvictAdapter, Generate, LoadAdapter, Operation
from lora_serve.request import AdapterUse, Finished, Request, Sampling, Tokens

STREAMS = 16
COPY = 0.1  # seconds after a load's reply in which its host-to-device copy may still run
MIXES: tuple[Mix, ...] = ("none", "one", "uniform")


@dataclass(frozen=True)
class EngineLoad:
    """The requests and adapter loads that the engine gets.

    Attributes:
        adapters: number of adapters on disk, of rank 16.
        clients, prompt, output: of a closed loop; its mean context is that of the steps measured without the engine.
        longest: the longest sequence in tokens.
        quiet: seconds without adapter loads, to measure usual gaps.
        loads: number of adapter loads while streams run.
    """

    adapters: int = 8
    clients: int = 32
    prompt: int = 480
    output: int = 64
    longest: int = 8192
    quiet: float = 4.0
    loads: int = 14


def make_adapters(shape: Shape, folder: Path, count: int) -> Path:
    """Write `count` adapters with random weights into a new folder."""
    folder.mkdir()
    for number in range(count):
        make_adapter(shape, folder / f"a{number:04}", rank=16, seed=1 + number)
    return folder


@contextmanager
def started_engine(
    model: Path, adapters: Path, store: Path, device: torch.device, work: EngineLoad, startup: dict[str, float]
) -> Iterator[tuple[Engine, threading.Event]]:
    """Start an engine on a base with random weights; `startup` gets the seconds by stage."""
    wake = threading.Event()
    config = ServeConfig(
        model=str(model),
        store=store,
        adapters=adapters,
        device=str(device),
        dtype="bfloat16",
        max_model_len=work.longest,
        max_num_seqs=max(64, work.clients),
        max_num_batched_tokens=2048,
        adapter_slots=work.adapters,
        prefix_cache=False,
    )
    begin = last = time.perf_counter()
    stage = "start"

    def progress(next_stage: str, done: float) -> None:
        nonlocal last, stage
        now = time.perf_counter()
        startup[stage] = startup.get(stage, 0.0) + now - last
        stage, last = next_stage, now

    with random_weights_on(device):
        engine = Engine.build(config, wake=wake.set, progress=progress)
    progress("", 1.0)
    startup["total"] = time.perf_counter() - begin
    try:
        yield engine, wake
    finally:
        engine.close()


def decode(engine: Engine, wake: threading.Event, work: EngineLoad, vocabulary: int) -> dict[str, dict[str, float]]:
    """By mix of adapters: median seconds and number of decode steps with all clients; tokens per second of all."""
    names = tuple(f"a{number:04}" for number in range(work.adapters))
    driver = Driver(engine, wake)
    load = Load(
        adapters=names, clients=work.clients, requests=work.clients, prompt=(work.prompt, work.prompt),
        output=(work.output, work.output), token_ids=(1, min(2000, vocabulary) - 1),
    )  # fmt: skip
    found: dict[str, dict[str, float]] = {}
    for salt, mix in enumerate(MIXES):
        driver.run(replace(load, mix=mix, output=(4, 4), salt=100 + salt))
        result = driver.run(replace(load, mix=mix, salt=salt))
        steps = result.decode_steps
        found[mix] = {
            "step": statistics.median(steps) if steps else math.nan,
            "steps": len(steps),
            "tokens per second": result.throughput,
        }
    return found


class Streams:
    """Sequences that keep running, half of them with an adapter.

    Attributes:
        times: of each stream's tokens.
    """

    def __init__(self, engine: Engine, wake: threading.Event, work: EngineLoad) -> None:
        self._engine = engine
        self._wake = wake
        self._calls = 0
        self._answered: set[int] = set()
        self._sampling = Sampling(max_tokens=work.longest - 64, temperature=0.0, ignore_eos=True)
        self.times: dict[str, list[float]] = {f"stream-{index}": [] for index in range(STREAMS)}
        for id in self.times:
            self._begin(id)
        while not all(self.times.values()):
            self.tick()

    def tick(self) -> None:
        """Run one step; a finished stream is started again. Raises RuntimeError if a stream or an operation fails."""
        if not self._engine.busy:
            self._wake.wait(0.01)
            self._wake.clear()
        update = self._engine.step()
        now = time.perf_counter()
        for event in update.events:
            if isinstance(event, Tokens):
                self.times[event.request_id].append(now)
            elif isinstance(event, Finished):
                if event.failure is not None:
                    raise RuntimeError(event.failure.message)
                self._begin(event.request_id)
        for reply in self._engine.replies():
            if reply.failure is not None:
                raise RuntimeError(reply.failure.message)
            self._answered.add(reply.id)

    def _begin(self, id: str) -> None:
        index = list(self.times).index(id)
        uses = (AdapterUse("a0000"),) if index % 2 else ()
        self._engine.receive(Generate(Request(id, [1 + index] * 32, self._sampling, uses)))

    def run(self, seconds: float) -> tuple[float, float]:
        """Run for some time; returns its start and end."""
        begin = now = time.perf_counter()
        while now < begin + seconds:
            self.tick()
            now = time.perf_counter()
        return begin, now

    def call(self, operation: Operation) -> tuple[float, float]:
        """Run an operation beside the streams; returns its start and end."""
        begin = time.perf_counter()
        self._calls += 1
        self._engine.receive(Call(self._calls, operation))
        while self._calls not in self._answered:
            self.tick()
        return begin, time.perf_counter()

    def close(self) -> None:
        for id in self.times:
            self._engine.receive(Abort(id))
        while self._engine.busy:
            self._engine.step()


def load_stalls(engine: Engine, wake: threading.Event, work: EngineLoad) -> Stall:
    """Load adapters from disk onto the device one after the other while streams run (goal 6)."""
    names = [f"a{number:04}" for number in range(1, work.adapters)]
    loads: list[tuple[float, float]] = []
    streams = Streams(engine, wake, work)
    try:
        for name in names:
            streams.call(EvictAdapter(name))
        streams.run(0.5)
        quiet = streams.run(work.quiet)
        for index in range(work.loads):
            name = names[index % len(names)]
            begin, _ = streams.call(LoadAdapter(name))
            loads.append((begin, streams.run(COPY)[1]))
            streams.call(EvictAdapter(name))
            streams.run(COPY)
        return load_stall([*streams.times.values()], loads, quiet)
    finally:
        streams.close()


def measure(
    shape: Shape,
    device: torch.device,
    work: EngineLoad,
    model: Path,
    adapters: Path,
    store: Path,
    found: dict[str, Any],
) -> None:
    """Measure start-up by stage, decode steps by mix, and the load stall; results go into `found` one by one."""
    found["startup"] = {}
    with started_engine(model, adapters, store, device, work, found["startup"]) as (engine, wake):
        found |= {"kv tokens": engine.info.kv_tokens, "kernels": engine.info.kernels, "notes": list(engine.info.notes)}
        found["decode"] = decode(engine, wake, work, shape.vocabulary)
        found["learnt costs"] = engine.stats().step_costs
        found["stall"] = load_stalls(engine, wake, work)
