"""Pooling: embeddings from the final hidden states of a prompt's tokens.

Every step sums the pooled rows of each sequence's part of it on the device, in float32; the sums of a chunked prompt
are added up on the host. Virtual tokens are not pooled. The last or first token alone is a sum of one row.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from lora_serve.engine.scheduled_sequence import ScheduledSequence
from lora_serve.engine.sequence import Sequence
from lora_serve.kernels.host_device_copy import DeviceToHostCopy

LEAST_NORM = 1e-12  # as in torch's `normalize`


def pooled_positions(part: ScheduledSequence) -> range:
    """Positions in a part of a step whose hidden states are pooled; none if the sequence generates."""
    seq = part.seq
    if seq.pooling is None:
        return range(0)
    first, end = seq.virtual, seq.prompt_end
    match seq.pooling.mode:
        case "first":
            end = first + 1
        case "last":
            first = end - 1
    return range(max(part.start, first), min(part.end, end))


class PendingSums:
    """Sums of hidden states being copied to the host: by part, float32 [parts, hidden]."""

    def __init__(self, parts: Seq[ScheduledSequence], sums: Tensor) -> None:
        self._parts, self._sums = parts, DeviceToHostCopy(sums)

    def wait(self) -> dict[int, Tensor]:
        """Wait for the device; sums [hidden] by id of the scheduled sequence object."""
        return {id(part): row for part, row in zip(self._parts, self._sums.wait(), strict=True)}


def sum_hidden(hidden: Tensor, parts: Seq[ScheduledSequence]) -> PendingSums:
    """Sum the pooled rows of each part of a step; parts without any are left out.

    Args:
        hidden: [rows, hidden], the `pooled_positions` of all parts, in order.
    """
    pooled = [(part, count) for part in parts if (count := len(pooled_positions(part)))]
    rows = torch.split(hidden, [count for _, count in pooled])
    return PendingSums([part for part, _ in pooled], torch.stack([own.float().sum(0) for own in rows]))


class EmbeddingSums:
    """Sums of the hidden states of prompts that are computed in chunks."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # request id → float64 [hidden]

    def __repr__(self) -> str:
        return f"<EmbeddingSums of {len(self._sums)} sequences>"

    def add(self, part: ScheduledSequence, hidden_sum: Tensor | None) -> None:
        """Add the sum over a part; starts anew with the first part, perhaps again after preemption."""
        id_ = part.seq.request.id
        if part.start <= part.seq.virtual:
            self._sums.pop(id_, None)
        if hidden_sum is not None:
            before = self._sums.get(id_)
            self._sums[id_] = hidden_sum.double() if before is None else before + hidden_sum

    def discard(self, seq: Sequence) -> None:
        """Forget a sequence that has ended."""
        self._sums.pop(seq.request.id, None)

    def embedding(self, seq: Sequence) -> bytes | None:
        """The embedding of a completely computed prompt, float32 little-endian; None if it is not finite."""
        assert seq.pooling is not None
        assert seq.request.embedding is not None
        vector = self._sums[seq.request.id]
        if seq.pooling.mode == "mean":
            vector = vector / len(seq.request.prompt)
        dimensions = seq.request.embedding.dimensions
        if dimensions is not None:
            vector = vector[:dimensions]
        if seq.pooling.normalize or dimensions is not None:
            vector = vector / vector.norm().clamp(min=LEAST_NORM)
        vector = vector.float()
        return vector.numpy().astype("<f4").tobytes() if vector.isfinite().all() else None
