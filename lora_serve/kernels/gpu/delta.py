"""Low-rank deltas of a mixed batch in Triton: each row uses its own adapter, through the pointer tables.

Two launches for a group of modules (`delta_kernels.py`). Shrink computes x·Aᵀ, split over parts of the input so that a
few rows still fill the device; expand adds up the parts and adds ·B to the outputs. Nothing is atomic and every sum has
a fixed order: two runs give the same bits. Ranks are read on the device and looped over: a batch costs what its ranks
cost. Of the scratch memory between the two, which has columns for `Segments.max_rank`, only columns of ranks that are
there are written and read: a bound far above them costs memory, not bandwidth.

A composition is one adapter whose rank is the sum of its members': their columns are neighbours between the two
launches, and the programs of its rows loop over its members in order. So no two programs write the same element.

Block sizes come from a table that was measured on the card (`plan_table.py`), or else by rule. Grids depend on shapes
and on what `Segments` holds on the host, never on the tables: the host does not wait for the device, and a captured
graph stays valid while slots are pointed elsewhere. Values on the device (whether segments lie in the batch and slots
in the tables) are not checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lora_serve.kernels.checks import check_delta, check_delta_input, check_gated
from lora_serve.kernels.contract import Activation, DeltaGroup, Segments
from lora_serve.kernels.gpu.delta_kernels import expand, shrink
from lora_serve.kernels.gpu.device import TYPES, launch_options, processors
from lora_serve.kernels.gpu.gated_delta_kernel import expand_gated
from lora_serve.kernels.gpu.plan_table import NO_PLANS, DeltaPlan, DeltaProblem, PlanTable, rows_bucket

MEASURED = torch.bfloat16  # type of rows and weights that plans are measured with
MODULES = 4  # outputs of one launch of expand
FEW = 16  # rows of a tile where segments are short; `tl.dot` takes no fewer
MANY = 64  # rows of a tile where segments are long
MOST_SPLITS = 16
MOST_SPLITS_OF_MANY = 4  # as every column's program reads all splits of its rows
AMONG = (32, 256, 1024)  # segments to search; few sizes, as each is compiled by itself
COLUMNS = 32  # the scratch memory's columns are a multiple of this
TOGETHER = 4  # splits of a tile of rows that expand adds per iteration
SHRINK_PROGRAMS, EXPAND_PROGRAMS = 3, 2  # per processor, where the plan is by rule


class DeltaLaunch(NamedTuple):
    """What a call launches: the plan, and what follows from it and the call's sizes.

    Attributes:
        tiles: upper bound of the number of row tiles.
        among: number of segments that a program searches for its tile's, a power of two; 1 if each tile is a segment.
        splits, span: the input is cut into `splits` parts, a power of two, each `span` wide.
        capacity: columns of a row of the scratch memory.
    """

    plan: DeltaPlan
    tiles: int
    among: int
    splits: int
    span: int
    capacity: int


def launch_of(
    rows: int,
    group: DeltaGroup,
    segments: Segments,
    dtype: torch.dtype,
    processors: int,
    table: PlanTable = NO_PLANS,
) -> DeltaLaunch:
    """What a call of `rows` rows of a dtype launches on a device with so many multiprocessors."""
    long = segments.max_rows > FEW
    problem = DeltaProblem(group.in_features, group.out_features, rows_bucket(rows), long)
    plan = table.delta.get(problem) if dtype is group.dtype is MEASURED else None
    if plan is None:
        plan = plan_by_rule(rows, group, segments, dtype, processors)
    block_m = plan.block_m
    short = segments.max_rows <= block_m
    tiles = _tiles(rows, segments, block_m)
    span = triton.cdiv(triton.cdiv(group.in_features, plan.splits), plan.block_k) * plan.block_k
    count = segments.count
    return DeltaLaunch(
        plan=plan,
        tiles=tiles,
        among=1 if short else _among(count),
        splits=triton.next_power_of_2(triton.cdiv(group.in_features, span)),
        span=span,
        capacity=triton.cdiv(segments.max_rank, COLUMNS) * COLUMNS,
    )


def plan_by_rule(rows: int, group: DeltaGroup, segments: Segments, dtype: torch.dtype, processors: int) -> DeltaPlan:
    """The plan of a call that no table holds."""
    size = max(dtype.itemsize, group.dtype.itemsize)
    # Not by the number of segments: in a graph that is what there may be, and a tile without rows ends at once.
    many = segments.max_rows > FEW and rows >= 2 * MANY
    block_m = MANY if many else FEW
    # `max_rank` may be far above the ranks: with few rows, blocks of few ranks, so that fewer loads are masked off.
    block_r = 32 if many else 16
    tiles, modules = _tiles(rows, segments, block_m), len(group.out_features)
    if many:
        splits = min(MOST_SPLITS_OF_MANY, max(2, _power_below(processors // (tiles * modules))))
    else:
        splits = min(MOST_SPLITS, _power_below(SHRINK_PROGRAMS * processors // (tiles * modules)))
    wide = EXPAND_PROGRAMS * processors // tiles  # tiles of columns that fill the device
    most = 256 if group.dtype is torch.float16 else 512  # fp16 is multiplied in three parts, which take registers
    block_n = 128 if many else min(most, max(128, _power_below(sum(group.out_features) // max(1, wide))))
    return DeltaPlan(
        splits=splits,
        block_m=block_m,
        block_k=(64 if many else 256) * 2 // size,
        block_n=block_n * 2 // size,
        block_r=block_r,
        shrink_warps=4,
        expand_warps=4,
        launch="in_turn" if many else "beside",
    )


def _among(count: int) -> int:
    """The number of segments that a program searches if it must search `count`."""
    return int(next((size for size in AMONG if size >= count), triton.next_power_of_2(count)))


def _tiles(rows: int, segments: Segments, block_m: int) -> int:
    """Upper bound of the number of tiles of `block_m` rows."""
    count = segments.count
    if segments.max_rows <= block_m:
        return count
    return int(min(count * triton.cdiv(segments.max_rows, block_m), rows // block_m + count))


def _power_below(number: int) -> int:
    """The largest power of two that is no more than `number`; at least 1."""
    return 1 << max(0, number.bit_length() - 1)


class DeltaCall:
    """One call's two launches, so that something else can run beside the first.

    Attributes:
        launch: what it launches.
        operand, precision: how x and A, or like rows and B, are multiplied.

    Raises ValueError or TypeError for an input or segments that do not fit the group.
    """

    def __init__(self, x: Tensor, group: DeltaGroup, segments: Segments, table: PlanTable) -> None:
        check(x, group, segments)
        self._x, self.group, self.segments = x, group, segments
        self.launch = launch_of(x.shape[0], group, segments, x.dtype, processors(x.device), table)
        half = x.element_size() == group.dtype.itemsize == 2
        self.operand = TYPES[x.dtype if x.dtype is group.dtype else torch.float32]
        self.precision = "tf32" if half else "ieee"  # two 16-bit types are exact in tf32
        self._h = torch.empty(
            self.launch.splits,
            len(group.out_features),
            x.shape[0],
            self.launch.capacity,
            dtype=torch.float32,
            device=x.device,
        )

    @property
    def beside(self) -> bool:
        """Whether shrink is planned to run beside the base's product."""
        return self.launch.plan.launch == "beside"

    def shrink(self) -> None:
        """Launch x·Aᵀ."""
        x, group, (plan, tiles, among, splits, span, capacity) = self._x, self.group, self.launch
        modules = len(group.out_features)
        shrink[tiles, modules, splits](
            *(x, x.stride(0), self._h, group.a, group.a.stride(0), *self.where()),
            *(self.segments.count, x.shape[0], modules, group.in_features, span, capacity),
            DTYPE=TYPES[group.dtype],
            OPERAND=self.operand,
            PRECISION=self.precision,
            BLOCK_M=plan.block_m,
            BLOCK_R=plan.block_r,
            BLOCK_K=plan.block_k,
            COUNT=among,
            num_warps=plan.shrink_warps,
            num_stages=3,
            **launch_options(plan.launch == "dependent"),
        )

    def expand(self, outputs: Sequence[Tensor]) -> None:
        """Launch ·B, which adds to the outputs."""
        check_delta(self._x, outputs, self.group)
        group, segments, (plan, tiles, among, splits, _, capacity) = self.group, self.segments, self.launch
        rows, modules = self._x.shape[0], len(outputs)
        for module in range(0, modules, MODULES):
            some = [*outputs[module : module + MODULES]]
            places = some + some[:1] * (MODULES - len(some))
            widths = [output.shape[1] for output in some] + [0] * (MODULES - len(some))
            expand[sum(triton.cdiv(width, plan.block_n) for width in widths), tiles](
                *(*places, *(output.stride(0) for output in places), *widths, self._h),
                *(group.b, group.b.stride(0), *self.where(), segments.weight),
                *(segments.count, rows, modules, module, capacity),
                DTYPE=TYPES[group.dtype],
                SPLITS=splits,
                TOGETHER=min(splits, TOGETHER),
                BLOCK_M=plan.block_m,
                BLOCK_R=plan.block_r,
                BLOCK_N=plan.block_n,
                COUNT=among,
                num_warps=plan.expand_warps,
                num_stages=1,
                **launch_options(plan.launch == "dependent"),
            )

    @property
    def gated(self) -> bool:
        """Whether a gated MLP's two projections are planned to be expanded and gated by one kernel."""
        return self.launch.plan.gated and len(self.group.out_features) == 2

    def expand_gated(self, outputs: Sequence[Tensor], activation: Activation) -> Tensor:
        """Launch ·B and the gated activation of the two outputs, which are left as they are; the result."""
        check_delta(self._x, outputs, self.group)
        gate, up = outputs
        check_gated(gate, up)
        group, segments, (plan, _, _, splits, _, capacity) = self.group, self.segments, self.launch
        rows, width = gate.shape
        y = torch.empty(rows, width, dtype=gate.dtype, device=gate.device)
        expand_gated[triton.cdiv(width, plan.block_n), rows](
            *(gate, up, y, gate.stride(0), up.stride(0), width, self._h),
            *(group.b, group.b.stride(0), *self.where(), segments.weight, segments.count, rows, capacity),
            DTYPE=TYPES[group.dtype],
            SPLITS=splits,
            BLOCK_R=plan.block_r,
            BLOCK_N=plan.block_n,
            COUNT=_among(segments.count),
            SILU=activation == "silu",
            num_warps=plan.expand_warps,
            num_stages=1,
            **launch_options(plan.launch == "dependent"),
        )
        return y

    def shrunk(self) -> Tensor:
        """x·Aᵀ, float32 [modules, rows, capacity], by the first launch; columns beyond a row's ranks are anything."""
        self.shrink()
        return self._h.sum(0)

    def like_shrunk(self) -> Tensor:
        """Scratch memory as the first launch writes it, [splits, modules, rows, capacity]."""
        return torch.empty_like(self._h)

    def where(self) -> tuple[Tensor, int, Tensor, Tensor, Tensor]:
        """The kernels' arguments that find rows and their slots."""
        rank, segments = self.group.rank, self.segments
        return rank, rank.stride(0), segments.start, segments.end, segments.slot


