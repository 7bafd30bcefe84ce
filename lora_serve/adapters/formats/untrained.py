"""LoRA of modules that a model never calls, such as a router whose weight its code reads.

PEFT's `target_modules="all-linear"` adapts them as well. Training does not reach them, so that B is still zero.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lora_serve.adapters.adapter import BaseShape
from lora_serve.adapters.checkpoint import shorten
from lora_serve.adapters.formats.keys import split_key


def leave_out_untrained(tensors: Mapping[str, Tensor], base: BaseShape) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors without LoRA whose B is zero on modules that cannot be adapted, and notes for the report."""
    modules = {key: split_key(key, base) for key in tensors}
    untrained = {
        module
        for key, (module, tail) in modules.items()
        if module in base.others and tail == "lora_B.weight" and not tensors[key].any()
    }
    rest = {key: tensor for key, tensor in tensors.items() if modules[key][0] not in untrained}
    if not untrained:
        return rest, []
    return rest, [f"LoRA that was not trained was left out: {shorten(sorted(untrained))}"]
