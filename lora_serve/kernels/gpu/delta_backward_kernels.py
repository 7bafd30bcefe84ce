"""Triton kernels of the low-rank delta's gradients, launched by `delta_backward.py`.

Each finds its rows and matrices as `delta_kernels.py` does, and treats up to four modules in one launch. Nothing is
atomic: a program owns what it adds to.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_serve.kernels.gpu.delta_kernels import NOT_SPECIALIZED, add_product, expand_rows, find_tile, shrink_rows


@triton.jit
def one_of(
    module: tl.tensor, first: tl.tensor, second: tl.tensor, third: tl.tensor, fourth: tl.tensor
) -> tl.tensor:  # fmt: skip
    """The argument of a launch's module."""
    return tl.where(module == 0, first, tl.where(module == 1, second, tl.where(module == 2, third, fourth)))


@triton.jit(do_not_specialize=NOT_SPECIALIZED, do_not_specialize_on_alignment=NOT_SPECIALIZED)
def shrink_gradients(
    grad0: tl.tensor, grad1: tl.tensor, grad2: tl.tensor, grad3: tl.tensor,
    stride0: tl.tensor, stride1: tl.tensor, stride2: tl.tensor, stride3: tl.tensor,
    width0: tl.tensor, width1: tl.tensor, width2: tl.tensor, width3: tl.tensor,
    dh: tl.tensor, b: tl.tensor, b_stride: tl.tensor, rank: tl.tensor, rank_stride: tl.tensor, start: tl.tensor,
    end: tl.tensor, slot: tl.tensor, count: tl.tensor, rows: tl.tensor, modules: tl.tensor, module0: tl.tensor,
    capacity: tl.tensor,
    DTYPE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, COUNT: tl.constexpr,
) -> None:  # fmt: skip
    """Products of parts of the outputs' gradients with B, of modules module0 to module0 + 3.

    Semantics, with part = slice(split * span, (split + 1) * span) of the module's outputs:

        dh[split, module, row] = grad[row, part] @ b(module, slot of the row)[:, part].T

    Shapes: grad_i [rows, width_i], dh float32 [SPLITS, modules, rows, capacity]; columns beyond a row's rank are not
    written. Program: (tile, module, split).
    """
    local, split = tl.program_id(1), tl.program_id(2)
    module = module0 + local
    grad = one_of(local, grad0, grad1, grad2, grad3)
    stride = one_of(local, stride0, stride1, stride2, stride3)
    features = one_of(local, width0, width1, width2, width3)
    segment, _, stop, row = find_tile(tl.program_id(0), start, end, count, BLOCK_M, COUNT)
    place = tl.load(slot + segment, mask=segment < count, other=0)
    width = tl.minimum(tl.load(rank + module * rank_stride + place), capacity)
    matrix = tl.multiple_of(tl.load(b + module * b_stride + place).to(tl.pointer_type(DTYPE)), 16)
    span = tl.cdiv(tl.cdiv(features, SPLITS), BLOCK_K) * BLOCK_K
    if row < stop:
        shrink_rows(
            grad + row.to(tl.int64) * stride, stride, matrix,
            dh + ((split * modules + module).to(tl.int64) * rows + row) * capacity, capacity, width, stop - row,
            split * span, tl.minimum((split + 1) * span, features), features, OPERAND, PRECISION, BLOCK_M, BLOCK_R,
            BLOCK_K,
        )  # fmt: skip


@triton.jit(do_not_specialize=NOT_SPECIALIZED, do_not_specialize_on_alignment=NOT_SPECIALIZED)
def add_input_gradient(
    dx: tl.tensor, stride: tl.tensor, in_features: tl.tensor, dh: tl.tensor, a: tl.tensor, a_stride: tl.tensor,
    rank: tl.tensor, rank_stride: tl.tensor, start: tl.tensor, end: tl.tensor, slot: tl.tensor, weight: tl.tensor,
    count: tl.tensor, rows: tl.tensor, modules: tl.tensor, capacity: tl.tensor,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, COUNT: tl.constexpr,
) -> None:  # fmt: skip
    """dx[row] += weight * sum(dh[module, row] @ a(module, slot) for all modules), rounded once.

    Shapes: dx [rows, in], dh float32 [modules, rows, capacity]. Program: (tile of columns, tile).
    """
    segment, _, stop, row = find_tile(tl.program_id(1), start, end, count, BLOCK_M, COUNT)
    if row < stop:
        place = tl.load(slot + segment)
        share = tl.load(weight + segment)
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        m = tl.arange(0, BLOCK_M)[:, None]
        there = (m < stop - row) & (n < in_features)[None, :]
        places = dx + row.to(tl.int64) * stride + m * stride + n[None, :]
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        dh += row.to(tl.int64) * capacity
        for module in range(modules):
            width = tl.minimum(tl.load(rank + module * rank_stride + place), capacity)
            matrix = tl.multiple_of(tl.load(a + module * a_stride + place).to(tl.pointer_type(DTYPE)), 16)
            sums = expand_rows(
                sums, dh, capacity, capacity, matrix, width, stop - row,
                share, n, in_features, 1, 1, BLOCK_M, BLOCK_R, False,
            )  # fmt: skip
            dh += rows.to(tl.int64) * capacity
        was = tl.load(places, mask=there, other=0.0)
        tl.store(places, (was.to(tl.float32) + sums).to(was.dtype), mask=there)


