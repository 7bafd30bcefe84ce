"""Write an adapter's folder as PEFT saves it: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


def write_peft_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files; the folder is made.

    Args:
        tensors: contiguous, on the host, by PEFT's keys.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    save_file(dict(tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})
