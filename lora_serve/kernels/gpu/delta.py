"""Low-rank deltas of a mixed batch in Triton: each row uses its own adapter, through the pointer tables.

Two launches for a group of modules (`delta_kernels.py`). Shrink computes x·Aᵀ, split over parts of the input so that a
few rows still fill the device; expand adds up the parts and adds ·B to the outputs. Nothing is atomic and every sum has
a fixed order: two runs give the same bits. Ranks are read on the device and looped over: a batch costs what its ranks
cost.

A composition is one adapter whose rank is the sum of its members': their columns are neighbours between the two
launches, and the programs of its rows loop over its members in order. So no two programs write the same element.

Grids depend on shapes and on what `Segments` holds on the host, never on the tables: the host does not wait for the
device, and a captured graph stays valid while slots are pointed elsewhere. Values on the device (whether segments lie
in the batch and slots in the tables) are not checked.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lora_serve.kernels.checks import check_delta
from lora_serve.kernels.contract import DeltaGroup, Segments
from lora_serve.kernels.gpu.delta_kernels import expand, shrink
from lora_serve.kernels.gpu.device import TYPES, processors

MODULES = 4  # outputs of one launch of expand
FEW = 16  # rows of a tile where segments are short; `tl.dot` takes no fewer
MANY = 64  # rows of a tile where segments are long
MOST_SPLITS = 16
AMONG = (32, 256, 1024)  # segments to search; few sizes, as each is compiled by itself
EXPAND_R = 32  # ranks per iteration of an expand program
PROGRAMS_PER_PROCESSOR = 2  # of shrink: with their pipelines, about enough to keep the memory busy


class DeltaTiling(NamedTuple):
    """Grid and block sizes of a call.

    Attributes:
        tiles: upper bound of the number of row tiles.
        among: number of segments that a program searches for its tile's, a power of two; 1 if each tile is a segment.
        splits, span: the input is cut into `splits` parts, each `span` wide.
        capacity: columns of a row of shrink's result.
        block_m, block_k, block_n: rows, inputs and outputs per iteration of a program.
        shrink_r: ranks per iteration of a shrink program.
        warps: of a program.
        together: splits that are added per iteration.
    """

    tiles: int
    among: int
    splits: int
    span: int
    capacity: int
    block_m: int
    block_k: int
    block_n: int
    shrink_r: int
    warps: int
    together: int


def tiling(rows: int, in_features: int, modules: int, segments: Segments, size: int, processors: int) -> DeltaTiling:
    """Choose the tiling; `size` is that of an operand in bytes, `processors` are the device's multiprocessors."""
    count = segments.count
    many = segments.max_rows > FEW and rows >= count * MANY // 2  # else most rows of the tiles would be empty
    block_m = MANY if many else FEW
    # `max_rank` may be far above the ranks: with few rows, blocks of few ranks, so that fewer loads are masked off.
    block_r = 32 if many else 16
    block_k = (256 if block_m + block_r <= 32 else 128 if block_m + block_r <= 80 else 64) * 2 // size
    short = segments.max_rows <= block_m
    tiles = count if short else min(count * triton.cdiv(segments.max_rows, block_m), rows // block_m + count)
    wanted = triton.cdiv(PROGRAMS_PER_PROCESSOR * processors, tiles * modules)
    wanted = min(triton.next_power_of_2(wanted), MOST_SPLITS)
    span = triton.cdiv(triton.cdiv(in_features, wanted), block_k) * block_k
    splits = triton.next_power_of_2(triton.cdiv(in_features, span))
    return DeltaTiling(
        tiles=tiles,
        among=1 if short else next((size for size in AMONG if size >= count), triton.next_power_of_2(count)),
        splits=splits,
        span=span,
        capacity=triton.cdiv(segments.max_rank, EXPAND_R) * EXPAND_R,
        block_m=block_m,
        block_k=block_k,
        block_n=64 if many else 128,
        shrink_r=block_r,
        warps=8 if many else 4,
        together=1 if many else 4,
    )


def delta(x: Tensor, outputs: list[Tensor], group: DeltaGroup, segments: Segments) -> None:
    """`Kernels.delta`; `segments.max_rank` is no less than the sum of a composition's ranks.

    Raises:
        ValueError: shapes or strides do not fit.
        TypeError: a type that is not fp32, bf16 or fp16, or segments that are not int32 and float32.
    """
    if segments.count == 0 or segments.max_rank == 0 or x.shape[0] == 0:
        return
    check(x, outputs, group, segments)
    rows, modules = x.shape[0], len(outputs)
    size = max(x.element_size(), group.dtype.itemsize)
    p = tiling(rows, group.in_features, modules, segments, size, processors(x.device))
    h = torch.empty(p.splits, modules, rows, p.capacity, dtype=torch.float32, device=x.device)
    where = (group.rank, group.rank.stride(0), segments.start, segments.end, segments.slot)
    shrink[p.tiles, modules, p.splits](
        *(x, x.stride(0), h, group.a, group.a.stride(0), *where),
        *(segments.count, rows, modules, group.in_features, p.span, p.capacity),
        DTYPE=TYPES[group.dtype],
        OPERAND=TYPES[x.dtype if x.dtype is group.dtype else torch.float32],
        PRECISION="tf32" if size == 2 else "ieee",  # two 16-bit types are exact in tf32
        BLOCK_M=p.block_m,
        BLOCK_R=p.shrink_r,
        BLOCK_K=p.block_k,
        COUNT=p.among,
        num_warps=p.warps,
        num_stages=3,
    )
    for module in range(0, modules, MODULES):
        some = outputs[module : module + MODULES]
        places = some + some[:1] * (MODULES - len(some))
        widths = [output.shape[1] for output in some] + [0] * (MODULES - len(some))
        expand[sum(triton.cdiv(width, p.block_n) for width in widths), p.tiles](
            *(*places, *(output.stride(0) for output in places), *widths, h, group.b, group.b.stride(0), *where),
            *(segments.weight, segments.count, rows, modules, module, p.splits, p.capacity),
            DTYPE=TYPES[group.dtype],
            TOGETHER=p.together,
            BLOCK_M=p.block_m,
            BLOCK_R=EXPAND_R,
            BLOCK_N=p.block_n,
            COUNT=p.among,
            num_warps=p.warps,
            num_stages=1,
        )


def check(x: Tensor, outputs: list[Tensor], group: DeltaGroup, segments: Segments) -> None:
    """Raise for shapes, types and strides that the kernels would misread."""
    for dtype in (x.dtype, group.dtype):
        if dtype not in TYPES:
            raise TypeError(f"{dtype} is not fp32, bf16 or fp16")
    check_delta(x, outputs, group)
    for part in (segments.start, segments.end, segments.slot):
        if part.dtype is not torch.int32 or part.stride(0) != 1:
            raise TypeError("segments are int32 and contiguous")
    if segments.weight.dtype is not torch.float32 or segments.weight.stride(0) != 1:
        raise TypeError("weights of segments are float32 and contiguous")
    if any(table.stride(1) != 1 for table in (group.a, group.b, group.rank)):
        raise ValueError("rows of the pointer tables are contiguous")