def adds_nothing(x: Tensor, segments: Segments) -> bool:
    """Whether the host knows that a call adds nothing."""
    return segments.count == 0 or segments.max_rank == 0 or x.shape[0] == 0


def delta(
    x: Tensor, outputs: Sequence[Tensor], group: DeltaGroup, segments: Segments, table: PlanTable = NO_PLANS
) -> None:
    """`Kernels.delta`; `segments.max_rank` is no less than the sum of a composition's ranks.

    Raises:
        ValueError: shapes or strides do not fit.
        TypeError: a type that is not fp32, bf16 or fp16, or segments that are not int32 and float32.
    """
    if adds_nothing(x, segments):
        return
    call = DeltaCall(x, group, segments, table)
    check_delta(x, outputs, group)
    call.shrink()
    call.expand(outputs)


def check(x: Tensor, group: DeltaGroup, segments: Segments) -> None:
    """Raise for shapes, types and strides that the kernels would misread."""
    for dtype in (x.dtype, group.dtype):
        if dtype not in TYPES:
            raise TypeError(f"{dtype} is not fp32, bf16 or fp16")
    check_delta_input(x, group)
    for part in (segments.start, segments.end, segments.slot):
        if part.dtype is not torch.int32 or part.stride(0) != 1:
            raise TypeError("segments are int32 and contiguous")
    if segments.weight.dtype is not torch.float32 or segments.weight.stride(0) != 1:
        raise TypeError("weights of segments are float32 and contiguous")
    if any(table.stride(1) != 1 for table in (group.a, group.b, group.rank)):
        raise ValueError("rows of the pointer tables are contiguous")
