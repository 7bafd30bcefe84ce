"""A scheduled step as flat tensors.

Sequences are laid out grouped by adapter, so that rows that share a slot are one segment, however many sequences they
belong to. Lists become tensors once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from lora_serve.engine.scheduler import Work
from lora_serve.engine.sequence import Sequence
from lora_serve.kernels.contract import Segments, Spans
from lora_serve.model.batch import Batch


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
    work = sorted(work, key=lambda item: _routes(item.seq, slots))
    tokens: list[int] = []
    positions: list[int] = []
    kv_index: list[int] = []
    query_start = [0]
    logits_rows: list[int] = []
    rows: list[Rows] = []
    for item in work:
        seq, end = item.seq, item.start + item.count
        tokens += seq.tokens[item.start : end]
        positions += range(item.start, end)
        for first in range(item.start - item.start % block_size, end, block_size):
            base = seq.blocks[first // block_size] * block_size
            kv_index += range(base + max(item.start - first, 0), base + min(end - first, block_size))
        query_start.append(len(tokens))
        wanted = item.count if seq.wants_prompt_logits else int(item.last)
        rows.append(Rows(item, len(logits_rows), len(logits_rows) + wanted, item.last))
        logits_rows += range(len(tokens) - wanted, len(tokens))
    longest = max(len(item.seq.blocks) for item in work)
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
        segments=_segments([(item.seq, item.count) for item in work], slots, device),
        logits_segments=_segments([(row.work.seq, row.end - row.start) for row in rows], slots, device),
    )
    return Flat(batch, rows)


def _routes(seq: Sequence, slots: Mapping[str, int]) -> list[tuple[int, float]]:
    """What is added to a sequence's rows: (slot, weight), none for the base."""
    return [(slots[adapter.digest], adapter.weight) for adapter in seq.adapters]


def _segments(runs: Iterable[tuple[Sequence, int]], slots: Mapping[str, int], device: torch.device) -> Segments | None:
    """Merge neighbouring runs of rows with the same routes; None if no row has any."""
    found: list[tuple[int, int, int, float]] = []
    start = 0
    for routes, group in groupby(runs, key=lambda run: _routes(run[0], slots)):
        end = start + sum(count for _, count in group)
        if end > start:
            found += [(start, end, slot, weight) for slot, weight in routes]
        start = end
    if not found:
        return None
    starts, ends, slot, weight = zip(*found, strict=True)
    return Segments(
        _int32(starts, device), _int32(ends, device), _int32(slot, device), torch.tensor(weight, device=device)
    )


def _int32(values: Iterable[object], device: torch.device) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32, device=device)
