"""Small folders to publish to a store, whose files are text: a store never looks into them."""

from __future__ import annotations

import json
from pathlib import Path

from lora_serve.adapters.store.records import NameRecord, describe_folder
from lora_serve.adapters.store.store import Store


def stage(store: Store, weights: str = "weights", alpha: int = 8, readme: str = "card", lowered: str = "") -> Path:
    """A staged folder of PEFT files, with a lowered form."""
    staged = store.stage()
    (staged / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha}))
    (staged / "adapter_model.safetensors").write_text(weights)
    (staged / "README.md").write_text(readme)
    (staged / "lowered").mkdir()
    (staged / "lowered" / "flat.bin").write_text(lowered or f"lowered {weights}")
    return staged


def publish(store: Store, name: str, weights: str, lowered: str = "") -> str:
    """Publish such a folder as the only version of `name`. Returns its digest."""
    staged = stage(store, weights, lowered=lowered)
    version = describe_folder(staged)
    store.publish(name, staged, version, NameRecord([version.digest]))
    return version.digest


def digest_of(store: Store, weights: str = "weights", alpha: int = 8, readme: str = "card") -> str:
    return describe_folder(stage(store, weights, alpha, readme)).digest


def listing(root: Path) -> set[str]:
    """Paths of all files below a folder."""
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() or path.is_symlink()}
