"""The identity of an adapter version: a hash of what it does, not of how it was written down."""

from __future__ import annotations

from hashlib import sha256

import torch

from lora_serve.adapters.adapter import Lowered


def digest(lowered: Lowered) -> str:
    """Hex SHA-256 over the lowered content in the precision it was saved in.

    The serving dtype and the order of keys in the file do not matter: the same deltas have the same digest.
    """
    found = sha256()
    for name in sorted(lowered.deltas):
        delta = lowered.deltas[name]
        for matrix in (delta.a, delta.b):
            found.update(f"{name} {tuple(matrix.shape)} {matrix.dtype}\n".encode())
            found.update(matrix.contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()
