"""Overlapped steps, launched before the previous step's tokens are read, give the same outputs as synchronous ones."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import peft
import pytest
from engine_session import Session
from parity import make_adapter

from lora_serve.messages import Abort
from lora_serve.request import Finished, Tokens

PLAIN = {"temperature": 0.9, "top_p": 0.8, "logprobs": 2}
STEERED = {"temperature": 0.9, "repetition_penalty": 1.3, "presence_penalty": 0.5}


def asked(rng: random.Random, options: dict[str, Any]) -> dict[str, Any]:
    prompt = [rng.randrange(3, 90) for _ in range(rng.randrange(1, 25))]
    more = {"min_tokens": 2, "stop_token_ids": [rng.randrange(96) for _ in range(9)]} if rng.random() < 0.5 else {}
    more |= {"prompt_logprobs": 1} if rng.random() < 0.3 else {}
    adapter = rng.choice([None, "one", "two"])
    return {"prompt": prompt, "adapter": adapter, "max_tokens": rng.randrange(1, 14), **options, **more}


def outputs(session: Session, id: str) -> list[Any]:
    """A request's outputs, independent of how they were split into events."""
    events = session.events[id]
    tokens = [event for event in events if isinstance(event, Tokens)]
    end = events[-1]
    assert isinstance(end, Finished)
    return [
        [token for event in tokens for token in event.token_ids],
        [round(each.value, 4) for event in tokens for each in event.logprobs or []],
        [event.prompt_logprobs is not None for event in tokens[:1]],
        (end.reason, end.stop_token),
    ]


@pytest.mark.parametrize("options", [[PLAIN], [PLAIN, PLAIN, STEERED]], ids=["free", "some steered"])
def test_every_request_gets_the_same_output(tmp_path: Path, options: list[dict[str, Any]]) -> None:
    for seed, name in enumerate(("one", "two")):
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        make_adapter("llama", tmp_path / "adapters" / name, seed, config)
    rng = random.Random(5)
    requests = [asked(rng, rng.choice(options) | {"seed": i}) for i in range(24)]
    results = []
    for overlap in (False, True):
        session = Session(
            tmp_path / str(overlap),
            overlap=overlap,
            adapters=tmp_path / "adapters",
            kv_cache_memory=768 * 120,
            max_model_len=48,
            max_num_seqs=6,
        )
        overlapped = 0
        for i, request in enumerate(requests):
            session.send(str(i), **request)
            session.step()
            overlapped += session.engine.step_in_flight
            if i % 7 == 3:  # a client leaves
                session.send("leaves", [1, 2, 3], max_tokens=40)
                session.step()
                session.engine.receive(Abort("leaves"))
                session.step()
        session.run()
        results.append([outputs(session, str(i)) for i in range(len(requests))])
        assert session.blocks_used == 0
        assert bool(overlapped) == overlap
        session.engine.close()
    for i, (left, right) in enumerate(zip(*results, strict=True)):
        assert left == right, requests[i]


def test_the_engine_stays_busy_when_finished_sequences_make_room_for_waiting_ones(tmp_path: Path) -> None:
    session = Session(tmp_path, overlap=True, max_num_seqs=2)
    for name in "abcd":
        session.send(name, [5, 9, 33], max_tokens=3)
    for _ in range(40):
        if not session.engine.busy:
            break
        session.step()
    assert all(len(session.tokens(name)) == 3 for name in "abcd")
    session.engine.close()
