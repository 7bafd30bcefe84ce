"""How a batch is run through the model: eagerly, as a recorded step (CPU), or as a CUDA graph (GPU).

All three give the same logits. `recorded_steps.py` and `cuda_graphs.py` run what they cannot replay through
`EagerSteps`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lora_serve.kernels.contract import Recording
from lora_serve.model.batch import Batch
from lora_serve.model.input_buffers import InputBuffers

ForwardPass = Callable[[InputBuffers], Tensor]  # the model on input buffers → logits [logits rows, vocab]


class StepExecutor(Protocol):
    """Runs batches of one resident base.

    Attributes:
        disabled: why no step, or none with adapters, is replayed; None if steps are.
    """

    disabled: str | None

    def __call__(self, batch: Batch) -> Tensor:
        """Logits [logits rows, vocab] of a batch, valid until the next call."""
        ...

    def prepare(self, max_rows: int, max_tokens: int, blocks: int, context: int) -> None:
        """Capture what is captured ahead; called once the KV cache has its final size, before any step.

        Args:
            max_rows, max_tokens: largest number of decode rows, and of all rows, in a step.
            blocks, context: KV blocks and tokens of the longest sequence.
        """
        ...

    def graph_memory(self, max_rows: int, free: Callable[[], int]) -> int:
        """Bytes of device memory that `prepare` will take; `free` returns the bytes that are free now."""
        ...

    def check(self, first: Batch, second: Batch, same: Callable[[Tensor, Tensor], bool]) -> None:
        """Replay a step that was recorded with `first` on `second`; disable replay where eager logits differ.

        Args:
            first, second: decode batches of one shape.
            same: whether two results are equal up to rounding.
        """
        ...


class EagerSteps:
    """Runs every batch through the model's Python.

    Args:
        ranks: highest rank of each slot's adapter; the device slots keep it up to date.
        reason: why steps are not replayed.
    """

    def __init__(
        self, forward: ForwardPass, ranks: Mapping[int, int], device: torch.device, reason: str | None = None
    ) -> None:
        self.forward, self.ranks, self.device = forward, ranks, device
        self.disabled = reason

    def __call__(self, batch: Batch) -> Tensor:
        """See `StepExecutor.__call__`."""
        return self.forward(InputBuffers.of(batch, self.ranks, self.device))

    def prepare(self, max_rows: int, max_tokens: int, blocks: int, context: int) -> None:
        """Nothing is captured."""

    def graph_memory(self, max_rows: int, free: Callable[[], int]) -> int:
        """Nothing is captured."""
        return 0

    def check(self, first: Batch, second: Batch, same: Callable[[Tensor, Tensor], bool]) -> None:
        """Nothing is replayed."""


@dataclass(frozen=True)
class ReplayableStep:
    """A recorded forward pass with its own input buffers and the logits tensor that it writes."""

    buffers: InputBuffers
    logits: Tensor
    recording: Recording

    def replay(self, batch: Batch) -> Tensor:
        """Logits of another batch that fits the buffers."""
        self.buffers.write(batch)
        self.recording.replay()
        return self.logits


def replays_right(
    executor: StepExecutor,
    eager: EagerSteps,
    batches: tuple[Batch, Batch],
    same: Callable[[Tensor, Tensor], bool],
) -> bool:
    """Whether `executor` gives the second of two batches of one shape the eager logits after it has run the first."""
    first, second = batches
    wanted = eager(second).clone()
    for _ in range(2):  # steps are recorded when their shape comes for the second time
        executor(first)
    return same(executor(second), wanted)
