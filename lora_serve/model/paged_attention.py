"""Paged attention, registered with transformers: writes the step's keys and values, attends over the KV blocks.

RoPE is already applied, or left to the kernel that writes the keys (`fused_rope.py`). The forward context arrives
through the keyword arguments that the model passes on; nothing is global. The kernel handles causality, sliding windows
and sequence boundaries, so no attention mask is made.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from lora_serve.model.forward_context import ForwardContext

PAGED_ATTENTION = (
    "lora_serve_blocks"  # transformers makes no mask for an attention function whose name it does not know
)


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    forward_context: ForwardContext,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, tokens, key_dim], key and value [1, kv_heads, tokens, dim] → [1, tokens, heads, value_dim]."""
    layer = module.layer_idx
    assert isinstance(layer, int)
    context, step = forward_context, forward_context.step
    keys, values = context.kv.keys[layer], context.kv.values[layer]
    rotation, context.rotation = context.rotation, None
    if rotation is None:
        context.kernels.write_kv(keys, values, key[0].transpose(0, 1), value[0].transpose(0, 1), step.kv_index)
    else:
        assert query is rotation.q  # `fused_rope.py` saw that the model hands on what it was given
        assert key is rotation.k
        query = context.kernels.rope_and_write_kv(rotation, value, keys, values, step.kv_index)
    for start, end, slot, _, first in context.virtual_rows:
        prefix, given = context.prefixes[slot], slice(first, first + end - start)
        if prefix.keys:
            own_keys, own_values = prefix.keys[layer][given], prefix.values[layer][given]
            context.kernels.write_kv(keys, values, own_keys, own_values, step.kv_index[start:end])
    output = context.kernels.attention(
        query[0].transpose(0, 1),
        keys,
        values,
        step.attention,
        scaling if scaling is not None else query.shape[-1] ** -0.5,
        kwargs["sliding_window"] if "sliding_window" in kwargs else context.windows[layer],
        softcap,
        s_aux,
    )
    return output.unsqueeze(0), None


AttentionInterface.register(PAGED_ATTENTION, paged_attention)
