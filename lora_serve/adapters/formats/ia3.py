"""(IA)³: a gain per channel, on a module's output or, for feed-forward modules, on its input.

    y = l ⊙ (W x + b), or W(l ⊙ x) + b
    keys: X.ia3_l, [out, 1] on the output, [1, in] on the input

The shape tells which of the two it is, so `feedforward_modules` is not needed. Source: PEFT 0.21,
`peft/tuners/ia3`.
"""

from __future__ import annotations

from dataclasses import replace

from lora_serve.adapters.adapter import BaseShape, Lowered, ModuleOverride
from lora_serve.adapters.checkpoint import Checkpoint
from lora_serve.adapters.formats.fields import check_fields
from lora_serve.adapters.formats.keys import group_by_site
from lora_serve.adapters.formats.report import report
from lora_serve.adapters.formats.saved import split_saved
from lora_serve.errors import AdapterInvalid

WITHOUT_EFFECT = {"feedforward_modules", "init_ia3_weights"}
TAILS = {"ia3_l": "ia3_l"}


def lower(checkpoint: Checkpoint, base: BaseShape) -> Lowered:
    """Lower to gains. Raises AdapterInvalid naming keys and fields."""
    config = checkpoint.config
    check_fields(config, set(), WITHOUT_EFFECT)
    saved = split_saved(config, checkpoint.tensors, base)
    overrides, found = dict(saved.overrides), group_by_site(saved.rest, base, TAILS)
    inputs = 0
    for name, group in found.items():
        gain, site = group["ia3_l"], base.sites[name]
        override = overrides.get(name, ModuleOverride())
        if tuple(gain.shape) == (1, site.in_features):
            overrides[name] = replace(override, gain_in=gain.flatten())
            inputs += 1
        elif tuple(gain.shape) == (site.out_features, 1):
            overrides[name] = replace(override, gain_out=gain.flatten())
        else:
            raise AdapterInvalid(
                f"{name}.ia3_l takes [{site.out_features}, 1] or [1, {site.in_features}]; "
                f"the adapter has {list(gain.shape)}"
            )
    lowered = [f"gains on the inputs of {inputs} modules and on the outputs of {len(found) - inputs}"]
    return Lowered(
        {}, report(config, base, method="IA3", overrides=overrides, features=saved.features, lowered=lowered), overrides
    )
