"""Triton kernels of the low-rank delta: shrink (x·Aᵀ) and expand (·B), launched by `delta.py`.

Both find their rows in the same way and read the adapters' matrices through the pointer tables. Offsets within a tile
fit 32 bits; a tile's own offset takes 64. Every matrix begins at a 64-byte boundary, which `tl.multiple_of` on pointers
from the tables tells the compiler: without it each element would be a load of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Arguments that vary from step to step or from group to group; specialising on them would only cost compilations.
NOT_SPECIALIZED = [
    *("a", "a_stride", "b", "b_stride", "rank", "rank_stride", "start", "end", "slot", "weight"),
    *("count", "rows", "modules", "module0", "splits"),
]


@triton.jit
def find_tile(
    tile: tl.tensor, start: tl.tensor, end: tl.tensor, slot: tl.tensor, rank: tl.tensor, count: tl.tensor,
    BLOCK_M: tl.constexpr, COUNT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Find the segments first to last (of one composition) of row tile `tile`, its first row and the end of its rows.

    Semantics: the rows of each composition are cut into tiles of BLOCK_M in turn; with COUNT = 1, `tile` is a segment,
    none being longer than a tile. `ranks`, returned last, is the sum over the members, 0 if there is nothing to do.
    """
    if COUNT == 1:
        first = tile
        part = 0
    else:
        i = tl.arange(0, COUNT)
        begins = tl.load(start + i, mask=i < count, other=0)
        stops = tl.load(end + i, mask=i < count, other=0)
        before = (i > 0) & (i < count)
        again = tl.load(start + i - 1, mask=before, other=-1) == begins
        again &= tl.load(end + i - 1, mask=before, other=-1) == stops
        past = tl.cumsum(tl.where(again, 0, tl.cdiv(stops - begins, BLOCK_M)), 0)
        first = tl.sum((past <= tile).to(tl.int32), 0)
        part = tile - tl.max(tl.where(past <= tile, past, 0), 0)
    begin = tl.load(start + first, mask=first < count, other=0)
    stop = tl.load(end + first, mask=first < count, other=0)
    before = (first > 0) & (first < count)
    again = (tl.load(start + first - 1, mask=before, other=-1) == begin) & (
        tl.load(end + first - 1, mask=before, other=-1) == stop
    )
    last = first
    ranks = 0
    member = (begin < stop) & (again == 0)
    while member:
        ranks += tl.load(rank + tl.load(slot + last))
        last += 1
        member = (tl.load(start + last, mask=last < count, other=-1) == begin) & (
            tl.load(end + last, mask=last < count, other=-1) == stop
        )
    return first, last, begin + part * BLOCK_M, stop, ranks


