"""Recorded steps (CPU): the kernel calls of a small step are recorded once and replayed without the model's Python.

Steps of one shape make the same calls. The first step of a shape runs eagerly, the second is recorded while it runs on
its own input buffers; later ones write into these buffers and replay. The calls are the same, so the logits are
bit-identical. The GPU's counterpart is `cuda_graphs.py`.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lora_serve.kernels.contract import Kernels
from lora_serve.model.batch import Batch
from lora_serve.model.input_buffers import BatchShape, InputBuffers
from lora_serve.model.step_executor import Checks, EagerSteps, ReplayableStep, replays_right

log = logging.getLogger(__name__)

MAX_ROWS = 32  # beyond that, Python is a small part of a step's time
MAX_RECORDINGS = 64
UNBOUNDED = 1 << 30  # the CPU kernels read ranks and lengths from the tensors: one recording serves all of them


class RecordedSteps:
    """Step executor that records each shape the second time it occurs, and replays it from then on."""

    def __init__(self, eager: EagerSteps, kernels: Kernels) -> None:
        self.disabled: str | None = None
        self.token_buckets: Sequence[int] = ()
        self._eager = eager
        self._kernels = kernels
        self._steps: OrderedDict[BatchShape, ReplayableStep] = OrderedDict()  # least recently used first
        self._seen: set[BatchShape] = set()
        self._checked = False

    def __call__(self, batch: Batch) -> Tensor:
        shape = None if self.disabled else _rounded_shape(batch)
        if shape is None:
            return self._eager(batch)
        step = self._steps.get(shape)
        if step is not None:
            self._steps.move_to_end(shape)
            return step.replay(batch)
        if shape not in self._seen:
            self._seen.add(shape)
            return self._eager(batch)
        return self._record(shape, batch)

    def prepare(self, max_rows: int, max_tokens: int, blocks: int, context: int) -> None:
        """Nothing is recorded ahead of time."""

    def graph_memory(self, max_rows: int, max_tokens: int, blocks: int, context: int, free: Callable[[], int]) -> int:
        return 0

    def check(self, checks: Checks, same: Callable[[Tensor, Tensor], bool]) -> None:
        """Ignores `same`: the calls are the same, so logits must be bit-identical. One pair of batches shows that."""
        right = replays_right(self, self._eager, checks[0], torch.equal)
        self._checked = True
        if not right:
            self._disable("it depends on more than its input tensors")

    def _record(self, shape: BatchShape, batch: Batch) -> Tensor:
        buffers = InputBuffers(shape, self._eager.device)
        buffers.write(batch)
        recording = self._kernels.new_recording(check_values=not self._checked)
        logits = recording.record(lambda: self._eager.forward(buffers))
        if recording.unsupported is not None:
            self._disable(recording.unsupported)
            return logits
        self._steps[shape] = ReplayableStep(buffers, logits, recording)
        if len(self._steps) > MAX_RECORDINGS:
            self._steps.popitem(last=False)
        return logits

    def _disable(self, reason: str) -> None:
        log.info("steps are not recorded: the forward pass cannot be replayed (%s)", reason)
        self.disabled = reason
        self._steps.clear()


def _rounded_shape(batch: Batch) -> BatchShape | None:
    """The batch's shape, rounded up where padding costs nothing; None if it has too many rows."""
    if len(batch.token_ids) > MAX_ROWS:
        return None
    exact = BatchShape.of(batch, {})
    return exact._replace(
        segments=_rounded_up(exact.segments),
        logits_segments=exact.logits_segments if exact.logits_segments < 0 else _rounded_up(exact.logits_segments),
        blocks=max(8, _rounded_up(exact.blocks)),
        max_segment_rows=MAX_ROWS,
        max_rank=UNBOUNDED,
        max_query_len=MAX_ROWS,
        max_context_len=UNBOUNDED,
    )


def _rounded_up(count: int) -> int:
    """Round up to a power of two, at least 8; zero stays zero."""
    return 0 if count == 0 else max(8, 1 << (count - 1).bit_length())
