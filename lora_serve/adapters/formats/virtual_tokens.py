"""Shared reader of the virtual-token methods: their table of virtual tokens, and optional `modules_to_save`.

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


def read_tensors(
    checkpoint: Checkpoint, base: BaseShape, *, read: Set[str] = frozenset(), without_effect: Set[str] = frozenset()
) -> tuple[dict[str, Tensor], dict[str, ModuleOverride], list[str]]:
    """The method's own tensors (with the table), overrides by module, and features found. Raises AdapterInvalid.

    Args:
        read, without_effect: configuration fields in addition to those of every such method.
    """
    config = checkpoint.config
    check_fields(config, SIZES | read, without_effect)
    wrapped = {_key(key): tensor for key, tensor in checkpoint.tensors.items()}
    found = saved.split_saved(config, keys.complete_paths(wrapped, base), base)
    table = found.rest.get(TABLE)
    if table is None or table.ndim != 2:
        raise AdapterInvalid(f"{TABLE} [virtual tokens, width] is missing")
    check_size(config, "num_virtual_tokens", table.shape[0])
    check_size(config, "num_transformer_submodules", 1)
    return found.rest, found.overrides, found.features


def refuse_unknown_tensors(tensors: dict[str, Tensor], known: Set[str]) -> None:
    """Raise AdapterInvalid for tensors other than `known`."""
    keys.refuse_unknown_keys([key for key in tensors if key not in known])


def check_size(config: Config, field: str, size: int) -> None:
    """Raise AdapterInvalid if a configured size differs from the actual one."""
    given: Any = config.get(field)
    if given is not None and (isinstance(given, bool) or given != size):
        raise AdapterInvalid(f"{field} = {str(given)[:20]} in adapter_config.json; here it is {size}")


def sharing_note(length: int) -> str:
    """The report's sentence on virtual tokens."""
    return f"{length} virtual tokens: computed once, their KV shared by requests, part of the context length"


def _key(key: str) -> str:
    """The key with the prefix of other methods; these save modules of the base without PEFT's wrapper in the path."""
    before = "base_model."
    return keys.PREFIX + key.removeprefix(before) if key.startswith(before) else key
