"""A scheduled step as flat tensors.

Sequences are laid out grouped by adapter, so that rows that share a slot are one segment, however many sequences they
belong to. Numbers only: where they lie on the device is the model's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise

from lora_serve.engine.scheduler import Work
from lora_serve.engine.sequence import IN_FLIGHT_TOKEN, Sequence
from lora_serve.model.batch import Batch, Run, VirtualRun


@dataclass(frozen=True)
class Rows:
    """A sequence's logits rows in the step, `start` to `end`; if `samples`, a token is drawn from the last."""

    work: Work
    start: int
    end: int
    samples: bool


@dataclass(frozen=True)
class Flat:
    """A batch, and where each sequence's logits will be in it."""

    batch: Batch
    rows: list[Rows]


def flatten(work: list[Work], slots: Mapping[str, int], block_size: int) -> Flat:
    """Lay out a step.

    Args:
        work: what is computed; not empty.
        slots: slot of every adapter (by digest) that the step uses.
    """
    work = sorted(work, key=lambda item: [(slots[digest], weight) for digest, weight, _ in item.seq.active])
    tokens: list[int] = []
    positions: list[int] = []
    kv_index: list[int] = []
    query_start = [0]
    logits_rows: list[int] = []
    rows: list[Rows] = []
    virtual: list[VirtualRun] = []
    spans: list[tuple[Sequence, int, int]] = []
    logits_spans: list[tuple[Sequence, int, int]] = []
    for item in work:
        seq, start, end = item.seq, item.start, item.end
        if start < seq.virtual:
            count = min(end, seq.virtual) - start
            virtual.append(VirtualRun(len(tokens), len(tokens) + count, slots[seq.active[0].digest], start))
            tokens += [0] * count
        tokens += seq.tokens[max(start, seq.virtual) : end]
        if tokens[-1] == IN_FLIGHT_TOKEN:
            tokens[-1] = -1 - seq.row
        positions += range(start, end)
        for first in range(start - start % block_size, end, block_size):
            base = seq.blocks[first // block_size] * block_size
            kv_index += range(base + max(start - first, 0), base + min(end - first, block_size))
        query_start.append(len(tokens))
        wanted = max(0, end - max(start, seq.virtual)) if seq.wants_prompt_logits else int(item.last)
        spans.append((seq, start, end))
        logits_spans.append((seq, end - wanted, end))
        rows.append(Rows(item, len(logits_rows), len(logits_rows) + wanted, item.last))
        logits_rows += range(len(tokens) - wanted, len(tokens))
    runs = _runs(spans, slots)
    batch = Batch(
        token_ids=tokens,
        positions=positions,
        kv_index=kv_index,
        query_start=query_start,
        context=[item.end for item in work],
        block_tables=[item.seq.blocks for item in work],
        logits_rows=logits_rows,
        runs=runs,
        logits_runs=runs if logits_spans == spans else _runs(logits_spans, slots),  # the same in every decoding step
        virtual=virtual,
    )
    return Flat(batch, rows)


def _runs(spans: Iterable[tuple[Sequence, int, int]], slots: Mapping[str, int]) -> list[Run]:
    """Rows by what is added to them; `spans` are positions (start, end) of sequences that lie end to end as rows."""
    found: list[Run] = []
    row = 0
    for routes, group in groupby(_pieces(spans, slots), key=lambda piece: piece[0]):
        end = row + sum(count for _, count in group)
        found += [Run(row, end, slot, weight) for slot, weight in routes]
        row = end
    return found


def _pieces(
    spans: Iterable[tuple[Sequence, int, int]], slots: Mapping[str, int]
) -> Iterator[tuple[list[tuple[int, float]], int]]:
    """AttentionMetadata cut where an adapter becomes active: (slot, weight) of those that are, and how many rows."""
    for seq, start, end in spans:
        if end == start:
            continue
        if all(each.start <= start for each in seq.active):
            yield [(slots[each.digest], each.weight) for each in seq.active], end - start
            continue
        cuts = sorted({start, end, *(each.start for each in seq.active if start < each.start < end)})
        for first, last in pairwise(cuts):
            routes = [(slots[each.digest], each.weight) for each in seq.active if each.start <= first]
            yield routes, last - first
