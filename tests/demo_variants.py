"""Adapters of the demo model that behave like `shout` and have different weights."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from server_process import ADAPTERS

from lora_serve.adapters.store.records import describe_folder

SHOUT = ADAPTERS / "shout"


def variant(number: int) -> dict[str, Any]:
    """Files of an adapter that behaves like `shout` but has different weights."""
    tensors = load_file(SHOUT / "adapter_model.safetensors")
    weights = save({name: tensor * (1 + 1e-4 * (number + 1)) for name, tensor in tensors.items()})
    return {
        "files": [
            ("files", ("adapter_config.json", (SHOUT / "adapter_config.json").read_bytes())),
            ("files", ("adapter_model.safetensors", weights)),
        ]
    }


@cache
def variant_digest(number: int) -> str:
    """Digest of the version that publishing a variant makes."""
    with tempfile.TemporaryDirectory() as folder:
        for _, (name, content) in variant(number)["files"]:
            (Path(folder) / name).write_bytes(content)
        return describe_folder(Path(folder)).digest
