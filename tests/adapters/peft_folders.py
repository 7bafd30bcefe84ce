"""Writes PEFT folders, valid or with a chosen fault, for a base of two small layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_serve.adapters.adapter import BaseShape, Site

PREFIX = "base_model.model."
SITES = {name: Site(name, 8, 12) for name in ("layers.0.q_proj", "layers.0.k_proj", "layers.1.q_proj")}
HEAD = torch.arange(96.0).view(12, 8)
BASE = BaseShape(
    sites=SITES,
    groups=(("layers.0.q_proj", "layers.0.k_proj"), ("layers.1.q_proj",)),
    weight=lambda name: HEAD,
    others={"norm": "a RMSNorm, not a linear module"},
    modules={name: {"weight": (12, 8)} for name in SITES},
    parameter=lambda path: HEAD,
)


def tensors(seed: int = 0, rank: int = 4, names: tuple[str, ...] = tuple(SITES)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in names:
        found[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(rank, 8, generator=generator)
        found[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(12, rank, generator=generator)
    return found


def config(**fields: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj"], **fields}


def write(folder: Path, weights: dict[str, Tensor] | None = None, **fields: Any) -> Path:
    """A folder with these weights (random ones by default) and configuration fields."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config(**fields)))
    save_file(tensors() if weights is None else weights, folder / "adapter_model.safetensors")
    return folder
