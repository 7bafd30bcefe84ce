"""Weights of linear maps in the form that a backend reads, in full precision or made small.

    int8:  W[o, i] ≈ scale[o] · q[o, i],             q in -127..127; rows of inputs are rounded to int8 alike:
           x[t, i] ≈ step[t] · p[t, i],              step[t] = max |x[t]| / 127
    int4:  W[o, i] ≈ scale[o, i // GROUP] · q[o, i],  q in -7..7; inputs stay as they are

Symmetric, rounded to nearest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Scheme = Literal["int8", "int4"]
GROUP = 32  # inputs that share a scale in int4
_MOST = {"int8": 127, "int4": 7}


@dataclass(frozen=True, eq=False)
class Packed:
    """One map's weights W [out, in]. What `data` and `scale` hold is the backend's own business.

    Attributes:
        shape: (out, in).
        dtype: of the weights that were packed.
        scheme: how they were made small; None: they were not.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    scheme: Scheme | None
    data: Tensor
    scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)


def fitting(scheme: Scheme | None, in_features: int) -> Scheme | None:
    """The scheme, if a map with so many inputs can be kept in it."""
    return None if scheme == "int4" and in_features % GROUP else scheme


def quantized(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Whole numbers q int8 [out, in] and scale float32 [out, groups] (one group in int8)."""
    out, wide = weight.shape
    grouped = weight.detach().float().reshape(out, -1, wide if scheme == "int8" else GROUP)
    scale = (grouped.abs().amax(-1, keepdim=True) / _MOST[scheme]).clamp(min=1e-12)
    whole = (grouped / scale).round().clamp(-_MOST[scheme], _MOST[scheme]).to(torch.int8)
    return whole.reshape(out, wide), scale.squeeze(-1)


def dequantized(whole: Tensor, scale: Tensor) -> Tensor:
    """The weights [out, in] that whole numbers and scales stand for, float32."""
    return (whole.view(*scale.shape, -1).float() * scale[..., None]).view(whole.shape)


def rounded(x: Tensor) -> Tensor:
    """Rows x [rows, in] as int8 keeps them, float32."""
    peak = x.float().abs().amax(-1, keepdim=True)
    return (x.float() * torch.where(peak > 0, 127 / peak, 0)).round() * (peak / 127)
