"""The identity of an adapter version: a SHA-256 of its lowered content, independent of how it was saved."""

from __future__ import annotations

from hashlib import sha256

import torch

from lora_serve.adapters.adapter import Lowered


def digest(lowered: Lowered) -> str:
    """Hex SHA-256 over the lowered content in the precision it was saved in.

    Independent of the serving dtype, the order of keys in the file and configuration fields without effect.
    """
    found = sha256()
    for name, tensor in sorted(lowered.tensors.items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        found.update(tensor.reshape(-1).contiguous().view(torch.uint8).numpy().data)
    ids = {module: override.token_ids for module, override in sorted(lowered.overrides.items()) if override.token_ids}
    if ids or lowered.invocation:
        found.update(f"{ids} {lowered.invocation}\n".encode())
    if lowered.embeds:
        found.update(f"embeds {lowered.pooling}\n".encode())
    return found.hexdigest()
