"""What is said about laws follows from what was measured, and the in-process loop measures what the engine did."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import torch

from bench import roofline
from bench.serving.engine_throughput import Driver, config_of, memory
from bench.laws import judge, law_table
from bench.serving.load import Load, Summary
from bench.make_model import make_adapter, make_model
from bench.shapes import SHAPES
from lora_serve.errors import Failure
from lora_serve.messages import Abort, Call, EvictAdapter, Generate, LoadAdapter, Reply, Stats, StepReport, Update
from lora_serve.request import Admitted, Event, Finished, Request, Served, Tokens

TINY = SHAPES["tiny"]
STEP = 0.01  # seconds that the fake engine takes


class FakeEngine:
    """One token a step for everyone that runs; a first step reads the prompts. Adapters take `size` bytes."""

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
    ran = Driver(engine, threading.Event()).run(LOAD)
    assert ran.tokens == 30
    assert engine.most == 3
    assert len(ran.decode_steps) == 8  # two rounds of five steps, of which one reads prompts
    assert all(STEP <= step < STEP + 0.05 for step in ran.decode_steps)
    assert 10 * STEP <= ran.seconds < 1
    assert ran.throughput == pytest.approx(30 / ran.seconds)


def test_a_failure_in_process_is_not_a_figure() -> None:
    with pytest.raises(RuntimeError, match="it broke"):
        Driver(FakeEngine(fails=True), threading.Event()).run(LOAD)


def test_memory_is_what_the_engine_holds_before_between_and_after(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_adapter(TINY, tmp_path / name, rank=4, seed=1, targets=["q_proj"])
    size = (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    clean = memory(Driver(FakeEngine(size=size), threading.Event()), ["a", "b"], tmp_path)
    assert clean == {"bytes_over_file": 1.0, "taken": 2 * size, "freed": 2 * size, "adapters": 2}
    leaky = memory(Driver(FakeEngine(size=size, leaks=10), threading.Event()), ["a", "b"], tmp_path)
    assert leaky["taken"] - leaky["freed"] == 20


def test_options_are_read_as_the_server_reads_them() -> None:
    config = config_of("model --threads 2 --dtype bfloat16 --no-prefix-cache")
    assert (config.model, config.threads, config.dtype, config.prefix_cache) == ("model", 2, "bfloat16", False)


def test_a_step_s_need_is_every_weight_once_each_adapter_once_and_all_kv(tmp_path: Path) -> None:
    make_model(TINY, tmp_path / "model")
    for name in ("a", "b"):
        make_adapter(TINY, tmp_path / name, rank=4, seed=1, targets=["q_proj"])
    kv = TINY.kv_heads * TINY.head_dim
    layer = 2 * TINY.hidden**2 + 2 * TINY.hidden * kv + 3 * TINY.hidden * TINY.intermediate
    layer += TINY.hidden + 2 * kv + 2 * TINY.hidden  # biases and norms
    weights = TINY.vocabulary * TINY.hidden + TINY.hidden + TINY.layers * layer
    adapter = TINY.layers * 4 * 2 * TINY.hidden
    a, b = tmp_path / "a", tmp_path / "b"
    needed = floor.need(tmp_path / "model", [a, b, b], batch=3, context=10, itemsize=2)
    assert needed.nbytes == 2 * (weights + 2 * adapter + 3 * 10 * TINY.layers * 2 * kv)
    assert needed.operations == 2 * (3 * weights + 3 * adapter) + 3 * 10 * TINY.layers * 4 * TINY.hidden

    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    untied = floor.need(tmp_path / "model", [], batch=3, context=0, itemsize=2)
    assert untied.nbytes == 2 * (weights - TINY.vocabulary * TINY.hidden)


def test_the_floor_is_the_harder_of_the_two_limits() -> None:
    needed = floor.Need(nbytes=100.0, operations=1000.0)
    assert needed.seconds(floor.Machine(bandwidth=10.0, peak=1000.0)) == 10.0
    assert needed.seconds(floor.Machine(bandwidth=1000.0, peak=10.0)) == 100.0
    assert floor.verdict(15.0, needed, floor.Machine(10.0, 1000.0))["ratio"] == 1.5


def test_the_limits_of_this_machine_are_plausible() -> None:
    machine = floor.measure(torch.device("cpu"), torch.bfloat16)
    assert 1e8 < machine.bandwidth < 1e13
    assert 1e8 < machine.peak < 1e15


def summary(throughput: float) -> Summary:
    nan = float("nan")
    return Summary(throughput, nan, nan, nan, nan, nan, nan, nan, 1, 0, 1, 1.0)


def test_each_law_is_the_ratio_that_it_says_beside_its_goal() -> None:
    over_http = {
        "none": [summary(100.0), summary(90.0), summary(500.0)],
        "one": [summary(80.0)],
        "distinct": [summary(78.0)],
        "plain base": [summary(101.0)],
    }
    decode = {"step": 0.06, "floor": 0.03, "ratio": 2.0, "bandwidth": 3e10, "peak": 3e11}
    inside = [
        {
            "engine": {"distinct": 104.0},
            "decode": {"none": decode},
            "memory": {"bytes_over_file": 1.01, "taken": 10, "freed": 10, "adapters": 1},
        },
        {"engine": {"distinct": 104.0}, "decode": {"none": decode}},
    ]
    laws = judge(over_http, inside, [1, 2, 3, 9, 11, 12])
    assert [(law.number, round(law.value, 3), law.holds) for law in laws] == [
        (1, 0.975, True),
        (2, 0.8, False),
        (3, 0.99, True),
        (9, 1.01, True),
        (9, 1.0, True),
        (11, 2.0, False),
        (12, 0.75, False),
    ]
    assert [law.number for law in judge(over_http, [], [2])] == [2]
    printed = law_table(laws).splitlines()
    assert len({len(line) for line in printed}) == 1
    assert "80.0 ÷ 100.0 tok/s" in printed[3]
    assert printed[3].rstrip(" |").endswith("no")
