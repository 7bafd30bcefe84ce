"""Prefix tuning and cartridges: keys and values of virtual tokens, as saved.

    every layer's K = [K_p; K(x)], V = [V_p; V(x)]
    key: prompt_embeddings [tokens, layers · 2 · heads · dim]; of token t the keys of layer i are [t, 2i], its values
         [t, 2i + 1] of the view [tokens, 2 · layers, heads, dim], with the heads that the base has for keys and values

With `prefix_projection` PEFT saves what the projection made. PEFT puts them into the cache as they are, so no rope is
applied to the keys; the prompt's positions begin after them. Source: PEFT 0.21, `peft/tuners/prefix_tuning`,
`cartridge`, and `get_prompt` in `peft_model.py`.
"""

from __future__ import annotations

from lora_serve.adapters.adapter import BaseShape, Lowered, Prefix
from lora_serve.adapters.checkpoint import Checkpoint
from lora_serve.adapters.formats import virtual_tokens
from lora_serve.adapters.formats.keys import check_shape
from lora_serve.adapters.formats.report import report
from lora_serve.adapters.formats.virtual_tokens import TABLE
from lora_serve.errors import AdapterInvalid

WITHOUT_EFFECT = {"init_weights", "encoder_hidden_size", "prefix_projection"}
CARTRIDGE = {"num_frozen_tokens"}


def lower(checkpoint: Checkpoint, base: BaseShape) -> Lowered:
    """Compile prefix tuning. Raises AdapterInvalid naming keys and fields."""
    return _lower(checkpoint, base, "prefix tuning", WITHOUT_EFFECT)


def lower_cartridge(checkpoint: Checkpoint, base: BaseShape) -> Lowered:
    """Compile a cartridge: the same, trained in another way."""
    return _lower(checkpoint, base, "cartridge", CARTRIDGE)


def _lower(checkpoint: Checkpoint, base: BaseShape, method: str, without_effect: set[str]) -> Lowered:
    config = checkpoint.config
    tensors, overrides, features = virtual_tokens.take(checkpoint, base, without_effect=without_effect)
    virtual_tokens.refuse_others(tensors, {TABLE})
    shapes = set(base.kv)
    if len(shapes) != 1 or any(key_dim != value_dim for _, key_dim, value_dim in shapes):
        raise AdapterInvalid(f"{method} needs layers that store keys and values of one shape; this base's differ")
    heads, dim, _ = base.kv[0]
    table, layers = tensors[TABLE], len(base.kv)
    for field, size in {"num_layers": layers, "num_attention_heads": heads, "token_dim": heads * dim}.items():
        virtual_tokens.check_size(config, field, size)
    length = table.shape[0]
    check_shape(TABLE, table, (length, layers * 2 * heads * dim))
    parts = [part.contiguous() for part in table.view(length, 2 * layers, heads, dim).unbind(1)]
    made = report(
        config, base, method=method, overrides=overrides, features=features, lowered=[virtual_tokens.shared(length)]
    )
    return Lowered({}, made, overrides, Prefix(length, keys=tuple(parts[::2]), values=tuple(parts[1::2])))
