"""A trained adapter's PEFT files.

An adapter from whose delta the initial one is subtracted (PiSSA, OLoRA) is saved as LoRA of twice the rank over the
untouched base, B A − B0 A0, as PEFT does with `path_initial_model_for_weight_conversion`. PEFT's factors are [B | −B0]
and [A ; A0], whose products nearly cancel: rounded to bf16 they would lose what was trained. These are factors of the
difference, found in float64.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional

from lora_serve.adapters.adapter import Site
from lora_serve.adapters.formats.keys import PREFIX
from lora_serve.adapters.formats.residual import difference
from lora_serve.adapters.formats.virtual_tokens import TABLE
from lora_serve.adapters.peft_folder import write_peft_folder
from lora_serve.engine.training.method_settings import Ia3Settings
from lora_serve.engine.training.trainable_adapter import TrainableAdapter
from lora_serve.engine.training.trainable_layout import FlatLayer
from lora_serve.engine.training.virtual_token_settings import (
    PrefixTuningSettings,
    PromptTuningSettings,
    PTuningSettings,
)


def peft_tensors(adapter: TrainableAdapter, masters: Tensor | None = None) -> dict[str, Tensor]:
    """The master weights under PEFT's keys, float32, on the host; copies. Takes long where an initial delta goes out.

    Args:
        masters: a copy of the adapter's, with which this may run in any thread; None: as they are now.
    """
    masters, found = adapter.masters if masters is None else masters, {}
    for name, layer in adapter.layers.items():
        a, b = _factors(layer, masters)
        found[f"{PREFIX}{name}.lora_A.weight"] = a
        found[f"{PREFIX}{name}.lora_B.weight"] = b.contiguous()
        if layer.magnitude >= 0:
            found[f"{PREFIX}{name}.lora_magnitude_vector"] = layer.m(masters).cpu().clone()
    for name, gain in adapter.layout.gains.items():
        values = gain.values(masters).cpu().clone()
        found[f"{PREFIX}{name}.ia3_l"] = values[None] if gain.on_input else values[:, None]
    virtual = adapter.layout.table or adapter.layout.prefix
    return found if virtual is None else {TABLE: virtual.values(masters).flatten(1).cpu().clone()}


def _factors(layer: FlatLayer, masters: Tensor) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] of the delta over the untouched base, unscaled; copies on the host."""
    a, b = layer.a(masters).cpu().clone(), layer.b(masters).T.cpu().clone()
    if not layer.subtracts:
        return a, b
    fixed_a, fixed_b = (each.cpu().double() for each in layer.initial(masters))
    a, b = difference(a, b, fixed_b.T / -layer.module.scaling, fixed_a)
    missing = 2 * layer.module.rank - len(a)  # a matrix of a lower rank than that
    return functional.pad(a, (0, 0, 0, missing)), functional.pad(b, (0, missing))


def peft_config(adapter: TrainableAdapter, base_name: str = "") -> dict[str, Any]:
    """The adapter's `adapter_config.json`.

    Args:
        base_name: what it says of the base.
    """
    return _settings(adapter) | {"base_model_name_or_path": base_name}


def save_peft(adapter: TrainableAdapter, folder: Path, base_name: str = "") -> None:
    """Write the adapter to a folder, which PEFT and the adapter store read; `base_name` as in `peft_config`."""
    write_peft_folder(folder, peft_config(adapter, base_name), peft_tensors(adapter))


def _settings(adapter: TrainableAdapter) -> dict[str, Any]:
    settings, gains = adapter.settings, adapter.layout.gains
    if isinstance(settings, PromptTuningSettings | PTuningSettings):
        assert adapter.layout.table is not None
        return settings.peft_config(adapter.layout.table.width)
    if isinstance(settings, PrefixTuningSettings):
        prefix = adapter.layout.prefix
        assert prefix is not None
        return settings.peft_config(prefix.layers, prefix.heads, prefix.dim)
    if isinstance(settings, Ia3Settings):
        sites = {name: gain.site for name, gain in gains.items()}
        targets, feedforward = _targets(adapter, sites), {name for name, gain in gains.items() if gain.on_input}
        leaves = {name.rpartition(".")[2] for name in feedforward}
        whole = {name for name in sites if any(name.endswith(leaf) for leaf in leaves)} != feedforward
        if whole or not leaves <= set(targets):
            targets, leaves = sorted(sites), feedforward
        found = settings.peft_config(targets, sorted(leaves))
    else:
        sites = {name: layer.module.site for name, layer in adapter.layers.items()}
        found = settings.peft_config(_targets(adapter, sites))
    return found | {"fan_in_fan_out": any(site.transposed for site in sites.values())}


def _targets(adapter: TrainableAdapter, sites: Mapping[str, Site]) -> list[str]:
    """`target_modules` that name exactly the adapter's modules, whatever a reader takes "all-linear" or a name for.

    Names of layers' modules if no other module of the base has one of them, else whole paths.
    """
    leaves = {name.rpartition(".")[2] for name in sites}
    named = {path for path in adapter.base_sites if not leaves.isdisjoint(re.split(r"[.\[]", path))}
    return sorted(leaves if named == sites.keys() else sites)
