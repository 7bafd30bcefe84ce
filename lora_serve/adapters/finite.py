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
    for module, delta in lowered.deltas.items():
        held.setdefault(module, []).extend((delta.a, delta.b))
    found = [
        module
        for module, tensors in held.items()
        if not all(_extreme(tensor) <= limit for tensor in tensors if tensor.numel())
        or (module in lowered.deltas and not _fits(lowered.deltas[module], limit))
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


def _fits(delta: Delta, limit: float) -> bool:
    """Whether ‖A‖ times the largest ‖B_o‖ is within a limit, of A [rank, in] and B [rank, out]."""
    a, b = delta.a, delta.b
    if not (a.numel() and b.numel()):
        return True
    # ‖A‖ is at most its largest element times the root of their number: this is far quicker, and mostly enough.
    if _extreme(a) * a.numel() ** 0.5 * _extreme(b) * b.shape[0] ** 0.5 <= limit:
        return True
    norms = torch.linalg.vector_norm(b, dim=0, dtype=torch.float64)
    return float(torch.linalg.vector_norm(a, dtype=torch.float64) * norms.max()) <= limit
