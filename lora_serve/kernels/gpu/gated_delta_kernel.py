"""Triton kernel that expands the deltas of a gated MLP's two projections and gates them, launched by `delta.py`.

In place of an expand and a gated activation: one launch less, and the projections are read once and not written again.
A program has one row, so that rows of the base are gated too; where many rows share an adapter, each reads its B anew.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lora_serve.kernels.gpu.delta_kernels import NOT_SPECIALIZED, expand_rows
from lora_serve.kernels.gpu.pointwise import gate_values


@triton.jit(do_not_specialize=NOT_SPECIALIZED, do_not_specialize_on_alignment=NOT_SPECIALIZED)
def expand_gated(
    gate: tl.tensor, up: tl.tensor, y: tl.tensor, gate_stride: tl.tensor, up_stride: tl.tensor, n_end: tl.tensor,
    h: tl.tensor, b: tl.tensor, b_stride: tl.tensor, rank: tl.tensor, rank_stride: tl.tensor, start: tl.tensor,
    end: tl.tensor, slot: tl.tensor, weight: tl.tensor, count: tl.tensor, rows: tl.tensor, capacity: tl.tensor,
    DTYPE: tl.constexpr, SPLITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, COUNT: tl.constexpr,
    SILU: tl.constexpr, DEPENDENT: tl.constexpr,
) -> None:  # fmt: skip
    """y[row] = activation(gate[row] + its delta) * (up[row] + its delta), rounded as by the separate kernels.

    Shapes: gate, up and y [rows, n_end], h [SPLITS, 2, rows, capacity]. Program: (tile of columns, row).
    """
    if DEPENDENT:
        gdc_launch_dependents()
    row = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.arange(0, COUNT)
    begins = tl.load(start + i, mask=i < count, other=0)
    stops = tl.load(end + i, mask=i < count, other=0)
    holds = (begins <= row) & (row < stops)  # the members of the row's composition, which are neighbours
    first = tl.min(tl.where(holds, i, COUNT), 0)
    members = tl.sum(holds.to(tl.int32), 0)
    h += row.to(tl.int64) * capacity
    beside = rows.to(tl.int64) * capacity  # from the first projection's part of h to the second's
    gate_sums = tl.zeros((BLOCK_N,), tl.float32)
    up_sums = tl.zeros((BLOCK_N,), tl.float32)
    gate_column = 0
    up_column = 0
    for segment in range(first, first + members):
        place = tl.load(slot + segment)
        share = tl.load(weight + segment)
        gate_width = tl.minimum(tl.load(rank + place), capacity - gate_column)
        up_width = tl.minimum(tl.load(rank + rank_stride + place), capacity - up_column)
        gate_values_b = tl.multiple_of(tl.load(b + place).to(tl.pointer_type(DTYPE)), 16)
        up_values_b = tl.multiple_of(tl.load(b + b_stride + place).to(tl.pointer_type(DTYPE)), 16)
        gate_sums = expand_rows(
            gate_sums, h + gate_column, 2 * beside, capacity, gate_values_b, gate_width, 1, share, n, n_end, SPLITS,
            SPLITS, 1, BLOCK_R, DEPENDENT,
        )  # fmt: skip
        up_sums = expand_rows(
            up_sums, h + beside + up_column, 2 * beside, capacity, up_values_b, up_width, 1, share, n, n_end, SPLITS,
            SPLITS, 1, BLOCK_R, DEPENDENT,
        )  # fmt: skip
        gate_column += gate_width
        up_column += up_width
    if DEPENDENT:
        gdc_wait()
    inside = n < n_end
    g = tl.load(gate + row.to(tl.int64) * gate_stride + n, mask=inside, other=0.0)
    u = tl.load(up + row.to(tl.int64) * up_stride + n, mask=inside, other=0.0)
    g = (g.to(tl.float32) + gate_sums).to(y.dtype.element_ty)
    u = (u.to(tl.float32) + up_sums).to(y.dtype.element_ty)
    tl.store(y + row.to(tl.int64) * n_end + n, gate_values(g, u, SILU), mask=inside)
