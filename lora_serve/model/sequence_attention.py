"""Differentiable causal attention over a flat batch of whole sequences, registered with transformers.

The same maths as `paged_attention.py`, without a KV cache: each sequence attends to itself, and to the learned prefix
of its adapter. Consecutive sequences of one length and prefix are one call. Where torch's fused attention has the
formula it is used, elsewhere scores are computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from lora_serve.model.training_step import TrainedPrefix, TrainingStep

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
    # From the last to the first: gradients go the other way, so prefixes add up theirs in the order of the sequences,
    # as they would if these were in several passes.
    for start, count, length, prefix in reversed([*_runs(training_step)]):
        q, k, v = (_stacked(each[0, :, start : start + count * length], count) for each in (query, key, value))
        if prefix is not None:
            k, v = (prefixed(each, prefix, 2 * layer + index) for index, each in enumerate((k, v)))
        before = k.shape[2] - length
        own_window = None if window is not None and window >= before + length else window
        if own_window is None and softcap is None and s_aux is None:
            share = q.shape[1] // k.shape[1]
            if share > 1:
                k, v = (each.repeat_interleave(share, 1) for each in (k, v))
            mask = None if prefix is None else ~_hidden(length, before, None, q.device)
            out = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=prefix is None, scale=scale)
        else:
            out = _attend(q, k, v, scale, own_window, softcap, s_aux)
        parts.append(out.transpose(1, 2).flatten(0, 1))  # [rows, heads, value_dim]
    return torch.cat(parts[::-1])[None], None


def prefixed(x: Tensor, prefix: TrainedPrefix, place: int) -> Tensor:
    """Keys or values x [n, kv_heads, length, dim] with those of a prefix before them; `place`: which of its own."""
    found: Tensor = PrefixedRows.apply(x, prefix.values[:, place], prefix.gradient[:, place])  # type: ignore[no-untyped-call]
    return found


class PrefixedRows(torch.autograd.Function):
    """x [n, heads, length, dim] after values [tokens, heads, dim], whose gradients are added up; saves no tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return torch.cat([values.transpose(0, 1).to(x.dtype).expand(x.shape[0], -1, -1, -1), x], 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        tokens = ctx.gradient.shape[0]
        ctx.gradient.add_(grad[:, :, :tokens].float().sum(0).transpose(0, 1))
        return grad[:, :, tokens:], None, None


def _runs(step: TrainingStep) -> Iterator[tuple[int, int, int, TrainedPrefix | None]]:
    """(first row, sequences, length, prefix) of consecutive sequences of one length and prefix."""
    owners = {sequence: index for index, prefix in enumerate(step.prefixes) for sequence in prefix.sequences}
    start, kinds = 0, [(length, owners.get(sequence, -1)) for sequence, length in enumerate(step.lengths)]
    for (length, owner), own in groupby(kinds):
        count = len(list(own))
        yield start, count, length, None if owner < 0 else step.prefixes[owner]
        start += count * length


def _stacked(rows: Tensor, count: int) -> Tensor:
    """[heads, count * length, dim] → [count, heads, length, dim]."""
    heads, tokens, dim = rows.shape
    return rows.reshape(heads, count, tokens // count, dim).transpose(0, 1)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """`Kernels.attention` of whole sequences, the last rows of k and v: q [n, heads, length, key_dim] → the same."""
    count, _, length, _ = q.shape
    grouped = q.float().reshape(count, k.shape[1], -1, length, q.shape[3])  # [n, kv_heads, share, length, key_dim]
    score = scale * (grouped @ k.float()[:, :, None].transpose(-1, -2))
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    score = score.masked_fill(_hidden(length, k.shape[2] - length, window, q.device), -torch.inf)
    if sinks is not None:
        sink = sinks.float().view(k.shape[1], -1, 1, 1).expand(count, -1, -1, length, 1)
        score = torch.cat([score, sink], -1)
    share = score.softmax(-1)[..., : k.shape[2]]
    out: Tensor = (share @ v.float()[:, :, None]).flatten(1, 2).to(q.dtype)
    return out


def _hidden(length: int, before: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys [before + length] each of the last `length` rows does not see."""
    key = torch.arange(before + length, device=device)
    row = key[before:, None]
    hidden = key > row
    return hidden if window is None else hidden | (key <= row - window)


AttentionInterface.register(SEQUENCE_ATTENTION, sequence_attention)
