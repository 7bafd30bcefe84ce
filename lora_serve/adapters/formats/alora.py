"""aLoRA: a LoRA that is active from the last occurrence of its invocation tokens in the prompt on.

    from the invocation on   what it adds to an output: s · B A x, and s · b with `lora_bias`
    for all tokens           what it replaces: `modules_to_save`, `trainable_token_indices`, a resized vocabulary

A replaced bias is served as a difference that is added, and a module that is replaced and adapted as one new weight:
neither could be active for some tokens only, so both are refused. Source: PEFT 0.21, `peft/tuners/lora/variants.py`
(ALoraLinearVariant).
"""

from __future__ import annotations

from torch import Tensor

from lora_serve.adapters.adapter import BaseShape, ModuleOverride
from lora_serve.adapters.checkpoint import shorten
from lora_serve.adapters.formats import residual
from lora_serve.adapters.formats.fields import Config
from lora_serve.errors import AdapterInvalid

MAX_INVOCATION = 1024


def invocation(config: Config, base: BaseShape) -> tuple[int, ...]:
    """The invocation tokens; empty for any other adapter. Raises AdapterInvalid."""
    tokens = config.get("alora_invocation_tokens")
    if tokens is None:
        return ()
    ids = base.modules.get(base.input_embedding, {}).get("weight", (1 << 31,))[0]
    if not isinstance(tokens, list) or not 0 < len(tokens) <= MAX_INVOCATION:
        raise AdapterInvalid(
            f"alora_invocation_tokens in adapter_config.json is not a list of 1 to {MAX_INVOCATION} ids"
        )
    if not all(type(token) is int and 0 <= token < ids for token in tokens):
        raise AdapterInvalid(f"alora_invocation_tokens in adapter_config.json has ids outside 0..{ids - 1}")
    return tuple(tokens)


def check(
    config: Config, always: dict[str, ModuleOverride], found: dict[str, dict[str, Tensor]], base: BaseShape
) -> None:
    """Raise AdapterInvalid unless an aLoRA's parts are either active for all tokens or from its invocation on.

    Args:
        always: overrides by saved parameters.
        found: the adapter's own tensors by module.
    """
    field = "alora_invocation_tokens in adapter_config.json"
    if residual.is_residual(config):
        raise AdapterInvalid(
            f"{field} with {residual.method_name(config)}: the base that its initialisation changed would be there for "
            "all tokens, the adapter only from its invocation on; train with init_lora_weights=True"
        )
    biases = [module for module, override in always.items() if override.shift is not None]
    if biases:
        raise AdapterInvalid(
            f"{field} with replaced biases, which are there for all tokens ({shorten(biases)}); train with bias='none' "
            "and lora_bias=True"
        )
    both = [module for module in always if module in found and module not in base.embeddings]
    if both:
        raise AdapterInvalid(
            f"{field}: {shorten(both)} is replaced for all tokens and adapted from the invocation on; only one of the "
            "two can be served"
        )
