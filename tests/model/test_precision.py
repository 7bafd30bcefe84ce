"""In every precision the server is about as exact as transformers: prefilling, in chunks, decoding.

Weights are not centred (norms' weights and biases have means, and so have the rows that they see), so that norms,
activations and embeddings which are only nearly alike give different logits.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from driver import Driver
from support import COMMON, uncentred
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Cohere2MoeConfig,
    CohereConfig,
    Gemma3TextConfig,
    GlmConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    ModernBertDecoderConfig,
    Olmo2Config,
    OlmoConfig,
    PhiConfig,
    PhimoeConfig,
    PretrainedConfig,
    Qwen3Config,
    Starcoder2Config,
)

EXPERTS: dict[str, Any] = {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2}
# As wide as this, random rows of no mean have almost the same LayerNorm and RMS norm; real rows do not.
WIDE: dict[str, Any] = {**COMMON, "hidden_size": 512, "head_dim": 16}
WINDOWS = ["sliding_attention", "sliding_attention", "full_attention"]

BASES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**COMMON),
    "llama with exact GELU": LlamaConfig(**WIDE, hidden_act="gelu"),
    "llama with quick GELU": LlamaConfig(**WIDE, hidden_act="quick_gelu"),
    "qwen3": Qwen3Config(**COMMON, head_dim=16),
    "gemma3": Gemma3TextConfig(**COMMON, head_dim=16, sliding_window=5, query_pre_attn_scalar=16, layer_types=WINDOWS),
    "olmo2": Olmo2Config(**COMMON),
    "glm, partial interleaved RoPE": GlmConfig(**COMMON, head_dim=16, partial_rotary_factor=0.5),
    "mixtral": MixtralConfig(**EXPERTS),
    "cohere": CohereConfig(**WIDE, use_qk_norm=True),
    "cohere2": Cohere2Config(**WIDE, sliding_window=6, layer_types=WINDOWS),
    "cohere2_moe": Cohere2MoeConfig(**WIDE, num_experts=4, num_experts_per_tok=2),
    "olmo": OlmoConfig(**COMMON),
    "starcoder2": Starcoder2Config(**COMMON, sliding_window=6),
    "gpt_neox": GPTNeoXConfig(**COMMON, rotary_pct=0.5),
    "phi": PhiConfig(**COMMON, partial_rotary_factor=0.5),
    "phimoe": PhimoeConfig(**EXPERTS, router_jitter_noise=1e-3),
    "modernbert-decoder": ModernBertDecoderConfig(
        **{**COMMON, "pad_token_id": 0}, cls_token_id=1, sep_token_id=2, local_attention=8
    ),
}


def logits(model: Any, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return found.double()


def distance(model: Any, exact: Any, sequences: list[list[int]]) -> float:
    """Of a model's logits from the exact ones, over all sequences."""
    return sum(float((logits(model, own) - logits(exact, own)).norm() ** 2) for own in sequences) ** 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("base", BASES)
def test_logits_are_as_exact_as_those_of_transformers(base: str, dtype: str, tmp_path: Path) -> None:
    kind = getattr(torch, dtype)
    uncentred(BASES[base]).to(kind).save_pretrained(tmp_path)
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=kind, **eager).eval()
    exact = copy.deepcopy(theirs).to(torch.float64 if kind is torch.float32 else torch.float32)
    driver = Driver(tmp_path, dtype=dtype, max_tokens=11)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 90, (n,), generator=generator).tolist() for n in (5, 17, 1, 30)]
    rows = driver.teach(prompts, decode=6)
    pairs = zip(rows, driver.sequences, strict=True)
    ours = sum(float((got.double() - logits(exact, own)).norm() ** 2) for got, own in pairs) ** 0.5
    floor = 1e-6 * sum(float(row.norm() ** 2) for row in rows) ** 0.5 if kind is torch.float32 else 0
    assert ours <= 1.5 * distance(theirs, exact, driver.sequences) + floor
