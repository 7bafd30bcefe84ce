"""Which format compiles what: PEFT's `peft_type` → the function that lowers it.

A new family is one new file beside this one and one line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lora_serve.adapters.adapter import BaseShape, Lowered
from lora_serve.adapters.checkpoint import Checkpoint
from lora_serve.adapters.formats import lora
from lora_serve.errors import AdapterInvalid

Lower = Callable[[Checkpoint, BaseShape], Lowered]

FORMATS: Mapping[str, Lower] = {"LORA": lora.lower}


def lower(checkpoint: Checkpoint, base: BaseShape, formats: Mapping[str, Lower] = FORMATS) -> Lowered:
    """Compile a checkpoint to deltas on the base's sites; AdapterInvalid names what stands in the way."""
    method = checkpoint.config.get("peft_type")
    if not isinstance(method, str):
        raise AdapterInvalid("adapter_config.json does not say its peft_type")
    if method not in formats:
        served = ", ".join(sorted(formats))
        raise AdapterInvalid(f"peft_type {method[:40]} is not served; these are: {served}")
    lowered = formats[method](checkpoint, base)
    if not lowered.deltas:
        raise AdapterInvalid("the adapter changes nothing: no tensor of it belongs to a module of the base")
    return lowered
