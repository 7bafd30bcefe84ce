"""Triton kernels of paged attention: `decode` and `combine` for sequences of one row, `prefill` for longer ones.

`attention.py` launches them. Arguments that they share:

    q                          [tokens, heads, KEY_DIM], strides query_token, query_head, 1
    keys, values               the block pools; strides KEY_BLOCK, KEY_TOKEN, KEY_HEAD, 1 and VALUE_... likewise
    query_start, contexts      `AttentionMetadata.query_start`, `AttentionMetadata.context`
    tables                     `AttentionMetadata.block_table`, stride table_row
    sinks                      [heads] or None
    out                        [tokens, heads, VALUE_DIM], contiguous
    window                     tokens that a row sees at most; WINDOWED: whether there is a window
    scale, cap                 score = scale * q · k, a power of two; if CAPPED, cap * tanh(scale * q · k)
    DTYPE                      type that products are computed in
    SHARE, SIZE                query heads of a kv head; tokens of a block
    KEY_PAD, VALUE_PAD         powers of two, no less than KEY_DIM and VALUE_DIM
    ROWS, TILE                 query rows of a program; tokens per iteration of its loop
    STAGES                     iterations under way: of five, the block table is loaded two ahead, keys and values one
    sequences, tokens          number of sequences, some of which may have no rows; rows of q and out

The pool's shape and strides are constexpr: they never change, and the compiler can vectorise loads by them.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))
AMONG = tl.constexpr(256)  # sequences that a program looks at per iteration
NOT_SPECIALIZED = ["window", "table_row", "splits", "sequences", "tokens", "enough"]  # they change often
NOT_ALIGNED = ["query_start", "contexts", "tables"]  # parts of one buffer, at offsets that a step's sizes give


@triton.jit
def _attend(
    q: tl.tensor, at: tl.tensor, keys: tl.tensor, values: tl.tensor, table: tl.tensor, first: tl.tensor, end: tl.tensor,
    window: tl.tensor, scale: tl.tensor, cap: tl.tensor, top: tl.tensor, total: tl.tensor,
    DTYPE: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    KEY_PAD: tl.constexpr, VALUE_PAD: tl.constexpr, SIZE: tl.constexpr, KEY_BLOCK: tl.constexpr,
    KEY_TOKEN: tl.constexpr, VALUE_BLOCK: tl.constexpr, VALUE_TOKEN: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Online softmax of the rows q [ROWS, KEY_PAD], whose positions are at [ROWS], over tokens first:end.

    Semantics, with j over those of first .. end - 1 that are also in at - window + 1 .. at:

        score[j] = q · key[j] * scale, or cap * tanh(that)
        top' = max(top, score);  total' = total * 2^(top - top') + Σ 2^(score - top');  acc = Σ 2^(score - top') * value

    Returns top', total' [ROWS] and acc [ROWS, VALUE_PAD], float32.
    """
    d = tl.arange(0, KEY_PAD)
    e = tl.arange(0, VALUE_PAD)
    acc = tl.zeros([ROWS, VALUE_PAD], tl.float32)
    for begin in tl.range(first, end, TILE, num_stages=STAGES):
        j = begin + tl.arange(0, TILE)
        token = tl.minimum(j, end - 1)  # past the end, the last token again: a valid address
        block = tl.load(table + token // SIZE).to(tl.int64)
        offset = token % SIZE
        key = tl.load(
            keys + (block * KEY_BLOCK + offset * KEY_TOKEN)[None, :] + d[:, None], mask=d[:, None] < KEY_DIM, other=0.0
        )
        score = tl.dot(q, key.to(DTYPE), input_precision="ieee") * scale  # [ROWS, TILE]
        if CAPPED:
            score = cap * (1.0 - 2.0 / (tl.exp2(score * (2.0 * LOG2E)) + 1.0))
        seen = j[None, :] <= at[:, None]
        if WINDOWED:
            seen &= j[None, :] > at[:, None] - window
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a row may have seen nothing yet
        share = tl.exp2(score - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(share, 1)
        value = tl.load(
            values + (block * VALUE_BLOCK + offset * VALUE_TOKEN)[:, None] + e[None, :],
            mask=e[None, :] < VALUE_DIM,
            other=0.0,
        )
        acc = tl.dot(share.to(DTYPE), value.to(DTYPE), acc * shrink[:, None], input_precision="ieee")
        top = higher
    return top, total, acc


@triton.jit
def _part(
    context: tl.tensor, window: tl.tensor, splits: tl.tensor, LEAST_PART: tl.constexpr, TILE: tl.constexpr
) -> tl.tensor:
    """First position that a decoding row sees, and the tokens of each split from there (the last: fewer or none).

    Depends on the sequence's own context, so that a short one costs little where `splits` is meant for long ones.
    """
    first = tl.maximum(context - window, 0)
    part = tl.maximum(tl.cdiv(context - first, splits), LEAST_PART)
    return first, tl.cdiv(part, TILE) * TILE


@triton.jit
def used_splits(
    query_start: tl.tensor, sequences: tl.tensor, splits: tl.tensor, enough: tl.tensor, MIXED: tl.constexpr
) -> tl.tensor:
    """Splits of a context: with MIXED, so many that all decoding sequences have `enough` together, `splits` at most."""
    if MIXED:
        decoding = 0
        for first in range(0, sequences, AMONG):
            i = first + tl.arange(0, AMONG)
            inside = i < sequences
            rows = tl.load(query_start + i + 1, mask=inside, other=0) - tl.load(query_start + i, mask=inside, other=0)
            decoding += tl.sum((rows == 1).to(tl.int32), 0)
        splits = tl.minimum(splits, tl.cdiv(enough, tl.maximum(decoding, 1)))
    return splits


@triton.jit(do_not_specialize=NOT_SPECIALIZED, do_not_specialize_on_alignment=NOT_ALIGNED)
def decode(
    q: tl.tensor, keys: tl.tensor, values: tl.tensor, query_start: tl.tensor, contexts: tl.tensor, tables: tl.tensor,
    sinks: tl.tensor, out: tl.tensor, parts: tl.tensor, sums: tl.tensor, window: tl.tensor, scale: tl.tensor,
    cap: tl.tensor, query_token: tl.tensor, query_head: tl.tensor, table_row: tl.tensor, splits: tl.tensor,
    enough: tl.tensor, CUT: tl.constexpr, MIXED: tl.constexpr, LEAST_PART: tl.constexpr,
    DTYPE: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, SHARE: tl.constexpr,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_PAD: tl.constexpr, VALUE_PAD: tl.constexpr, SIZE: tl.constexpr,
    KEY_BLOCK: tl.constexpr, KEY_TOKEN: tl.constexpr, KEY_HEAD: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    VALUE_TOKEN: tl.constexpr, VALUE_HEAD: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """Sequences of one row. Program: up to ROWS query heads of a kv head (axis 0), split (axis 1), sequence (axis 2).

    Without CUT it writes `out`; with CUT, its acc to parts [sequences, heads, splits, VALUE_DIM] and (top, total) to
    sums [.., 2].
    """
    split = tl.program_id(1)
    sequence = tl.program_id(2)
    row = tl.load(query_start + sequence)
    if tl.load(query_start + sequence + 1) - row != 1:
        return
    context = tl.load(contexts + sequence)
    used = used_splits(query_start, tl.num_programs(2), splits, enough, MIXED)
    first, part = _part(context, window, used, LEAST_PART, TILE)
    first += split * part
    end = tl.minimum(first + part, context)
    if first >= end:
        return
    kv_head = tl.program_id(0) // tl.cdiv(SHARE, ROWS)
    member = tl.program_id(0) % tl.cdiv(SHARE, ROWS) * ROWS + tl.arange(0, ROWS)
    head = kv_head * SHARE + member
    mine = member < SHARE
    d = tl.arange(0, KEY_PAD)
    e = tl.arange(0, VALUE_PAD)
    query = tl.load(
        q + row.to(tl.int64) * query_token + (head * query_head)[:, None] + d[None, :],
        mask=mine[:, None] & (d[None, :] < KEY_DIM),
        other=0.0,
    )
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if sinks is not None:  # as if seen first, by the first split
        sees = mine & (split == 0)
        top = tl.load(sinks + head, mask=sees, other=float("-inf")).to(tl.float32) * LOG2E
        total = tl.where(sees, 1.0, 0.0)
    top, total, acc = _attend(
        query.to(DTYPE), tl.zeros([ROWS], tl.int32) + (end - 1), keys + kv_head * KEY_HEAD,
        values + kv_head * VALUE_HEAD, tables + sequence.to(tl.int64) * table_row,
        first, end, window, scale, cap, top, total, DTYPE, CAPPED, WINDOWED, KEY_DIM, VALUE_DIM, KEY_PAD, VALUE_PAD,
        SIZE, KEY_BLOCK, KEY_TOKEN, VALUE_BLOCK, VALUE_TOKEN, ROWS, TILE, STAGES,
    )  # fmt: skip
    heads = tl.num_programs(0) // tl.cdiv(SHARE, ROWS) * SHARE
    if CUT:
        place = (sequence.to(tl.int64) * heads + head) * splits + split
        tl.store(sums + 2 * place, top, mask=mine)
        tl.store(sums + 2 * place + 1, total, mask=mine)
        tl.store(parts + (place * VALUE_DIM)[:, None] + e[None, :], acc, mask=mine[:, None] & (e[None, :] < VALUE_DIM))
    else:
        place = (row.to(tl.int64) * heads + head) * VALUE_DIM
        result = (acc / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + place[:, None] + e[None, :], result, mask=mine[:, None] & (e[None, :] < VALUE_DIM))


@triton.jit(do_not_specialize=NOT_SPECIALIZED, do_not_specialize_on_alignment=NOT_ALIGNED[:2])
def combine(
    out: tl.tensor, parts: tl.tensor, sums: tl.tensor, query_start: tl.tensor, contexts: tl.tensor, window: tl.tensor,
    splits: tl.tensor, enough: tl.tensor, MIXED: tl.constexpr, LEAST_PART: tl.constexpr, TILE: tl.constexpr,
    SPLITS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
) -> None:  # fmt: skip
    """Combine the splits of a decoding row: out = Σ 2^(top - max top) acc / Σ 2^(top - max top) total.

    Program: head (axis 0), sequence (axis 1). Reads only the splits that had tokens.
    """
    head = tl.program_id(0)
    sequence = tl.program_id(1)
    row = tl.load(query_start + sequence)
    if tl.load(query_start + sequence + 1) - row != 1:
        return
    context = tl.load(contexts + sequence)
    used = used_splits(query_start, tl.num_programs(1), splits, enough, MIXED)
    first, part = _part(context, window, used, LEAST_PART, TILE)
    s = tl.arange(0, SPLITS)
    e = tl.arange(0, VALUE_PAD)
    there = first + s * part < context
    place = (sequence.to(tl.int64) * tl.num_programs(0) + head) * splits + s
    top = tl.load(sums + 2 * place, mask=there, other=float("-inf"))
    total = tl.load(sums + 2 * place + 1, mask=there, other=0.0)
    acc = tl.load(
        parts + (place * VALUE_DIM)[:, None] + e[None, :], mask=there[:, None] & (e[None, :] < VALUE_DIM), other=0.0
    )
    weight = tl.exp2(top - tl.max(top, 0))
    result = tl.sum(acc * weight[:, None], 0) / tl.sum(total * weight, 0)
    place = (row.to(tl.int64) * tl.num_programs(0) + head) * VALUE_DIM
    tl.store(out + place + e, result.to(out.dtype.element_ty), mask=e < VALUE_DIM)


@triton.jit
def sequence_of(
    tile: tl.tensor, query_start: tl.tensor, sequences: tl.tensor, SHARE: tl.constexpr, ROWS: tl.constexpr
) -> tl.tensor:
    """The sequence of a tile of (row, query head) pairs, and the tile's first pair in it, which may be past its rows.

    Sequence i has the tiles from query_start[i] * SHARE // ROWS + i on: as many as its pairs need, or one more.
    """
    before = 0  # sequences whose tiles begin at or before this one
    for first in range(0, sequences, AMONG):
        i = first + tl.arange(0, AMONG)
        start = tl.load(query_start + i, mask=i < sequences, other=0)
        before += tl.sum(((start * SHARE // ROWS + i <= tile) & (i < sequences)).to(tl.int32), 0)
    sequence = before - 1
    return sequence, (tile - sequence - tl.load(query_start + sequence) * SHARE // ROWS) * ROWS


@triton.jit(do_not_specialize=NOT_SPECIALIZED, do_not_specialize_on_alignment=NOT_ALIGNED)
def prefill(
    q: tl.tensor, keys: tl.tensor, values: tl.tensor, query_start: tl.tensor, contexts: tl.tensor, tables: tl.tensor,
    sinks: tl.tensor, out: tl.tensor, window: tl.tensor, scale: tl.tensor, cap: tl.tensor, query_token: tl.tensor,
    query_head: tl.tensor, table_row: tl.tensor, sequences: tl.tensor, tokens: tl.tensor,
    DTYPE: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, SHARE: tl.constexpr,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_PAD: tl.constexpr, VALUE_PAD: tl.constexpr, SIZE: tl.constexpr,
    KEY_BLOCK: tl.constexpr, KEY_TOKEN: tl.constexpr, KEY_HEAD: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    VALUE_TOKEN: tl.constexpr, VALUE_HEAD: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """Sequences of two rows or more. Program: tile (axis 0), kv head (axis 1).

    A tile is ROWS of the pairs (row, query head of the kv head) of a sequence, rows major; the last tiles, whose
    contexts are the longest, start first. Tiles of the last sequence go on over rows of no sequence, which become 0.
    """
    kv_head = tl.program_id(1)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence, pair = sequence_of(tile, query_start, sequences, SHARE, ROWS)
    start = tl.load(query_start + sequence)
    rows = tl.load(query_start + sequence + 1) - start
    last = sequence == sequences - 1
    until = tl.where(last, tokens - start, rows) * SHARE  # pairs that are written
    own = tl.where(rows > 1, rows * SHARE, 0)  # pairs of the sequence, unless its row is `decode`'s
    if ((rows <= 1) & (last == 0)) | (pair >= until):
        return
    before = tl.load(contexts + sequence) - rows  # tokens before this step's
    first = tl.maximum(before + pair // SHARE - window + 1, 0)
    end = before + tl.minimum((pair + ROWS - 1) // SHARE, rows - 1) + 1
    end = tl.where(pair < own, end, first)
    pairs = pair + tl.arange(0, ROWS)
    mine = pairs < own
    row = tl.maximum(tl.minimum(pairs // SHARE, rows - 1), 0)
    head = kv_head * SHARE + pairs % SHARE
    d = tl.arange(0, KEY_PAD)
    e = tl.arange(0, VALUE_PAD)
    query = tl.load(
        q + ((start + row).to(tl.int64) * query_token + head * query_head)[:, None] + d[None, :],
        mask=mine[:, None] & (d[None, :] < KEY_DIM),
        other=0.0,
    )
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if sinks is not None:  # as if seen first
        top = tl.load(sinks + head).to(tl.float32) * LOG2E
        total += 1.0
    top, total, acc = _attend(
        query.to(DTYPE), before + row, keys + kv_head * KEY_HEAD, values + kv_head * VALUE_HEAD,
        tables + sequence.to(tl.int64) * table_row,
        first, end, window, scale, cap, top, total, DTYPE, CAPPED, WINDOWED, KEY_DIM, VALUE_DIM, KEY_PAD, VALUE_PAD,
        SIZE, KEY_BLOCK, KEY_TOKEN, VALUE_BLOCK, VALUE_TOKEN, ROWS, TILE, STAGES,
    )  # fmt: skip
    place = ((start + pairs // SHARE).to(tl.int64) * tl.num_programs(1) * SHARE + head) * VALUE_DIM
    result = tl.where(mine[:, None], acc / tl.where(mine, total, 1.0)[:, None], 0.0).to(out.dtype.element_ty)
    written = (pairs < until) & (mine | (pairs >= rows * SHARE))
    tl.store(out + place[:, None] + e[None, :], result, mask=written[:, None] & (e[None, :] < VALUE_DIM))
