"""Gradients of low-rank deltas in Triton: five launches for a group of up to four modules, however many adapters.

    h, dh = x @ A.T, grads @ B.T;  dx += weight * dh @ A;  dB += weight * h.T @ grads;  dA += weight * dh.T @ x

h and dh are computed as shrink does (`delta.py`), in parts whose sum is taken before they are read again and again.
Every sum has a fixed order, nothing is atomic, and the host does not wait: two runs give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from lora_serve.kernels.checks import check_delta
from lora_serve.kernels.contract import DeltaGroup, Segments
from lora_serve.kernels.gpu.delta import MODULES, DeltaCall, adds_nothing
from lora_serve.kernels.gpu.delta_backward_kernels import add_input_gradient, add_matrix_gradients, shrink_gradients
from lora_serve.kernels.gpu.device import TYPES
from lora_serve.kernels.gpu.plan_table import NO_PLANS, PlanTable

ROWS, RANKS, COLUMNS = 64, 16, 64  # of a program that adds to a matrix, per iteration
WARPS = 4


def delta_backward(
    x: Tensor,
    grads: Sequence[Tensor],
    dx: Tensor,
    group: DeltaGroup,
    segments: Segments,
    gradients: DeltaGroup,
    table: PlanTable = NO_PLANS,
) -> None:
    """`Kernels.delta_backward`; `segments.max_rank` is no less than any rank.

    Raises:
        ValueError: shapes or strides do not fit.
        TypeError: a type that is not fp32, bf16 or fp16, or gradients that are not float32.
    """
    if adds_nothing(x, segments):
        return
    call = DeltaCall(x, group, segments, table)
    check_delta(x, grads, group)
    if dx.shape != x.shape or dx.dtype is not x.dtype or dx.stride(1) != 1:
        raise ValueError(f"dx {tuple(dx.shape)}, {dx.dtype} does not fit {tuple(x.shape)}, {x.dtype}")
    if gradients.dtype is not torch.float32 or (gradients.in_features, gradients.out_features) != (
        group.in_features,
        group.out_features,
    ):
        raise TypeError("gradients are float32, of the group's shapes")
    h, dh = call.shrunk(), call.like_shrunk()
    for module in range(0, len(grads), MODULES):
        _shrink_gradients(call, grads, module, dh)
    dh = dh.sum(0)
    _add_input_gradient(call, dx, dh)
    for module in range(0, len(grads), MODULES):
        _add_matrix_gradients(call, grads[module : module + MODULES], module, h, gradients.b, gradients.rank)
        _add_matrix_gradients(
            call, [x] * len(grads[module : module + MODULES]), module, dh, gradients.a, gradients.rank
        )


def _shrink_gradients(call: DeltaCall, grads: Sequence[Tensor], module: int, dh: Tensor) -> None:
    group, plan = call.group, call.launch.plan
    some = grads[module : module + MODULES]
    shrink_gradients[call.launch.tiles, len(some), call.launch.splits](
        *_four(some),
        *(dh, group.b, group.b.stride(0), *call.where(), call.segments.count, dh.shape[2], len(grads), module),
        call.launch.capacity,
        DTYPE=TYPES[group.dtype],
        OPERAND=call.operand,
        PRECISION=call.precision,
        SPLITS=call.launch.splits,
        BLOCK_M=plan.block_m,
        BLOCK_R=plan.block_r,
        BLOCK_K=plan.block_k,
        COUNT=call.launch.among,
        num_warps=plan.shrink_warps,
        num_stages=3,
    )


def _add_input_gradient(call: DeltaCall, dx: Tensor, dh: Tensor) -> None:
    group, plan = call.group, call.launch.plan
    add_input_gradient[triton.cdiv(group.in_features, plan.block_n), call.launch.tiles](
        *(dx, dx.stride(0), group.in_features, dh, group.a, group.a.stride(0), *call.where(), call.segments.weight),
        *(call.segments.count, dx.shape[0], dh.shape[0], call.launch.capacity),
        DTYPE=TYPES[group.dtype],
        BLOCK_M=plan.block_m,
        BLOCK_R=plan.block_r,
        BLOCK_N=plan.block_n,
        COUNT=call.launch.among,
        num_warps=plan.expand_warps,
        num_stages=1,
    )


def _add_matrix_gradients(
    call: DeltaCall, rows: Sequence[Tensor], module: int, h: Tensor, matrices: Tensor, rank: Tensor
) -> None:
    """Add h.T @ rows to the matrices of some modules, the first of which is `module`."""
    segments = call.segments
    grid = (
        sum(triton.cdiv(each.shape[1], COLUMNS) for each in rows),
        segments.count,
        triton.cdiv(segments.max_rank, RANKS),
    )
    add_matrix_gradients[grid](
        *_four(rows),
        *(h, matrices, matrices.stride(0), rank, rank.stride(0), segments.start, segments.end, segments.slot),
        *(segments.weight, segments.count, h.shape[1], module, call.launch.capacity),
        BLOCK_M=ROWS,
        BLOCK_R=RANKS,
        BLOCK_N=COLUMNS,
        COUNT=triton.next_power_of_2(segments.count),
        num_warps=WARPS,
        num_stages=2,
    )


def _four(rows: Sequence[Tensor]) -> list[Tensor | int]:
    """The arguments for up to four modules: rows [tokens, width_i], their strides, their widths; 0 for no module."""
    spare = MODULES - len(rows)
    places = [*rows, *[rows[0]] * spare]
    return [*places, *(each.stride(0) for each in places), *(each.shape[1] for each in rows), *[0] * spare]
