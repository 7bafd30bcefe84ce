"""Triton kernels of the low-rank delta: shrink (x·Aᵀ) and expand (·B), launched by `delta.py`.

Both find their rows in the same way and read the adapters' matrices through the pointer tables. Where few rows are in a
step, time goes into loads that wait for each other, not into bytes. So what does not depend on another load is loaded
at once (the segment, its neighbours, its slot; then rank and address; then the matrix), and a segment of one row is
multiplied as a vector, without a tensor core's tile of which fifteen rows would be empty.

Offsets within a tile fit 32 bits; a tile's own offset takes 64. Every matrix begins at a 64-byte boundary, which
`tl.multiple_of` on pointers from the tables tells the compiler: without it each element would be a load of its own.

DEPENDENT: launched while the kernel before still runs (programmatic dependent launch). Until `gdc_wait` such a program
writes nothing and reads only what no kernel of the step writes: segments, pointer tables, the adapters' matrices. All
programs wait, also those with nothing to do: a kernel that ended before the one before it would let a third one start.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Arguments that vary from step to step or from group to group; specialising on them would only cost compilations.
NOT_SPECIALIZED = [
    *("a", "a_stride", "b", "b_stride", "rank", "rank_stride", "start", "end", "slot", "weight"),
    *("count", "rows", "modules", "module0"),
]


@triton.jit
def find_tile(
    tile: tl.tensor, start: tl.tensor, end: tl.tensor, count: tl.tensor, BLOCK_M: tl.constexpr, COUNT: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Find row tile `tile`: its first segment, the rows of that one (begin, stop), and the tile's first row.

    Semantics: the rows of each composition are cut into tiles of BLOCK_M in turn; with COUNT = 1, `tile` is a segment,
    none being longer than a tile. The first row is no less than `stop` where there is nothing to do: beyond the last
    tile, in an empty segment, or in one that is not its composition's first.
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
    row = begin + part * BLOCK_M
    if COUNT == 1:
        before = (first > 0) & (first < count)
        again = (tl.load(start + first - 1, mask=before, other=-1) == begin) & (
            tl.load(end + first - 1, mask=before, other=-1) == stop
        )
        row = tl.where(again, stop, row)
    return first, begin, stop, row


@triton.jit
def covers(
    segment: tl.tensor, begin: tl.tensor, stop: tl.tensor, start: tl.tensor, end: tl.tensor, count: tl.tensor
) -> tl.tensor:
    """Whether a segment exists and has exactly these rows, as the next member of a composition has."""
    return (tl.load(start + segment, mask=segment < count, other=-1) == begin) & (
        tl.load(end + segment, mask=segment < count, other=-1) == stop
    )


@triton.jit
def shrink_row(
    x: tl.tensor, matrix: tl.tensor, h: tl.tensor, width: tl.tensor, k_first: tl.tensor, k_end: tl.tensor,
    in_features: tl.tensor,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    """h[:width] = x[k_first:k_end] @ matrix[:width, k_first:k_end].T for one row."""
    for r0 in range(0, width, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        sums = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
        for k0 in range(k_first, k_end, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            inside = k < in_features
            weights = tl.load(
                matrix + r[:, None] * in_features + k[None, :], mask=(r < width)[:, None] & inside[None, :], other=0.0
            )
            part = tl.load(x + k, mask=inside, other=0.0)
            sums += weights.to(tl.float32) * part.to(tl.float32)[None, :]
        tl.store(h + r, tl.sum(sums, 1), mask=r < width)


@triton.jit
def shrink_rows(
    x: tl.tensor, x_stride: tl.tensor, matrix: tl.tensor, h: tl.tensor, capacity: tl.tensor, width: tl.tensor,
    height: tl.tensor, k_first: tl.tensor, k_end: tl.tensor, in_features: tl.tensor,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    """The same for the first `height` of BLOCK_M rows of x and h."""
    m = tl.arange(0, BLOCK_M)[:, None]
    here = m < height
    for r0 in range(0, width, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        sums = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for k0 in range(k_first, k_end, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            inside = (k < in_features)[None, :]
            part = tl.load(x + m * x_stride + k[None, :], mask=here & inside, other=0.0)
            weights = tl.load(
                matrix + r[:, None] * in_features + k[None, :], mask=(r < width)[:, None] & inside, other=0.0
            )
            sums = tl.dot(part.to(OPERAND), tl.trans(weights.to(OPERAND)), sums, input_precision=PRECISION)
        tl.store(h + m * capacity + r[None, :], sums, mask=here & (r < width)[None, :])


@triton.jit(do_not_specialize=NOT_SPECIALIZED, do_not_specialize_on_alignment=NOT_SPECIALIZED)
def shrink(
    x: tl.tensor, x_stride: tl.tensor, h: tl.tensor, a: tl.tensor, a_stride: tl.tensor, rank: tl.tensor,
    rank_stride: tl.tensor, start: tl.tensor, end: tl.tensor, slot: tl.tensor, count: tl.tensor, rows: tl.tensor,
    modules: tl.tensor, in_features: tl.tensor, span: tl.tensor, capacity: tl.tensor,
    DTYPE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, COUNT: tl.constexpr, DEPENDENT: tl.constexpr,
) -> None:  # fmt: skip
    """Products of parts of the input with A; the columns of a composition's members are neighbours.

    Semantics, with part = slice(split * span, (split + 1) * span):

        h[split, module, row] = concat(x[row, part] @ a(module, slot)[:, part].T for slot in the row's composition)

    Shapes: x [rows, in], h float32 [splits, modules, rows, capacity]; columns beyond a row's ranks are not written.
    Program: (tile, module, split). Ranks beyond `capacity` are cut off, so that a wrong bound cannot write elsewhere.
    """
    if DEPENDENT:
        gdc_launch_dependents()
    module, split = tl.program_id(1), tl.program_id(2)
    a += module * a_stride
    rank += module * rank_stride
    segment, begin, stop, row = find_tile(tl.program_id(0), start, end, count, BLOCK_M, COUNT)
    place = tl.load(slot + segment, mask=segment < count, other=0)
    width = tl.load(rank + place)
    matrix = tl.load(a + place)
    x += row.to(tl.int64) * x_stride
    h += ((split * modules + module).to(tl.int64) * rows + row) * capacity
    k_first = split * span
    k_end = tl.minimum(k_first + span, in_features)
    column = 0
    if DEPENDENT:
        gdc_wait()
    member = row < stop
    while member:
        member = covers(segment + 1, begin, stop, start, end, count)
        width = tl.minimum(width, capacity - column)
        values = tl.multiple_of(matrix.to(tl.pointer_type(DTYPE)), 16)
        if stop - begin == 1:
            shrink_row(x, values, h + column, width, k_first, k_end, in_features, BLOCK_R, BLOCK_K)
        else:
            shrink_rows(
                x, x_stride, values, h + column, capacity, width, stop - row, k_first, k_end, in_features, OPERAND,
                PRECISION, BLOCK_M, BLOCK_R, BLOCK_K,
            )  # fmt: skip
        column += width
        segment += 1
        place = tl.load(slot + segment, mask=member, other=0)
        width = tl.load(rank + place)
        matrix = tl.load(a + place)


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


@triton.jit
def expand_rows(
    sums: tl.tensor, h: tl.tensor, between: tl.tensor, capacity: tl.tensor, matrix: tl.tensor, width: tl.tensor,
    height: tl.tensor, share: tl.tensor, n: tl.tensor, n_end: tl.tensor,
    SPLITS: tl.constexpr, TOGETHER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """sums + share * (h.sum(0) @ matrix)[:, n] for the first `height` of BLOCK_M rows; one row is a vector.

    Shapes: h [SPLITS, height, width], `between` elements from one split to the next and `capacity` from row to row.
    """
    inside = (n < n_end)[None, :]
    s = tl.arange(0, SPLITS)[:, None]
    m = tl.arange(0, BLOCK_M)[:, None]
    for r0 in range(0, width, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        weights = tl.load(matrix + r[:, None] * n_end + n[None, :], mask=(r < width)[:, None] & inside, other=0.0)
        if DEPENDENT:
            gdc_wait()
        if BLOCK_M == 1:
            parts = tl.load(h + s.to(tl.int64) * between + r[None, :], mask=(r < width)[None, :], other=0.0)
            vector = tl.sum(parts, 0) * share
            sums += tl.sum(weights.to(tl.float32) * vector[:, None], 0)
        else:
            there = (m < height) & (r < width)[None, :]
            shrunk = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for split0 in range(0, SPLITS, TOGETHER):
                for i in tl.static_range(TOGETHER):
                    part = h + (split0 + i) * between
                    shrunk += tl.load(part + m * capacity + r[None, :], mask=there, other=0.0)
            sums = add_product(sums, shrunk * share, weights)
    return sums


@triton.jit
def expand_members(
    sums: tl.tensor, h: tl.tensor, between: tl.tensor, capacity: tl.tensor, matrix: tl.tensor, width: tl.tensor,
    share: tl.tensor, segment: tl.tensor, begin: tl.tensor, stop: tl.tensor, row: tl.tensor, n: tl.tensor,
    n_end: tl.tensor, b: tl.tensor, rank: tl.tensor, start: tl.tensor, end: tl.tensor, slot: tl.tensor,
    weight: tl.tensor, count: tl.tensor,
    DTYPE: tl.constexpr, SPLITS: tl.constexpr, TOGETHER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """`expand_rows` of all members of a composition, whose first one's matrix, width and share are loaded already.

    Returns the sums, and the columns of h that were read: 0 if no member has a delta.
    """
    column = 0
    member = row < stop
    while member:
        member = covers(segment + 1, begin, stop, start, end, count)
        width = tl.minimum(width, capacity - column)
        values = tl.multiple_of(matrix.to(tl.pointer_type(DTYPE)), 16)
        sums = expand_rows(
            sums, h + column, between, capacity, values, width, stop - row, share, n, n_end, SPLITS, TOGETHER, BLOCK_M,
            BLOCK_R, DEPENDENT,
        )  # fmt: skip
        column += width
        segment += 1
        place = tl.load(slot + segment, mask=member, other=0)
        share = tl.load(weight + segment, mask=member, other=0.0)
        width = tl.load(rank + place)
        matrix = tl.load(b + place)
    return sums, column


@triton.jit(do_not_specialize=NOT_SPECIALIZED, do_not_specialize_on_alignment=NOT_SPECIALIZED)
def expand(
    out0: tl.tensor, out1: tl.tensor, out2: tl.tensor, out3: tl.tensor,
    stride0: tl.tensor, stride1: tl.tensor, stride2: tl.tensor, stride3: tl.tensor,
    width0: tl.tensor, width1: tl.tensor, width2: tl.tensor, width3: tl.tensor,
    h: tl.tensor, b: tl.tensor, b_stride: tl.tensor, rank: tl.tensor, rank_stride: tl.tensor, start: tl.tensor,
    end: tl.tensor, slot: tl.tensor, weight: tl.tensor, count: tl.tensor, rows: tl.tensor, modules: tl.tensor,
    module0: tl.tensor, capacity: tl.tensor,
    DTYPE: tl.constexpr, SPLITS: tl.constexpr, TOGETHER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, COUNT: tl.constexpr, DEPENDENT: tl.constexpr,
) -> None:  # fmt: skip
    """Add the sum of the parts times B to the outputs of modules module0 to module0 + 3, rounded once.

    Semantics, with `ranks` the columns of h that are the member's:

        out[row] += sum(weight * (h[:, module, row, ranks].sum(0) @ b(module, slot)) for the row's composition)

    Shapes: out_i [rows, width_i]; a width of 0 is no output. Rows whose adapters have no delta keep every bit.
    Program: (tile of the columns of all outputs, tile).
    """
    if DEPENDENT:
        gdc_launch_dependents()
    tile = tl.program_id(0)
    end0 = tl.cdiv(width0, BLOCK_N)
    end1 = end0 + tl.cdiv(width1, BLOCK_N)
    end2 = end1 + tl.cdiv(width2, BLOCK_N)
    out = tl.where(tile < end0, out0, tl.where(tile < end1, out1, tl.where(tile < end2, out2, out3)))
    stride = tl.where(tile < end0, stride0, tl.where(tile < end1, stride1, tl.where(tile < end2, stride2, stride3)))
    n_end = tl.where(tile < end0, width0, tl.where(tile < end1, width1, tl.where(tile < end2, width2, width3)))
    before = tl.where(tile < end0, 0, tl.where(tile < end1, end0, tl.where(tile < end2, end1, end2)))
    module = module0 + (tile >= end0).to(tl.int32) + (tile >= end1).to(tl.int32) + (tile >= end2).to(tl.int32)
    b += module * b_stride
    rank += module * rank_stride
    segment, begin, stop, row = find_tile(tl.program_id(1), start, end, count, BLOCK_M, COUNT)
    place = tl.load(slot + segment, mask=segment < count, other=0)
    share = tl.load(weight + segment, mask=segment < count, other=0.0)
    width = tl.load(rank + place)
    matrix = tl.load(b + place)
    n = (tile - before) * BLOCK_N + tl.arange(0, BLOCK_N)
    out += row.to(tl.int64) * stride
    h += (module.to(tl.int64) * rows + row) * capacity
    between = modules.to(tl.int64) * rows * capacity
    if (row < stop) & (stop - begin == 1):
        if not DEPENDENT:
            was = tl.load(out + n, mask=n < n_end, other=0.0)  # early: it is needed last
        sums, column = expand_members(
            tl.zeros((BLOCK_N,), tl.float32), h, between, capacity, matrix, width, share, segment, begin, stop, row, n,
            n_end, b, rank, start, end, slot, weight, count, DTYPE, SPLITS, TOGETHER, 1, BLOCK_R, DEPENDENT,
        )  # fmt: skip
        if DEPENDENT:
            gdc_wait()
            was = tl.load(out + n, mask=n < n_end, other=0.0)
        tl.store(out + n, (was.to(tl.float32) + sums).to(was.dtype), mask=(n < n_end) & (column > 0))
    elif row < stop:
        m = tl.arange(0, BLOCK_M)[:, None]
        there = (m < stop - row) & (n < n_end)[None, :]
        places = out + m * stride + n[None, :]
        if not DEPENDENT:
            tall_was = tl.load(places, mask=there, other=0.0)
        tall, tall_column = expand_members(
            tl.zeros((BLOCK_M, BLOCK_N), tl.float32), h, between, capacity, matrix, width, share, segment, begin, stop,
            row, n, n_end, b, rank, start, end, slot, weight, count, DTYPE, SPLITS, TOGETHER, BLOCK_M, BLOCK_R,
            DEPENDENT,
        )  # fmt: skip
        if DEPENDENT:
            gdc_wait()
            tall_was = tl.load(places, mask=there, other=0.0)
        tl.store(places, (tall_was.to(tl.float32) + tall).to(tall_was.dtype), mask=there & (tall_column > 0))
    elif DEPENDENT:
        gdc_wait()