@triton.jit(do_not_specialize=NOT_SPECIALIZED, do_not_specialize_on_alignment=NOT_SPECIALIZED)
def shrink(
    x: tl.tensor, x_stride: tl.tensor, h: tl.tensor, a: tl.tensor, a_stride: tl.tensor, rank: tl.tensor,
    rank_stride: tl.tensor, start: tl.tensor, end: tl.tensor, slot: tl.tensor, count: tl.tensor, rows: tl.tensor,
    modules: tl.tensor, in_features: tl.tensor, span: tl.tensor, capacity: tl.tensor,
    DTYPE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, COUNT: tl.constexpr,
) -> None:  # fmt: skip
    """Products of parts of the input with A; the columns of a composition's members are neighbours.

    Semantics, with part = slice(split * span, (split + 1) * span):

        h[split, module, row] = concat(x[row, part] @ a(module, slot)[:, part].T for slot in the row's composition)

    Shapes: x [rows, in], h float32 [splits, modules, rows, capacity]; columns beyond a row's ranks are not written.
    Program: (tile, module, split). Ranks beyond `capacity` are cut off, so that a wrong bound cannot write elsewhere.
    """
    module, split = tl.program_id(1), tl.program_id(2)
    a += module * a_stride
    rank += module * rank_stride
    first, last, row, stop, ranks = find_tile(tl.program_id(0), start, end, slot, rank, count, BLOCK_M, COUNT)
    if ranks == 0:
        return
    m = tl.arange(0, BLOCK_M)[:, None]
    here = m < stop - row
    x += row.to(tl.int64) * x_stride
    h += ((split * modules + module).to(tl.int64) * rows + row) * capacity
    to = tl.minimum((split + 1) * span, in_features)
    column = 0
    for segment in range(first, last):
        place = tl.load(slot + segment)
        width = tl.minimum(tl.load(rank + place), capacity - column)
        matrix = tl.multiple_of(tl.load(a + place).to(tl.pointer_type(DTYPE)), 16)
        for r0 in range(0, width, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            sums = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for k0 in range(split * span, to, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                inside = (k < in_features)[None, :]
                part = tl.load(x + m * x_stride + k[None, :], mask=here & inside, other=0.0)
                weights = tl.load(
                    matrix + r[:, None] * in_features + k[None, :], mask=(r < width)[:, None] & inside, other=0.0
                )
                sums = tl.dot(part.to(OPERAND), tl.trans(weights.to(OPERAND)), sums, input_precision=PRECISION)
            tl.store(h + m * capacity + (column + r)[None, :], sums, mask=here & (r < width)[None, :])
        column += width


@triton.jit
def add_product(sums: tl.tensor, h: tl.tensor, weights: tl.tensor) -> tl.tensor:
    """sums + h @ weights, h in float32; with 16-bit weights, h is split into parts that tensor cores multiply."""
    if weights.dtype == tl.bfloat16:
        high = h.to(tl.bfloat16)
        sums = tl.dot((h - high.to(tl.float32)).to(tl.bfloat16), weights, sums)
        sums = tl.dot(high, weights, sums)
    elif weights.dtype == tl.float16:  # h may be beyond fp16
        sums = tl.dot(h, weights.to(tl.float32), sums, input_precision="tf32x3")
    else:
        sums = tl.dot(h, weights, sums, input_precision="ieee")
    return sums


@triton.jit(do_not_specialize=NOT_SPECIALIZED, do_not_specialize_on_alignment=NOT_SPECIALIZED)
def expand(
    out0: tl.tensor, out1: tl.tensor, out2: tl.tensor, out3: tl.tensor,
    stride0: tl.tensor, stride1: tl.tensor, stride2: tl.tensor, stride3: tl.tensor,
    width0: tl.tensor, width1: tl.tensor, width2: tl.tensor, width3: tl.tensor,
    h: tl.tensor, b: tl.tensor, b_stride: tl.tensor, rank: tl.tensor, rank_stride: tl.tensor, start: tl.tensor,
    end: tl.tensor, slot: tl.tensor, weight: tl.tensor, count: tl.tensor, rows: tl.tensor, modules: tl.tensor,
    module0: tl.tensor, splits: tl.tensor, capacity: tl.tensor,
    DTYPE: tl.constexpr, TOGETHER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, COUNT: tl.constexpr,
) -> None:  # fmt: skip
    """Add the sum of the parts times B to the outputs of modules module0 to module0 + 3, rounded once.

    Semantics, with `ranks` the columns of h that are the member's:

        out[row] += sum(weight * (h[:, module, row, ranks].sum(0) @ b(module, slot)) for the row's composition)

    Shapes: out_i [rows, width_i]; a width of 0 is no output. Program: (tile of the columns of all outputs, tile).
    """
    tile = tl.program_id(0)
    end0 = tl.cdiv(width0, BLOCK_N)
    end1 = end0 + tl.cdiv(width1, BLOCK_N)
    end2 = end1 + tl.cdiv(width2, BLOCK_N)
    out = tl.where(tile < end0, out0, tl.where(tile < end1, out1, tl.where(tile < end2, out2, out3)))
    stride = tl.where(tile < end0, stride0, tl.where(tile < end1, stride1, tl.where(tile < end2, stride2, stride3)))
    width = tl.where(tile < end0, width0, tl.where(tile < end1, width1, tl.where(tile < end2, width2, width3)))
    before = tl.where(tile < end0, 0, tl.where(tile < end1, end0, tl.where(tile < end2, end1, end2)))
    module = module0 + (tile >= end0).to(tl.int32) + (tile >= end1).to(tl.int32) + (tile >= end2).to(tl.int32)
    b += module * b_stride
    rank += module * rank_stride
    first, last, row, stop, ranks = find_tile(tl.program_id(1), start, end, slot, rank, count, BLOCK_M, COUNT)
    if ranks == 0:
        return
    m = tl.arange(0, BLOCK_M)[:, None]
    n = (tile - before) * BLOCK_N + tl.arange(0, BLOCK_N)
    here = m < stop - row
    inside = (n < width)[None, :]
    places = out + row.to(tl.int64) * stride + m * stride + n[None, :]
    was = tl.load(places, mask=here & inside, other=0.0)  # early: it is needed last
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    column = 0
    for segment in range(first, last):
        place = tl.load(slot + segment)
        share = tl.load(weight + segment)
        high = tl.minimum(tl.load(rank + place), capacity - column)
        matrix = tl.multiple_of(tl.load(b + place).to(tl.pointer_type(DTYPE)), 16)
        for r0 in range(0, high, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            known = (r < high)[None, :]
            weights = tl.load(matrix + r[:, None] * width + n[None, :], mask=(r < high)[:, None] & inside, other=0.0)
            shrunk = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for split0 in range(0, splits, TOGETHER):
                for i in tl.static_range(TOGETHER):
                    part = h + (((split0 + i) * modules + module).to(tl.int64) * rows + row) * capacity
                    there = here & known & (split0 + i < splits)
                    shrunk += tl.load(part + m * capacity + (column + r)[None, :], mask=there, other=0.0)
            sums = add_product(sums, shrunk * share, weights)
        column += high
    tl.store(places, (was.to(tl.float32) + sums).to(was.dtype), mask=here & inside)
