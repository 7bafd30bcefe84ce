"""Admission: which requests are refused once their adapters are known, and which field the error names."""

from __future__ import annotations

from typing import Any

import pytest

from lora_serve.adapters.registry import Lease
from lora_serve.adapters.traits import Traits
from lora_serve.engine.admission import check
from lora_serve.errors import BadRequest, ContextExceeded
from lora_serve.messages import EngineInfo
from lora_serve.request import Request, Sampling

INFO = EngineInfo(
    model="m", root="m", device="cpu", dtype="float32", kernels="native", max_model_len=20, vocab_size=50,
    eos_token_ids=(2,), kv_tokens=100, adapter_slots=8, adapters=0, parameters=1, created=0,
)  # fmt: skip
FIXED = Traits(not_additive="it rescales parts of the base (norm)")


def lease(name: str = "a", weight: float = 1.0, **traits: Any) -> Lease:
    return Lease(name, name, weight, Traits(**traits))


def admit(*leases: Lease, prompt: tuple[int, ...] = (5, 6), max_tokens: int = 4, **sampling: Any) -> None:
    check(Request("r", list(prompt), Sampling(max_tokens=max_tokens, **sampling)), leases, INFO)


def test_additive_adapters_can_be_weighted_and_composed() -> None:
    admit(lease("a", 0.5), lease("b", -2.0), lease("c", invocation=(1,)))
    admit(*(lease(str(index)) for index in range(8)))
    admit(Lease("a", "a", 1.0, FIXED))


@pytest.mark.parametrize(
    ("leases", "said"),
    [
        ([Lease("fixed", "f", 0.5, FIXED)], "fixed cannot be weighted: it rescales parts of the base"),
        ([lease("a"), Lease("fixed", "f", 1.0, FIXED)], "fixed cannot be composed with others: it rescales"),
        ([Lease("fixed", "f", 1.0, FIXED)] * 2, "fixed cannot be composed"),
        ([lease(str(index)) for index in range(9)], "more than 8 adapters"),
    ],
)
def test_adapters_that_cannot_be_composed_are_refused_by_name_and_reason(leases: list[Lease], said: str) -> None:
    with pytest.raises(BadRequest, match=said) as refusal:
        admit(*leases)
    assert refusal.value.param == "adapter"


def test_virtual_tokens_count_towards_the_context_length() -> None:
    admit(lease(virtual=17))
    with pytest.raises(ContextExceeded, match="2 tokens and the adapter 18 virtual ones, the context 20"):
        admit(lease(virtual=18))
    admit(lease(virtual=18), max_tokens=0)
    with pytest.raises(ContextExceeded, match="the prompt has 20 tokens, the context 20"):
        admit(prompt=(5,) * 20)


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"prompt": (5, 50)}, "prompt"),
        ({"prompt": (-1,)}, "prompt"),
        ({"prompt": ()}, "prompt"),
        ({"stop_token_ids": (50,)}, "stop_token_ids"),
        ({"logit_bias": {50: 1.0}}, "logit_bias"),
    ],
)
def test_tokens_outside_the_vocabulary_are_refused(asked: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as refusal:
        admit(**asked)
    assert refusal.value.param == param
    if param != "prompt" or asked["prompt"] == (5, 50):
        admit(lease(vocabulary=51), **asked)


def test_a_smaller_vocabulary_of_an_adapter_is_enforced() -> None:
    with pytest.raises(BadRequest, match=r"outside 0\.\.39"):
        admit(lease(vocabulary=40), prompt=(40,))
