"""One step's rows, as the engine lays them out on the host: plain numbers, no tensors.

`model/input_buffers.py` puts them where the forward pass reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple


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
    """All tokens of all scheduled sequences, end to end.

    Attributes:
        token_ids, positions: [tokens]; an id -1 - i is the token that was drawn last from row i of the logits, which
            only the device knows yet.
        kv_index: [tokens], where each token's keys and values go in the block pool.
        query_start: [sequences + 1], rows of sequence i are query_start[i]:query_start[i+1].
        context: [sequences], tokens of each sequence including this step's.
        block_tables: [sequences], each one's KV blocks in order.
        logits_rows: the tokens whose logits are wanted, in order.
        runs: rows that get an adapter; those of a composition are neighbours and cover the same rows.
        logits_runs: the same over `logits_rows`, for an adapted head.
        virtual: rows that are an adapter's virtual tokens; their `token_ids` are 0.
    """

    token_ids: Sequence[int]
    positions: Sequence[int]
    kv_index: Sequence[int]
    query_start: Sequence[int]
    context: Sequence[int]
    block_tables: Sequence[Sequence[int]]
    logits_rows: Sequence[int]
    runs: list[Run] = field(default_factory=list)
    logits_runs: list[Run] = field(default_factory=list)
    virtual: list[VirtualRun] = field(default_factory=list)

    @property
    def decodes(self) -> bool:
        """Whether every sequence has one row, whose logits are wanted."""
        return len(self.token_ids) == len(self.context) == len(self.logits_rows)


def trial(lengths: Sequence[int], blocks: int) -> Batch:
    """A batch of sequences so long, of the base, that leaves all KV but the scratch block's alone.

    Args:
        blocks: that the longest takes.
    """
    tokens = sum(lengths)
    return Batch(
        token_ids=[0] * tokens,
        positions=[position for length in lengths for position in range(length)],
        kv_index=[0] * tokens,
        query_start=[0, *accumulate(lengths)],
        context=lengths,
        block_tables=[[0] * blocks] * len(lengths),
        logits_rows=range(tokens),
    )
