"""A scheduled step as flat tensors.

Sequences are laid out grouped by adapter, so that rows that share a slot are one segment, however many sequences they
belong to. Lists become tensors once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import Tensor

from lora_serve.engine.scheduler import Work
from lora_serve.engine.sequence import Sequence
from lora_serve.kernels.contract import Segments, Spans
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


def flatten(work: list[Work], slots: Mapping[str, int], block_size: int, device: torch.device) -> Flat:
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
        seq, start, end = item.seq, item.start, item.start + item.count
        if start < seq.virtual:
            count = min(end, seq.virtual) - start
            virtual.append(VirtualRun(len(tokens), len(tokens) + count, slots[seq.active[0].digest], start))
            tokens += [0] * count
        tokens += seq.tokens[max(start, seq.virtual) : end]
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
    longest = max(len(item.seq.blocks) for item in work)
    runs = _runs(spans, slots)
    segments = _segments(runs, device)
    same = logits_spans == spans  # as in every step that only decodes
    logits_runs = runs if same else _runs(logits_spans, slots)
    batch = Batch(
        token_ids=torch.tensor(tokens, device=device),
        positions=torch.tensor(positions, device=device),
        kv_index=torch.tensor(kv_index, device=device),
        spans=Spans(
            query_start=_int32(query_start, device),
            context=_int32([item.start + item.count for item in work], device),
            block_table=_int32([item.seq.blocks + [0] * (longest - len(item.seq.blocks)) for item in work], device),
            longest_query=max(item.count for item in work),
            longest_context=max(item.start + item.count for item in work),
        ),
        logits_rows=torch.tensor(logits_rows, dtype=torch.int64, device=device),
        segments=segments,
        logits_segments=segments if same else _segments(logits_runs, device),
        runs=runs,
        logits_runs=logits_runs,
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
    """Spans cut where an adapter becomes active: (slot, weight) of those that are, and how many rows."""
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


def _segments(runs: list[Run], device: torch.device) -> Segments | None:
    """Runs as the kernels read them; None if there are none."""
    if not runs:
        return None
    starts, ends, slots, weights = zip(*runs, strict=True)
    return Segments(
        _int32(starts, device), _int32(ends, device), _int32(slots, device), torch.tensor(weights, device=device)
    )


def _int32(values: Iterable[object], device: torch.device) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32, device=device)
