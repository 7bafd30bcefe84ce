"""Paged attention on the GPU: launches, grids and tile sizes of the kernels in `attention_kernels.py`.

A sequence with one row decodes: the query heads that share a kv head form one tile, and the context is split over
programs, as one row alone would leave most of the device idle. A sequence with more rows prefills: its rows and the
query heads of a kv head are cut into tiles, each of which loops over the context that it may see; a tile finds its
sequence on the device. Each kernel returns at once for the other's sequences.

Grids depend only on shapes, `max_query_len` and `max_context_len`; the rest is read on the device. So the host never
waits for the device, and a captured graph stays valid while sequences grow, end (0 rows) and begin.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import Any, NamedTuple, cast

import torch
import triton
from torch import Tensor

from lora_serve.kernels.contract import AttentionMetadata
from lora_serve.kernels.gpu.attention_kernels import combine, decode, prefill
from lora_serve.kernels.gpu.device import TYPES, hopper, processors
from lora_serve.kernels.gpu.plan_table import (
    NO_PLANS,
    AttentionProblem,
    DecodeAttentionPlan,
    PlanTable,
    PrefillAttentionPlan,
    rows_bucket,
)

EVERYTHING = 1 << 30  # a window longer than any context
MOST_SPLITS = 32
LEAST_PART = 128  # fewest tokens of a split: fewer would cost more to combine than they save
PROGRAMS = 4  # per multiprocessor; about half are resident, the rest evens out contexts of different lengths
STAGES = 5
MIXED_PROGRAMS = 4096  # of a step with prompts: which sequences decode, and share them, only the device knows
INTERPRETED = 32  # multiprocessors assumed in the interpreter: few, yet enough to split contexts
LOG2E = math.log2(math.e)


def decode_by_rule(width: int, itemsize: int) -> DecodeAttentionPlan:
    """For keys and values `width` (a power of two) wide or less."""
    tokens = _tokens(16 if itemsize == 4 else 32, width, itemsize)
    return DecodeAttentionPlan(tokens, warps=4, stages=STAGES, programs=PROGRAMS, least_part=LEAST_PART)


def prefill_by_rule(width: int, itemsize: int, hopper: bool) -> PrefillAttentionPlan:
    """For keys and values `width` (a power of two) wide or less; tiles as large as registers allow."""
    if itemsize == 4:  # without tensor cores
        return PrefillAttentionPlan(16, _tokens(16, width, itemsize), 4, STAGES)
    if hopper:
        return PrefillAttentionPlan(128, _tokens(32, width, itemsize), 8, STAGES)
    return PrefillAttentionPlan(128 if width <= 128 else 64, _tokens(16, width, itemsize), 8, STAGES)


def _tokens(kib: int, width: int, itemsize: int) -> int:
    """Tokens whose keys and values take `kib` KiB, within 16 to 64."""
    return min(64, max(16, (kib << 10) // (2 * width * itemsize)))


def splits_of(programs: int, reach: int, enough: int, least_part: int = LEAST_PART) -> int:
    """Number of splits of each context, where `programs` would read up to `reach` tokens each without, of `enough`."""
    return max(1, min(-(-enough // programs), -(-reach // least_part), MOST_SPLITS))


def forget_plans() -> None:
    """Look plans up again, after a table has changed."""
    _plan.cache_clear()


class AttentionPlan(NamedTuple):
    """What calls of one kind launch: grids, arguments that are numbers, and options by name.

    Attributes:
        parts, sums: shapes of the scratch memory of splits, empty if contexts are not cut.
        numbers, strides: arguments of `decode` and `prefill`; cutting: of `decode` and `combine`.
        combine_grid, prefill_grid: None if the kernel is not launched.
    """

    parts: tuple[int, ...]
    sums: tuple[int, ...]
    numbers: tuple[float, ...]
    strides: tuple[int, ...]
    cutting: tuple[int, ...]
    decode_grid: tuple[int, int, int]
    decode: dict[str, Any]
    combine_grid: tuple[int, int] | None
    combine: dict[str, Any]
    prefill_grid: tuple[int, int] | None
    prefill: dict[str, Any]


def attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    metadata: AttentionMetadata,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    *,
    table: PlanTable = NO_PLANS,
) -> Tensor:
    """`Kernels.attention`. The maxima in `metadata` may be too large.

    Rows after those of all sequences are 0, so that padding stays finite; undefined if `max_query_len` is 1.

    Heads are 8 to 256 wide, sequences up to 65,535. Raises ValueError or TypeError for shapes, strides or types that do
    not fit.
    """
    start, context, blocks = metadata.query_start, metadata.context, metadata.block_table
    tensors = (q, keys, values, start, context, blocks, sinks)
    # Layers repeat: what follows from shapes, strides and types alone, checks too, is computed for the first of them.
    layouts = tuple([None if each is None else (each.shape, each.stride(), each.dtype) for each in tensors])
    p = _plan(layouts, metadata.max_query_len, metadata.max_context_len, scale, window, softcap, q.device, table)
    tokens, heads, _ = q.shape
    out = torch.empty((tokens, heads, values.shape[3]), dtype=q.dtype, device=q.device)
    if p is None:
        return out
    parts = torch.empty(p.parts, dtype=torch.float32, device=q.device)
    sums = torch.empty(p.sums, dtype=torch.float32, device=q.device)
    given = (q, keys, values, start, context, blocks, sinks, out)
    decode[p.decode_grid](*given, parts, sums, *p.numbers, *p.strides, *p.cutting, **p.decode)
    if p.combine_grid is not None:
        combine[p.combine_grid](out, parts, sums, start, context, p.numbers[0], *p.cutting, **p.combine)
    if p.prefill_grid is not None:
        prefill[p.prefill_grid](*given, *p.numbers, *p.strides, context.shape[0], tokens, **p.prefill)
    return out


class TensorLayout(NamedTuple):
    """Of a tensor, without its memory."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


