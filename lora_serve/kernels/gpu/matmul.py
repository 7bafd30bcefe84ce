"""Linear maps over weights in int8 and int4 on a GPU, in Triton.

Two launches (`linear_kernels.py`): the rows are rounded once for all maps that read them, then tensor cores multiply
whole numbers, run by run, and scales join in float32. Where outputs are too few to fill the device, the input is cut
into splits, whose sums are added by a third launch in a fixed order: two runs give the same bits. Maps laid out beside
each other are one product. Grids follow from shapes, nothing waits for the device: a graph can capture it.

Weights lie run by run of 64 inputs, the last filled up with zeros: neighbouring outputs are one piece of memory.

    int8:  data int8 [runs, out, 64], scale float32 [out]
    int4:  data int8 [runs, out, 32]; byte i is 8 + q[i] in its lower half and q[i + 32] in its upper one
           scale int32 [runs, out]; the first group's scale and a sixteenth of the second's, as two bf16, first one low

A mask is all that unpacking takes: the upper half is read as sixteen times its number, and what the lower half adds,
eight times the sum of a row's numbers, is taken off again. Masks work on four numbers at once, shifts on one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional

from lora_serve.kernels.gpu.device import TYPES, processors
from lora_serve.kernels.gpu.matmul_kernels import add_splits, multiply, round_rows
from lora_serve.kernels.packed_weight import GROUP, RUN, PackedWeight, Scheme, dequantized, quantized

PROGRAM = 2048  # numbers that a program rounds
COLUMNS = 1024  # outputs that a program adds up
MOST_SPLITS = 8
LEAST_SPAN = 4  # runs; fewer do not fill a pipeline
PROGRAMS_PER_PROCESSOR = 4  # where memory is what is waited for


class MatmulTiling(NamedTuple):
    """How a product is laid over the device.

    Attributes:
        block_m, block_n: rows and outputs that a program takes.
        splits, span: of the runs; each is `span` of them.
        warps, stages: of a program.
    """

    block_m: int
    block_n: int
    splits: int
    span: int
    warps: int
    stages: int


class RoundedRows(NamedTuple):
    """Rounded rows: whole int8 [groups, rows, size], step float32 and int4's excess int32 [groups, rows]."""

    whole: Tensor
    step: Tensor
    excess: Tensor | None


def tiling(rows: int, out: int, runs: int, wide: int, processors: int) -> MatmulTiling:
    """Lay out a product with `out` outputs, a run of one being `wide` bytes; `processors` are what the device has."""
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


def pack(weight: Tensor, scheme: Scheme) -> PackedWeight:
    """See `Kernels.pack`.

    Raises:
        ValueError: inputs that are no whole number of int4's groups.
        TypeError: weights that are not fp32, bf16 or fp16.
    """
    out, width = weight.shape
    if weight.dtype not in TYPES:
        raise TypeError(f"{weight.dtype} is not fp32, bf16 or fp16")
    if scheme == "int4" and width % GROUP:
        raise ValueError(f"{width} inputs are no whole number of int4's groups")
    whole, scale = quantized(weight, scheme)
    runs = functional.pad(whole, (0, -width % RUN)).view(out, -1, RUN).transpose(0, 1)  # [runs, out, RUN]
    if scheme == "int8":
        return PackedWeight((out, width), weight.dtype, scheme, runs.contiguous(), scale[:, 0])
    low, high = runs[..., :GROUP], runs[..., GROUP:]
    pairs = functional.pad(scale, (0, -scale.shape[1] % 2)).view(out, -1, 2)
    pairs = torch.stack([pairs[..., 0], pairs[..., 1] / 16], 2).bfloat16().view(torch.int32)  # [out, runs, 1]
    data = (low + 8) | (high << 4)
    return PackedWeight((out, width), weight.dtype, scheme, data.contiguous(), pairs[..., 0].T.contiguous())


def unpack(packed: PackedWeight) -> Tensor:
    """See `Kernels.unpack`."""
    whole, scale = packed.data, packed.scale
    assert scale is not None
    if packed.scheme == "int4":
        whole = torch.cat([(whole & 15) - 8, whole & -16], 2)
        scale = scale[..., None].contiguous().view(torch.bfloat16).float()  # [runs, out, 2]
    else:
        scale = scale[None, :, None]
    whole, scale = (each.transpose(0, 1).flatten(1) for each in (whole, scale))  # [out, inputs], [out, groups]
    return dequantized(whole, scale)[:, : packed.shape[1]].contiguous()


