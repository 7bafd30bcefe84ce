"""Adapters of every method with something in them changed at random are served or refused by name; nothing else."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from test_budget import VALID, lowered
from torch import Tensor

from lora_serve.adapters.formats.dispatch import FORMATS
from lora_serve.adapters.formats.fields import COMMON
from lora_serve.errors import AdapterInvalid

DRAWS = 150  # of each method; tens of thousands were tried on adapters that PEFT saved for small models
FIELDS = [
    *sorted(COMMON), "r", "lora_alpha", "alpha", "init_r", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora",
    "bias", "lora_bias", "trainable_token_indices", "token_indices", "target_parameters", "alora_invocation_tokens",
    "use_bdlora", "kasa_config", "init_lora_weights", "init_weights", "mini_r", "topk", "num_vectors", "vector_length",
    "save_projection", "projection_prng_key", "sparse", "randlora_alpha", "num_virtual_tokens", "token_dim",
    "num_layers", "num_tasks", "cpt_token_ids",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 1.5, 1e308, 1e-320, 999_999, 1 << 62, "", "q", "none", "all", "(", "a|b",
    "pissa", "olora", "bat", "mini", "\0", "ü" * 300, [], [1], ["q"], [[0, 1]], [None], [3, 3], [1 << 40], ["head"],
    ["norm", "embed"], [True, False], {}, {"q": 1}, {"q": 0}, {"(": 1}, {"a": []}, {"nblocks": 2}, {"embed": [1]},
]  # fmt: skip
WORDS = ("q", "head", "embed", "norm", "ghost", "weight", "bias", "base_layer", "lora_A", "", "module", "_orig_mod")


def mutated(
    generator: random.Random, tensors: dict[str, Tensor], fields: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, fields = dict(tensors), dict(fields)
    for _ in range(generator.choice((1, 1, 2, 3))):
        key = generator.choice([*tensors])
        match generator.randrange(6):
            case 0 | 1:
                fields[generator.choice(FIELDS)] = generator.choice(VALUES)
            case 2:
                shape = [generator.choice((0, 1, 2, 3, 4, 8, 12, 20)) for _ in range(generator.randrange(9))]
                tensors[key] = torch.ones(shape[: 1 + max(0, 6 - len(shape))])
            case 3:
                tensors[key] = torch.full_like(tensors[key], generator.choice((0, 1, 3, 120)))
            case 4 if len(tensors) > 1:
                del tensors[key]
            case _:
                parts = key.split(".")
                parts[generator.randrange(len(parts))] = generator.choice(WORDS)
                tensors[".".join(parts)] = tensors.pop(key) if generator.random() < 0.5 else tensors[key]
    return tensors, fields


@pytest.mark.parametrize("method", FORMATS)
def test_a_mutated_adapter_is_served_or_refused_with_a_short_reason(method: str) -> None:
    generator = random.Random(method)
    outcomes = [outcome(method, mutated(generator, *VALID[method])) for _ in range(DRAWS)]
    assert 10 < sum(map(bool, outcomes)) < DRAWS
    assert all(len(reason) < 1500 for reason in outcomes)


def outcome(method: str, case: tuple[dict[str, Tensor], dict[str, Any]]) -> str:
    """Why an adapter is refused; empty if it is served. Any other exception is an error of the test."""
    try:
        lowered(method, case)
    except AdapterInvalid as error:
        return error.message
    return ""
