"""Differentiable causal attention over a flat batch of whole sequences, registered with transformers.

The same maths as `paged_attention.py`, without a KV cache: each sequence attends to itself. Consecutive sequences of
one length are one call. Where torch's fused attention has the formula it is used, elsewhere scores are computed in
float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from lora_serve.model.training_step import TrainingStep

SEQUENCE_ATTENTION = "lora_serve_sequences"  # a name for which transformers makes no mask


def sequence_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    training_step: TrainingStep,
    training_windows: Sequence[int | None],
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, tokens, key_dim], key and value [1, kv_heads, tokens, dim] → [1, tokens, heads, value_dim]."""
    layer = module.layer_idx
    assert isinstance(layer, int)
    window = kwargs["sliding_window"] if "sliding_window" in kwargs else training_windows[layer]
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    parts = []
    for start, count, length in _runs(training_step.lengths):
        q, k, v = (_stacked(each[0, :, start : start + count * length], count) for each in (query, key, value))
        own_window = None if window is not None and window >= length else window
        if own_window is None and softcap is None and s_aux is None:
            share = q.shape[1] // k.shape[1]
            if share > 1:
                k, v = (each.repeat_interleave(share, 1) for each in (k, v))
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        else:
            out = _attend(q, k, v, scale, own_window, softcap, s_aux)
        parts.append(out.transpose(1, 2).flatten(0, 1))  # [rows, heads, value_dim]
    return torch.cat(parts)[None], None


def _runs(lengths: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first row, sequences, length) of consecutive sequences of one length."""
    start = 0
    for length, own in groupby(lengths):
        count = len(list(own))
        yield start, count, length
        start += count * length


def _stacked(rows: Tensor, count: int) -> Tensor:
    """[heads, count * length, dim] → [count, heads, length, dim]."""
    heads, tokens, dim = rows.shape
    return rows.reshape(heads, count, tokens // count, dim).transpose(0, 1)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """`Kernels.attention` of whole sequences: q [n, heads, length, key_dim] → [n, heads, length, value_dim]."""
    count, _, length, _ = q.shape
    grouped = q.float().reshape(count, k.shape[1], -1, length, q.shape[3])  # [n, kv_heads, share, length, key_dim]
    score = scale * (grouped @ k.float()[:, :, None].transpose(-1, -2))
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    row = torch.arange(length, device=q.device)
    hidden = row > row[:, None]
    if window is not None:
        hidden = hidden | (row <= row[:, None] - window)
    score = score.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        sink = sinks.float().view(k.shape[1], -1, 1, 1).expand(count, -1, -1, length, 1)
        score = torch.cat([score, sink], -1)
    share = score.softmax(-1)[..., :length]
    out: Tensor = (share @ v.float()[:, :, None]).flatten(1, 2).to(q.dtype)
    return out


AttentionInterface.register(SEQUENCE_ATTENTION, sequence_attention)
