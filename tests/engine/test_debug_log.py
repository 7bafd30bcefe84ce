"""The log at level debug: a line for each decision on a sequence or an adapter, with no prompts; none above it."""

from __future__ import annotations

import logging
from pathlib import Path

import peft
import pytest
from engine_session import Session
from parity import make_adapter
from test_scheduler import run, scheduler, sequence

PROMPT = [91, 92, 93]
LORA = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}


def said(caplog: pytest.LogCaptureFixture, begins: str) -> list[str]:
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("lora_serve.")]
    return [line for line in lines if line.startswith(begins)]


def test_sequences_that_are_admitted_and_preempted_are_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    s = scheduler(blocks=6, prefix=False)
    for order in range(2):
        s.add(seq := sequence(order, 7))
        seq.limit = 24
    while not s.running.preemptions:
        run(s)
    assert said(caplog, "admitted 0")[0] == (
        "admitted 0 of base: 7 tokens, 0 cached, 7 in this step; 1 running, 1 waiting, 4 KV blocks free"
    )
    (preempted,) = said(caplog, "preempted")
    assert preempted.startswith("preempted 1 with ")
    assert preempted.endswith("no KV block is free for 0")


def test_a_sequence_whose_adapter_left_memory_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    s = scheduler()
    s.add(sequence(0, 3, "poet"))
    run(s)
    run(s, lambda digest: False)
    assert said(caplog, "preempted") == ["preempted 0 with 3 tokens in 1 blocks: its adapter left memory"]


def test_turns_that_end_are_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    s = scheduler(slots=1)
    for order, adapter in enumerate("ab"):
        s.add(sequence(order, 3, adapter))
    for _ in range(6):
        run(s)
    assert said(caplog, "rotated") == ["rotated at step 5: the turn of b begins; a after 4 steps yielded"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("bard", "poet")):
        make_adapter("llama", folder / name, seed, peft.LoraConfig(**LORA))
    return folder


@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO])
def test_loads_and_evictions_are_told_with_names_and_for_whom(
    adapters: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, level: int
) -> None:
    session = Session(tmp_path, adapters=adapters, adapter_slots=1)
    caplog.set_level(level)
    for name in ("bard", "poet"):
        session.ask(name, PROMPT, adapter=name)
    session.engine.close()
    if level > logging.DEBUG:
        assert [record for record in caplog.records if record.name.startswith("lora_serve.")] == []
        return
    for name in ("bard", "poet"):
        begun, ended = said(caplog, f"load of {name}@")
        assert " begun: " in begun
        assert " complete after " in ended
        assert len(said(caplog, f"admitted {name} of {name}@")) == 1
    (evicted,) = said(caplog, "evicted bard@")
    assert " from the device for poet@" in evicted
    assert "91" not in "".join(said(caplog, "admitted"))
