"""Which steps CUDA graphs are captured for (buckets), and which bucket a batch is padded to.

A bucket is a `BatchShape`: how many of everything it holds. Where every sequence decodes it has as many sequences as
rows; where there are prompt tokens, few sizes of both. Each is there twice, with adapter segments and without, so that
a batch of the base alone pays nothing for adapters. Pure functions over plain data.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import product

from lora_serve.kernels.contract import GraphBuckets
from lora_serve.model.batch import AdapterRows, Batch
from lora_serve.model.input_buffers import BatchShape, max_rank_of

KINDS = ("steps with prompts", "decode steps", "steps with prompts and adapters", "decode steps with adapters")


def kind_of(shape: BatchShape) -> str:
    """What steps a bucket is for, one of `KINDS`."""
    return KINDS[2 * (shape.segments > 0) + (shape.max_query_len == 1)]


def bucket_shapes(buckets: GraphBuckets, max_rows: int, max_tokens: int, blocks: int, context: int) -> list[BatchShape]:
    """All buckets, the smallest first: sizes of each kind up to the first that holds the largest step.

    Args:
        max_rows, max_tokens: sequences of a step, and its rows.
        blocks, context: KV blocks and tokens of the longest sequence.
    """
    longest = {"blocks": blocks, "max_context_len": context}
    shapes = []
    for rows, adapted in product(_up_to(buckets.rows, max_rows), (False, True)):
        segments = rows if adapted else 0
        shapes.append(
            BatchShape(
                rows=rows, sequences=rows, logits_rows=rows, segments=segments, logits_segments=-1,
                max_segment_rows=buckets.max_segment_rows, max_rank=buckets.max_rank, max_query_len=1, **longest,
            )
        )  # fmt: skip
    sizes = {
        (rows, min(rows, sequences))
        for rows in _up_to(buckets.tokens, max_tokens)
        for sequences in _up_to(buckets.sequences, max_rows)
    }
    for (rows, sequences), adapted in product(sizes, (False, True)):
        segments = sequences if adapted else 0
        shapes.append(
            BatchShape(
                rows=rows, sequences=sequences, logits_rows=sequences, segments=segments, logits_segments=segments,
                max_segment_rows=rows, max_rank=buckets.max_rank, max_query_len=rows, **longest,
            )
        )  # fmt: skip
    return sorted(shapes, key=lambda shape: (shape.rows, shape.max_query_len, shape.sequences, shape.segments))


def find_bucket(buckets: Iterable[BatchShape], batch: Batch, ranks: Mapping[int, int]) -> BatchShape | str:
    """The first of the buckets, the smallest first, that holds a batch; or why none of them does.

    Args:
        ranks: the highest rank of each slot's adapter.
    """
    rows, rank = len(batch.token_ids), max_rank_of(batch.adapter_rows, ranks)
    decodes = batch.is_decode and batch.adapter_rows == batch.logits_adapter_rows
    adapted = bool(batch.adapter_rows)
    reason = "no graph of their kind was captured"
    for shape in buckets:
        if adapted != (shape.segments > 0) or (shape.max_query_len == 1 and not decodes):
            continue
        if rows > shape.rows:
            reason = f"there are more than {shape.rows} rows"
        elif len(batch.context) > shape.sequences:
            reason = f"there are more than {shape.sequences} sequences"
        elif len(batch.logits_rows) > shape.logits_rows:
            reason = f"more than {shape.logits_rows} rows' logits are wanted"
        elif adapted and rank > shape.max_rank:
            reason = f"adapters' ranks are more than {shape.max_rank}"
        elif adapted and _parts(batch.adapter_rows, shape.max_segment_rows) > shape.segments:
            reason = f"there are more than {shape.segments} segments"
        elif len(batch.logits_adapter_rows) > shape.logits_segments >= 0:
            reason = f"there are more than {shape.logits_segments} segments of logits"
        else:
            return shape
    return reason


def _up_to(sizes: Sequence[int], most: int) -> Sequence[int]:
    """Sizes up to the first that is `most` or more; all of them if none is."""
    return sizes[: bisect_left(sizes, most) + 1]


def _parts(segments: Sequence[AdapterRows], max_rows: int) -> int:
    """Number of segments after `split_segments`."""
    return sum(-(-(each.end - each.start) // max_rows) for each in segments)