def merge(layers: Sequence[PackedWeight]) -> list[PackedWeight]:
    """The same layers laid out as one, so that `linear` is one product, of whose outputs each layer has some."""
    if len(layers) == 1 or any(packed.scheme != layers[0].scheme for packed in layers):
        return list(layers)
    outs = [packed.shape[0] for packed in layers]
    data = torch.cat([packed.data for packed in layers], 1).split_with_sizes(outs, 1)
    scale = torch.cat([packed.scale for packed in layers if packed.scale is not None], -1).split_with_sizes(outs, -1)
    return [replace(packed, data=d, scale=s) for packed, d, s in zip(layers, data, scale, strict=True)]


def linear(x: Tensor, layers: Sequence[tuple[PackedWeight, Tensor | None]]) -> list[Tensor]:
    """See `Kernels.linear`, for maps of one scheme.

    Raises:
        ValueError: shapes, strides or schemes do not fit.
        TypeError: rows that are not fp32, bf16 or fp16, or a bias of another type.
    """
    check(x, layers)
    if x.shape[0] == 0:
        return [x.new_empty(0, packed.shape[0]) for packed, _ in layers]
    shared = rounded(x, layers[0][0].scheme)
    together = joined(layers)
    if together is None:
        return [_multiplied(x, shared, packed, bias) for packed, bias in layers]
    return list(_multiplied(x, shared, *together).split_with_sizes([packed.shape[0] for packed, _ in layers], 1))


def rounded(x: Tensor, scheme: Scheme | None) -> RoundedRows:
    """Rows x [rows, in] in whole numbers, as maps in the scheme read them."""
    rows, width = x.shape
    size = RUN if scheme == "int8" else GROUP
    groups = triton.cdiv(width, RUN) * (RUN // size)
    whole = torch.empty(groups, rows, size, dtype=torch.int8, device=x.device)
    step = torch.empty(groups, rows, dtype=torch.float32, device=x.device)
    excess = torch.empty(groups, rows, dtype=torch.int32, device=x.device) if scheme == "int4" else None
    tile = PROGRAM // size
    round_rows[rows, triton.cdiv(groups, tile)](
        x, whole, step, excess, x.stride(0), rows, groups, WIDTH=width, SIZE=size, TILE=tile
    )
    return RoundedRows(whole, step, excess)


def joined(layers: Sequence[tuple[PackedWeight, Tensor | None]]) -> tuple[PackedWeight, Tensor | None] | None:
    """The map of which the given ones are the outputs, one after the other; None if they lie apart."""
    if len(layers) == 1:
        return layers[0]
    first = layers[0][0]
    data = neighbours([packed.data for packed, _ in layers], 1)
    scale = neighbours([packed.scale for packed, _ in layers if packed.scale is not None], -1)
    if data is None or scale is None:
        return None
    known = [bias for _, bias in layers if bias is not None]
    parts = [known[0].new_zeros(packed.shape[0]) if bias is None else bias for packed, bias in layers] if known else []
    whole = replace(first, shape=(data.shape[1], first.shape[1]), data=data, scale=scale)
    return whole, torch.cat(parts) if parts else None


def neighbours(parts: Sequence[Tensor], dim: int) -> Tensor | None:
    """The tensor of which the parts are consecutive pieces along `dim`; None if they are not."""
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


def _multiplied(x: Tensor, shared: RoundedRows, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    """y [rows, out] in x's dtype, of rows that have been rounded."""
    rows, out, int4 = x.shape[0], packed.shape[0], packed.scheme == "int4"
    runs, _, wide = packed.data.shape
    p = tiling(rows, out, runs, wide, processors(x.device))
    cut = p.splits > 1
    y = torch.empty(rows, out, dtype=x.dtype, device=x.device)
    sums = torch.empty(p.splits, rows, out, dtype=torch.float32, device=x.device) if cut else y
    multiply[triton.cdiv(rows, p.block_m), triton.cdiv(out, p.block_n), p.splits](
        *(*shared, packed.data, packed.scale, None if cut else bias, sums),
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


def check(x: Tensor, layers: Sequence[tuple[PackedWeight, Tensor | None]]) -> None:
    """Refuse what the kernels would misread, as far as the host can tell."""
    if x.dtype not in TYPES:
        raise TypeError(f"{x.dtype} is not fp32, bf16 or fp16")
    if x.stride(1) != 1:
        raise ValueError("rows are contiguous")
    scheme = layers[0][0].scheme
    for packed, bias in layers:
        if packed.scheme is None or packed.scheme != scheme or packed.shape[1] != x.shape[1]:
            raise ValueError(f"a map of {packed.shape[1]} inputs and scheme {packed.scheme} does not fit its call")
        if bias is not None and (bias.dtype is not x.dtype or bias.shape != packed.shape[:1] or bias.stride(0) != 1):
            raise TypeError(f"a bias of {packed.shape[0]} outputs is contiguous and has the rows' type")
