"""Packed weights of linear layers, in full precision or quantised (int8, int4, fp8), and how they are quantised.

    int8:  W[o, i] ≈ scale[o] · q[o, i],                  q in -127..127
           x[t, i] ≈ step[t, i // RUN] · p[t, i],         p in -127..127
    int4:  W[o, i] ≈ scale[o] · s[o, g] · (q[o, i] - z[o, g] / 8),  g = i // GROUP, q in 0..15, z in 0..127
           x[t, i] ≈ step[t, g] · p[t, i],                p in -127..127
    fp8:   W[o, i] ≈ scale[o] · q[o, i],                  q in e4m3, -448..448
           x[t, i] ≈ step[t] · p[t, i],                   p in e4m3, -448..448

In int8 and int4, q, p and z are integers, rounded to nearest (halves to even). A step, and int8's scale, is the largest
magnitude among the numbers that share it, divided by the largest integer. Products of integers are summed exactly over
what shares a scale and a step. fp8 is the same with torch's `float8_e4m3fn`, floats of four bits of exponent and three
of mantissa, rounded to nearest (halves to even); their products are exact in float32, in which they are summed.

In int4 s and z fill 16 bits, a *level*: z in the lower seven, above them s, a float of four bits of exponent and five
of mantissa, (1 + mantissa / 32) · 2 ** (exponent - 15). They are fitted by weighted least squares: what a weight's
error costs is proportional to the mean square of the input that it multiplies, the *importance* of that input. A few
inputs of a language model are hundreds of times as large as the others: without it, the errors of their weights decide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Scheme = Literal["int8", "int4", "fp8"]
FP8 = torch.float8_e4m3fn
MOST_FP8 = 448.0  # the largest of them
GROUP = 32  # inputs that share a scale, and a step of the rows, in int4
RUN = 64  # inputs that share a step of the rows in int8; the last of a row may be fewer
ZERO_BITS = 7  # of a level, for z; the others are for s
SPANS = (13.5, 14.1, 14.7, 15.3, 15.9)  # steps that the range of a group is cut into, ascending
_MOST = 127  # largest integer in int8
_LAST = 15  # largest integer in int4
_TOP = 63 / 32  # largest s
_CHUNK, _CHUNK_ON_GPU = 1 << 18, 1 << 22  # weights that are fitted at a time: what a CPU's caches hold
_LEAST = 1e-30  # smallest scale or step; where numbers are smaller, the integers are zero


@dataclass(frozen=True, eq=False)
class _Packed:
    """Weights in a backend's own layout.

    Attributes:
        shape: (out, in) of one matrix.
        dtype: of the weights that were packed.
        scheme: how they are quantised; None: full precision.
        scale: of each output, if quantised.
        levels: int4's, where they are not in `data`.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    scheme: Scheme | None
    data: Tensor
    scale: Tensor | None = None
    levels: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.data, self.scale, self.levels) if part is not None)


class PackedWeight(_Packed):
    """One layer's weights W [out, in]."""


class PackedExpertWeights(_Packed):
    """The weights [experts, out, in] of one layer of a mixture's experts, one `PackedWeight` after the other in memory.

    `data`, `scale` and `levels` are [experts, ...].
    """

    @classmethod
    def pack(cls, weights: Tensor, pack: Callable[[Tensor], PackedWeight]) -> PackedExpertWeights:
        """Pack weights [experts, out, in], of at least one expert, by packing each expert's."""
        first = pack(weights[0])
        data, scale, levels = (
            None if part is None else part.new_empty(len(weights), *part.shape)
            for part in (first.data, first.scale, first.levels)
        )
        assert data is not None
        whole = cls(first.shape, first.dtype, first.scheme, data, scale, levels)
        for expert, weight in enumerate(weights):  # one by one: there are never two copies of all of them
            packed, own = pack(weight), whole[expert]
            for part, copy in ((packed.data, own.data), (packed.scale, own.scale), (packed.levels, own.levels)):
                if part is not None and copy is not None:
                    copy.copy_(part)
        return whole

    def __len__(self) -> int:
        return self.data.shape[0]

    def __getitem__(self, expert: int) -> PackedWeight:
        scale, levels = (None if part is None else part[expert] for part in (self.scale, self.levels))
        return PackedWeight(self.shape, self.dtype, self.scheme, self.data[expert], scale, levels)


def scheme_for(scheme: Scheme | None, in_features: int) -> Scheme | None:
    """The scheme for a weight with so many inputs: int8 instead of int4 where these are not whole groups."""
    return "int8" if scheme == "int4" and in_features % GROUP else scheme


