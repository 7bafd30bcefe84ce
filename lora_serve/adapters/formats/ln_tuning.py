"""LN-tuning: the parameters of chosen modules, usually norms, are replaced by trained ones.

    y = module(x) with its parameters = the trained ones
    keys: X.ln_tuning_layers.weight, X.ln_tuning_layers.bias
          X.ln_tuning_layers.default.Y.weight, … where X has modules Y of its own; "default" is the adapter's name

Any module can be chosen, not only norms; a replaced embedding does not change the head, even if tied. Source: PEFT
0.21, `peft/tuners/ln_tuning`.
"""

from __future__ import annotations

from dataclasses import replace

from lora_serve.adapters.adapter import BaseShape, Lowered, ModuleOverride
from lora_serve.adapters.checkpoint import Checkpoint
from lora_serve.adapters.formats.fields import check_fields
from lora_serve.adapters.formats.keys import PREFIX, refuse_unknown_keys, split_key
from lora_serve.adapters.formats.report import report
from lora_serve.adapters.formats.saved import split_saved
from lora_serve.errors import AdapterInvalid

COPY = ".ln_tuning_layers."


def lower(checkpoint: Checkpoint, base: BaseShape) -> Lowered:
    """Lower to replaced parameters. Raises AdapterInvalid naming keys and fields."""
    config = checkpoint.config
    check_fields(config, set())
    copies = {_original(key, base): tensor for key, tensor in checkpoint.tensors.items() if COPY in key}
    saved = split_saved(config, {key: tensor for key, tensor in checkpoint.tensors.items() if COPY not in key}, base)
    chosen = {key.removeprefix(PREFIX).partition(COPY)[0] for key in checkpoint.tensors if COPY in key}
    trained = split_saved({"modules_to_save": sorted(chosen)}, copies, base)
    refuse_unknown_keys([*saved.rest, *trained.rest])
    overrides = dict(saved.overrides)
    for module, override in trained.overrides.items():
        below = overrides.get(module, ModuleOverride())
        overrides[module] = replace(override, parameters=below.parameters | override.parameters)
    if not overrides:
        raise AdapterInvalid("the adapter changes nothing: every module that it replaces is the base's own")
    lowered = ["trained copies replace the base's own parameters"]
    return Lowered(
        {},
        report(config, base, method="LN-tuning", overrides=overrides, features=saved.features, lowered=lowered),
        overrides,
    )


def _original(key: str, base: BaseShape) -> str:
    """The key of the base's parameter that a trained one replaces."""
    module, _, own = key.partition(COPY)
    plain = f"{module}.{own}"
    return plain if split_key(plain, base)[0] == module.removeprefix(PREFIX) else f"{module}.{own.partition('.')[2]}"
