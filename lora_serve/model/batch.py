"""One step's flat tensors, as the forward pass reads them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lora_serve.kernels.contract import Segments, Spans


@dataclass(frozen=True)
class Batch:
    """All tokens of all scheduled sequences, end to end, on the device.

    Attributes:
        token_ids, positions: int64 [tokens].
        kv_index: int64 [tokens], where each token's keys and values go in the block pool.
        spans: how the tokens lie over sequences and blocks.
        logits_rows: int64 [rows], the tokens whose logits are wanted, in order.
        segments: runs of tokens that share a slot; None if all rows are the base's.
        logits_segments: the same over `logits_rows`, for an adapted head.
    """

    token_ids: Tensor
    positions: Tensor
    kv_index: Tensor
    spans: Spans
    logits_rows: Tensor
    segments: Segments | None
    logits_segments: Segments | None
