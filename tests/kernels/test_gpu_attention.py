"""Paged attention of the GPU backend, in Triton's interpreter, equals the reference for every way to split the work."""

from __future__ import annotations

import dataclasses
from typing import Any

import interpreter  # noqa: F401  (before the kernels)
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import AttentionCase, assert_near, attention_cases, int32
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lora_serve.kernels.contract import AttentionMetadata
from lora_serve.kernels.gpu.attention import _plan, attention, decode_by_rule, splits_of
from lora_serve.kernels.gpu.attention_kernels import sequence_of, used_splits
from lora_serve.kernels.gpu.plan_table import (
    AttentionProblem,
    DecodeAttentionPlan,
    PlanTable,
    PrefillAttentionPlan,
    rows_bucket,
)
from lora_serve.kernels.reference import ReferenceKernels

pytestmark = pytest.mark.filterwarnings("ignore:(All-NaN|invalid value):RuntimeWarning")  # NaN is intended
reference = ReferenceKernels()

CASE = AttentionCase(  # a chunk, long and short contexts in decode, a sequence without rows, a whole prompt
    seed=5,
    dtype=torch.float32,
    kv_heads=2,
    share=3,
    key_dim=64,
    value_dim=64,
    block_size=16,
    sequences=[(40, 90), (1, 500), (1, 3), (0, 1), (7, 7)],
    window=None,
    softcap=None,
    sinks=False,
)
DECODING = dataclasses.replace(CASE, sequences=[(1, 500), (0, 1), (1, 3), (1, 129)])


def assert_equals_reference(case: AttentionCase, max_query_len: int = 0, max_context_len: int = 0) -> Tensor:
    """With the maxima in the metadata at least so large."""
    q, keys, values, metadata = case.tensors()
    loose = dataclasses.replace(
        metadata,
        max_query_len=max(metadata.max_query_len, max_query_len),
        max_context_len=max(metadata.max_context_len, max_context_len),
    )
    got = attention(q, keys, values, loose, *case.options)
    assert got.is_contiguous()
    assert_near(got, reference.attention(q, keys, values, metadata, *case.options))
    return got


@settings(max_examples=10, deadline=None)
@given(attention_cases())
def test_it_equals_the_reference(case: AttentionCase) -> None:
    assert_equals_reference(case)


