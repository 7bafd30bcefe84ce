"""Baichuan and Baichuan 2, which transformers does not have: Llama with packed q, k and v.

The checkpoint's own code is never run; the model is built from Llama's modules and registered with transformers.

    q, k, v = split(W_pack x)                  one linear module, which adapters target as `W_pack`
    7B:  rotary positions, as Llama
    13B: ALiBi: score[h, i, j] = q_i · k_j / √d - slope[h] (i - j)
    Baichuan 2: logits = (W / ‖W‖ by row) x    the rows of the head's weight are divided by their lengths

ALiBi is a dot product of a few more numbers per query and key (`AlibiFeatures`), so that any attention function
computes it. Sources: Baichuan 2: Open Large-scale Language Models (arXiv 2309.10305); Train Short, Test Long (arXiv
2108.12409).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from lora_serve.adapters.adapter import divide_rows

NORMALIZED_HEAD_VOCABULARY = 125_696  # Baichuan 2's; Baichuan's has 64,000
DIGIT = 256  # positions are split into two digits that every dtype holds exactly


@strict
class BaichuanConfig(LlamaConfig):  # type: ignore[no-untyped-call]
    """A Baichuan checkpoint's `config.json`.

    Attributes:
        max_position_embeddings: 0: it is not given, as in the 13B checkpoints, and `model_max_length` is the context.
        alibi: None: if no `max_position_embeddings` is given.
        normalized_head: None: by the size of the vocabulary, which tells Baichuan 2 from Baichuan.
    """

    model_type = "baichuan"

    max_position_embeddings: int = 0
    model_max_length: int = 4096
    alibi: bool | None = None
    normalized_head: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.alibi is None:
            self.alibi = not self.max_position_embeddings
        self.max_position_embeddings = self.max_position_embeddings or self.model_max_length
        if self.normalized_head is None:
            self.normalized_head = self.vocab_size >= NORMALIZED_HEAD_VOCABULARY
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]


class AlibiFeatures(nn.Module):
    """What makes q · k include ALiBi, in place of rotary embeddings.

    With the slope s = S[h] √d, position i of a query and j of a key in base 256, and s and s·i as sums of two numbers
    of the model's dtype:

        q = [256 s₁, 256 s₂, s₁, s₂, -(s i)₁ / 256, -(s i)₂ / 256, 0, 0]
        k = [j // 256, j // 256, j % 256, j % 256, 256, 256, 0, 0]

    so that q · k / √d = S[h] (j - i). What is rounded in s·i is the same for all keys, and softmax ignores it. The
    zeros keep keys aligned.
    """

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__()
        self._heads = config.num_attention_heads
        self._root = math.sqrt(config.hidden_size // config.num_attention_heads)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """x [batch, tokens, hidden] → features of queries and of keys, each [batch, heads, tokens, 8]."""
        positions = position_ids[:, None].expand(x.shape[0], self._heads, -1)
        slopes = self._root * alibi_slopes(self._heads, x.device)[:, None].expand(positions.shape)
        slope = _in_two_parts(slopes, x.dtype)
        own = _in_two_parts((slope[0].float() + slope[1].float()) * positions / DIGIT, x.dtype)
        zero, digit = torch.zeros_like(own[0]), torch.full_like(own[0], DIGIT)
        high, low = (part.to(x.dtype) for part in (positions // DIGIT, positions % DIGIT))
        query = torch.stack([DIGIT * slope[0], DIGIT * slope[1], *slope, -own[0], -own[1], zero, zero], -1)
        return query, torch.stack([high, high, low, low, digit, digit, zero, zero], -1)


class BaichuanAttention(nn.Module):
    """Llama's attention with one linear module for queries, keys and values."""

    def __init__(self, config: BaichuanConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [batch, tokens, hidden] → the same shape, and weights if the attention function gives them."""
        shape = hidden_states.shape[:-1]
        query, key, value = (
            part.view(*shape, -1, self.head_dim).transpose(1, 2) for part in self.W_pack(hidden_states).chunk(3, dim=-1)
        )
        if self.config.alibi:
            query, key = (torch.cat(pair, -1) for pair in zip((query, key), position_embeddings, strict=True))
        else:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(output.reshape(*shape, -1).contiguous()), weights


class NormalizedHead(nn.Linear):
    """An LM head that divides every row of its weight by the row's length."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] → logits [..., vocab]."""
        return nn.functional.linear(x, divide_rows(self.weight))


class BaichuanDecoderLayer(LlamaDecoderLayer):  # type: ignore[no-untyped-call]
    """Llama's decoder layer with Baichuan's attention."""

    def __init__(self, config: BaichuanConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.add_module("self_attn", BaichuanAttention(config, layer_idx))


class BaichuanModel(LlamaModel):  # type: ignore[no-untyped-call]
    """Llama's decoder with Baichuan's layers and positions."""

    config_class = BaichuanConfig

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(BaichuanDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        if config.alibi:
            self.add_module("rotary_emb", AlibiFeatures(config))
        self.post_init()  # type: ignore[no-untyped-call]


class BaichuanForCausalLM(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """Baichuan with its LM head."""

    config_class = BaichuanConfig

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__(config)
        self.add_module("model", BaichuanModel(config))
        if config.normalized_head:
            self.add_module("lm_head", NormalizedHead(config.hidden_size, config.vocab_size, bias=False))
        self.post_init()  # type: ignore[no-untyped-call]


def alibi_slopes(heads: int, device: torch.device) -> Tensor:
    """ALiBi's slopes [heads], float32: a geometric sequence, for a power of two.

    Other numbers of heads have the largest power's slopes and every second one of the next power's.
    """
    power = 1 << (heads.bit_length() - 1)
    head = torch.arange(heads, device=device)
    return torch.exp2(-torch.where(head < power, 8 * (head + 1), 8 * (head - power) + 4) / power)


def divide_head(model: Any) -> frozenset[str]:
    """Divide a normalised head's rows once and make it a plain linear module, in place; returns its path, if any.

    In half precision the quotients are rounded, as where Baichuan 2 is run otherwise.
    """
    divided = {}
    for path, module in model.named_modules():
        if isinstance(module, NormalizedHead):
            divided[path] = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            divided[path].weight = nn.Parameter(divide_rows(module.weight), requires_grad=False)
    for path, head in divided.items():
        model.set_submodule(path, head)
    return frozenset(divided)


def _in_two_parts(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two tensors of a dtype whose sum is x, to twice the dtype's precision."""
    first = x.to(dtype)
    return first, (x - first).to(dtype)


AutoConfig.register(BaichuanConfig.model_type, BaichuanConfig)
AutoModel.register(BaichuanConfig, BaichuanModel)
AutoModelForCausalLM.register(BaichuanConfig, BaichuanForCausalLM)
