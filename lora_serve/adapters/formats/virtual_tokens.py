"""What all methods with virtual tokens have in common: one table of them, and perhaps replaced modules of the base.

    keys: prompt_embeddings [tokens, …]; modules_to_save as base_model.<module>.… (PEFT wraps no model around the base)

Source: PEFT 0.21, `peft/peft_model.py` and `peft/utils/save_and_load.py`.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from torch import Tensor

from lora_serve.adapters.adapter import BaseShape, ModuleOverride
from lora_serve.adapters.checkpoint import Checkpoint
from lora_serve.adapters.formats import keys, saved
from lora_serve.adapters.formats.fields import Config, check_fields
from lora_serve.errors import AdapterInvalid

TABLE = "prompt_embeddings"
SIZES = {"num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers", "num_transformer_submodules"}


def take(
    checkpoint: Checkpoint, base: BaseShape, *, read: Set[str] = frozenset(), without_effect: Set[str] = frozenset()
) -> tuple[dict[str, Tensor], dict[str, ModuleOverride], list[str]]:
    """The method's own tensors (the table among them), replaced modules by path, and features found.

    Args:
        read, without_effect: configuration fields beside those of every such method.
    """
    config = checkpoint.config
    check_fields(config, SIZES | read, without_effect)
    found = saved.take(config, {_key(key): tensor for key, tensor in checkpoint.tensors.items()}, base)
    table = found.rest.get(TABLE)
    if table is None or table.ndim != 2:
        raise AdapterInvalid(f"{TABLE} [virtual tokens, width] is missing")
    check_size(config, "num_virtual_tokens", table.shape[0])
    check_size(config, "num_transformer_submodules", 1)
    return found.rest, found.overrides, found.features


def refuse_others(tensors: dict[str, Tensor], known: Set[str]) -> None:
    """Refuse tensors that the method does not have."""
    keys.refuse_strays([key for key in tensors if key not in known])


def check_size(config: Config, field: str, size: int) -> None:
    """Hold a number that the configuration may give to what it is."""
    given: Any = config.get(field)
    if given is not None and (isinstance(given, bool) or given != size):
        raise AdapterInvalid(f"{field} = {str(given)[:20]} in adapter_config.json; here it is {size}")


def shared(length: int) -> str:
    """For reports."""
    return f"{length} virtual tokens: computed once, their KV shared by requests, part of the context length"


def _key(key: str) -> str:
    """The key as other methods would have it: these name the base's modules without PEFT's own in between."""
    before = "base_model."
    return keys.PREFIX + key.removeprefix(before) if key.startswith(before) else key
