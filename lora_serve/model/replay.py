"""Small steps played from a tape: what repeats with other numbers is not thought through again in Python.

A step of the same numbers of rows and sequences makes the same calls. The first such step runs as any other, the second
is noted (`kernels/tape.py`), and from then on its numbers are written where the tape reads them and the tape is played.
The calls are the same, so every bit of the result is. Backends without a tape, and models whose pass cannot be noted,
run as before.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lora_serve.kernels.contract import Kernels, Segments, Spans
from lora_serve.kernels.tape import Tape
from lora_serve.model.batch import Batch

log = logging.getLogger(__name__)

MOST_ROWS = 32  # with more, Python is a small part of a step
MOST_TAPES = 64


class Key(NamedTuple):
    """The sizes of a step: rows, sequences, rows with logits, and what there is room for."""

    rows: int
    sequences: int
    logits: int
    segments: int
    logits_segments: int
    width: int


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
        self._proved = False

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
        """Note one step and play another of the same sizes; stop noting if a bit of that differs from its own pass."""
        wanted = self._run(second)
        self(first), self(first)
        if self._able and not torch.equal(self(second), wanted):
            self._give_up("it depends on more than its tensors")
        self._proved = True

    def _note(self, key: Key, batch: Batch) -> Tensor:
        tape = self._kernels.tape(wary=not self._proved)
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
        if len(self._noted) > MOST_TAPES:
            self._noted.popitem(last=False)
        return logits

    def _give_up(self, reason: str) -> None:
        log.info("steps run through Python: the pass cannot be noted (%s)", reason)
        self._able = False
        self._noted.clear()


def _key(batch: Batch) -> Key | None:
    """The batch's sizes; None for one with so many rows that Python is a small part of it."""
    rows, spans = batch.token_ids.shape[0], batch.spans
    if rows > MOST_ROWS:
        return None
    same = batch.segments is batch.logits_segments
    return Key(
        rows=rows,
        sequences=spans.context.shape[0],
        logits=batch.logits_rows.shape[0],
        segments=_room(batch.segments),
        logits_segments=-1 if same else _room(batch.logits_segments),
        width=_rounded(spans.block_table.shape[1]),
    )


def _room(segments: Segments | None) -> int:
    return 0 if segments is None else _rounded(segments.count)


def _rounded(count: int) -> int:
    """A power of two, at least 8."""
    return max(8, 1 << (count - 1).bit_length())


def _own(batch: Batch, key: Key) -> Batch:
    """A copy of the batch with room for others of the same key."""
    spans = batch.spans
    segments = _segments(batch.segments, key.segments)
    logits_segments = segments if key.logits_segments < 0 else _segments(batch.logits_segments, key.logits_segments)
    own = Batch(
        token_ids=torch.empty_like(batch.token_ids),
        positions=torch.empty_like(batch.positions),
        kv_index=torch.empty_like(batch.kv_index),
        spans=Spans(
            torch.empty_like(spans.query_start),
            torch.empty_like(spans.context),
            spans.block_table.new_zeros(key.sequences, key.width),
            longest_query=key.rows,
            longest_context=key.width,
        ),
        logits_rows=torch.empty_like(batch.logits_rows),
        segments=segments,
        logits_segments=logits_segments,
    )
    _write(own, batch)
    return own


def _segments(given: Segments | None, room: int) -> Segments | None:
    if given is None:
        return None
    return Segments(*(part.new_zeros(room) for part in (given.start, given.end, given.slot, given.weight)))


def _write(own: Batch, batch: Batch) -> None:
    """Put a batch's numbers where a tape reads them."""
    own.token_ids.copy_(batch.token_ids)
    own.positions.copy_(batch.positions)
    own.kv_index.copy_(batch.kv_index)
    own.logits_rows.copy_(batch.logits_rows)
    own.spans.query_start.copy_(batch.spans.query_start)
    own.spans.context.copy_(batch.spans.context)
    own.spans.block_table[:, : batch.spans.block_table.shape[1]] = batch.spans.block_table
    _write_segments(own.segments, batch.segments)
    if own.logits_segments is not own.segments:
        _write_segments(own.logits_segments, batch.logits_segments)


def _write_segments(own: Segments | None, given: Segments | None) -> None:
    """Segments that are left over cover no rows."""
    if own is None or given is None:
        return
    count = given.count
    own.start[:count] = given.start
    own.end[:count] = given.end
    own.slot[:count] = given.slot
    own.weight[:count] = given.weight
    own.end[count:] = own.start[count:]
