"""CUDA graphs of whole steps, captured at start for fixed sizes (buckets); a batch is padded up to the next one.

Decode, prefill and mixed steps are replayed alike: which buckets there are is in `graph_buckets.py`, how a batch is
padded in `input_buffers.py`. Graphs read fixed input buffers and the adapters' pointer tables, so they stay valid while
adapters are loaded, evicted and replaced by ones of another rank. What no bucket holds runs eagerly. The CPU's
counterpart is `recorded_steps.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from lora_serve.kernels.contract import GraphBuckets, Kernels
from lora_serve.model.batch import AdapterRows, Batch, dummy_batch
from lora_serve.model.graph_buckets import KINDS, bucket_shapes, find_bucket, kind_of
from lora_serve.model.input_buffers import BatchShape, InputBuffers, split_segments
from lora_serve.model.step_executor import Checks, EagerSteps, ReplayableStep, replays_right

log = logging.getLogger(__name__)

# Sequence lengths of prefill steps that are run once at start to compile kernels before the first eager request: few
# and many, long and short sequences, in all combinations that kernels distinguish.
WARMUP_STEPS = ((16,), (20, 20), (20,) * 40, (64,), (100,), (100, *(31,) * 40))
GRAPH_BYTES = 8 << 20  # device memory of one graph's kernel launches: under 6 MB for 32 layers on an H200
EMPTY_BATCH = Batch([], [], [], [0], [], [], [])


class CudaGraphs:
    """Step executor with CUDA graphs. Kinds of steps that cannot be captured run eagerly; the others get graphs."""

    def __init__(self, eager: EagerSteps, kernels: Kernels, buckets: GraphBuckets) -> None:
        self.disabled: str | None = None
        self._eager = eager
        self._kernels = kernels
        self._buckets = buckets
        self._graphs: dict[BatchShape, ReplayableStep] = {}  # the smallest first
        self._reasons: set[str] = set()  # why steps ran eagerly, each logged once

    def __call__(self, batch: Batch) -> Tensor:
        bucket = find_bucket(self._graphs, batch, self._eager.ranks)
        if isinstance(bucket, str):
            if self._graphs and bucket not in self._reasons:
                self._reasons.add(bucket)
                log.info("steps without a CUDA graph: %s", bucket)
            return self._eager(batch)
        segments = split_segments(batch.adapter_rows, bucket.max_segment_rows)
        return self._graphs[bucket].replay(replace(batch, adapter_rows=segments))[: len(batch.logits_rows)]

    @property
    def token_buckets(self) -> Sequence[int]:
        return sorted({shape.rows for shape in self._graphs if shape.max_query_len > 1})

    def prepare(self, max_rows: int, max_tokens: int, blocks: int, context: int) -> None:
        """Capture all buckets up to those that hold the largest step, and warm up eager prefill."""
        self._capture(bucket_shapes(self._buckets, max_rows, max_tokens, blocks, context))
        for lengths in WARMUP_STEPS:
            if sum(lengths) <= max_tokens and max(lengths) <= context:
                self._warm_up(lengths, blocks)

    def graph_memory(self, max_rows: int, max_tokens: int, blocks: int, context: int, free: Callable[[], int]) -> int:
        """Measured on the largest bucket of each kind; the smaller ones share its memory except for their launches."""
        shapes = bucket_shapes(self._buckets, max_rows, max_tokens, blocks, context)
        largest = {kind_of(shape): shape for shape in shapes}  # of each kind the last
        before = free()
        self._capture(list(largest.values()))
        taken = max(0, before - free())
        self._graphs.clear()
        self.disabled = None
        return taken + (len(shapes) - len(largest)) * GRAPH_BYTES

    def check(self, checks: Checks, same: Callable[[Tensor, Tensor], bool]) -> None:
        """Compares up to rounding: a bucket may use other kernels than the batch's own number of rows."""
        for first, second in checks:
            bucket = find_bucket(self._graphs, second, self._eager.ranks)
            if isinstance(bucket, str) or replays_right(self, self._eager, (first, second), same):
                continue
            for kind in KINDS:
                if kind.startswith(kind_of(bucket)):  # with adapters too
                    self._drop(kind, "it depends on more than its input tensors")

    def _capture(self, shapes: Sequence[BatchShape]) -> None:
        """Capture buckets, which are given the smallest first; if one fails, those of its kind are left out.

        All read the same input buffers and write the same logits: one graph is replayed at a time.
        """
        memory = torch.zeros(max(map(InputBuffers.size_of, shapes)), dtype=torch.int32, device=self._eager.device)
        most = max(shapes, key=lambda shape: (shape.logits_rows, -shape.segments, -shape.rows))
        logits = torch.empty_like(self._eager.forward(self._new_buffers(most, memory)))
        for kind in KINDS:
            for shape in reversed([shape for shape in shapes if kind_of(shape) == kind]):  # so that memory is reused
                step = self._record(self._new_buffers(shape, memory), logits[: shape.logits_rows])
                if isinstance(step, str):
                    self._drop(kind, step)
                    break
                self._graphs[shape] = step
        self._graphs = {shape: self._graphs[shape] for shape in shapes if shape in self._graphs}

    def _record(self, buffers: InputBuffers, logits: Tensor) -> ReplayableStep | str:
        """Capture the pass that these buffers feed, writing to `logits`; or why it cannot be captured."""
        recording = self._kernels.new_recording(check_values=True)
        recording.record(lambda: logits.copy_(self._eager.forward(buffers)))
        return recording.unsupported or ReplayableStep(buffers, logits, recording)

    def _drop(self, kind: str, reason: str) -> None:
        """Run steps of this kind eagerly from now on."""
        log.info("%s run without CUDA graphs (%s)", kind, reason)
        self.disabled = self.disabled or f"{kind}: {reason}"
        self._graphs = {shape: graph for shape, graph in self._graphs.items() if kind_of(shape) != kind}

    def _new_buffers(self, shape: BatchShape, memory: Tensor) -> InputBuffers:
        buffers = InputBuffers(shape, self._eager.device, memory)
        buffers.write(EMPTY_BATCH)
        return buffers

    def _warm_up(self, lengths: Sequence[int], blocks: int) -> None:
        """Compile the prefill kernels: run sequences of these lengths, each a segment, in the scratch block."""
        batch = replace(
            dummy_batch(lengths, blocks),
            logits_rows=range(len(lengths)),
            adapter_rows=[
                AdapterRows(end - length, end, 0) for length, end in zip(lengths, accumulate(lengths), strict=True)
            ],
            logits_adapter_rows=[AdapterRows(row, row + 1, 0) for row in range(len(lengths))],
        )
        self._eager.forward(InputBuffers.of(batch, {0: 1}, self._eager.device))