@lru_cache(1024)
def _plan(
    layouts: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype] | None, ...],
    max_query_len: int,
    max_context_len: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    device: torch.device,
    table: PlanTable,
) -> AttentionPlan | None:
    """Check and plan calls whose q, keys, values, metadata and sinks are laid out so; None: there is nothing to do."""
    *given, sinks = [None if each is None else TensorLayout(*each) for each in layouts]
    q, keys, values, query_start, context, block_table = cast("list[TensorLayout]", given)
    _check(q, keys, values, query_start, context, block_table, sinks)
    tokens, heads, key_dim = q.shape
    _, size, kv_heads, value_dim = values.shape
    sequences = context.shape[0]
    if tokens == 0 or sequences == 0:
        return None
    dtype = torch.promote_types(q.dtype, keys.dtype)
    key_pad, value_pad = (max(16, triton.next_power_of_2(dim)) for dim in (key_dim, value_dim))
    width, share, reach = max(key_pad, value_pad), heads // kv_heads, min(window or EVERYTHING, EVERYTHING)
    shape = {
        "DTYPE": TYPES[dtype],
        "CAPPED": bool(softcap),
        "WINDOWED": bool(window),
        "SHARE": share,
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "KEY_PAD": key_pad,
        "VALUE_PAD": value_pad,
        "SIZE": size,
        **dict(zip(("KEY_BLOCK", "KEY_TOKEN", "KEY_HEAD"), keys.stride, strict=False)),
        **dict(zip(("VALUE_BLOCK", "VALUE_TOKEN", "VALUE_HEAD"), values.stride, strict=False)),
    }
    problem = partial(AttentionProblem, kv_heads, share, key_dim, value_dim, dtype.itemsize)
    planned = table.decode_attention.get(problem(rows_bucket(sequences)))
    d = decode_by_rule(width, dtype.itemsize) if planned is None else planned
    rows = min(32, max(16, triton.next_power_of_2(share)))  # `tl.dot` takes at least 16
    columns = kv_heads * triton.cdiv(share, rows)
    mixed, enough = max_query_len > 1, d.programs * processors(device, INTERPRETED)
    most = max(enough, MIXED_PROGRAMS) if mixed else enough
    splits = splits_of(columns * sequences, min(max_context_len, reach), most, d.least_part)
    cut = splits > 1
    cuts = (sequences, heads, splits) if cut else (0, 0, 0)
    part = {"MIXED": mixed and cut, "LEAST_PART": d.least_part, "TILE": d.tokens}
    wanted = table.prefill_attention.get(problem(rows_bucket(tokens)))
    p = prefill_by_rule(width, dtype.itemsize, hopper(device)) if wanted is None else wanted
    return AttentionPlan(
        parts=(*cuts, value_dim),
        sums=(*cuts, 2),
        # Softmax takes powers of two; with a cap, `scale` is applied before the hyperbolic tangent and `cap` after it.
        numbers=(reach, scale / softcap if softcap else scale * LOG2E, softcap * LOG2E if softcap else 0.0),
        strides=(q.stride[0], q.stride[1], block_table.stride[0]),
        cutting=(splits, triton.cdiv(enough, columns)),
        decode_grid=(columns, splits, sequences),
        decode={"CUT": cut, "ROWS": rows, "STAGES": d.stages, **part, **shape, "num_warps": d.warps},
        combine_grid=(heads, sequences) if cut else None,
        combine={"SPLITS": MOST_SPLITS, "VALUE_DIM": value_dim, "VALUE_PAD": value_pad, **part},
        prefill_grid=(tokens * share // p.rows + sequences, kv_heads) if mixed else None,
        prefill={"ROWS": p.rows, "TILE": p.tokens, "STAGES": p.stages, **shape, "num_warps": p.warps},
    )


def _check(
    q: TensorLayout,
    keys: TensorLayout,
    values: TensorLayout,
    query_start: TensorLayout,
    context: TensorLayout,
    table: TensorLayout,
    sinks: TensorLayout | None,
) -> None:
    """Raise for shapes, types and strides that the kernels cannot read."""
    heads, key_dim = q.shape[1:]
    blocks, size, kv_heads, value_dim = values.shape
    if keys.shape != (blocks, size, kv_heads, key_dim) or heads % kv_heads:
        raise ValueError(f"q {tuple(q.shape)} does not fit the pool {tuple(keys.shape)}")
    if not (8 <= key_dim <= 256 and 8 <= value_dim <= 256):
        raise ValueError(f"heads are 8 to 256 wide, not {key_dim} and {value_dim}")
    if keys.dtype is not values.dtype:
        raise TypeError("keys and values share a type")
    if any(each.stride[-1] != 1 for each in (q, keys, values)):
        raise ValueError("heads are contiguous")
    if sinks is not None and (sinks.shape != (heads,) or sinks.stride[0] != 1):
        raise ValueError(f"sinks {tuple(sinks.shape)} do not fit {heads} heads")
    sequences = context.shape[0]
    if query_start.shape != (sequences + 1,) or table.shape[0] != sequences:
        raise ValueError(f"the attention metadata is not all of {sequences} sequences")
    for each in (query_start, context, table):
        if each.dtype is not torch.int32:
            raise TypeError("attention metadata is int32")
        if each.stride[-1] != 1:
            raise ValueError("attention metadata is contiguous")
