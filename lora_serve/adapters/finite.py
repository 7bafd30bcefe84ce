"""Check that what an adapter of finite numbers adds to and puts into the base is finite when it is served."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_serve.adapters.adapter import Lowered
from lora_serve.adapters.checkpoint import shorten
from lora_serve.errors import AdapterInvalid
from lora_serve.kernels.contract import Delta


def check_finite(lowered: Lowered, dtype: torch.dtype) -> None:
    """Raise AdapterInvalid naming the modules at which an adapter overflows in the serving dtype.

    That is where a number is not finite after lowering (scaled, multiplied, merged) or after the cast to `dtype`, or
    where a delta's output is too large for `dtype`: on input channels of size one, |B A x| is about ‖B_o A‖ ≤ ‖B_o‖ ‖A‖
    at output o.
    """
    limit = torch.finfo(dtype).max
    held = {module: list(override.tensors.values()) for module, override in lowered.overrides.items()}
    if lowered.prefix is not None:
        held["the virtual tokens"] = list(lowered.prefix.tensors.values())
    found = [
        module
        for module in dict.fromkeys([*held, *lowered.deltas])
        if not all(_extreme(tensor) <= limit for tensor in held.get(module, ()))
        or (module in lowered.deltas and not _fits(lowered.deltas[module], limit))
    ]
    if found:
        raise AdapterInvalid(
            f"the adapter's effect is not finite in {str(dtype).removeprefix('torch.')}, at {shorten(found, 4)}: its "
            "numbers, times its scaling, are too large"
        )


def _extreme(tensor: Tensor) -> float:
    """The largest magnitude; NaN if there is one, 0 if it is empty."""
    if not tensor.numel():
        return 0.0
    low, high = tensor.aminmax()
    return float(torch.maximum(-low, high))


def _fits(delta: Delta, limit: float) -> bool:
    """Whether all numbers of A [rank, in] and B [rank, out], and ‖A‖ times the largest ‖B_o‖, are within a limit."""
    a, b = _extreme(delta.a), _extreme(delta.b)
    if not (a <= limit and b <= limit):
        return False
    # ‖A‖ is at most its largest element times the root of their number: this is far quicker, and mostly enough.
    if a * delta.a.numel() ** 0.5 * b * delta.b.shape[0] ** 0.5 <= limit:
        return True
    norms = torch.linalg.vector_norm(delta.b, dim=0, dtype=torch.float64)
    return float(torch.linalg.vector_norm(delta.a, dtype=torch.float64) * norms.max()) <= limit
