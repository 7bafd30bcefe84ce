"""Where a step's numbers lie on the device: one tensor a step, filled on the host and sent over in one copy.

A place may be kept and written again (a tape reads its memory), also by a smaller step of single rows: what is left
over are sequences of one token in the scratch block, and segments of no rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from lora_serve.kernels.contract import AttentionMetadata, Segments
from lora_serve.model.batch import Batch, Run


class Sizes(NamedTuple):
    """What a place has room for: rows, sequences, rows with logits, segments of both kinds, blocks a sequence.

    No segments (0): all rows are the base's. `logits_segments` -1: they are the segments themselves.
    """

    rows: int
    sequences: int
    logits: int
    segments: int
    logits_segments: int
    width: int


class Bounds(NamedTuple):
    """What no segment and no sequence of a place exceeds; see `Segments` and `AttentionMetadata`."""

    longest: int
    rank: int
    query: int
    context: int


@dataclass(frozen=True)
class Placed:
    """A batch on the device.

    Attributes:
        token_ids, positions, kv_index: int64 [rows].
        spans: how the rows lie over sequences and blocks.
        logits_rows: int64 [logits].
        segments, logits_segments: runs of rows that share a slot; None if all rows are the base's.
    """

    token_ids: Tensor
    positions: Tensor
    kv_index: Tensor
    spans: AttentionMetadata
    logits_rows: Tensor
    segments: Segments | None
    logits_segments: Segments | None


def sizes_of(batch: Batch) -> Sizes:
    """Exactly what the batch needs."""
    same = batch.runs == batch.logits_runs and len(batch.logits_rows) == len(batch.token_ids)
    return Sizes(
        rows=len(batch.token_ids),
        sequences=len(batch.context),
        logits=len(batch.logits_rows),
        segments=len(batch.runs),
        logits_segments=-1 if same else len(batch.logits_runs),
        width=max(map(len, batch.block_tables)),
    )


def rank_of(runs: Sequence[Run], ranks: Mapping[int, int]) -> int:
    """The most ranks that together add to one row: those of a composition cover the same rows."""
    groups = groupby(runs, key=lambda run: (run.start, run.end))
    return max((sum(ranks.get(run.slot, 0) for run in group) for _, group in groups), default=0)


def bounds_of(batch: Batch, ranks: Mapping[int, int]) -> Bounds:
    """Exactly what the batch has; `ranks` are the slots' highest ones."""
    return Bounds(
        longest=max((run.end - run.start for run in batch.runs + batch.logits_runs), default=0),
        rank=max(rank_of(runs, ranks) for runs in (batch.runs, batch.logits_runs)),
        query=max(end - start for start, end in zip(batch.query_start, batch.query_start[1:], strict=False)),
        context=max(batch.context),
    )


def cut(runs: Sequence[Run], longest: int) -> list[Run]:
    """The same rows in runs of at most `longest` rows; those of a composition stay neighbours."""
    parts = [
        Run(start, min(start + longest, run.end), run.slot, run.weight)
        for run in runs
        for start in range(run.start, run.end, longest)
    ]
    return sorted(parts, key=lambda part: part.start)


class Place:
    """Memory for steps of given sizes.

    Attributes:
        placed: its parts.
    """

    def __init__(self, sizes: Sizes, bounds: Bounds, device: torch.device) -> None:
        self._sizes = sizes
        self._device = device
        rows, sequences, logits, segments, logits_segments, width = sizes
        # In int32; what holds int64 comes first, so that all of it is aligned.
        self._lengths = [2 * rows, 2 * rows, 2 * rows, 2 * logits, sequences + 1, sequences]
        self._lengths += [each for count in (segments, max(0, logits_segments)) for each in [count] * 4]
        self._table = sum(self._lengths)
        self._flat = torch.zeros(self._table + sequences * width, dtype=torch.int32, device=device)
        wide, narrow = self._parts(self._flat)
        own = _segments(narrow[2:6], bounds)
        self.placed = Placed(
            token_ids=wide[0],
            positions=wide[1],
            kv_index=wide[2],
            spans=AttentionMetadata(
                query_start=narrow[0],
                context=narrow[1],
                block_table=self._flat[self._table :].view(sequences, width),
                max_query_len=bounds.query,
                max_context_len=bounds.context,
            ),
            logits_rows=wide[3],
            segments=own,
            logits_segments=own if logits_segments < 0 else _segments(narrow[6:10], bounds),
        )

    def write(self, batch: Batch) -> None:
        """Put a batch's numbers here; what it has more or fewer of than the place must fit as the module says.

        On another device than the host's this waits for nothing: the numbers arrive in the stream's order.
        """
        away = self._device.type != "cpu"
        used = max(map(len, batch.block_tables), default=0) if away else self._sizes.width
        flat = torch.empty(self._table, dtype=torch.int32, pin_memory=True) if away else self._flat[: self._table]
        table = self.placed.spans.block_table[:, :used]
        blocks = torch.empty(*table.shape, dtype=torch.int32, pin_memory=True) if away else table
        self._fill(flat, blocks, batch)
        if away:
            self._flat[: self._table].copy_(flat, non_blocking=True)
            table.copy_(blocks, non_blocking=True)

    def _fill(self, flat: Tensor, blocks: Tensor, batch: Batch) -> None:
        wide, narrow = self._parts(flat)
        left = self._sizes.rows - len(batch.token_ids)
        for part, numbers in zip(wide, (batch.token_ids, batch.positions, batch.kv_index), strict=False):
            _set(part, numbers)
        _set(wide[3], batch.logits_rows, range(len(batch.logits_rows), self._sizes.logits))
        _set(narrow[0], batch.query_start, range(len(batch.token_ids) + 1, len(batch.token_ids) + left + 1))
        _set(narrow[1], batch.context, [1] * left)
        for own, runs in ((narrow[2:6], batch.runs), (narrow[6:10], batch.logits_runs)):
            if own[0].shape[0]:
                for part, numbers in zip(own, zip(*runs, strict=True) if runs else [()] * 4, strict=True):
                    _set(part, numbers)
        rows = blocks.numpy()
        for row, numbers in zip(rows, batch.block_tables, strict=False):
            row[: len(numbers)] = numbers
        rows[len(batch.block_tables) :, :1] = 0

    def _parts(self, flat: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Views: token ids, positions, places in KV, rows with logits; and the narrow ones."""
        parts = flat[: self._table].split_with_sizes(self._lengths)
        wide = [part.view(torch.int64) for part in parts[:4]]
        narrow = list(parts[4:])
        for weight in (5, 9):
            narrow[weight] = narrow[weight].view(torch.float32)
        return wide, narrow


def placed(batch: Batch, ranks: Mapping[int, int], device: torch.device) -> Placed:
    """The batch on the device, in memory of its own."""
    place = Place(sizes_of(batch), bounds_of(batch, ranks), device)
    place.write(batch)
    return place.placed


def _segments(parts: Sequence[Tensor], bounds: Bounds) -> Segments | None:
    start, end, slot, weight = parts
    return Segments(start, end, slot, weight, bounds.longest, bounds.rank) if start.shape[0] else None


def _set(part: Tensor, numbers: Sequence[int] | Sequence[float], rest: Sequence[int] | int = 0) -> None:
    """Fill a part of the host's memory: the numbers, then the rest."""
    values = part.numpy()  # sharing memory
    values[: len(numbers)] = numbers
    values[len(numbers) :] = rest
