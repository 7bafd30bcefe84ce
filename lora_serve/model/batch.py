"""One step's batch on the host: token ids, positions, KV indices and adapters of every row.

The engine builds it (`engine/batch_builder.py`); `model/input_buffers.py` copies it to the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple


class AdapterRows(NamedTuple):
    """Rows `start` to `end` of a batch that use the adapter in a device slot.

    `weight` scales its delta. For rows that are the adapter's virtual tokens, `first` is the index of the first one.
    """

    start: int
    end: int
    slot: int
    weight: float = 1.0
    first: int = 0


@dataclass(frozen=True)
class Batch:
    """All tokens of all scheduled sequences, concatenated.

    Attributes:
        token_ids, positions: [rows]; a negative id -1 - i is the token in row i of `SampledTokens`, on the device.
        kv_index: [rows], the KV slot (block * block size + offset) to which each row's keys and values are written.
        query_start: [sequences + 1], rows of sequence i are query_start[i]:query_start[i+1].
        context: [sequences], context length of each sequence including this step's tokens.
        block_tables: [sequences], KV blocks of each sequence in order.
        logits_rows: the rows whose logits are wanted, ascending.
        adapter_rows: rows that get an adapter's delta; entries of a composition are adjacent and cover the same rows.
        logits_adapter_rows: the same as indices into `logits_rows`, for an adapted head.
        virtual_rows: rows that are an adapter's virtual tokens; their `token_ids` are 0.
        hidden_rows: the rows whose final hidden states are wanted, ascending.
    """

    token_ids: Sequence[int]
    positions: Sequence[int]
    kv_index: Sequence[int]
    query_start: Sequence[int]
    context: Sequence[int]
    block_tables: Sequence[Sequence[int]]
    logits_rows: Sequence[int]
    adapter_rows: list[AdapterRows] = field(default_factory=list)
    logits_adapter_rows: list[AdapterRows] = field(default_factory=list)
    virtual_rows: list[AdapterRows] = field(default_factory=list)
    hidden_rows: Sequence[int] = ()

    @property
    def is_decode(self) -> bool:
        """Whether every sequence has exactly one row, whose logits are wanted."""
        return len(self.token_ids) == len(self.context) == len(self.logits_rows)


def dummy_batch(lengths: Sequence[int], blocks: int) -> Batch:
    """A prefill of base sequences of the given lengths that writes to the scratch KV block only.

    Args:
        blocks: width of the block tables.
    """
    rows = sum(lengths)
    return Batch(
        token_ids=[0] * rows,
        positions=[position for length in lengths for position in range(length)],
        kv_index=[0] * rows,
        query_start=[0, *accumulate(lengths)],
        context=lengths,
        block_tables=[[0] * blocks] * len(lengths),
        logits_rows=range(rows),
    )
