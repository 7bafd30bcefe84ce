"""Sixteen names on three slots, under all that clients and admins do at once: every answer is the idle engine's.

The long run is for AddressSanitizer: `make asan ARGS="tests/engine/test_churn.py -m slow"` takes 20 minutes.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
from engine_session import Session
from parity import make_adapter

from lora_serve.messages import (
    Abort,
    Call,
    DeleteAdapter,
    EvictAdapter,
    Inspect,
    LoadAdapter,
    PinAdapter,
    Publish,
    UnloadAdapter,
)
from lora_serve.request import AdapterUse, Admitted, Finished

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

NAMES = [f"name{number:02}" for number in range(16)]
SLOTS = 3
IN_FLIGHT = 10
EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COMPOSABLE: list[Any] = [
    peft.LoraConfig(r=rank, target_modules=targets)
    for rank, targets in (
        (1, EVERYWHERE),
        (3, ["q_proj"]),
        (8, EVERYWHERE),
        (17, ["down_proj", "v_proj"]),
        (64, EVERYWHERE),
    )
]
ALONE: list[Any] = [
    peft.LoraConfig(r=4, target_modules=EVERYWHERE, use_dora=True),
    peft.LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights="pissa"),
    peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm"]),
    peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
]  # fmt: skip
# What may end a request or an operation here: its adapter was deleted or unloaded, pins leave no room for its
# adapters, it names what cannot be composed, or a pin or replacement is refused.
EXPECTED = {"adapter_not_found", "bad_request", "adapter_exists", "adapter_busy", "unavailable"}


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of adapters, each method twice with other weights."""
    folder = tmp_path_factory.mktemp("contents")
    for seed, config in enumerate([*COMPOSABLE, *ALONE] * 2):
        make_adapter("llama", folder / f"content{seed:02}", seed, config, reload=False)
    return sorted(folder.iterdir())


class IdleEngine:
    """What an engine answers that does nothing else, by prompt and versions."""

    def __init__(self, folder: Path, contents: list[Path]) -> None:
        self.session = Session(
            folder,
            adapters=contents[0].parent,
            max_model_len=64,
            adapter_slots=len(contents) + 1,
            kv_cache_memory=4 << 20,
        )
        infos = self.session.engine._calls._operations.describe_some("")
        self._names = {info.versions[0].digest: info.name for info in infos}
        self._answers: dict[Any, list[int]] = {}

    def answer(self, prompt: list[int], digests: tuple[str, ...], tokens: int) -> list[int]:
        key = (tuple(prompt), digests)
        if key not in self._answers:
            uses = tuple(AdapterUse(self._names[digest], weight=1 / len(digests)) for digest in digests)
            self._answers[key] = self.session.ask(str(len(self._answers)), prompt, uses=uses, max_tokens=16)
        return self._answers[key][:tokens]


