"""One step's flat tensors, as the forward pass reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from lora_serve.kernels.contract import Segments, Spans


class Run(NamedTuple):
    """Rows `start` to `end` of a batch get the adapter in `slot`; the same rows may get several."""

    start: int
    end: int
    slot: int
    weight: float


class VirtualRun(NamedTuple):
    """Rows `start` to `end` of a batch are virtual tokens of the adapter in `slot`, from its number `offset` on."""

    start: int
    end: int
    slot: int
    offset: int


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
        runs, logits_runs: the rows of `segments` and `logits_segments`, known on the host.
        virtual: rows that are an adapter's virtual tokens; their `token_ids` are 0.
    """

    token_ids: Tensor
    positions: Tensor
    kv_index: Tensor
    spans: Spans
    logits_rows: Tensor
    segments: Segments | None
    logits_segments: Segments | None
    runs: list[Run] = field(default_factory=list)
    logits_runs: list[Run] = field(default_factory=list)
    virtual: list[VirtualRun] = field(default_factory=list)
