"""Packed weights of linear layers, in full precision or quantised (int8, int4), and the maths of the quantisation.

    int8:  W[o, i] ≈ scale[o] · q[o, i],             q in -127..127
           x[t, i] ≈ step[t, i // RUN] · p[t, i],    p in -127..127
    int4:  W[o, i] ≈ scale[o, i // GROUP] · q[o, i], q in -8..7, scale in bf16
           x[t, i] ≈ step[t, i // GROUP] · p[t, i],  p in -127..127

q and p are integers, rounded to nearest (halves to even). A scale or step is the largest magnitude among the numbers
that share it, divided by the largest integer; in int4 it is the number of the largest magnitude divided by -8, with its
sign, as there is one more integer below zero than above. Products of integers are summed exactly over what shares a
scale and a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Scheme = Literal["int8", "int4"]
GROUP = 32  # inputs that share a scale, and a step of the rows, in int4
RUN = 64  # inputs that share a step of the rows in int8; the last of a row may be fewer
_MOST = 127  # largest integer in int8
_LEAST = 1e-30  # smallest scale or step; where numbers are smaller, the integers are zero


@dataclass(frozen=True, eq=False)
class _Packed:
    """Weights in a backend's own layout.

    Attributes:
        shape: (out, in) of one matrix.
        dtype: of the weights that were packed.
        scheme: how they are quantised; None: full precision.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    scheme: Scheme | None
    data: Tensor
    scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)


class PackedWeight(_Packed):
    """One layer's weights W [out, in]."""


class PackedExpertWeights(_Packed):
    """The weights [experts, out, in] of one layer of a mixture's experts, one `PackedWeight` after the other in memory.

    `data` and `scale` are [experts, ...].
    """

    @classmethod
    def pack(cls, weights: Tensor, pack: Callable[[Tensor], PackedWeight]) -> PackedExpertWeights:
        """Pack weights [experts, out, in], of at least one expert, by packing each expert's."""
        first = pack(weights[0])
        data = first.data.new_empty(len(weights), *first.data.shape)
        scale = None if first.scale is None else first.scale.new_empty(len(weights), *first.scale.shape)
        whole = cls(first.shape, first.dtype, first.scheme, data, scale)
        for expert, weight in enumerate(weights):  # one by one: there are never two copies of all of them
            packed = pack(weight)
            whole[expert].data.copy_(packed.data)
            if packed.scale is not None and scale is not None:
                scale[expert].copy_(packed.scale)
        return whole

    def __len__(self) -> int:
        return self.data.shape[0]

    def __getitem__(self, expert: int) -> PackedWeight:
        scale = None if self.scale is None else self.scale[expert]
        return PackedWeight(self.shape, self.dtype, self.scheme, self.data[expert], scale)


def scheme_for(scheme: Scheme | None, in_features: int) -> Scheme | None:
    """The scheme for a weight with so many inputs: int8 instead of int4 where these are not whole groups."""
    return "int8" if scheme == "int4" and in_features % GROUP else scheme


def quantize(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Integers q int8 [out, in] and scales float32 [out, groups] (one group in int8)."""
    if scheme == "int8":
        grouped = _grouped(weight.detach(), weight.shape[1])
        scale = _step(grouped)
    else:
        grouped = _grouped(weight.detach(), GROUP)
        high, low = (extreme(dim=-1, keepdim=True) for extreme in (grouped.amax, grouped.amin))
        scale = torch.where(high >= -low, high, low) / -8
        scale = torch.where(scale.abs() < _LEAST, _LEAST, scale).bfloat16().float()
    q = _integers(grouped, scale).clamp(-8 if scheme == "int4" else -_MOST, 7 if scheme == "int4" else _MOST)
    return q.to(torch.int8).view(weight.shape), scale.squeeze(-1)


def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """The weights float32 [out, in] that integers and scales stand for."""
    return (q.view(*scale.shape, -1).float() * scale[..., None]).view(q.shape)


def round_rows(x: Tensor, scheme: Scheme) -> Tensor:
    """Rows x [rows, in] rounded as a layer quantised in the scheme multiplies them, float32."""
    width, size = x.shape[1], RUN if scheme == "int8" else GROUP
    grouped = _grouped(functional.pad(x, (0, -width % size)), size)
    step = _step(grouped)
    return (_integers(grouped, step) * step).flatten(1)[:, :width]


def _grouped(rows: Tensor, size: int) -> Tensor:
    """float32 [rows, groups, size]."""
    return rows.float().reshape(rows.shape[0], rows.shape[1] // size, size)


def _step(grouped: Tensor) -> Tensor:
    return (grouped.abs().amax(-1, keepdim=True) / _MOST).clamp(min=_LEAST)


def _integers(grouped: Tensor, step: Tensor) -> Tensor:
    return (grouped * (1 / step)).round()
