"""Adapters that load while steps run, and while steps are recorded, change no answer and no memory but their own."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
from engine_session import Session
from parity import make_adapter

from lora_serve.kernels.cpu.build import CHECKED
from lora_serve.messages import Call, EvictAdapter
from lora_serve.request import AdapterUse

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS: dict[str, Any] = {
    "rank1": peft.LoraConfig(r=1, target_modules=EVERYWHERE),
    "rank5": peft.LoraConfig(r=5, target_modules=["q_proj", "down_proj"]),
    "rank64": peft.LoraConfig(r=64, target_modules=EVERYWHERE),
    # Lowering the others reads the base's weights, which the kernels unpack for it.
    "dora": peft.LoraConfig(r=4, target_modules=EVERYWHERE, use_dora=True),
    "pissa": peft.LoraConfig(r=4, target_modules=["v_proj", "up_proj"], init_lora_weights="pissa"),
    "head": peft.LoraConfig(r=3, target_modules=["q_proj", "lm_head"]),  # PEFT saves the head's own weights beside it
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm"]),
}
Case = tuple[list[int], tuple[AdapterUse, ...]]  # prompt, adapters
COMPOSED = ("rank1", "rank5", "rank64", "head")
ROUNDS = 4 if CHECKED else 15


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, config) in enumerate(CONFIGS.items()):
        make_adapter("llama", folder / name, seed, config, reload=False)
    return folder


def cases() -> list[Case]:
    """Prompts and what is used on them: the base, one adapter, or several of them."""
    chosen = random.Random(0)
    routes: list[tuple[AdapterUse, ...]] = [(), (), (), *((AdapterUse(name),) for name in CONFIGS)]
    routes += [tuple(AdapterUse(name, weight=0.5) for name in chosen.sample(COMPOSED, n)) for n in (2, 3, 2)]
    return [([chosen.randrange(3, 90) for _ in range(chosen.choice((1, 3, 9, 17)))], route) for route in routes * 2]


class Everything(set[Any]):
    """Batch shapes seen before: all of them, so that the first step of a shape is recorded."""

    def __contains__(self, shape: object) -> bool:
        return True


def ask(session: Session, tag: str, chosen: Sequence[tuple[int, Case]]) -> dict[int, list[int]]:
    """The tokens of some cases at once, by number. Every fourth step is recorded, the others are replayed."""
    steps = session.engine._runner._base._steps
    for index, (prompt, uses) in chosen:
        session.send(f"{tag}-{index}", prompt, uses=uses, max_tokens=12)
    count, deadline = 0, time.monotonic() + 60
    while session.engine.busy or session.engine.stats().waiting:
        if count % 4 == 0:
            steps._steps.clear()
        count += 1
        session.step()
        assert time.monotonic() < deadline, "the engine never came to rest"
    return {index: session.tokens(f"{tag}-{index}") for index, _ in chosen}


def test_answers_are_those_of_the_idle_engine(adapters: Path, tmp_path: Path) -> None:
    session = Session(
        tmp_path, adapters=adapters, max_model_len=64, kv_cache_memory=4 << 20, max_num_batched_tokens=64,
        adapter_slots=8, threads=2,
    )  # fmt: skip
    steps, chosen = session.engine._runner._base._steps, random.Random(1)
    steps._seen = Everything()
    numbered = list(enumerate(cases()))
    wanted = {index: ask(session, "idle", [(index, case)])[index] for index, case in numbered}
    for number in range(ROUNDS):
        for offset, name in enumerate(CONFIGS):
            session.engine.receive(Call(number * len(CONFIGS) + offset, EvictAdapter(name)))
        some = chosen.sample(numbered, chosen.randrange(4, 20))
        assert ask(session, str(number), some) == {index: wanted[index] for index, _ in some}
    assert steps.disabled is None
    assert session.engine.stats().loads_total["host"] > ROUNDS
    session.engine.close()