def quantize(weight: Tensor, scheme: Scheme, importance: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """q int8 (in fp8: `FP8`) [out, in], scales float32 [out] and, in int4, levels int16 [out, groups].

    Args:
        importance: of each input, float32 [in], for int4; None: all the same.
    """
    weight = weight.detach()
    # A few outputs at a time: the float32 copies would take several times the memory of the weights.
    rows = max(1, (_CHUNK if weight.is_cpu else _CHUNK_ON_GPU) // max(1, weight.shape[1]))
    chunks = [weight[first : first + rows] for first in range(0, max(1, weight.shape[0]), rows)]
    if scheme == "int4":
        q, scale, levels = zip(*(_quantize_groups(chunk, importance) for chunk in chunks), strict=True)
        return torch.cat(q), torch.cat(scale), torch.cat(levels)
    if scheme == "fp8":
        floats, scale = zip(*map(_quantize_to_fp8, chunks), strict=True)
        return torch.cat([each.view(torch.int8) for each in floats]).view(FP8), torch.cat(scale), None
    whole, steps = zip(*map(_quantize_outputs, chunks), strict=True)
    return torch.cat(whole), torch.cat(steps), None


def dequantize(q: Tensor, scale: Tensor, levels: Tensor | None = None) -> Tensor:
    """The weights float32 [out, in] that q, scales and levels stand for."""
    if levels is None:
        return q.float() * scale[:, None]
    s, z = (each[..., None] for each in unpack_levels(levels))
    eighths = 8 * q.view(*levels.shape, -1) - z  # up to here everything is exact
    return (s / 8 * eighths).flatten(1) * scale[:, None]


def unpack_levels(levels: Tensor) -> tuple[Tensor, Tensor]:
    """s float32 and z int32 of levels."""
    bits = levels.int() & 0xFFFF
    z = bits & (1 << ZERO_BITS) - 1
    return ((bits - z << 11) + (112 << 23)).view(torch.float32), z  # s's mantissa and exponent as float32 has them


def _quantize_outputs(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize` in int8, of some outputs."""
    grouped = _grouped(weight, weight.shape[1])
    step = _step(grouped)
    return _integers(grouped, step).clamp(-_MOST, _MOST).to(torch.int8).view(weight.shape), step.flatten()


def _quantize_to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize` in fp8, of some outputs."""
    wide = weight.float()
    step = _step(wide, MOST_FP8)
    return _floats(wide, step), step.flatten()


def _quantize_groups(weight: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize` in int4, of some outputs.

    For each of `SPANS`, a group's range (with 0) is cut into so many steps, step and least number are fitted to the
    integers that this gives, and rounded to a level. The level with the least error is kept.
    """
    out, width = weight.shape
    x = weight.float().view(out, -1, GROUP).permute(2, 0, 1).contiguous()  # [GROUP, out, groups]
    if importance is None:
        importance = x.new_ones(width)
    costs = importance.to(x).view(-1, GROUP).T[:, None].contiguous()  # [GROUP, 1, groups]
    least, most = x.amin(0).clamp(max=0), x.amax(0).clamp(min=0)
    span = (most - least).clamp(min=_LEAST)
    scale = (span.amax(1, keepdim=True) / (SPANS[0] * _TOP)).clamp(min=_LEAST)
    all_costs, all_x = _sum(costs), _sum(costs * x)
    error, s, z = torch.full_like(span, torch.inf), torch.ones_like(span), torch.zeros_like(span)
    for steps in SPANS:
        q = (x - least).mul_(steps / span).round_().clamp_(0, _LAST)
        cost_q = costs * q
        sum_q, sum_qq, sum_qx = _sum(cost_q), _sum(q.mul_(cost_q)), _sum(cost_q.mul_(x))
        fitted = (all_costs * sum_qx - sum_q * all_x) / (all_costs * sum_qq - sum_q * sum_q)
        own = _round_step(fitted / scale)
        step = own * scale
        zero = (8 * (step * sum_q - all_x) / (step * all_costs)).round().clamp(0, (1 << ZERO_BITS) - 1)
        q = (x / step).add_(zero / 8).round_().clamp_(0, _LAST)
        off = q.sub_(zero / 8).mul_(step).sub_(x)
        found = _sum(off.square_().mul_(costs))
        better = found < error
        error, s, z = (torch.where(better, new, old) for new, old in ((found, error), (own, s), (zero, z)))
    q = (x / (s * scale) + z / 8).round().clamp(0, _LAST)
    levels = (s.view(torch.int32) - (112 << 23) >> 11) + z.int()
    return q.to(torch.int8).permute(1, 2, 0).reshape(out, width), scale.flatten(), levels.to(torch.int16)


def _round_step(step: Tensor) -> Tensor:
    """s, of the nearest level; the smallest one where a step is not a number."""
    bits = step.nan_to_num(0).clamp(2**-15, _TOP).view(torch.int32)
    return ((bits + (1 << 17)) & -(1 << 18)).view(torch.float32).clamp(max=_TOP)


def _sum(x: Tensor) -> Tensor:
    """x [GROUP, ...] summed over the group, in the same order on every device."""
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return x[0]


def round_rows(x: Tensor, scheme: Scheme) -> Tensor:
    """Rows x [rows, in] rounded as a layer quantised in the scheme multiplies them, float32."""
    if scheme == "fp8":
        wide = x.float()
        step = _step(wide, MOST_FP8)
        return _floats(wide, step).float() * step
    width, size = x.shape[1], RUN if scheme == "int8" else GROUP
    grouped = _grouped(functional.pad(x, (0, -width % size)), size)
    step = _step(grouped)
    return (_integers(grouped, step) * step).flatten(1)[:, :width]


def _grouped(rows: Tensor, size: int) -> Tensor:
    """float32 [rows, groups, size]."""
    return rows.float().reshape(rows.shape[0], rows.shape[1] // size, size)


def _step(grouped: Tensor, most: float = _MOST) -> Tensor:
    return (grouped.abs().amax(-1, keepdim=True) / most).clamp(min=_LEAST)


def _floats(wide: Tensor, step: Tensor) -> Tensor:
    return (wide * (1 / step)).clamp(-MOST_FP8, MOST_FP8).to(FP8)


def _integers(grouped: Tensor, step: Tensor) -> Tensor:
    return (grouped * (1 / step)).round()
