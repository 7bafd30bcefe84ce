"""Small models with random weights, one per architecture, that tests create, save and serve."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY = 96
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

ARCHITECTURES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**COMMON),
    "qwen2": Qwen2Config(**COMMON, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**COMMON, head_dim=16),
    "mistral": MistralConfig(**COMMON, sliding_window=6),
    "gemma2": Gemma2Config(**COMMON, head_dim=16, sliding_window=5, query_pre_attn_scalar=16),
    "phi3": Phi3Config(**COMMON, sliding_window=9),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=3, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    ),
}

# Query and key norms that get their rows behind the heads, separate: other tests have enough with Gemma 2.
HEADS_FIRST: dict[str, PretrainedConfig] = {
    "gemma3": Gemma3TextConfig(**COMMON, head_dim=16, sliding_window=5, query_pre_attn_scalar=16),
}

# Mixtures of experts, separate: not every test of all architectures needs to run on them.
EXPERTS: dict[str, PretrainedConfig] = {
    "mixtral": MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(
        **COMMON, head_dim=16, moe_intermediate_size=48, num_experts=6, num_experts_per_tok=3, mlp_only_layers=[0]
    ),
}


def make_model(config: PretrainedConfig, seed: int = 0) -> Any:
    """A model with random weights that are large enough to make differences visible."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.12)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.05)
    return model


def uncentred(config: PretrainedConfig) -> Any:
    """A random model in whose norms and embeddings no mean is zero and no weight one."""
    model = make_model(config)
    generator = torch.Generator().manual_seed(1)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "norm" in name:
                parameter.add_(0.3 + 0.3 * torch.randn(parameter.shape, generator=generator))
            elif parameter is embedding:
                parameter.add_(0.1)
            elif name.endswith(("gate.weight", "router.weight")):
                parameter.mul_(20)  # experts that are nearly alike would be chosen by rounding
    return model


@cache
def reference(architecture: str) -> Any:
    """The shared fp32 model of an architecture; tests must not change it."""
    return make_model((ARCHITECTURES | EXPERTS | HEADS_FIRST)[architecture])


def save(architecture: str, folder: Path) -> Path:
    """The architecture's model as a safetensors folder."""
    reference(architecture).save_pretrained(folder)
    return folder
