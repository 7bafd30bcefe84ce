"""Build a step's batch: the scheduled sequences' tokens, concatenated and grouped by adapter.

Sequences with the same adapters are adjacent, so that all their rows form one segment.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby, pairwise

from lora_serve.engine.pooling import pooled_positions
from lora_serve.engine.scheduled_sequence import ScheduledSequence
from lora_serve.engine.sequence import IN_FLIGHT_TOKEN, Sequence
from lora_serve.model.batch import AdapterRows, Batch

LogitsRows = list[tuple[ScheduledSequence, slice]]  # each scheduled sequence's rows of the logits


def build_batch(
    scheduled: list[ScheduledSequence], slots: Mapping[str, int], block_size: int
) -> tuple[Batch, LogitsRows]:
    """A step's batch, and each scheduled sequence's rows of its logits, in batch order.

    Args:
        scheduled: not empty.
        slots: device slot of every adapter (by digest) that the step uses.
    """
    parts = sorted(scheduled, key=lambda part: [(slots[each.digest], each.weight) for each in part.seq.active])
    tokens: list[int] = []
    positions: list[int] = []
    kv_index: list[int] = []
    query_start = [0]
    logits_rows: list[int] = []
    owners: LogitsRows = []
    virtual_rows: list[AdapterRows] = []
    hidden_rows: list[int] = []
    ranges: list[tuple[Sequence, int, int]] = []
    logits_ranges: list[tuple[Sequence, int, int]] = []
    for part in parts:
        seq, start, end = part.seq, part.start, part.end
        if start < seq.virtual:
            count = min(end, seq.virtual) - start
            virtual_rows.append(AdapterRows(len(tokens), len(tokens) + count, slots[seq.active[0].digest], first=start))
            tokens += [0] * count
        tokens += seq.tokens[max(start, seq.virtual) : end]
        if tokens[-1] == IN_FLIGHT_TOKEN:
            tokens[-1] = -1 - seq.sampled_row
        positions += range(start, end)
        for first in range(start - start % block_size, end, block_size):
            base = seq.blocks[first // block_size] * block_size
            kv_index += range(base + max(start - first, 0), base + min(end - first, block_size))
        query_start.append(len(tokens))
        wanted = max(0, end - max(start, seq.virtual)) if seq.wants_prompt_logits else int(part.samples)
        if seq.pooling is not None:
            hidden_rows += [len(tokens) - end + position for position in pooled_positions(part)]
        ranges.append((seq, start, end))
        logits_ranges.append((seq, end - wanted, end))
        owners.append((part, slice(len(logits_rows), len(logits_rows) + wanted)))
        logits_rows += range(len(tokens) - wanted, len(tokens))
    adapter_rows = _adapter_rows(ranges, slots)
    batch = Batch(
        token_ids=tokens,
        positions=positions,
        kv_index=kv_index,
        query_start=query_start,
        context=[part.end for part in parts],
        block_tables=[part.seq.blocks for part in parts],
        logits_rows=logits_rows,
        adapter_rows=adapter_rows,
        # Equal in every decode step.
        logits_adapter_rows=adapter_rows if logits_ranges == ranges else _adapter_rows(logits_ranges, slots),
        virtual_rows=virtual_rows,
        hidden_rows=hidden_rows,
    )
    return batch, owners


def _adapter_rows(ranges: Iterable[tuple[Sequence, int, int]], slots: Mapping[str, int]) -> list[AdapterRows]:
    """Segments of rows by adapter; `ranges` are positions (start, end) of sequences, whose rows are concatenated."""
    found: list[AdapterRows] = []
    row = 0
    for adapters, group in groupby(_pieces(ranges, slots), key=lambda piece: piece[0]):
        end = row + sum(count for _, count in group)
        found += [AdapterRows(row, end, slot, weight) for slot, weight in adapters]
        row = end
    return found


def _pieces(
    ranges: Iterable[tuple[Sequence, int, int]], slots: Mapping[str, int]
) -> Iterator[tuple[list[tuple[int, float]], int]]:
    """Split ranges where an adapter becomes active; yields (slot, weight) of the adapters, and a row count."""
    for seq, start, end in ranges:
        if end == start:
            continue
        if all(each.start <= start for each in seq.active):
            yield [(slots[each.digest], each.weight) for each in seq.active], end - start
            continue
        cuts = sorted({start, end, *(each.start for each in seq.active if start < each.start < end)})
        for first, last in pairwise(cuts):
            weights = ((slots[each.digest], each.weight_at(first)) for each in seq.active)
            yield [(slot, weight) for slot, weight in weights if weight is not None], last - first
