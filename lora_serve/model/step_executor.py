"""Executors of forward passes: eager, and the interface that recorded steps (CPU) and CUDA graphs (GPU) implement.

All give the same logits. `recorded_steps.py` and `cuda_graphs.py` run what they cannot replay through `EagerSteps`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lora_serve.kernels.contract import Recording
from lora_serve.model.batch import Batch
from lora_serve.model.input_buffers import InputBuffers

ForwardPass = Callable[[InputBuffers], Tensor]  # the model on input buffers → logits [logits rows, vocab]
Checks = Sequence[tuple[Batch, Batch]]  # pairs of batches: the second one's logits are compared


class StepExecutor(Protocol):
    """Runs batches of one resident base.

    Attributes:
        disabled: why steps, or some kinds of them, are not replayed; None if they are.
    """

    disabled: str | None

    @property
    def token_buckets(self) -> Sequence[int]:
        """Numbers of rows that steps with prompt tokens are padded to, ascending; larger steps are not padded."""
        ...

    def __call__(self, batch: Batch) -> Tensor:
        """Logits [logits rows, vocab] of a batch, valid until the next call."""
        ...

    def prepare(self, max_rows: int, max_tokens: int, blocks: int, context: int) -> None:
        """Capture graphs ahead of time; called once the KV cache has its final size, before any step.

        Args:
            max_rows, max_tokens: largest number of decode rows, and of all rows, in a step.
            blocks, context: KV blocks and tokens of the longest sequence.
        """
        ...

    def graph_memory(self, max_rows: int, max_tokens: int, blocks: int, context: int, free: Callable[[], int]) -> int:
        """Bytes of device memory that `prepare` will take; `free` returns the free bytes."""
        ...

    def check(self, checks: Checks, same: Callable[[Tensor, Tensor], bool]) -> None:
        """Replay steps that were recorded with each first batch on the second; disable replay if the logits differ.

        Args:
            checks: decode batches of one shape, and batches with prompts.
            same: whether two logits tensors are equal up to rounding.
        """
        ...


class EagerSteps:
    """Runs every batch through the model's Python.

    Args:
        ranks: highest rank of each slot's adapter; the device slots keep it up to date.
        reason: initial value of `disabled`.
    """

    def __init__(
        self, forward: ForwardPass, ranks: Mapping[int, int], device: torch.device, reason: str | None = None
    ) -> None:
        self.forward, self.ranks, self.device = forward, ranks, device
        self.disabled = reason
        self.token_buckets: Sequence[int] = ()

    def __call__(self, batch: Batch) -> Tensor:
        return self.forward(InputBuffers.of(batch, self.ranks, self.device))

    def prepare(self, max_rows: int, max_tokens: int, blocks: int, context: int) -> None:
        """Nothing is captured."""

    def graph_memory(self, max_rows: int, max_tokens: int, blocks: int, context: int, free: Callable[[], int]) -> int:
        return 0

    def check(self, checks: Checks, same: Callable[[Tensor, Tensor], bool]) -> None:
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
    """Whether the executor replays the second of two same-shaped batches with the eager logits."""
    first, second = batches
    wanted = eager(second).clone()
    for _ in range(2):  # a shape is recorded the second time it occurs
        executor(first)
    return same(executor(second), wanted)
