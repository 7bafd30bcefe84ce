"""Decode steps played from a tape: what repeats with other numbers is not thought through again in Python.

A decode step of the same number of rows makes the same calls. The first such step runs as any other, the second is
noted on memory of its own (`kernels/tape.py`), and from then on its numbers are written there and the tape is played.
The calls are the same, so every bit of the result is. Backends without a tape, and models whose pass cannot be noted,
run as before.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_serve.kernels.contract import Kernels, Segments, Spans
from lora_serve.kernels.tape import Tape
from lora_serve.model.batch import Batch

log = logging.getLogger(__name__)

MOST_ROWS = 32  # with more, Python is a small part of a step
MOST_BYTES = 128 << 20  # that all tapes together may keep
Key = tuple[int, int, int]


@dataclass(frozen=True)
class Noted:
    """A pass on its own memory: the batch it reads, the logits it leaves."""

    batch: Batch
    logits: Tensor
    tape: Tape


class Replay:
    """Runs batches, from a tape where there is one.

    Args:
        run: the pass itself: a batch's logits.
    """

    def __init__(self, run: Callable[[Batch], Tensor], kernels: Kernels) -> None:
        self._run = run
        self._kernels = kernels
        self._noted: OrderedDict[Key, Noted] = OrderedDict()  # least recently played first
        self._seen: set[Key] = set()
        self._able = True

    def __call__(self, batch: Batch) -> Tensor:
        """The batch's logits, valid until the next call."""
        key = _key(batch) if self._able else None
        if key is None:
            return self._run(batch)
        noted = self._noted.get(key)
        if noted is None:
            if key in self._seen:
                return self._note(key, batch)
            self._seen.add(key)
            return self._run(batch)
        self._noted.move_to_end(key)
        _write(noted.batch, batch)
        noted.tape.play()
        return noted.logits

    def prove(self, first: Batch, second: Batch) -> None:
        """Note one decode step and play another; stop noting if a bit of that differs from its own pass."""
        wanted = self._run(second).clone()
        self(first), self(first)
        if self._able and not torch.equal(self(second), wanted):
            self._give_up("it depends on more than its tensors")

    def _note(self, key: Key, batch: Batch) -> Tensor:
        tape = self._kernels.tape()
        if tape is None:
            self._able = False
            return self._run(batch)
        own = _own(batch, key)
        with tape:
            logits = self._run(own)
        if tape.refused is not None:
            self._give_up(tape.refused)
            return logits
        self._noted[key] = Noted(own, logits, tape)
        while sum(noted.tape.nbytes for noted in self._noted.values()) > MOST_BYTES:
            self._noted.popitem(last=False)
        return logits

    def _give_up(self, reason: str) -> None:
        log.info("decode steps run through Python: the pass cannot be noted (%s)", reason)
        self._able = False
        self._noted.clear()


def _key(batch: Batch) -> Key | None:
    """Rows, room for segments and width of the block table; None for a batch that is not a small plain decode step."""
    rows = batch.token_ids.shape[0]
    if rows > MOST_ROWS or batch.spans.longest_query != 1 or batch.logits_rows.shape[0] != rows:
        return None
    if batch.segments is not batch.logits_segments:
        return None
    segments = 0 if batch.segments is None else _rounded(batch.segments.count)
    return rows, segments, _rounded(batch.spans.block_table.shape[1])


def _rounded(count: int) -> int:
    """A power of two, at least 8."""
    return max(8, 1 << (count - 1).bit_length())


def _own(batch: Batch, key: Key) -> Batch:
    """A copy of the batch with room for others of the same key."""
    rows, room, width = key
    spans = batch.spans
    table = spans.block_table.new_zeros(rows, width)
    segments = None
    if batch.segments is not None:
        given = batch.segments
        segments = Segments(*(part.new_zeros(room) for part in (given.start, given.end, given.slot, given.weight)))
    own = Batch(
        token_ids=batch.token_ids.clone(),
        positions=batch.positions.clone(),
        kv_index=batch.kv_index.clone(),
        spans=Spans(spans.query_start.clone(), spans.context.clone(), table, 1, width),
        logits_rows=batch.logits_rows.clone(),
        segments=segments,
        logits_segments=segments,
    )
    _write(own, batch)
    return own


def _write(own: Batch, batch: Batch) -> None:
    """Put a batch's numbers where a tape reads them; segments that are left over cover no rows."""
    own.token_ids.copy_(batch.token_ids)
    own.positions.copy_(batch.positions)
    own.kv_index.copy_(batch.kv_index)
    own.spans.context.copy_(batch.spans.context)
    own.spans.block_table[:, : batch.spans.block_table.shape[1]] = batch.spans.block_table
    if own.segments is not None and batch.segments is not None:
        count = batch.segments.count
        own.segments.start[:count] = batch.segments.start
        own.segments.end[:count] = batch.segments.end
        own.segments.slot[:count] = batch.segments.slot
        own.segments.weight[:count] = batch.segments.weight
        own.segments.end[count:] = own.segments.start[count:]
