"""Triton kernels of quantised linear layers: rounding of rows, and products, launched by `matmul.py`.

Weights and rows are stored run by run, so that what a program reads of one run is contiguous, however few outputs or
rows it takes. Offsets within a run fit 32 bits; from run to run, pointers are advanced.
"""

from __future__ import annotations

import triton
import triton.language as tl

LEAST = tl.constexpr(1e-30)  # smallest step of the rows; as in `packed_weight.py`
ROUND = tl.constexpr(12582912.0)  # 1.5 · 2²³: float32 has no fractions there, so adding it rounds, halves to even

# Arguments that vary from batch to batch or from layer to layer; specialising on them would only cost compilations.
NOT_SPECIALIZED = ["rows", "groups", "runs", "span", "splits"]


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def round_rows(
    x: tl.tensor, whole: tl.tensor, step: tl.tensor, total: tl.tensor, x_stride: tl.tensor, rows: tl.tensor,
    groups: tl.tensor,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """Round rows to integers, SIZE inputs to a step, as `packed_weight.py` defines; zeros beyond a row's WIDTH inputs.

    Semantics; a step is NaN where not all of x is finite:

        x[t, g * SIZE + i] ≈ step[g, t] * whole[g, t, i]
        total[g, t] = whole[g, t].sum()

    Shapes: x [rows, WIDTH], whole int8 [groups, rows, SIZE], step float32 and total int32 (or None) [groups, rows].
    Program: (row, TILE groups).
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    part = tl.load(x + row * x_stride + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    size = tl.maximum(tl.div_rn(tl.max(tl.abs(part), 1), 127.0), LEAST)
    near = part * tl.div_rn(1.0, size)[:, None]
    near = tl.minimum(tl.maximum(near, -127.0), 127.0)  # changes only NaN; keeps product and sum from being fused
    place = group.to(tl.int64) * rows + row
    inside = group < groups
    numbers = ((near + ROUND) - ROUND).to(tl.int8)
    tl.store(whole + (place * SIZE)[:, None] + tl.arange(0, SIZE)[None, :], numbers, mask=inside[:, None])
    tl.store(step + place, size + tl.sum(part - part, 1), mask=inside)  # a maximum would leave NaN out
    if total is not None:
        tl.store(total + place, tl.sum(numbers.to(tl.int32), 1), mask=inside)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def round_rows_to_fp8(
    x: tl.tensor, codes: tl.tensor, step: tl.tensor, x_stride: tl.tensor, rows: tl.tensor,
    WIDTH: tl.constexpr, RUN: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """Round rows to e4m3, a step for each, as `packed_weight.py` defines; zeros from WIDTH to the end of the last run.

    Semantics; a step is NaN where not all of the row is finite:

        x[t, r * RUN + i] ≈ step[t] * codes[r, t, i], whose bits are stored

    Shapes: x [rows, WIDTH], codes int8 [runs, rows, RUN], step float32 [rows].
    Program: (row). A row of more than TILE inputs is read twice.
    """
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    most, fault = tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.float32)
    part = most
    for first in range(0, WIDTH, TILE):
        column = first + tl.arange(0, TILE)
        part = tl.load(x + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(part))
        fault += part - part
    size = tl.maximum(tl.div_rn(tl.max(most, 0), 448.0), LEAST)
    times = tl.div_rn(1.0, size)
    for first in range(0, WIDTH, TILE):
        column = first + tl.arange(0, TILE)
        if WIDTH > TILE:
            part = tl.load(x + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        near = tl.minimum(tl.maximum(part * times, -448.0), 448.0)
        place = (column // RUN).to(tl.int64) * rows * RUN + row * RUN + column % RUN
        tl.store(codes + place, e4m3_bits(near), mask=column < (WIDTH + RUN - 1) // RUN * RUN)
    tl.store(step + row, size + tl.sum(fault, 0))


@triton.jit
def e4m3_bits(x: tl.tensor) -> tl.tensor:
    """The bits of float32 numbers in -448..448 rounded to e4m3, halves to even, as int8.

    A conversion does the same on a GPU; in Triton's interpreter it rounds otherwise.
    """
    size = tl.abs(x)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)  # exponents begin at -6 instead of -126
    small = ((size * 512.0 + ROUND) - ROUND).to(tl.int32)  # below 2⁻⁶ a code is a number of 512ths
    code = tl.where(size < 0.015625, small, normal)
    return tl.where(x < 0, code - 128, code).to(tl.int8)


@triton.jit
def product(
    whole: tl.tensor, weights: tl.tensor, step: tl.tensor, m: tl.tensor, here: tl.tensor,
    SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """step[m] * (whole[m] @ weights.T), rounded only at the end: whole [rows, SIZE], weights [BLOCK_N, SIZE]."""
    part = tl.load(whole + (m * SIZE)[:, None] + tl.arange(0, SIZE)[None, :], mask=here[:, None], other=0)
    size = tl.load(step + m, mask=here, other=0.0)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    return tl.dot(part, tl.trans(weights), sums, out_dtype=tl.int32).to(tl.float32) * size[:, None]


@triton.jit
def group_product(
    whole: tl.tensor, weights: tl.tensor, level: tl.tensor, step: tl.tensor, total: tl.tensor, m: tl.tensor,
    here: tl.tensor,
    TIMES: tl.constexpr, BELOW: tl.constexpr, SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """step[m] * s * (whole[m] @ weights.T / TIMES + (BELOW - z / 8) * total[m]), with s and z of the level [BLOCK_N].

    The level may have other bits above its sixteen.
    """
    s = (((level & 0xFF80) << 11) + (112 << 23)).to(tl.float32, bitcast=True)
    zero = (BELOW - (level & 0x7F).to(tl.float32) / 8) * s
    sums = tl.load(total + m, mask=here, other=0).to(tl.float32) * tl.load(step + m, mask=here, other=0.0)
    part = product(whole, weights, step, m, here, SIZE, BLOCK_M, BLOCK_N)
    return part * (s / TIMES)[None, :] + sums[:, None] * zero[None, :]


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def multiply(
    whole: tl.tensor, step: tl.tensor, total: tl.tensor, data: tl.tensor, scale: tl.tensor, levels: tl.tensor,
    bias: tl.tensor, y: tl.tensor, rows: tl.tensor, out: tl.tensor, stride: tl.tensor, runs: tl.tensor, span: tl.tensor,
    INT4: tl.constexpr, RUN: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """Rows times weights, over the runs of one split.

    Semantics, in the layouts of `matmul.py`, r over the split's runs of 64 inputs:

        int8:  y[split, t, o] = scale[o] * sum(step[r, t] * (whole[r, t] @ data[r, o])) + bias[o]
        int4:  y[split, t, o] = scale[o] * sum(
                   step[2r, t] * s(2r, o) * (whole[2r, t] @ (data[r, o] & 15) - z(2r, o) / 8 * total[2r, t])
                   + step[2r + 1, t] * s(2r + 1, o)
                     * (whole[2r + 1, t] @ (data[r, o] & -16) / 16 + (8 - z(2r + 1, o) / 8) * total[2r + 1, t])
               ) + bias[o]
        fp8:   y[split, t, o] = scale[o] * step[t] * sum(whole[r, t] @ data[r, o]) + bias[o]

    with s and z of levels[r, o]. Integer products are exact; those of fp8 are, and a tensor core's sums of them leave
    its registers after every run, because some have fewer bits than float32.
    Shapes: y [splits, rows, out]; `stride` outputs lie between runs in data and levels. Levels and total are int4's,
    else None; bias may be None.
    Program: (BLOCK_M rows, BLOCK_N outputs, split).
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    first = (split * span).to(tl.int64)
    here, inside = m < rows, n < out
    FLOATS: tl.constexpr = data.dtype.element_ty == tl.float8e4nv
    WIDE: tl.constexpr = RUN // 2 if INT4 else RUN  # bytes of a run's weights
    data += first * stride * WIDE
    whole += first * rows * RUN
    if not FLOATS:
        step += first * rows * (RUN // GROUP)
    if INT4:
        levels += first * stride
        total += first * rows * (RUN // GROUP)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in tl.range(0, tl.minimum(span, runs - split * span), num_stages=STAGES):
        place = data + (n * WIDE)[:, None] + tl.arange(0, WIDE)[None, :]
        weights = tl.load(place, mask=inside[:, None], other=0.0 if FLOATS else 0)
        if FLOATS:
            part = tl.load(whole + (m * RUN)[:, None] + tl.arange(0, RUN)[None, :], mask=here[:, None], other=0.0)
            sums = tl.dot(part, tl.trans(weights), sums, max_num_imprecise_acc=RUN)
        elif INT4:
            level = tl.load(levels + n, mask=inside, other=0)
            sums += group_product(whole, weights & 15, level, step, total, m, here, 1, 0, GROUP, BLOCK_M, BLOCK_N)
            sums += group_product(
                whole + rows * GROUP, weights & -16, level >> 16, step + rows, total + rows, m, here, 16, 8, GROUP,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip
            levels += stride
            total += rows * (RUN // GROUP)
        else:
            sums += product(whole, weights, step, m, here, RUN, BLOCK_M, BLOCK_N)
        data += stride * WIDE
        whole += rows * RUN
        if not FLOATS:
            step += rows * (RUN // GROUP)
    if FLOATS:
        sums *= tl.load(step + m, mask=here, other=0.0)[:, None]
    sums *= tl.load(scale + n, mask=inside, other=0.0)[None, :]
    if bias is not None:
        sums += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    y += (split * rows + tl.program_id(0) * BLOCK_M).to(tl.int64) * out
    place = tl.arange(0, BLOCK_M)[:, None] * out + n[None, :]
    tl.store(y + place, sums.to(y.dtype.element_ty), mask=here[:, None] & inside[None, :])


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def add_splits(
    parts: tl.tensor, bias: tl.tensor, y: tl.tensor, rows: tl.tensor, out: tl.tensor, splits: tl.tensor,
    BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """y[row] = parts[:, row].sum(0) + bias, in order, rounded once: parts float32 [splits, rows, out].

    Program: (BLOCK_N outputs, row).
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1).to(tl.int64)
    inside = n < out
    sums = tl.zeros((BLOCK_N,), tl.float32)
    for split in range(splits):
        sums += tl.load(parts + (split * rows + row) * out + n, mask=inside, other=0.0)
    if bias is not None:
        sums += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * out + n, sums.to(y.dtype.element_ty), mask=inside)