@triton.jit(do_not_specialize=NOT_SPECIALIZED, do_not_specialize_on_alignment=NOT_SPECIALIZED)
def add_matrix_gradients(
    x0: tl.tensor, x1: tl.tensor, x2: tl.tensor, x3: tl.tensor,
    stride0: tl.tensor, stride1: tl.tensor, stride2: tl.tensor, stride3: tl.tensor,
    width0: tl.tensor, width1: tl.tensor, width2: tl.tensor, width3: tl.tensor,
    h: tl.tensor, b: tl.tensor, b_stride: tl.tensor, rank: tl.tensor, rank_stride: tl.tensor, start: tl.tensor,
    end: tl.tensor, slot: tl.tensor, weight: tl.tensor, count: tl.tensor, rows: tl.tensor, module0: tl.tensor,
    capacity: tl.tensor,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, COUNT: tl.constexpr,
) -> None:  # fmt: skip
    """Add the gradients of matrices [rank, width] of each slot, of modules module0 to module0 + 3.

    Semantics, over the segments of the slot:

        b(module, slot) += sum(weight * h[module, begin:end].T @ x[begin:end])

    Shapes: x_i [rows, width_i], a width of 0 is no module; h float32 [modules, rows, capacity], matrices float32.
    Program: (tile of the columns of all modules, segment, block of ranks); the slot's first segment does all of it.
    """
    tile, segment = tl.program_id(0), tl.program_id(1)
    end0 = tl.cdiv(width0, BLOCK_N)
    end1 = end0 + tl.cdiv(width1, BLOCK_N)
    end2 = end1 + tl.cdiv(width2, BLOCK_N)
    local = (tile >= end0).to(tl.int32) + (tile >= end1).to(tl.int32) + (tile >= end2).to(tl.int32)
    x = one_of(local, x0, x1, x2, x3)
    stride = one_of(local, stride0, stride1, stride2, stride3)
    n_end = one_of(local, width0, width1, width2, width3)
    module = module0 + local
    place = tl.load(slot + segment)
    i = tl.arange(0, COUNT)
    again = tl.sum((tl.load(slot + i, mask=i < segment, other=-1) == place).to(tl.int32), 0)
    width = tl.minimum(tl.load(rank + module * rank_stride + place), capacity)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    if (again == 0) & (tl.program_id(2) * BLOCK_R < width):
        n = (tile - one_of(local, 0, end0, end1, end2)) * BLOCK_N + tl.arange(0, BLOCK_N)
        matrix = tl.multiple_of(tl.load(b + module * b_stride + place).to(tl.pointer_type(tl.float32)), 16)
        places = matrix + r[:, None] * n_end + n[None, :]
        inside = (r < width)[:, None] & (n < n_end)[None, :]
        sums = tl.load(places, mask=inside, other=0.0)
        m = tl.arange(0, BLOCK_M)[:, None]
        h += module.to(tl.int64) * rows * capacity
        for other in range(segment, count):
            first = tl.load(start + other)
            stop = tl.where(tl.load(slot + other) == place, tl.load(end + other), first)
            share = tl.load(weight + other)
            for passed in range(0, stop - first, BLOCK_M):
                row = (first + passed).to(tl.int64)
                here = m < stop - row
                part = tl.load(x + row * stride + m * stride + n[None, :], mask=here & (n < n_end)[None, :], other=0.0)
                inner = tl.load(
                    h + row * capacity + m * capacity + r[None, :],
                    mask=here & (r < width)[None, :],
                    other=0.0,
                )
                sums = add_product(sums, tl.trans(inner * share), part)
        tl.store(places, sums, mask=inside)
