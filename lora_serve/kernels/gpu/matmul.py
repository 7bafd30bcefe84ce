"""Linear layers with int8, int4 and fp8 weights on a GPU, in Triton.

Two launches (`matmul_kernels.py`): the rows are rounded once for all layers that read them, to int8 or fp8, then tensor
cores multiply run by run, and scales are applied in float32. Where outputs are too few to fill the device, the
input is cut into splits, whose sums a third launch adds in a fixed order: two runs give the same bits. Layers whose
weights are neighbours in memory are one product. Grids depend on shapes and nothing waits for the device: a CUDA graph
can capture it.

Weights are stored in runs of 64 inputs, the last padded with zeros; within a run, neighbouring outputs are contiguous.

    int8:  data int8 [runs, out, 64], scale float32 [out]
    int4:  data int8 [runs, out, 32]; byte i is q[i] in its lower half and q[i + 32] - 8 in its upper one
           scale float32 [out], levels int32 [runs, out]; the first group's level in the lower half
    fp8:   data int8 [runs, out, 64], the bits of e4m3; scale float32 [out]

Unpacking int4 takes only masks, which work on four numbers at once where shifts work on one: the upper half is used as
sixteen times its number. The zero points, and the 8, are accounted for by the sums of the rows' integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional

from lora_serve.kernels.contract import Layers
from lora_serve.kernels.gpu.device import TYPES, processors
from lora_serve.kernels.gpu.matmul_kernels import add_splits, multiply, round_rows, round_rows_to_fp8
from lora_serve.kernels.gpu.plan_table import NO_PLANS, MatmulPlan, MatmulProblem, PlanTable, rows_bucket
from lora_serve.kernels.packed_weight import FP8, GROUP, RUN, PackedWeight, Scheme, dequantize, quantize

PROGRAM = 2048  # numbers that a program of round_rows rounds
MOST_FP8_TILE = 16384  # numbers that a program of round_rows_to_fp8 holds, 32 a thread
COLUMNS = 1024  # outputs of a program of add_splits
MOST_SPLITS = 8
LEAST_SPAN = 4  # runs of a split; fewer do not fill a pipeline
PROGRAMS_PER_PROCESSOR = 4  # with few rows, where memory is the limit


class MatmulTiling(NamedTuple):
    """Grid and block sizes of a product.

    Attributes:
        block_m, block_n: rows and outputs of a program.
        splits, span: the input is cut into `splits` parts of `span` runs.
        warps, stages: of a program.
    """

    block_m: int
    block_n: int
    splits: int
    span: int
    warps: int
    stages: int


class RoundedRows(NamedTuple):
    """Rows rounded to int8 [groups, rows, size], with steps float32 and, for int4, sums int32 [groups, rows].

    For fp8, `whole` is of that type, a group is a run, and steps are [rows].
    """

    whole: Tensor
    step: Tensor
    total: Tensor | None


def tiling(rows: int, out: int, runs: int, wide: int, processors: int) -> MatmulTiling:
    """Choose the tiling; a run of one output's weights takes `wide` bytes, the device has `processors`."""
    few = rows <= 32
    block_m = 128 if rows > 256 else min(64, max(16, triton.next_power_of_2(rows)))
    block_n = 4096 // wide if few else 128
    tiles = triton.cdiv(rows, block_m) * triton.cdiv(out, block_n)
    wanted = processors * (PROGRAMS_PER_PROCESSOR if few else 1) // tiles
    span = triton.cdiv(runs, max(1, min(wanted, MOST_SPLITS, runs // LEAST_SPAN)))
    return MatmulTiling(
        block_m=block_m,
        block_n=block_n,
        splits=triton.cdiv(runs, span),
        span=span,
        warps=4 if few else 8,
        stages=6 if few else 4,
    )


def tiling_of(plan: MatmulPlan, runs: int) -> MatmulTiling:
    """The tiling of a plan, for weights of `runs` runs."""
    span = triton.cdiv(runs, plan.splits)
    return MatmulTiling(plan.block_m, plan.block_n, triton.cdiv(runs, span), span, plan.warps, plan.stages)


def pack(weight: Tensor, scheme: Scheme, importance: Tensor | None = None) -> PackedWeight:
    """Lay out one weight [out, in].

    Raises:
        ValueError: a number of inputs that is not a multiple of int4's groups.
        TypeError: weights that are not fp32, bf16 or fp16.
    """
    out, width = weight.shape
    if weight.dtype not in TYPES:
        raise TypeError(f"{weight.dtype} is not fp32, bf16 or fp16")
    if scheme == "int4" and width % GROUP:
        raise ValueError(f"{width} inputs are not a multiple of int4's groups of {GROUP}")
    whole, scale, levels = quantize(weight, scheme, importance)
    whole = whole.view(torch.int8)
    runs = functional.pad(whole, (0, -width % RUN)).view(out, -1, RUN).transpose(0, 1)  # [runs, out, RUN]
    if levels is None:
        return PackedWeight((out, width), weight.dtype, scheme, runs.contiguous(), scale)
    data = runs[..., :GROUP] | (runs[..., GROUP:] - 8 << 4)
    pairs = functional.pad(levels, (0, -levels.shape[1] % 2)).view(torch.int32)  # [out, runs]
    return PackedWeight((out, width), weight.dtype, scheme, data.contiguous(), scale, pairs.T.contiguous())


def unpack(packed: PackedWeight) -> Tensor:
    whole, levels, width = packed.data, None, packed.shape[1]
    assert packed.scale is not None
    if packed.levels is not None:
        whole = torch.cat([whole & 15, (whole >> 4) + 8], 2)
        # Not `contiguous`, which keeps the strides of a single row.
        pairs = packed.levels.T.clone(memory_format=torch.contiguous_format)
        levels = pairs.view(torch.int16)[:, : width // GROUP]  # [out, groups]
    whole = whole.transpose(0, 1).flatten(1)[:, :width].contiguous()  # [out, inputs]
    whole = whole.view(FP8) if packed.scheme == "fp8" else whole
    return dequantize(whole, packed.scale, levels)


def outputs_of(packed: PackedWeight, outputs: slice) -> PackedWeight:
    """The weight of some outputs, in the same memory; for `unpack`."""
    scale = None if packed.scale is None else packed.scale[outputs]
    levels = None if packed.levels is None else packed.levels[:, outputs]
    shape = (outputs.stop - outputs.start, packed.shape[1])
    return replace(packed, shape=shape, data=packed.data[:, outputs], scale=scale, levels=levels)


def merge(layers: Sequence[PackedWeight]) -> list[PackedWeight]:
    """The same layers with their weights in one tensor, so that `linear` is one product for all of them."""
    if len(layers) == 1 or any(packed.scheme != layers[0].scheme for packed in layers):
        return list(layers)
    outs = [packed.shape[0] for packed in layers]
    data = torch.cat([packed.data for packed in layers], 1).split_with_sizes(outs, 1)
    scale = torch.cat([packed.scale for packed in layers if packed.scale is not None]).split_with_sizes(outs)
    joined = [replace(packed, data=d, scale=s) for packed, d, s in zip(layers, data, scale, strict=True)]
    if layers[0].levels is None:
        return joined
    levels = torch.cat([packed.levels for packed in layers if packed.levels is not None], 1).split_with_sizes(outs, 1)
    return [replace(packed, levels=own) for packed, own in zip(joined, levels, strict=True)]


def linear(x: Tensor, layers: Layers, table: PlanTable = NO_PLANS) -> list[Tensor]:
    """`Kernels.linear` for quantised layers.

    Raises:
        ValueError: shapes, strides or schemes do not fit.
        TypeError: rows that are not fp32, bf16 or fp16, or a bias of another type.
    """
    check(x, layers)
    if x.shape[0] == 0:
        return [x.new_empty(0, packed.shape[0]) for packed, _ in layers]
    shared = quantize_rows(x, layers[0][0].scheme)
    together = merged_layer(layers)
    if together is None:
        return [_multiply(x, shared, packed, bias, table) for packed, bias in layers]
    return list(_multiply(x, shared, *together, table).split_with_sizes([packed.shape[0] for packed, _ in layers], 1))


def quantize_rows(x: Tensor, scheme: Scheme | None) -> RoundedRows:
    """Rows x [rows, in] rounded, in the layout that `multiply` reads."""
    rows, width = x.shape
    if scheme == "fp8":
        codes = torch.empty(triton.cdiv(width, RUN), rows, RUN, dtype=torch.int8, device=x.device)
        steps = torch.empty(rows, dtype=torch.float32, device=x.device)
        tile = min(MOST_FP8_TILE, max(PROGRAM, triton.next_power_of_2(width)))
        round_rows_to_fp8[(rows,)](
            *(x, codes, steps, x.stride(0), rows), WIDTH=width, RUN=RUN, TILE=tile, num_warps=max(4, tile // 1024)
        )
        return RoundedRows(codes.view(FP8), steps, None)
    size = RUN if scheme == "int8" else GROUP
    groups = triton.cdiv(width, RUN) * (RUN // size)
    whole = torch.empty(groups, rows, size, dtype=torch.int8, device=x.device)
    step = torch.empty(groups, rows, dtype=torch.float32, device=x.device)
    total = torch.empty(groups, rows, dtype=torch.int32, device=x.device) if scheme == "int4" else None
    tile = PROGRAM // size
    round_rows[rows, triton.cdiv(groups, tile)](
        x, whole, step, total, x.stride(0), rows, groups, WIDTH=width, SIZE=size, TILE=tile
    )
    return RoundedRows(whole, step, total)


def merged_layer(layers: Layers) -> tuple[PackedWeight, Tensor | None] | None:
    """The one layer that has the outputs of all, if their weights are neighbours in memory; else None."""
    if len(layers) == 1:
        return layers[0]
    first = layers[0][0]
    data = neighbours([packed.data for packed, _ in layers], 1)
    scale = neighbours([packed.scale for packed, _ in layers if packed.scale is not None], 0)
    own = [packed.levels for packed, _ in layers if packed.levels is not None]
    levels = neighbours(own, 1) if own else None
    if data is None or scale is None or (own and levels is None):
        return None
    known = [bias for _, bias in layers if bias is not None]
    parts = [known[0].new_zeros(packed.shape[0]) if bias is None else bias for packed, bias in layers] if known else []
    whole = replace(first, shape=(data.shape[1], first.shape[1]), data=data, scale=scale, levels=levels)
    return whole, torch.cat(parts) if parts else None


def neighbours(parts: Sequence[Tensor], dim: int) -> Tensor | None:
    """The tensor whose consecutive slices along `dim` the parts are; None if they are not."""
    first = parts[0]
    end = first.storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or part.stride() != first.stride() or part.storage_offset() != end:
            return None
        end += part.shape[dim] * part.stride(dim)
    shape = list(first.shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return first.as_strided(shape, first.stride())


def _multiply(x: Tensor, shared: RoundedRows, packed: PackedWeight, bias: Tensor | None, table: PlanTable) -> Tensor:
    """One layer's outputs [rows, out] in x's dtype; `shared` are x's rounded rows."""
    rows, out, int4 = x.shape[0], packed.shape[0], packed.scheme == "int4"
    runs, _, wide = packed.data.shape
    assert packed.scheme is not None
    planned = table.matmul.get(MatmulProblem(packed.shape[1], out, packed.scheme, rows_bucket(rows)))
    p = tiling(rows, out, runs, wide, processors(x.device)) if planned is None else tiling_of(planned, runs)
    cut = p.splits > 1
    y = torch.empty(rows, out, dtype=x.dtype, device=x.device)
    sums = torch.empty(p.splits, rows, out, dtype=torch.float32, device=x.device) if cut else y
    multiply[triton.cdiv(rows, p.block_m), triton.cdiv(out, p.block_n), p.splits](
        *(
            *shared,
            packed.data.view(FP8) if packed.scheme == "fp8" else packed.data,
            packed.scale,
            packed.levels,
            None if cut else bias,
            sums,
        ),
        *(rows, out, packed.data.stride(0) // wide, runs, p.span),
        INT4=int4,
        RUN=RUN,
        GROUP=GROUP if int4 else RUN,
        BLOCK_M=p.block_m,
        BLOCK_N=p.block_n,
        STAGES=p.stages,
        num_warps=p.warps,
    )
    if cut:
        add_splits[triton.cdiv(out, COLUMNS), rows](sums, bias, y, rows, out, p.splits, BLOCK_N=COLUMNS)
    return y


def check(x: Tensor, layers: Layers) -> None:
    """Raise for shapes, types and strides that the kernels would misread."""
    if x.dtype not in TYPES:
        raise TypeError(f"{x.dtype} is not fp32, bf16 or fp16")
    if x.stride(1) != 1:
        raise ValueError("rows are contiguous")
    scheme = layers[0][0].scheme
    for packed, bias in layers:
        if packed.scheme is None or packed.scheme != scheme or packed.shape[1] != x.shape[1]:
            raise ValueError(f"a layer of {packed.shape[1]} inputs, scheme {packed.scheme} does not fit its call")
        if bias is not None and (bias.dtype is not x.dtype or bias.shape != packed.shape[:1] or bias.stride(0) != 1):
            raise TypeError(f"a bias of {packed.shape[0]} outputs is contiguous and has the rows' type")
