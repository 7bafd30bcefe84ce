"""Paged attention on the GPU: what is launched, over which grid, in which tiles.

A sequence with one row decodes: its query heads that share a kv head are one tile, and its context is split over
programs, as one row alone would leave most of the device idle. A sequence with more rows prefills: its rows and shared
heads are tiles, each of which walks the context that it may see. Either kernel leaves the other's sequences at once.

Grids follow from shapes and from `max_query_len` and `max_context_len` alone, the rest is read on the device: nothing
waits for it, and a captured graph stays right while sequences grow, end (0 rows) and begin.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lora_serve.kernels.contract import AttentionMetadata
from lora_serve.kernels.gpu.attention_kernels import combine, decode, prefill
from lora_serve.kernels.gpu.device import TYPES, hopper, processors

EVERYTHING = 1 << 30  # a window longer than any context
MOST_SPLITS = 32
LEAST_PART = 128  # tokens of a split: fewer would not pay for their share of the combination
PROGRAMS = 4  # for each processor; about half of them are resident, the rest evens out contexts of different lengths
INTERPRETED = 32  # processors of what is none: few, yet enough to split contexts
LOG2E = math.log2(math.e)


class Tile(NamedTuple):
    """What one program takes: query rows and, at each turn of its loop, tokens of the context; and its warps."""

    rows: int
    tokens: int
    warps: int


def decode_tile(share: int, width: int, itemsize: int) -> Tile:
    """For `share` query heads of a kv head whose keys and values are `width` (a power of two) wide or less."""
    rows = min(32, max(16, triton.next_power_of_2(share)))  # a product has at least 16
    return Tile(rows, _turn(16 if itemsize == 4 else 32, width, itemsize), 4)


def prefill_tile(width: int, itemsize: int, hopper: bool) -> Tile:
    """For keys and values `width` (a power of two) wide or less; as large as registers allow."""
    if itemsize == 4:  # without tensor cores
        return Tile(16, _turn(16, width, itemsize), 4)
    if hopper:
        return Tile(128, _turn(32, width, itemsize), 8)
    return Tile(128 if width <= 128 else 64, _turn(16, width, itemsize), 8)


def _turn(kib: int, width: int, itemsize: int) -> int:
    """Tokens whose keys and values take `kib` KiB, within 16 to 64."""
    return min(64, max(16, (kib << 10) // (2 * width * itemsize)))


def splits_of(programs: int, reach: int, processors: int) -> int:
    """How many parts contexts are cut into where `programs` would read up to `reach` tokens each."""
    wanted = -(-PROGRAMS * processors // programs)
    return max(1, min(wanted, -(-reach // LEAST_PART), MOST_SPLITS))


def attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    spans: AttentionMetadata,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """See `Kernels.attention`; rows of no sequence come out as they may. The maxima of `spans` may be too large.

    Heads are 8 to 256 wide, sequences up to 65,535. ValueError, TypeError: shapes, strides or types that do not fit.
    """
    _check(q, keys, values, spans, sinks)
    tokens, heads, key_dim = q.shape
    _, size, kv_heads, value_dim = values.shape
    sequences = spans.context.shape[0]
    out = torch.empty(tokens, heads, value_dim, dtype=q.dtype, device=q.device)
    if tokens == 0 or sequences == 0:
        return out
    dtype = torch.promote_types(q.dtype, keys.dtype)
    key_pad, value_pad = (max(16, triton.next_power_of_2(dim)) for dim in (key_dim, value_dim))
    width, share, reach = max(key_pad, value_pad), heads // kv_heads, min(window or EVERYTHING, EVERYTHING)
    given = (q, keys, values, spans.query_start, spans.context, spans.block_table, sinks, out)
    # Scores are powers of two; with a cap, `scale` leads into the hyperbolic tangent and `cap` out of it.
    numbers = (reach, scale / softcap if softcap else scale * LOG2E, softcap * LOG2E if softcap else 0.0)
    strides = (q.stride(0), q.stride(1), spans.block_table.stride(0))
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
        **dict(zip(("KEY_BLOCK", "KEY_TOKEN", "KEY_HEAD"), keys.stride(), strict=False)),
        **dict(zip(("VALUE_BLOCK", "VALUE_TOKEN", "VALUE_HEAD"), values.stride(), strict=False)),
    }

    tile = decode_tile(share, width, dtype.itemsize)
    columns = kv_heads * triton.cdiv(share, tile.rows)
    splits = splits_of(columns * sequences, min(spans.max_context_len, reach), processors(q.device, INTERPRETED))
    cut = splits > 1
    cuts = (sequences, heads, splits) if cut else (0, 0, 0)
    parts = torch.empty(*cuts, value_dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(*cuts, 2, dtype=torch.float32, device=q.device)
    part = {"LEAST_PART": LEAST_PART, "TILE": tile.tokens}
    decode[columns, splits, sequences](
        *given, parts, sums, *numbers, *strides, splits, CUT=cut, ROWS=tile.rows, **part, **shape, num_warps=tile.warps
    )
    if cut:
        combine[heads, sequences](
            out, parts, sums, spans.query_start, spans.context, reach, splits,
            SPLITS=MOST_SPLITS, VALUE_DIM=value_dim, VALUE_PAD=value_pad, **part,
        )  # fmt: skip

    if spans.max_query_len > 1:
        tile = prefill_tile(width, dtype.itemsize, hopper(q.device))
        rows = min(spans.max_query_len, tokens) * share
        prefill[triton.cdiv(rows, tile.rows), kv_heads, sequences](
            *given, *numbers, *strides, ROWS=tile.rows, TILE=tile.tokens, **shape, num_warps=tile.warps
        )
    return out


def _check(q: Tensor, keys: Tensor, values: Tensor, spans: AttentionMetadata, sinks: Tensor | None) -> None:
    """Raise where `attention` could not serve; looks at shapes, types and strides only."""
    heads, key_dim = q.shape[1:]
    blocks, size, kv_heads, value_dim = values.shape
    if keys.shape != (blocks, size, kv_heads, key_dim) or heads % kv_heads:
        raise ValueError(f"q {tuple(q.shape)} does not fit the pool {tuple(keys.shape)}")
    if not (8 <= key_dim <= 256 and 8 <= value_dim <= 256):
        raise ValueError(f"heads are 8 to 256 wide, not {key_dim} and {value_dim}")
    if keys.dtype is not values.dtype:
        raise TypeError("keys and values share a type")
    if any(each.stride(-1) != 1 for each in (q, keys, values)):
        raise ValueError("heads are contiguous")
    if sinks is not None and (sinks.shape != (heads,) or sinks.stride(0) != 1):
        raise ValueError(f"sinks {tuple(sinks.shape)} do not fit {heads} heads")
    sequences = spans.context.shape[0]
    if spans.query_start.shape != (sequences + 1,) or spans.block_table.shape[0] != sequences:
        raise ValueError(f"the spans are not all of {sequences} sequences")
    for each in (spans.query_start, spans.context, spans.block_table):
        if each.dtype is not torch.int32:
            raise TypeError("spans are int32")
        if each.stride(-1) != 1:
            raise ValueError("spans are contiguous")
