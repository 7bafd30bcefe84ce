"""A trained adapter's PEFT files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_serve.adapters.formats.keys import PREFIX
from lora_serve.adapters.peft_folder import write_peft_folder
from lora_serve.engine.training.trainable_adapter import TrainableAdapter


def peft_tensors(adapter: TrainableAdapter) -> dict[str, Tensor]:
    """The master weights under PEFT's keys, float32, on the host; copies."""
    found = {}
    for name, layer in adapter.layers.items():
        found[f"{PREFIX}{name}.lora_A.weight"] = layer.a(adapter.masters).cpu().clone()
        found[f"{PREFIX}{name}.lora_B.weight"] = layer.b(adapter.masters).T.cpu().contiguous()
        if layer.magnitude >= 0:
            found[f"{PREFIX}{name}.lora_magnitude_vector"] = layer.m(adapter.masters).cpu().clone()
    return found


def peft_config(adapter: TrainableAdapter, base_name: str = "") -> dict[str, Any]:
    """The adapter's `adapter_config.json`.

    Args:
        base_name: what it says of the base.
    """
    turned = any(layer.module.site.transposed for layer in adapter.layers.values())
    return adapter.settings.peft_config(_targets(adapter)) | {
        "base_model_name_or_path": base_name,
        "fan_in_fan_out": turned,
    }


def save_peft(adapter: TrainableAdapter, folder: Path, base_name: str = "") -> None:
    """Write the adapter to a folder, which PEFT and the adapter store read; `base_name` as in `peft_config`."""
    write_peft_folder(folder, peft_config(adapter, base_name), peft_tensors(adapter))


def _targets(adapter: TrainableAdapter) -> list[str]:
    """`target_modules` that name exactly the adapter's modules, whatever a reader takes "all-linear" or a name for.

    Names of layers' modules if no other module of the base has one of them, else whole paths.
    """
    leaves = {name.rpartition(".")[2] for name in adapter.layers}
    named = {path for path in adapter.base_sites if not leaves.isdisjoint(re.split(r"[.\[]", path))}
    return sorted(leaves if named == adapter.layers.keys() else adapter.layers)
