"""A step's input tensors on the device: one allocation, filled on the host and copied at once.

Recorded steps and CUDA graphs keep their input buffers and write every batch into the same memory. The buffers may hold
more than a batch has. Where every sequence decodes, a padding row is a sequence of one token in the scratch KV block;
elsewhere padding rows follow those of all sequences, write to that block, and padding sequences have no rows. A padding
segment has no rows either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lora_serve.kernels.contract import AttentionMetadata, Segments
from lora_serve.model.batch import AdapterRows, Batch


class BatchShape(NamedTuple):
    """The sizes of a batch, or the capacity of input buffers.

    Attributes:
        rows, sequences, logits_rows: number of each.
        segments: number of adapter segments; 0 if all rows are the base's.
        logits_segments: the same over the logits rows; -1 if these share `segments`.
        blocks: width of the block tables.
        max_segment_rows, max_rank: see `Segments`.
        max_query_len, max_context_len: see `AttentionMetadata`.
    """

    rows: int
    sequences: int
    logits_rows: int
    segments: int
    logits_segments: int
    blocks: int
    max_segment_rows: int
    max_rank: int
    max_query_len: int
    max_context_len: int

    @classmethod
    def of(cls, batch: Batch, ranks: Mapping[int, int]) -> BatchShape:
        """The exact shape of a batch; `ranks` has the highest rank of each slot's adapter."""
        both = (batch.adapter_rows, batch.logits_adapter_rows)
        same = both[0] == both[1] and len(batch.logits_rows) == len(batch.token_ids)
        starts = batch.query_start
        return cls(
            rows=len(batch.token_ids),
            sequences=len(batch.context),
            logits_rows=len(batch.logits_rows),
            segments=len(both[0]),
            logits_segments=-1 if same else len(both[1]),
            blocks=max(map(len, batch.block_tables)),
            max_segment_rows=max((each.end - each.start for segments in both for each in segments), default=0),
            max_rank=max(max_rank_of(segments, ranks) for segments in both),
            max_query_len=max(end - start for start, end in pairwise(starts)),
            max_context_len=max(batch.context),
        )


def max_rank_of(segments: Sequence[AdapterRows], ranks: Mapping[int, int]) -> int:
    """The highest rank added to any row: the ranks of a composition, whose segments cover the same rows, add up."""
    groups = groupby(segments, key=lambda each: (each.start, each.end))
    return max((sum(ranks.get(each.slot, 0) for each in group) for _, group in groups), default=0)


def split_segments(segments: Sequence[AdapterRows], max_rows: int) -> list[AdapterRows]:
    """Split segments to at most `max_rows` rows; segments of a composition stay adjacent."""
    parts = [
        each._replace(start=start, end=min(start + max_rows, each.end))
        for each in segments
        for start in range(each.start, each.end, max_rows)
    ]
    return sorted(parts, key=lambda part: part.start)


