"""Methods other than LoRA: unsupported fields, keys and shapes are refused by name."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from method_cases import (
    ADALORA,
    BANK,
    GOOD,
    LOHA,
    LOKR,
    MISS,
    RANDLORA,
    TALL,
    TOKENS,
    VBLORA,
    VBLORA_FIELDS,
    VERA,
    WIDE,
    lower_tensors,
    normal,
)
from torch import Tensor

from lora_serve.adapters.formats import (
    adalora,
    delora,
    ia3,
    ln_tuning,
    loha,
    lokr,
    miss,
    randlora,
    trainable_tokens,
    vblora,
    vera,
)
from lora_serve.adapters.formats.fields import COMMON
from lora_serve.errors import AdapterInvalid

MODULES: dict[str, tuple[ModuleType, type]] = {
    "ADALORA": (adalora, peft.AdaLoraConfig),
    "VERA": (vera, peft.VeraConfig),
    "LOHA": (loha, peft.LoHaConfig),
    "LOKR": (lokr, peft.LoKrConfig),
    "VBLORA": (vblora, peft.VBLoRAConfig),
    "RANDLORA": (randlora, peft.RandLoraConfig),
    "DELORA": (delora, peft.DeloraConfig),
    "MISS": (miss, peft.MissConfig),
    "IA3": (ia3, peft.IA3Config),
    "LN_TUNING": (ln_tuning, peft.LNTuningConfig),
    "TRAINABLE_TOKENS": (trainable_tokens, peft.TrainableTokensConfig),
}


@pytest.mark.parametrize("method", GOOD)
def test_every_field_of_peft_s_configuration_is_classified(method: str) -> None:
    module, config = MODULES[method]
    known = set(COMMON)
    for name in ("READ", "WITHOUT_EFFECT", "MUST_BE_OFF"):
        known |= set(getattr(module, name, ()))
    assert {field.name for field in dataclasses.fields(config)} <= known


@pytest.mark.parametrize("method", GOOD)
def test_an_unknown_field_is_refused_by_name(method: str) -> None:
    tensors, fields = GOOD[method]
    assert lower_tensors(method, tensors, **fields).report["method"]
    with pytest.raises(AdapterInvalid, match="something_new"):
        lower_tensors(method, tensors, **fields, something_new=3)


@pytest.mark.parametrize("method", GOOD)
def test_a_key_without_a_module_is_refused_with_the_reason(method: str) -> None:
    tensors, fields = GOOD[method]
    stray = next(iter(tensors)).rpartition(".")[2]
    stray = "vblora_logits_A" if method == "VBLORA" else stray
    with pytest.raises(AdapterInvalid, match="ghost"):
        lower_tensors(method, tensors | {f"ghost.{stray}": normal(2, WIDE)}, **fields)
    if method not in ("LN_TUNING", "TRAINABLE_TOKENS"):
        with pytest.raises(AdapterInvalid, match=r"embed.*an Embedding, not a linear module"):
            lower_tensors(method, tensors | {f"embed.{stray}": normal(2, WIDE)}, **fields)


@pytest.mark.parametrize("method", GOOD)
@pytest.mark.parametrize("shape", [(), (1,), (5, 5), (2, 2, 2)])
def test_a_wrong_shape_is_refused_by_key(method: str, shape: tuple[int, ...]) -> None:
    tensors, fields = GOOD[method]
    for key in tensors:
        if (method, shape) != ("DELORA", (1,)):
            with pytest.raises(AdapterInvalid, match=key.removeprefix("base_model.").split(".")[0]):
                lower_tensors(method, tensors | {key: torch.ones(shape)}, **fields)


@pytest.mark.parametrize("method", [name for name, (tensors, _) in GOOD.items() if len(tensors) > 1])
def test_a_missing_matrix_is_refused(method: str) -> None:
    tensors, fields = GOOD[method]
    for key in tensors:
        with pytest.raises(AdapterInvalid, match=r"q|bank"):
            lower_tensors(method, {name: tensor for name, tensor in tensors.items() if name != key}, **fields)


REFUSED: dict[str, tuple[str, dict[str, Tensor], dict[str, Any], str]] = {
    "another rank": ("ADALORA", ADALORA, {"init_r": 4}, "rank 3 in the weights and 4"),
    "DoRA": ("ADALORA", ADALORA, {"init_r": 3, "use_dora": True}, "use_dora"),
    "replicated layers": ("ADALORA", ADALORA, {"init_r": 3, "layer_replication": [[0, 1]]}, "layer_replication"),
    "a rank pattern of numbers": ("ADALORA", ADALORA, {"init_r": 3, "rank_pattern": {"q.lora_E": 3}}, "rank_pattern"),
    "projections not saved": ("VERA", VERA, {"r": 2}, "save_projection.*vera_A"),
    "projections too small": (
        "VERA",
        VERA | {"base_model.vera_A": normal(2, 7), "base_model.vera_B": normal(TALL, 2)},
        {"r": 2},
        "vera_A takes",
    ),
    "a seed that is none": ("VERA", VERA, {"r": 2, "save_projection": False, "projection_prng_key": "x"}, "prng_key"),
    "projections beyond measure": (
        "VERA",
        {"huge.vera_lambda_d": torch.ones(600), "huge.vera_lambda_b": torch.ones(4)},
        {"r": 600, "save_projection": False},
        "random projections of 629148000 numbers",
    ),
    "a convolution's LoHa": ("LOHA", LOHA | {"q.hada_t1": normal(2, 2, 1, 1)}, {"r": 2}, "hada_t1"),
    "a convolution's LoKr": ("LOKR", LOKR | {"q.lokr_t2": normal(1, 1, 1, 1)}, {"r": 1}, "lokr_t2"),
    "both a factor and its halves": ("LOKR", LOKR | {"q.lokr_w2": normal(4, 4)}, {"r": 1}, "lokr_w2, or lokr_w2_a"),
    "a negative rank": ("LOKR", LOKR, {"r": -1}, "rank -1"),
    "more chosen than there are": ("VBLORA", VBLORA, {**VBLORA_FIELDS, "topk": 6}, "topk = 6"),
    "a bank of another size": ("VBLORA", VBLORA, {**VBLORA_FIELDS, "num_vectors": 6}, "vector_bank"),
    "a bank that does not fit": (
        "VBLORA",
        {BANK: normal(5, 5), "q.vblora_logits_A": normal(2, 1, 5), "q.vblora_logits_B": normal(2, 2, 5)},
        {**VBLORA_FIELDS, "vector_length": 5},
        "vector_length 5",
    ),
    "a choice out of range": (
        "VBLORA",
        {
            BANK: normal(5, 4),
            **{f"q.vblora_logits_{m}_topk_weights": torch.ones(*s, 1) for m, s in (("A", (2, 2)), ("B", (3, 2)))},
            **{f"q.vblora_logits_{m}_topk_indices": torch.full((*s, 2), 5) for m, s in (("A", (2, 2)), ("B", (3, 2)))},
        },
        {**VBLORA_FIELDS, "save_only_topk_weights": True},
        "topk_indices does not choose 2 of 5",
    ),
    "bases that differ": (
        "RANDLORA",
        RANDLORA
        | {"q.randlora_A": normal(3, 1, WIDE), "base_model.randlora_A": normal(3, 1, WIDE) + 1}
        | {"base_model.randlora_B": normal(TALL, 3, 3)},
        {"r": 3},
        "not a copy",
    ),
    "blocks that do not divide": (
        "MISS",
        {"q.miss_block": normal(4, 3, 3)},
        {"r": 3, "init_weights": "bat"},
        "r 3 .* does not divide",
    ),
    "copies that do not divide": (
        "MISS",
        {"q.miss_block": normal(2, 5)},
        {"r": 2, "init_weights": "mini", "mini_r": 5},
        "mini_r 5",
    ),
    "half a rank": ("MISS", MISS, {"r": 4.5}, "r in adapter_config"),
    "norms as they were": ("LN_TUNING", {"norm.ln_tuning_layers.weight": torch.ones(WIDE)}, {}, "changes nothing"),
    "a head that is no copy": (
        "TRAINABLE_TOKENS",
        TOKENS | {"head.trainable_tokens_delta": normal(2, WIDE) + 1},
        {"token_indices": [3, 7]},
        "not a copy of the embedding's",
    ),
    "tokens out of range": ("TRAINABLE_TOKENS", TOKENS, {"token_indices": [3, 21]}, "outside 0..19"),
    "rows out of range": (
        "TRAINABLE_TOKENS",
        {"q.trainable_tokens_delta": normal(2, WIDE)},
        {"token_indices": [3, 12]},
        "outside 0..11",
    ),
    "tokens that are not said": ("TRAINABLE_TOKENS", TOKENS, {}, "token ids"),
    "a module replaced and adapted": ("MISS", MISS | {"q.weight": normal(TALL, WIDE)}, {"r": 4}, "q is replaced whole"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_unsupported_adapters_are_refused_by_field_or_key(what: str) -> None:
    method, tensors, fields, match = REFUSED[what]
    with pytest.raises(AdapterInvalid, match=match):
        lower_tensors(method, tensors, **fields)
