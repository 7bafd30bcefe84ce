"""Attention over paged KV, in the place where the HF modelling code asks for an attention function.

The rope is already applied. Batch and KV memory arrive through the keyword arguments that the model passes on; nothing
is global. Causality, windows and sequence borders are the kernel's: the model is given no mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from lora_serve.adapters.adapter import Prefix
from lora_serve.kernels.contract import AttentionMetadata, Kernels
from lora_serve.kv.tensors import KVTensors, LayerShape
from lora_serve.model.batch import VirtualRun

BLOCKS = "lora_serve_blocks"  # not a name that transformers reads a meaning into, so no mask is made for it
OBSERVE = "lora_serve_observe"


@dataclass(frozen=True)
class PagedKV:
    """What an attention layer needs of the step: where KV lies, and which of it belongs to whom.

    `windows` holds each layer's sliding window (None: full attention), for models that keep it in the config only.
    `given` are rows whose keys and values are not computed but an adapter's own, by slot in `prefixes`.
    """

    kernels: Kernels
    tensors: KVTensors
    kv_index: Tensor
    spans: AttentionMetadata
    windows: list[int | None]
    given: Sequence[VirtualRun] = ()
    prefixes: Mapping[int, Prefix] = field(default_factory=dict)


def block_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    paged: PagedKV,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, tokens, key_dim], key and value [1, kv_heads, tokens, dim] → [1, tokens, heads, value_dim]."""
    layer = module.layer_idx
    assert isinstance(layer, int)
    keys, values = paged.tensors.keys[layer], paged.tensors.values[layer]
    paged.kernels.write_kv(keys, values, key[0].transpose(0, 1), value[0].transpose(0, 1), paged.kv_index)
    for start, end, slot, offset in paged.given:
        prefix, own = paged.prefixes[slot], slice(offset, offset + end - start)
        paged.kernels.write_kv(
            keys, values, prefix.keys[layer][own], prefix.values[layer][own], paged.kv_index[start:end]
        )
    output = paged.kernels.attention(
        query[0].transpose(0, 1),
        keys,
        values,
        paged.spans,
        scaling if scaling is not None else query.shape[-1] ** -0.5,
        kwargs["sliding_window"] if "sliding_window" in kwargs else paged.windows[layer],
        softcap,
        s_aux,
    )
    return output.unsqueeze(0), None


class Observed(dict[int, LayerShape]):
    """KV shape by layer, filled in by a forward pass under the attention function `OBSERVE`.

    `modules` are those that asked for attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.modules: list[nn.Module] = []


def observe_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    observed: Observed,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Note what a layer would store; attend to nothing."""
    layer = module.layer_idx
    assert isinstance(layer, int)
    observed.modules.append(module)
    observed[layer] = LayerShape(key.shape[1], key.shape[3], value.shape[3])
    return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None


AttentionInterface.register(BLOCKS, block_attention)
AttentionInterface.register(OBSERVE, observe_attention)
