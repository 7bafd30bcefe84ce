"""Adapters that only fetching looks at: files of any content."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping

CONFIG = b'{"peft_type": "LORA", "r": 8}'
WEIGHTS = bytes(range(256)) * 2000
FILES = {"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS}
MANY = FILES | {"README.md": b"A card.", "1_Pooling/config.json": b"{}", "optimizer.pt": b"pickle"}
WANTED = FILES | {"README.md": b"A card.", "1_Pooling/config.json": b"{}"}


def _tar(files: Mapping[str, bytes] = FILES) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


PACKED = _tar()