class InputBuffers:
    """Memory for batches up to a given shape.

    Args:
        memory: int32, at least `size_of(shape)`, to be used; buffers that share it are written and read in turns. None:
            memory of their own.

    Attributes:
        token_ids, positions, kv_index: int64 [rows].
        attention: sequence boundaries, context lengths and block tables.
        logits_rows: int64 [logits rows].
        segments, logits_segments: rows that share an adapter slot; None if all rows are the base's.
    """

    def __init__(self, shape: BatchShape, device: torch.device, memory: Tensor | None = None) -> None:
        self._shape = shape
        self._device = device
        _, sequences, _, _, logits_segments, blocks, *_ = shape
        self._lengths = _lengths(shape)
        self._table = sum(self._lengths)  # offset of the block table
        size = self.size_of(shape)
        self._flat = torch.zeros(size, dtype=torch.int32, device=device) if memory is None else memory[:size]
        wide, narrow = self._split(self._flat)
        self.token_ids, self.positions, self.kv_index, self.logits_rows = wide
        self.attention = AttentionMetadata(
            query_start=narrow[0],
            context=narrow[1],
            block_table=self._flat[self._table :].view(sequences, blocks),
            max_query_len=shape.max_query_len,
            max_context_len=shape.max_context_len,
        )
        self.segments = _segments(narrow[2:6], shape)
        self.logits_segments = self.segments if logits_segments < 0 else _segments(narrow[6:10], shape)

    @staticmethod
    def size_of(shape: BatchShape) -> int:
        """Numbers that buffers of this shape take, each an int32."""
        return sum(_lengths(shape)) + shape.sequences * shape.blocks

    @classmethod
    def of(cls, batch: Batch, ranks: Mapping[int, int], device: torch.device) -> InputBuffers:
        """New buffers of exactly the batch's shape, filled with it."""
        buffers = cls(BatchShape.of(batch, ranks), device)
        buffers.write(batch)
        return buffers

    def write(self, batch: Batch) -> None:
        """Copy a batch into the buffers, and padding after it.

        On a GPU this does not wait: the copy is ordered before the next kernels on the stream.
        """
        on_gpu = self._device.type != "cpu"
        used = max(map(len, batch.block_tables), default=1) if on_gpu else self._shape.blocks
        flat = torch.empty(self._table, dtype=torch.int32, pin_memory=True) if on_gpu else self._flat[: self._table]
        table = self.attention.block_table[:, :used]
        blocks = torch.empty(*table.shape, dtype=torch.int32, pin_memory=True) if on_gpu else table
        self._fill(flat, blocks, batch)
        if on_gpu:
            self._flat[: self._table].copy_(flat, non_blocking=True)
            table.copy_(blocks, non_blocking=True)

    def _fill(self, flat: Tensor, blocks: Tensor, batch: Batch) -> None:
        wide, narrow = self._split(flat)
        rows, sequences, wanted = len(batch.token_ids), len(batch.context), len(batch.logits_rows)
        all_decode = self._shape.max_query_len == 1
        for part, numbers in zip(wide, (batch.token_ids, batch.positions, batch.kv_index), strict=False):
            _set(part, numbers)
        _set(wide[3], batch.logits_rows, range(wanted, self._shape.logits_rows) if all_decode else 0)
        following = range(rows + 1, rows + 1 + self._shape.sequences - sequences)
        _set(narrow[0], batch.query_start, following if all_decode else rows)
        _set(narrow[1], batch.context, 1)
        for own, segments in ((narrow[2:6], batch.adapter_rows), (narrow[6:10], batch.logits_adapter_rows)):
            if own[0].shape[0]:
                # Start, end, slot, weight; `first` is not needed.
                columns = tuple(zip(*segments, strict=True)) or ((),) * 4
                for part, numbers in zip(own, columns[:4], strict=True):
                    _set(part, numbers)
        tables = blocks.numpy()
        for table, numbers in zip(tables, batch.block_tables, strict=False):
            table[: len(numbers)] = numbers
        tables[len(batch.block_tables) :, :1] = 0

    def _split(self, flat: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Views of the int64 parts (token ids, positions, KV indices, logits rows) and of the 32-bit parts."""
        parts = flat[: self._table].split_with_sizes(self._lengths)
        wide = [part.view(torch.int64) for part in parts[:4]]
        narrow = list(parts[4:])
        for weight in (5, 9):
            narrow[weight] = narrow[weight].view(torch.float32)
        return wide, narrow


def _lengths(shape: BatchShape) -> list[int]:
    """Sizes of the parts before the block table, in units of int32; int64 parts come first, so that all are aligned."""
    rows, sequences, logits_rows, segments, logits_segments, *_ = shape
    lengths = [2 * rows, 2 * rows, 2 * rows, 2 * logits_rows, sequences + 1, sequences]
    return lengths + [each for count in (segments, max(0, logits_segments)) for each in [count] * 4]


def _segments(parts: Sequence[Tensor], shape: BatchShape) -> Segments | None:
    start, end, slot, weight = parts
    return Segments(start, end, slot, weight, shape.max_segment_rows, shape.max_rank) if start.shape[0] else None


def _set(part: Tensor, numbers: Sequence[int] | Sequence[float], rest: Sequence[int] | int = 0) -> None:
    """Fill a tensor in host memory with the numbers, then its remainder with `rest`."""
    values = part.numpy()  # shares memory
    values[: len(numbers)] = numbers
    values[len(numbers) :] = rest
