"""Byte floors, adapter overheads, load stalls and tables, computed from GPU measurements."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from bench.report import number, table
from bench.shapes import Shape

ITEM = 2  # bytes of a weight, adapter or KV element: all bf16
MIXES = ("none", "one", "distinct")
GOAL_ROWS = 32  # largest batch of the roofline goal, and the batch at which mixes are compared


@dataclass(frozen=True)
class Limits:
    """Peak rates of a device.

    Attributes:
        read, copy: bytes per second of its memory; a copy counts what is read and what is written.
        host_to_device: bytes per second from pinned memory.
        flops: FLOP/s of a large bf16 matrix product.
    """

    read: float
    copy: float
    host_to_device: float
    flops: float


@dataclass(frozen=True)
class Step:
    """A measured decode step: median seconds over repeats, and the bytes that it has to read."""

    mix: str
    rows: int
    seconds: float
    nbytes: float

    def ratio(self, limits: Limits) -> float:
        """Measured time ÷ the floor, which is bytes ÷ read bandwidth."""
        return self.seconds * limits.read / self.nbytes


@dataclass(frozen=True)
class Stall:
    """Worst gap between two tokens of any stream, in seconds.

    Attributes:
        usual: median over periods without loads, each as long as a load.
        loading: median over adapter loads.
        worst: over all loads.
        loads: number of adapter loads.
    """

    usual: float
    loading: float
    worst: float
    loads: int

    @property
    def ratio(self) -> float:
        return self.loading / self.usual


def weights_read(shape: Shape) -> int:
    """Number of weights that a decode step reads: all but an untied embedding."""
    layers = sum(math.prod(size) for layer in range(shape.layers) for _, size in shape.tensors(layer))
    ends = sum(math.prod(size) for name, size in shape.ends() if shape.tied or "embed_tokens" not in name)
    return layers + ends


def kv_bytes(shape: Shape, tokens: int) -> int:
    """Bytes of the KV of `tokens` tokens."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * tokens * ITEM


def adapter_bytes(shape: Shape, rank: int) -> int:
    """Bytes of a LoRA adapter on all linear modules."""
    return shape.layers * sum(rank * (wide + tall) for wide, tall in shape.linears().values()) * ITEM


def step_bytes(shape: Shape, rows: int, context: int, ranks: Sequence[int]) -> float:
    """Bytes that a decode step has to read: the base, each adapter (one per rank in `ranks`), all sequences' KV."""
    return (
        ITEM * weights_read(shape) + kv_bytes(shape, rows * context) + sum(adapter_bytes(shape, rank) for rank in ranks)
    )


def find_step(steps: Sequence[Step], mix: str, rows: int) -> Step | None:
    """The step of this mix and batch size, if it was measured."""
    return next((each for each in steps if (each.mix, each.rows) == (mix, rows)), None)


def seconds(steps: Sequence[Step], mix: str, rows: int) -> float:
    """Seconds of the step of this mix and batch size; NaN if it was not measured."""
    found = find_step(steps, mix, rows)
    return math.nan if found is None else found.seconds


def overhead(steps: Sequence[Step], mix: str, rows: int) -> float:
    """What adapters add to the base's step, as a fraction of it."""
    return seconds(steps, mix, rows) / seconds(steps, "none", rows) - 1


def step_table(steps: Sequence[Step], limits: Limits) -> str:
    """A table with one row per batch size: milliseconds, ratio to the floor, adapter overhead, tokens per second."""
    rows = []
    for size in sorted({each.rows for each in steps}):
        cells = [str(size)]
        for mix in MIXES:
            found = find_step(steps, mix, size)
            ratio = math.nan if found is None else found.ratio(limits)
            cells += [number(1e3 * seconds(steps, mix, size), 2), number(ratio, 2)]
            cells += [] if mix == "none" else [number(100 * overhead(steps, mix, size), 1)]
        rows.append([*cells, number(size / seconds(steps, "distinct", size), 0)])
    rows += [
        [f"{each.rows} {each.mix}", *["–"] * 5, number(1e3 * each.seconds, 2), number(each.ratio(limits), 2),
         number(100 * (each.seconds / seconds(steps, "none", each.rows) - 1), 1), number(each.rows / each.seconds, 0)]
        for each in steps
        if each.mix not in MIXES
    ]  # fmt: skip
    header = [
        "rows",
        "base ms",
        "÷ floor",
        "one ms",
        "÷ floor",
        "overhead %",
        "distinct ms",
        "÷ floor",
        "overhead %",
        "tok/s",
    ]
    return table(header, rows)


def load_stall(
    streams: Sequence[Sequence[float]], loads: Sequence[tuple[float, float]], quiet: tuple[float, float]
) -> Stall:
    """Token gaps of streams, with and without an adapter loading.

    Args:
        streams: arrival times of each stream's tokens.
        loads: start and end of each adapter load.
        quiet: start and end of a period without loads, longer than any of them.
    """
    gaps = sorted(gap for times in streams for gap in pairwise(times))
    length = statistics.median(end - begin for begin, end in loads)
    usual = [_worst(gaps, begin, begin + length) for begin in _starts(quiet, length)]
    loading = [_worst(gaps, *each) for each in loads]
    return Stall(statistics.median(usual), statistics.median(loading), max(loading), len(loads))


def _worst(gaps: Sequence[tuple[float, float]], begin: float, end: float) -> float:
    """The longest gap that overlaps the period."""
    return max((b - a for a, b in gaps if a < end and b > begin), default=0.0)


def _starts(whole: tuple[float, float], length: float) -> Iterator[float]:
    """Starts of consecutive periods of `length` within `whole`; at least one."""
    yield whole[0]
    start = whole[0] + length
    while start + length <= whole[1]:
        yield start
        start += length
