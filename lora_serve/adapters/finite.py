"""Check that what an adapter of finite numbers adds to and puts into the base is finite when it is served."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_serve.adapters.adapter import Lowered
from lora_serve.adapters.checkpoint import shorten
from lora_serve.errors import AdapterInvalid


def check_finite(lowered: Lowered, dtype: torch.dtype) -> None:
    """Raise AdapterInvalid naming the modules at which an adapter overflows in the serving dtype.

    That is where a number is not finite after lowering (scaled, multiplied, merged) or after the cast to `dtype`, or
    where a delta's output is too large for `dtype`: on input channels of size one, |B A x| is about ‖B_o A‖ ≤ ‖B_o‖ ‖A‖
    at output o.
    """
    limit = torch.finfo(dtype).max
    largest = {module: _largest(delta.a, delta.b) for module, delta in lowered.deltas.items()}
    held = {module: list(override.tensors.values()) for module, override in lowered.overrides.items()}
    if lowered.prefix is not None:
        held["the virtual tokens"] = list(lowered.prefix.tensors.values())
    for module, delta in lowered.deltas.items():
        held.setdefault(module, []).extend((delta.a, delta.b))
    found = [
        module
        for module, tensors in held.items()
        if not all(_extreme(tensor) <= limit for tensor in tensors if tensor.numel())
        or not largest.get(module, 0.0) <= limit
    ]
    if found:
        raise AdapterInvalid(
            f"the adapter's effect is not finite in {str(dtype).removeprefix('torch.')}, at {shorten(found, 4)}: its "
            "numbers, times its scaling, are too large"
        )


def _extreme(tensor: Tensor) -> float:
    """The largest magnitude; NaN if there is one."""
    low, high = tensor.aminmax()
    return float(torch.maximum(-low, high))


def _largest(a: Tensor, b: Tensor) -> float:
    """‖A‖ times the largest ‖B_o‖, of A [rank, in] and B [rank, out]."""
    norms = torch.linalg.vector_norm(b, dim=0, dtype=torch.float64)
    return float(torch.linalg.vector_norm(a, dtype=torch.float64) * norms.max()) if b.numel() else 0.0
