"""Valid adapters of methods other than LoRA, as tensors and configuration fields, for a small base."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_serve.adapters.adapter import BaseShape, Lowered, Site
from lora_serve.adapters.checkpoint import Checkpoint
from lora_serve.adapters.formats.dispatch import lower

X = "base_model.model."
WIDE, TALL = 8, 12
PARAMETERS = {
    "q.weight": torch.randn(TALL, WIDE, generator=torch.Generator().manual_seed(1)),
    "q.bias": torch.arange(12.0),
    "norm.weight": torch.ones(WIDE),
    "embed.weight": torch.zeros(20, WIDE),
    "head.weight": torch.zeros(20, WIDE),
    "huge.weight": torch.empty(4, 0),
}
BASE = BaseShape(
    sites={"q": Site("q", WIDE, TALL), "huge": Site("huge", 1 << 20, 4), "head": Site("head", WIDE, 20)},
    groups=(("q",), ("huge",), ("head",)),
    weight=lambda name: PARAMETERS[f"{name}.weight"],
    others={"embed": "an Embedding, not a linear module", "norm": "a RMSNorm, not a linear module"},
    tied=True,
    modules={
        "q": {"weight": (TALL, WIDE), "bias": (TALL,)},
        "norm": {"weight": (WIDE,)},
        "embed": {"weight": (20, WIDE)},
        "head": {"weight": (20, WIDE)},
    },
    parameter=PARAMETERS.__getitem__,
    embeddings={"embed": 1.0},
    input_embedding="embed",
    head="head",
    quantized="int8",
)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def lower_tensors(method: str, tensors: dict[str, Tensor], base: BaseShape = BASE, **fields: Any) -> Lowered:
    keyed = {key if key.startswith("base_model.") else X + key: tensor for key, tensor in tensors.items()}
    return lower(Checkpoint({"peft_type": method, **fields}, keyed, 0), base)


ADALORA = {"q.lora_A": normal(3, WIDE), "q.lora_B": normal(TALL, 3), "q.lora_E": normal(3, 1)}
VERA = {"q.vera_lambda_d": normal(2), "q.vera_lambda_b": normal(TALL)}
LOHA = {f"q.hada_w{i}_{m}": normal(*shape) for i in (1, 2) for m, shape in (("a", (TALL, 2)), ("b", (2, WIDE)))}
LOKR = {"q.lokr_w1": normal(3, 2), "q.lokr_w2_a": normal(4, 1), "q.lokr_w2_b": normal(1, 4)}
BANK = "base_model.vblora_vector_bank"
VBLORA = {BANK: normal(5, 4), "q.vblora_logits_A": normal(2, 2, 5), "q.vblora_logits_B": normal(3, 2, 5)}
VBLORA_FIELDS = {"r": 2, "num_vectors": 5, "vector_length": 4}
RANDLORA = {"q.randlora_lambda": normal(3, 3), "q.randlora_gamma": normal(3, WIDE)}
DELORA = {"q.delora_A": normal(2, WIDE), "q.delora_B": normal(TALL, 2), "q.delora_lambda": normal(1)}
MISS = {"q.miss_block": normal(4, TALL)}
IA3 = {"q.ia3_l": normal(TALL, 1)}
LN = {"norm.ln_tuning_layers.weight": normal(WIDE)}
TOKENS = {"embed.trainable_tokens_delta": normal(2, WIDE)}

GOOD: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
    "ADALORA": (ADALORA, {"init_r": 3}),
    "VERA": (VERA, {"r": 2, "save_projection": False}),
    "LOHA": (LOHA, {"r": 2}),
    "LOKR": (LOKR, {"r": 1}),
    "VBLORA": (VBLORA, VBLORA_FIELDS),
    "RANDLORA": (RANDLORA, {"r": 3, "save_projection": False}),
    "DELORA": (DELORA, {"r": 2}),
    "MISS": (MISS, {"r": 4}),
    "IA3": (IA3, {}),
    "LN_TUNING": (LN, {}),
    "TRAINABLE_TOKENS": (TOKENS, {"token_indices": [3, 7]}),
}
