"""CUDA graphs for decode, captured at start for fixed batch sizes (buckets); a batch is padded up to the next one.

Padding rows are sequences of one token in the scratch KV block. Each bucket has a graph with adapter segments and one
without, so that a batch of the base alone pays nothing for adapters. Graphs read fixed input buffers and the adapters'
pointer tables, so they stay valid while adapters are loaded, evicted and replaced by ones of another rank. Prefill and
mixed steps run eagerly. The CPU's counterpart is `recorded_steps.py`.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from lora_serve.kernels.contract import GraphBuckets, Kernels
from lora_serve.model.batch import AdapterRows, Batch, dummy_batch
from lora_serve.model.input_buffers import BatchShape, InputBuffers, max_rank_of, split_segments
from lora_serve.model.step_executor import EagerSteps, ReplayableStep, replays_right

log = logging.getLogger(__name__)

# Sequence lengths of prefill steps that are run once at start to compile kernels before the first request: few and
# many, long and short sequences, in all combinations that kernels distinguish.
WARMUP_STEPS = ((16,), (20, 20), (20,) * 40, (64,), (100,), (100, *(31,) * 40))
GRAPH_BYTES = 16 << 20  # device memory of one graph's kernel launches, roughly
EMPTY_BATCH = Batch([], [], [], [0], [], [], [])


class CudaGraphs:
    """Step executor with CUDA graphs. If passes with adapters cannot be captured, the base still gets graphs."""

    def __init__(self, eager: EagerSteps, kernels: Kernels, buckets: GraphBuckets) -> None:
        self.disabled: str | None = None
        self._eager = eager
        self._kernels = kernels
        self._buckets = buckets
        self._sizes: list[int] = []  # of the captured buckets, in rows, ascending
        self._blocks = self._context = 1
        self._graphs: dict[BatchShape, ReplayableStep] = {}

    def __call__(self, batch: Batch) -> Tensor:
        decode = batch.is_decode and batch.adapter_rows == batch.logits_adapter_rows
        if not decode or max_rank_of(batch.adapter_rows, self._eager.ranks) > self._buckets.max_rank:
            return self._eager(batch)
        segments = split_segments(batch.adapter_rows, self._buckets.max_segment_rows)
        rows = len(batch.token_ids)
        bucket = bisect_left(self._sizes, max(rows, len(segments)))
        if bucket == len(self._sizes):
            return self._eager(batch)
        graph = self._graphs.get(self._shape(self._sizes[bucket], adapted=bool(segments)))
        if graph is None:
            return self._eager(batch)
        return graph.replay(replace(batch, adapter_rows=segments))[:rows]

    def prepare(self, max_rows: int, max_tokens: int, blocks: int, context: int) -> None:
        """Capture all buckets up to the first that holds `max_rows`, and warm up prefill."""
        self._blocks, self._context = blocks, context
        self._sizes = self._sizes_for(max_rows)
        logits = self._new_logits(self._sizes[-1])  # shared by all buckets: one graph is replayed at a time
        for adapted in (False, True):
            for rows in reversed(self._sizes):  # so that smaller graphs reuse the memory of larger ones
                if self.disabled is None:
                    self._capture(logits[:rows], adapted=adapted)
        for lengths in WARMUP_STEPS:
            if sum(lengths) <= max_tokens and max(lengths) <= context:
                self._warm_up(lengths)

    def graph_memory(self, max_rows: int, free: Callable[[], int]) -> int:
        """Measured on the largest bucket; the smaller ones share its memory except for their launches."""
        sizes = self._sizes_for(max_rows)
        before = free()
        logits = self._new_logits(sizes[-1])
        for adapted in (False, True):
            self._capture(logits, adapted=adapted)
        taken = max(0, before - free())
        self._graphs.clear()
        self.disabled = None
        return taken + 2 * (len(sizes) - 1) * GRAPH_BYTES

    def check(self, first: Batch, second: Batch, same: Callable[[Tensor, Tensor], bool]) -> None:
        """Compares up to rounding: a bucket may use other kernels than the batch's own number of rows."""
        if self._graphs and not replays_right(self, self._eager, (first, second), same):
            self._disable("it depends on more than its input tensors")
            self._graphs.clear()

    def _capture(self, logits: Tensor, *, adapted: bool) -> None:
        """Capture a bucket that writes its logits to `logits`; if that fails, captured graphs of the base are kept."""
        rows = logits.shape[0]
        buffers = self._new_buffers(rows, adapted=adapted)
        recording = self._kernels.new_recording(check_values=True)
        recording.record(lambda: logits.copy_(self._eager.forward(buffers)))
        if recording.unsupported is None:
            self._graphs[self._shape(rows, adapted=adapted)] = ReplayableStep(buffers, logits, recording)
            return
        self._disable(recording.unsupported)
        self._graphs = {shape: graph for shape, graph in self._graphs.items() if not shape.segments}

    def _disable(self, reason: str) -> None:
        log.info("steps run without CUDA graphs: the forward pass cannot be captured (%s)", reason)
        self.disabled = reason

    def _warm_up(self, lengths: Sequence[int]) -> None:
        """Compile the prefill kernels: run sequences of these lengths, each a segment, in the scratch block."""
        batch = replace(
            dummy_batch(lengths, self._blocks),
            logits_rows=range(len(lengths)),
            adapter_rows=[
                AdapterRows(end - length, end, 0) for length, end in zip(lengths, accumulate(lengths), strict=True)
            ],
            logits_adapter_rows=[AdapterRows(row, row + 1, 0) for row in range(len(lengths))],
        )
        self._eager.forward(InputBuffers.of(batch, {0: 1}, self._eager.device))

    def _sizes_for(self, max_rows: int) -> list[int]:
        """Buckets up to the first that holds `max_rows`; all of them if none does."""
        rows = self._buckets.rows
        return list(rows[: bisect_left(rows, max_rows) + 1])

    def _new_logits(self, rows: int) -> Tensor:
        return torch.empty_like(self._eager.forward(self._new_buffers(rows, adapted=False)))

    def _new_buffers(self, rows: int, *, adapted: bool) -> InputBuffers:
        buffers = InputBuffers(self._shape(rows, adapted=adapted), self._eager.device)
        buffers.write(EMPTY_BATCH)
        return buffers

    def _shape(self, rows: int, *, adapted: bool) -> BatchShape:
        return BatchShape(
            rows=rows,
            sequences=rows,
            logits_rows=rows,
            segments=rows if adapted else 0,
            logits_segments=-1,
            blocks=self._blocks,
            max_segment_rows=self._buckets.max_segment_rows,
            max_rank=self._buckets.max_rank,
            max_query_len=1,
            max_context_len=self._context,
        )
