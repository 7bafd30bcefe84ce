"""Argument checks shared by the CPU and GPU backends.

Values are not read. Each check raises ValueError or TypeError with what does not fit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_serve.kernels.contract import DeltaGroup


def check_norm(rows: Tensor, weight: Tensor) -> None:
    """For `Kernels.rms_norm`, its input flattened to rows [rows, width]."""
    width = rows.shape[1]
    if rows.stride(1) != 1 or weight.shape != (width,) or not weight.is_contiguous():
        raise ValueError(f"weight {tuple(weight.shape)} does not fit rows of {width}")


def check_gated(gate: Tensor, up: Tensor) -> None:
    if gate.shape != up.shape or gate.dtype is not up.dtype or (gate.stride(-1), up.stride(-1)) != (1, 1):
        raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} do not fit")


def check_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    _, _, tokens, dim = q.shape
    fits = q.shape[0] == k.shape[0] == 1 and k.shape[2:] == (tokens, dim) and dim % 2 == 0
    if not fits or cos.shape != (1, tokens, dim) or sin.shape != cos.shape:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and cos {tuple(cos.shape)} do not fit")
    if q.dtype is not k.dtype or cos.dtype is not sin.dtype or (q.stride(3), k.stride(3)) != (1, 1):
        raise TypeError("q and k share a type, cos and sin too; heads are contiguous")


def check_write(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, kv_index: Tensor) -> None:
    heads, tokens = keys.shape[2], kv_index.shape[0]
    if k.dtype is not keys.dtype or v.dtype is not values.dtype or kv_index.dtype is not torch.int64:
        raise TypeError("k and v have the pool's type, kv_index is int64")
    if k.shape != (tokens, heads, keys.shape[3]) or v.shape != (tokens, heads, values.shape[3]):
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} do not fit the pool {tuple(keys.shape)}")


def check_delta_input(x: Tensor, group: DeltaGroup) -> None:
    if x.ndim != 2 or x.shape[1] != group.in_features or x.stride(1) != 1:
        raise ValueError(f"x {tuple(x.shape)} does not fit the group")


def check_delta(x: Tensor, outputs: Sequence[Tensor], group: DeltaGroup) -> None:
    check_delta_input(x, group)
    tokens = x.shape[0]
    if len(outputs) != len(group.out_features):
        raise ValueError(f"x {tuple(x.shape)} with {len(outputs)} outputs does not fit the group")
    for output, features in zip(outputs, group.out_features, strict=True):
        if output.dtype is not x.dtype or output.shape != (tokens, features) or output.stride(1) != 1:
            raise ValueError(f"output {tuple(output.shape)}, {output.dtype} does not fit {tokens} rows of {features}")