def test_it_equals_torchs_attention() -> None:
    q, keys, values, metadata = CASE.tensors()
    got = attention(q, keys, values, metadata, 0.125)
    row = 0
    for i, (rows, context) in enumerate(CASE.sequences):
        blocks = metadata.block_table[i, : -(-context // CASE.block_size)].long()
        key, value = (pool[blocks].flatten(0, 1)[:context].transpose(0, 1) for pool in (keys, values))
        seen = torch.ones(rows, context, dtype=torch.bool).tril(context - rows)
        wanted = scaled_dot_product_attention(
            q[row : row + rows].transpose(0, 1), key, value, attn_mask=seen, scale=0.125, enable_gqa=True
        )
        assert_near(got[row : row + rows], wanted.transpose(0, 1))
        row += rows


@pytest.mark.parametrize(
    ("dtype", "window", "softcap", "sinks"),
    [
        (torch.float32, None, None, False),
        (torch.float32, 200, 30.0, True),
        (torch.bfloat16, 200, None, True),
        (torch.float16, 17, 2.0, False),
    ],
)
def test_contexts_of_uneven_lengths_are_split_correctly(
    dtype: torch.dtype, window: int | None, softcap: float | None, sinks: bool
) -> None:
    assert splits_of(2 * 4, 500, 4 * 32) > 1
    assert_equals_reference(dataclasses.replace(DECODING, dtype=dtype, window=window, softcap=softcap, sinks=sinks))


@pytest.mark.parametrize(
    ("decoding", "prompts"),
    [
        (DecodeAttentionPlan(16, 1, 1, programs=1, least_part=16), PrefillAttentionPlan(16, 16, 1, 1)),
        (DecodeAttentionPlan(128, 8, 3, programs=32, least_part=256), PrefillAttentionPlan(64, 128, 4, 2)),
    ],
)
@pytest.mark.parametrize("case", [CASE, DECODING])
def test_every_plan_gives_the_same(
    case: AttentionCase, decoding: DecodeAttentionPlan, prompts: PrefillAttentionPlan
) -> None:
    q, keys, values, metadata = case.tensors()
    table = PlanTable()
    heads = (case.kv_heads, case.share, case.key_dim, case.value_dim, case.dtype.itemsize)
    table.decode_attention[AttentionProblem(*heads, rows_bucket(len(case.sequences)))] = decoding
    table.prefill_attention[AttentionProblem(*heads, rows_bucket(q.shape[0]))] = prompts
    before = _plan.cache_info().misses
    got = attention(q, keys, values, metadata, 0.125, table=table)
    assert _plan.cache_info().misses == before + 1  # another table is another plan
    assert_near(got, reference.attention(q, keys, values, metadata, 0.125))


@pytest.mark.parametrize("window", [None, 100])
def test_prefill_and_decode_can_share_a_batch(window: int | None) -> None:
    assert_equals_reference(dataclasses.replace(CASE, window=window, sinks=True))


@pytest.mark.parametrize("case", [CASE, DECODING])
def test_maxima_in_the_metadata_may_be_far_too_large(case: AttentionCase) -> None:
    """As in a CUDA graph, where they are the model's."""
    assert_equals_reference(case, max_query_len=64 * (case is CASE), max_context_len=1 << 17)


@pytest.mark.parametrize(
    ("share", "key_dim", "value_dim", "block_size"),
    [(1, 8, 8, 256), (40, 24, 8, 1), (71, 64, 64, 16), (16, 192, 128, 32), (2, 256, 256, 7), (8, 80, 80, 48)],
)
def test_head_shapes_of_real_models(share: int, key_dim: int, value_dim: int, block_size: int) -> None:
    shape = {"share": share, "key_dim": key_dim, "value_dim": value_dim, "block_size": block_size}
    assert_equals_reference(dataclasses.replace(CASE, sequences=[(1, 150), (5, 70)], dtype=torch.bfloat16, **shape))


def test_the_pool_may_have_a_narrower_dtype_than_the_queries() -> None:
    q, keys, values, metadata = CASE.tensors()
    keys, values = keys.bfloat16(), values.bfloat16()
    assert_near(attention(q, keys, values, metadata, 0.125), reference.attention(q, keys, values, metadata, 0.125))


def test_padding_and_sequences_without_rows_do_not_affect_others() -> None:
    q, keys, values, metadata = DECODING.tensors()
    wanted = attention(q, keys, values, metadata, 0.125)
    keys[metadata.block_table[1, 0]] = float("nan")  # the scratch block of padding
    start = torch.cat([metadata.query_start, int32(4, 5, 5)])
    table = torch.cat([metadata.block_table, metadata.block_table[1:2].expand(3, -1)])
    padded = AttentionMetadata(start, torch.cat([metadata.context, int32(1, 1, 1)]), table, 1, 500)
    got = attention(torch.cat([q, q[:2]]), keys, values, padded, 0.125)
    assert_near(got[:3], wanted)


@pytest.mark.parametrize("sequences", [1, 5, 64, 300])
def test_a_graphs_mixed_step_may_have_any_padding(sequences: int) -> None:
    """As in a bucket: sequences without rows, rows of no sequence, the bucket's bounds, NaN in the scratch block."""
    case = dataclasses.replace(CASE, sequences=[(1, 300), (9, 20), (1, 1), (30, 40), (1, 129)][:sequences])
    q, keys, values, metadata = case.tensors()
    wanted = reference.attention(q, keys, values, metadata, 0.125)
    spare = next(block for block in range(len(keys)) if block not in metadata.block_table.flatten().tolist())
    for pool in (keys, values):
        pool[spare] = float("nan")
    rows, count = q.shape[0], len(case.sequences)
    padding = sequences - count
    table = torch.full((sequences, metadata.block_table.shape[1]), spare, dtype=torch.int32)
    table[:count] = metadata.block_table
    start = torch.cat([metadata.query_start, metadata.query_start[-1:].expand(padding)])
    bucket = AttentionMetadata(
        start, torch.cat([metadata.context, int32(1).expand(padding)]), table, rows + 21, 1 << 17
    )
    padded = torch.cat([q, torch.full((21, *q.shape[1:]), float("nan"))])
    got = attention(padded, keys, values, bucket, 0.125)
    assert_near(got[:rows], wanted)
    assert not got[rows:].any()  # what follows stays finite


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([0, 0, 1, 1, 2, 15, 16, 17, 33]), min_size=1, max_size=7), st.sampled_from([1, 3, 5, 16])
)
def test_tiles_cover_every_pair_of_every_sequence_once(counts: list[int], share: int) -> None:
    """What a program finds on the device, for every tile of the grid."""
    tile_rows = 16
    start = [sum(counts[:i]) for i in range(len(counts) + 1)]
    found = torch.full((start[-1] * share // tile_rows + len(counts), 2), -1, dtype=torch.int32)
    _tiles[(len(found),)](found, int32(*start), len(counts), SHARE=share, ROWS=tile_rows)
    seen = [0] * (start[-1] * share)
    for sequence, pair in found.tolist():
        assert 0 <= sequence < len(counts)
        for each in range(pair, min(pair + tile_rows, counts[sequence] * share)):
            seen[start[sequence] * share + each] += 1
    assert set(seen) <= {1}


@triton.jit
def _tiles(found: Any, query_start: Any, sequences: Any, SHARE: tl.constexpr, ROWS: tl.constexpr) -> None:
    sequence, pair = sequence_of(tl.program_id(0), query_start, sequences, SHARE, ROWS)
    tl.store(found + 2 * tl.program_id(0), sequence)
    tl.store(found + 2 * tl.program_id(0) + 1, pair)


def test_one_long_context_is_split_as_far_beside_prompts_as_alone() -> None:
    """In a graph for 64 sequences, of which one decodes: its context is spread over many programs."""
    counts = torch.zeros(2, dtype=torch.int32)
    for decoding in (1, 8, 64):
        start = torch.tensor([0, *range(1, decoding + 1), *[decoding + 100] * (64 - decoding)], dtype=torch.int32)
        _used[(1,)](counts, start, 64, 8, 66)
        assert counts[0] == min(8, -(-66 // decoding))


@triton.jit
def _used(counts: Any, query_start: Any, sequences: Any, splits: Any, enough: Any) -> None:
    tl.store(counts, used_splits(query_start, sequences, splits, enough, True))


def test_a_sequence_reads_nothing_but_its_own_context() -> None:
    q, keys, values, metadata = CASE.tensors()
    wanted = attention(q, keys, values, metadata, 0.125)
    mine = metadata.block_table[4, :1].long()  # seven tokens in one block of sixteen
    for pool in (keys, values):
        kept = pool[mine, :7].clone()
        pool[:] = float("nan")
        pool[mine, :7] = kept
    got = attention(q, keys, values, metadata, 0.125)
    assert torch.equal(got[42:], wanted[42:])
    assert got[:42].isnan().all()


def test_a_decoding_row_reads_nothing_before_its_window() -> None:
    q, keys, values, metadata = DECODING.tensors()
    wanted = attention(q, keys, values, metadata, 0.125, window=130)
    keys[metadata.block_table[0, : (500 - 130) // 16].long()] = float("nan")
    assert torch.equal(attention(q, keys, values, metadata, 0.125, window=130), wanted)


def test_a_query_with_nan_affects_only_its_own_row() -> None:
    q, keys, values, metadata = CASE.tensors()
    wanted = attention(q, keys, values, metadata, 0.125)
    for row in (5, 40):  # one of a chunk, and one that decodes
        broken = q.clone()
        broken[row] = float("nan")
        got = attention(broken, keys, values, metadata, 0.125)
        assert got[row].isnan().all()
        assert torch.equal(torch.cat([got[:row], got[row + 1 :]]), torch.cat([wanted[:row], wanted[row + 1 :]]))


@pytest.mark.parametrize("size", [0.0, 1e4, 1e30])
def test_probabilities_sum_to_one_whatever_the_size_of_the_scores(size: float) -> None:
    q, keys, values, metadata = CASE.tensors()
    got = attention(q * size, keys, torch.ones_like(values), metadata, 0.125)
    torch.testing.assert_close(got, torch.ones_like(got))


def test_a_batch_without_rows_gives_an_empty_result() -> None:
    q, keys, values, metadata = CASE.tensors()
    empty = AttentionMetadata(int32(0), int32(), metadata.block_table[:0], 0, 0)
    assert attention(q[:0], keys, values, empty, 0.125).shape == (0, 6, 64)


def test_splits_fill_the_device_and_no_more() -> None:
    assert splits_of(programs=8, reach=100, enough=528) == 1  # nothing to cut
    assert splits_of(programs=8, reach=1024, enough=528) == 8
    assert splits_of(programs=8, reach=1 << 17, enough=528) == 32
    assert splits_of(programs=8 * 32, reach=1 << 17, enough=528) == 3
    assert splits_of(programs=8 * 256, reach=1 << 17, enough=528) == 1
    assert (decode_by_rule(width=128, itemsize=2).tokens, decode_by_rule(width=256, itemsize=4).tokens) == (64, 16)


def test_calls_of_one_kind_are_checked_and_planned_once() -> None:
    q, keys, values, metadata = CASE.tensors()
    _plan.cache_clear()
    for _ in range(3):  # layers
        attention(q, keys.clone(), values.clone(), metadata, 0.125)
    assert (_plan.cache_info().misses, _plan.cache_info().hits) == (1, 2)
    for _ in range(2):  # what does not fit is refused every time
        with pytest.raises(TypeError, match="share a type"):
            attention(q, keys, values.half(), metadata, 0.125)


def test_shapes_and_types_that_do_not_fit_are_refused() -> None:
    q, keys, values, metadata = CASE.tensors()
    with pytest.raises(ValueError, match="does not fit the pool"):
        attention(q[..., :32], keys, values, metadata, 0.125)
    with pytest.raises(ValueError, match="8 to 256 wide"):
        attention(q[..., :4], keys[..., :4], values, metadata, 0.125)
    with pytest.raises(ValueError, match="do not fit 6 heads"):
        attention(q, keys, values, metadata, 0.125, sinks=torch.zeros(5))
    with pytest.raises(ValueError, match="not all of 5 sequences"):
        attention(q, keys, values, dataclasses.replace(metadata, query_start=metadata.query_start[1:]), 0.125)
    with pytest.raises(TypeError, match="share a type"):
        attention(q, keys, values.half(), metadata, 0.125)
    with pytest.raises(TypeError, match="int32"):
        attention(q, keys, values, dataclasses.replace(metadata, context=metadata.context.long()), 0.125)
