"""The in-process loop runs a closed loop on the engine and measures its steps and memory."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from bench.make_model import make_adapter
from bench.serving.engine_throughput import Driver, config_of, memory
from bench.serving.load import Load
from bench.shapes import SHAPES
from lora_serve.errors import Failure
from lora_serve.messages import Abort, Call, EvictAdapter, Generate, LoadAdapter, Reply, Stats, StepReport, Update
from lora_serve.request import Admitted, Event, Finished, Request, Served, Tokens

TINY = SHAPES["tiny"]
STEP = 0.01  # seconds that the fake engine takes


class FakeEngine:
    """A fake engine: one token per step and running request, after a prefill step. Adapters take `size` bytes."""

    def __init__(self, *, size: int = 0, leaks: int = 0, fails: bool = False) -> None:
        self.running: dict[str, tuple[Request, int]] = {}
        self.events: list[Event] = []
        self.answers: list[Reply] = []
        self.most = 0
        self.size, self.leaks, self.fails = size, leaks, fails
        self.bytes = {"base": 1000, "adapters": 0}
        self.loaded: set[str] = set()

    @property
    def busy(self) -> bool:
        return bool(self.running or self.events or self.answers)

    def receive(self, message: Generate | Abort | Call) -> None:
        if isinstance(message, Generate):
            request = message.request
            self.running[request.id] = (request, 0)
            self.most = max(self.most, len(self.running))
            served = [Served(use.name, "d", use.weight) for use in request.adapters]
            self.events.append(Admitted(request.id, served))
        elif isinstance(message, Call):
            match message.operation:
                case LoadAdapter(name) if name not in self.loaded:
                    self.loaded.add(name)
                    self.bytes["adapters"] += self.size
                case EvictAdapter(name) if name in self.loaded:
                    self.loaded.discard(name)
                    self.bytes["adapters"] -= self.size - self.leaks
            self.answers.append(Reply(message.id, {"versions": [{"memory_bytes": self.size}]}))

    def step(self) -> Update:
        report = None
        if self.running:
            time.sleep(STEP)
            fresh = [request for request, done in self.running.values() if not done]
            tokens = sum(len(request.prompt) for request in fresh) + len(self.running) - len(fresh)
            report = StepReport(len(self.running), tokens, 0, STEP)
            for id, (request, done) in list(self.running.items()):
                self.events.append(Tokens(id, [5]))
                self.running[id] = (request, done + 1)
                if done + 1 == request.sampling.max_tokens:
                    del self.running[id]
                    failure = Failure("engine_fault", "it broke") if self.fails else None
                    self.events.append(Finished(id, "error" if self.fails else "length", failure=failure))
        events, self.events = self.events, []
        return Update(events, None, report)

    def replies(self) -> list[Reply]:
        answers, self.answers = self.answers, []
        return answers

    def stats(self) -> Stats:
        return Stats(bytes=dict(self.bytes))


LOAD = Load(mix="distinct", adapters=("a", "b", "c"), clients=3, requests=6, prompt=(4, 4), output=(5, 5))


def test_the_engine_in_process_gets_a_closed_loop() -> None:
    engine = FakeEngine()
    result = Driver(engine, threading.Event()).run(LOAD)
    assert result.tokens == 30
    assert engine.most == 3
    assert len(result.decode_steps) == 8  # two rounds of five steps, of which one reads prompts
    assert all(STEP <= step < STEP + 0.05 for step in result.decode_steps)
    assert 10 * STEP <= result.seconds < 1
    assert result.throughput == pytest.approx(30 / result.seconds)


def test_a_failed_request_raises() -> None:
    with pytest.raises(RuntimeError, match="it broke"):
        Driver(FakeEngine(fails=True), threading.Event()).run(LOAD)


def test_memory_is_the_difference_in_bytes_that_the_engine_counts(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_adapter(TINY, tmp_path / name, rank=4, seed=1, targets=["q_proj"])
    size = (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    clean = memory(Driver(FakeEngine(size=size), threading.Event()), ["a", "b"], tmp_path)
    assert clean == {"bytes_over_file": 1.0, "taken": 2 * size, "freed": 2 * size, "adapters": 2}
    leaky = memory(Driver(FakeEngine(size=size, leaks=10), threading.Event()), ["a", "b"], tmp_path)
    assert leaky["taken"] - leaky["freed"] == 20


def test_options_are_parsed_as_the_server_parses_them() -> None:
    config = config_of("model --threads 2 --dtype bfloat16 --no-prefix-cache")
    assert (config.model, config.threads, config.dtype, config.prefix_cache) == ("model", 2, "bfloat16", False)
