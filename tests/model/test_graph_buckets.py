"""Which bucket a batch is padded to: every batch within limits finds one, or a reason why it runs eagerly."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_serve.kernels.contract import GraphBuckets
from lora_serve.kernels.gpu.graph_sizes import GRAPH_SIZES
from lora_serve.model.batch import AdapterRows, Batch
from lora_serve.model.graph_buckets import KINDS, bucket_shapes, find_bucket, kind_of
from lora_serve.model.input_buffers import BatchShape, InputBuffers, split_segments

CPU = torch.device("cpu")
SIZES = GraphBuckets((1, 2, 4, 8), 4, 64, (8, 16, 32), (4, 8))
BUCKETS = bucket_shapes(SIZES, 8, 32, blocks=4, context=64)
RANKS = {1: 8, 2: 64, 3: 65}


def batch_of(counts: list[int], slots: list[int], *, all_logits: bool = False) -> Batch:
    """Sequences of so many rows, each with the adapter in a slot (0: none), in order of slots."""
    order = sorted(range(len(counts)), key=lambda i: slots[i])
    counts, slots = [counts[i] for i in order], [slots[i] for i in order]
    start = [0, *accumulate(counts)]
    wanted = list(range(start[-1])) if all_logits else [end - 1 for end in start[1:]]
    return Batch(
        token_ids=[5] * start[-1],
        positions=[position for count in counts for position in range(count)],
        kv_index=[16 * (i + 1) + row % 16 for i, count in enumerate(counts) for row in range(count)],
        query_start=start,
        context=counts,
        block_tables=[[i + 1] * -(-count // 16) for i, count in enumerate(counts)],
        logits_rows=wanted,
        adapter_rows=_segments(counts, slots),
        logits_adapter_rows=_segments(counts if all_logits else [1] * len(counts), slots),
    )


def _segments(counts: list[int], slots: list[int]) -> list[AdapterRows]:
    found, row = [], 0
    for slot in sorted(set(slots)):
        end = row + sum(count for count, own in zip(counts, slots, strict=True) if own == slot)
        found += [AdapterRows(row, end, slot)] if slot else []
        row = end
    return found


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    counts = draw(st.lists(st.sampled_from([1, 1, 1, 2, 5, 16]), min_size=1, max_size=9))
    slots = draw(st.lists(st.sampled_from([0, 0, 1, 2, 3]), min_size=len(counts), max_size=len(counts)))
    return batch_of(counts, slots, all_logits=draw(st.booleans()))


@settings(max_examples=300, deadline=None)
@given(batches())
def test_a_batch_finds_the_smallest_bucket_that_holds_it_or_a_reason(batch: Batch) -> None:
    bucket = find_bucket(BUCKETS, batch, RANKS)
    exact = BatchShape.of(batch, RANKS)
    most = 32 if len(batch.token_ids) > len(batch.context) else 8
    fits = exact.rows <= most and exact.sequences <= 8 and exact.logits_rows <= 8 and exact.max_rank <= 64
    assert isinstance(bucket, BatchShape) == fits, bucket
    if isinstance(bucket, str):
        assert bucket.startswith(("there are more than", "more than", "adapters' ranks"))
        return
    smaller = [shape for shape in BUCKETS if shape.rows < bucket.rows and (shape.segments > 0) == (bucket.segments > 0)]
    assert all(
        shape.rows < exact.rows or shape.sequences < exact.sequences or shape.max_query_len == 1 for shape in smaller
    )
    assert_padding_is_harmless(
        bucket, replace(batch, adapter_rows=split_segments(batch.adapter_rows, bucket.max_segment_rows))
    )


def assert_padding_is_harmless(bucket: BatchShape, batch: Batch) -> None:
    """Whatever the memory held: all indices are in range; padding is in no sequence and writes to the scratch block."""
    rows, sequences = len(batch.token_ids), len(batch.context)
    memory = torch.full((InputBuffers.size_of(bucket) + 7,), 0x7FC0FFEE, dtype=torch.int32)
    buffers = InputBuffers(bucket, CPU, memory)
    buffers.write(batch)
    metadata = buffers.attention
    assert buffers.kv_index[:rows].tolist() == batch.kv_index
    assert not buffers.kv_index[rows:].any()
    assert not buffers.token_ids[rows:].any()
    assert not buffers.positions[rows:].any()
    assert buffers.logits_rows.shape == (bucket.logits_rows,)
    assert (buffers.logits_rows >= 0).all()
    assert (buffers.logits_rows < bucket.rows).all()
    counts = metadata.query_start.diff()
    assert counts[:sequences].tolist() == batch.context
    assert (counts[sequences:] == int(bucket.max_query_len == 1)).all()
    assert metadata.query_start[0] == 0
    assert int(metadata.query_start[-1]) <= bucket.rows
    assert metadata.context[sequences:].tolist() == [1] * (bucket.sequences - sequences)
    assert not metadata.block_table[sequences:, 0].any()
    for segments, own in ((buffers.segments, batch.adapter_rows), (buffers.logits_segments, batch.logits_adapter_rows)):
        if segments is not None and bucket.logits_segments >= 0:
            assert segments.start[: len(own)].tolist() == [each.start for each in own]
            assert segments.end[len(own) :].tolist() == segments.start[len(own) :].tolist()
            assert not segments.slot[len(own) :].any()
            assert int((segments.end - segments.start).max()) <= segments.max_rows


@pytest.mark.parametrize("rows", range(1, 33))
def test_a_prompt_of_any_size_is_padded_by_less_than_the_next_bucket(rows: int) -> None:
    bucket = find_bucket(BUCKETS, batch_of([rows], [0]), RANKS)
    assert isinstance(bucket, BatchShape)
    assert bucket.rows == (1 if rows == 1 else next(size for size in (8, 16, 32) if size >= rows))
    assert bucket.sequences == min(bucket.rows, 4)


def test_why_a_batch_runs_eagerly_is_said() -> None:
    def why(batch: Batch) -> str:
        found = find_bucket(BUCKETS, batch, RANKS)
        assert isinstance(found, str)
        return found

    assert why(batch_of([33], [0])) == "there are more than 32 rows"
    assert why(batch_of([1] * 9, [0] * 9)) == "there are more than 8 sequences"
    assert why(batch_of([9], [0], all_logits=True)) == "more than 8 rows' logits are wanted"
    assert why(batch_of([2], [3])) == "adapters' ranks are more than 64"
    composed = [AdapterRows(0, 2, 1)] * 9
    assert why(replace(batch_of([2], [1]), adapter_rows=composed)) == "adapters' ranks are more than 64"
    small = {1: 1}
    assert (
        find_bucket(BUCKETS, replace(batch_of([2], [1]), adapter_rows=composed), small)
        == "there are more than 8 segments"
    )
    assert find_bucket([], batch_of([1], [0]), {}) == "no graph of their kind was captured"


def test_decode_steps_get_decode_buckets_and_others_do_not() -> None:
    for rows in range(1, 9):
        for slot in (0, 1):
            decode = find_bucket(BUCKETS, batch_of([1] * rows, [slot] * rows), RANKS)
            assert isinstance(decode, BatchShape)
            assert decode.max_query_len == 1
    mixed = find_bucket(BUCKETS, batch_of([1, 1, 2], [0, 1, 1]), RANKS)
    assert isinstance(mixed, BatchShape)
    assert kind_of(mixed) == "steps with prompts and adapters"


def test_the_gpus_buckets_waste_little_and_are_few() -> None:
    shapes = bucket_shapes(GRAPH_SIZES, 256, 2048, blocks=512, context=8192)
    assert {kind: sum(kind_of(shape) == kind for shape in shapes) for kind in KINDS} == {
        "steps with prompts": 27,
        "decode steps": 20,
        "steps with prompts and adapters": 27,
        "decode steps with adapters": 20,
    }
    assert sum(kind_of(shape) == KINDS[0] for shape in bucket_shapes(GRAPH_SIZES, 64, 2048, 512, 8192)) == 15
    padded = [next(size for size in GRAPH_SIZES.tokens if size >= tokens) / tokens for tokens in range(256, 2049)]
    assert max(padded) < 1.34
    assert sum(padded) / len(padded) < 1.13
    assert find_bucket(shapes, batch_of([2048 - 63] + [1] * 63, [0] * 64), {}) == next(
        shape for shape in shapes if (shape.rows, shape.sequences) == (2048, 64)
    )