@dataclass
class Churn:
    """Requests and operations by chance, on one engine."""

    session: Session
    idle: IdleEngine
    contents: list[Path]
    chosen: random.Random
    sent: dict[str, tuple[list[int], int]] = field(default_factory=dict)  # prompt and number of tokens
    aborted: set[str] = field(default_factory=set)
    calls: int = 0
    answered: int = 0
    requests: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def begin_request(self) -> None:
        uses = tuple(AdapterUse(name, weight=0.5) for name in self.chosen.sample(NAMES, 2))
        if (draw := self.chosen.random()) < 0.8:
            uses = (AdapterUse(uses[0].name),) if draw > 0.1 else ()
        id = f"request{self.requests}"
        self.requests += 1
        # Few prompts, so that answers are known and prefixes are found in the cache.
        prompt = [3 + 5 * self.chosen.randrange(3) + step for step in range(self.chosen.choice((1, 3, 9, 17)))]
        self.sent[id] = (prompt, self.chosen.randrange(1, 17))
        self.session.send(id, prompt, uses=uses, max_tokens=self.sent[id][1])

    def begin_operation(self) -> None:
        name = self.chosen.choice(NAMES)
        content = str(self.chosen.choice(self.contents))
        operations = [
            *[Publish(name, content, replace=True)] * 6,
            Publish(name, content),
            Inspect(content),
            DeleteAdapter(name),
            UnloadAdapter(name),
            *[LoadAdapter(name), EvictAdapter(name)] * 2,
            PinAdapter(name, True),
            *[PinAdapter(name, False)] * 2,
        ]
        self.call(self.chosen.choice(operations))

    def call(self, operation: Any) -> None:
        self.calls += 1
        self.session.engine.receive(Call(self.calls, operation))

    def step(self) -> None:
        self.session.step()
        for id in list(self.sent):
            if id in self.session.events and isinstance(end := self.session.events[id][-1], Finished):
                self.check(id, end)
        for number in list(self.session.replies):
            failure = self.session.replies.pop(number).failure
            assert failure is None or failure.kind in EXPECTED, failure
            self.answered += 1
            self.counts["operations" if failure is None else f"operation: {failure.kind}"] += 1

    def check(self, id: str, end: Finished) -> None:
        prompt, tokens = self.sent.pop(id)
        if end.failure is not None:
            assert end.failure.kind in EXPECTED, end.failure
            self.counts[end.failure.kind] += 1
        elif id in self.aborted:
            self.counts["aborted"] += 1
        else:
            first = self.session.events[id][0]
            assert isinstance(first, Admitted)
            digests = tuple(served.digest for served in first.adapters)
            assert self.session.tokens(id) == self.idle.answer(prompt, digests, tokens), (id, digests)
            self.counts["answers"] += 1
        del self.session.events[id]

    def finish(self) -> None:
        """Step until every request and operation has ended."""
        deadline = time.monotonic() + 120
        while self.sent or self.answered < self.calls:
            self.step()
            assert time.monotonic() < deadline, (self.sent, self.session.engine.stats())


@pytest.mark.parametrize("seconds", [4, pytest.param(1200, marks=[pytest.mark.slow, pytest.mark.timeout(0)])])
def test_every_answer_is_the_idle_engines_and_nothing_is_left(
    contents: list[Path], tmp_path: Path, seconds: int
) -> None:
    idle = IdleEngine(tmp_path / "idle", contents)
    session = Session(
        tmp_path, max_model_len=64, kv_cache_memory=1 << 20, max_num_batched_tokens=64, adapter_slots=SLOTS, threads=2,
        adapter_cache_memory=3_000_000,
    )  # fmt: skip
    churn = Churn(session, idle, contents, random.Random(0))
    for name in NAMES:
        churn.call(Publish(name, str(churn.chosen.choice(contents))))
    churn.finish()
    steps = session.engine._runner._base._steps
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        while len(churn.sent) < IN_FLIGHT:
            churn.begin_request()
        if churn.calls - churn.answered < 8 and churn.chosen.random() < 0.05:
            churn.begin_operation()
        if churn.chosen.random() < 0.02:
            id = churn.chosen.choice(list(churn.sent))
            churn.aborted.add(id)
            session.engine.receive(Abort(id))
        if churn.chosen.random() < 0.05:
            steps._steps.clear()  # so that steps are recorded while adapters come and go
        churn.step()
    churn.finish()
    print(
        f"{session.engine.stats().steps_total} steps: {dict(churn.counts)}, loads {session.engine.stats().loads_total}"
    )
    assert churn.counts["answers"] > 20 * seconds / 4
    assert steps.disabled is None
    for name in NAMES:
        churn.call(PinAdapter(name, False))
        churn.call(DeleteAdapter(name))
    churn.finish()
    store = tmp_path / "store"
    session.engine._registry.wait(lambda: not any([*(store / "versions").iterdir(), *(store / "staging").iterdir()]))
    assert session.engine.stats().bytes == {"host": 0, "device": 0}
    assert session.engine.stats().kv_blocks_used == 0
    session.engine.close()
    idle.session.engine.close()
