"""Prefix tuning and cartridges: learned keys and values of virtual tokens, in every layer.

    K = [K_p; K(x)], V = [V_p; V(x)]
    key: prompt_embeddings [tokens, layers · 2 · heads · dim]; of token t the keys of layer i are [t, 2i], its values
         [t, 2i + 1] of the view [tokens, 2 · layers, heads, dim], with the heads that the base has for keys and values

With `prefix_projection` PEFT saves the projected values. RoPE is not applied to the keys, as in PEFT; the prompt's
positions begin after the virtual tokens. Source: PEFT 0.21, `peft/tuners/prefix_tuning`,
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
    """Lower prefix tuning. Raises AdapterInvalid naming keys and fields."""
    return _lower(checkpoint, base, "prefix tuning", WITHOUT_EFFECT)


def lower_cartridge(checkpoint: Checkpoint, base: BaseShape) -> Lowered:
    """Lower a cartridge, which has the form of prefix tuning. Raises AdapterInvalid naming keys and fields."""
    return _lower(checkpoint, base, "cartridge", CARTRIDGE)


def _lower(checkpoint: Checkpoint, base: BaseShape, method: str, without_effect: set[str]) -> Lowered:
    config = checkpoint.config
    tensors, overrides, features = virtual_tokens.read_tensors(checkpoint, base, without_effect=without_effect)
    virtual_tokens.refuse_unknown_tensors(tensors, {TABLE})
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
    summary = report(
        config,
        base,
        method=method,
        overrides=overrides,
        features=features,
        lowered=[virtual_tokens.sharing_note(length)],
    )
    return Lowered({}, summary, overrides, Prefix(length, keys=tuple(parts[::2]), values=tuple(parts[1::2])))
