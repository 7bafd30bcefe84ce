"""What is said about a GPU follows from what was measured there: floors, taxes, goals, tables. No clock is here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from bench.laws import Law
from bench.report import number, table
from bench.shapes import Shape

ITEM = 2  # bytes of a weight, an adapter's number, a key or a value: all is bf16
MIXES = ("none", "one", "distinct")
LIMIT = 32  # rows up to which a step is held to its floor, and at which mixes are compared


@dataclass(frozen=True)
class Limits:
    """What the device can do at best: bytes a second read, copied (read and written both count), sent to it from pinned
    memory; operations a second of a large bf16 product."""

    read: float
    copied: float
    sent: float
    peak: float


@dataclass(frozen=True)
class Step:
    """A measured decode step: median seconds over repeats, and the bytes that it must read."""

    mix: str
    rows: int
    seconds: float
    nbytes: float

    def ratio(self, limits: Limits) -> float:
        """Measured over the floor."""
        return self.seconds * limits.read / self.nbytes


@dataclass(frozen=True)
class Stall:
    """Seconds. The worst gap of any stream: usually (median of stretches as long as a load), during a load (median of
    loads), during any load."""

    usual: float
    loading: float
    worst: float
    loads: int

    @property
    def ratio(self) -> float:
        return self.loading / self.usual


def weights(shape: Shape) -> int:
    """Numbers that a decode step reads of the base: all but the rows of an untied embedding that nobody looks up."""
    layers = sum(math.prod(size) for layer in range(shape.layers) for _, size in shape.tensors(layer))
    ends = sum(math.prod(size) for name, size in shape.ends() if shape.tied or "embed_tokens" not in name)
    return layers + ends


def kv(shape: Shape, tokens: int) -> int:
    """Bytes of so many tokens' keys and values."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * tokens * ITEM


def adapter(shape: Shape, rank: int) -> int:
    """Bytes of an adapter on all linear modules."""
    return shape.layers * sum(rank * (wide + tall) for wide, tall in shape.linears().values()) * ITEM


def floor(shape: Shape, rows: int, context: int, ranks: Sequence[int]) -> float:
    """Bytes that a decode step must read: the base and each of its adapters once, every sequence's keys and values."""
    return ITEM * weights(shape) + kv(shape, rows * context) + sum(adapter(shape, rank) for rank in ranks)


def step(steps: Sequence[Step], mix: str, rows: int) -> Step | None:
    return next((each for each in steps if (each.mix, each.rows) == (mix, rows)), None)


def seconds(steps: Sequence[Step], mix: str, rows: int) -> float:
    """NaN if it was not measured."""
    found = step(steps, mix, rows)
    return math.nan if found is None else found.seconds


def tax(steps: Sequence[Step], mix: str, rows: int) -> float:
    """What adapters add to the base's step, as a share of it."""
    return seconds(steps, mix, rows) / seconds(steps, "none", rows) - 1


def laws(steps: Sequence[Step], idle: float, limits: Limits, stall: Stall | None) -> list[Law]:
    """The goals, each with what was measured; NaN, which holds nothing, where that failed.

    Args:
        idle: the base's step before any adapter was there, over the same with all of them there.
    """
    sizes = sorted({each.rows for each in steps})
    middle = max((rows for rows in sizes if rows <= LIMIT), default=0)

    def ms(mix: str) -> str:
        return f"{1e3 * seconds(steps, mix, middle):.2f}"

    taxes = {rows: tax(steps, "one", rows) for rows in sizes}
    worst = max(taxes, key=lambda rows: taxes[rows], default=0)
    small = [each for each in steps if each.rows <= LIMIT and each.mix in MIXES]
    farthest = max(small, key=lambda each: each.ratio(limits), default=None)
    mix = seconds(steps, "one", middle) / seconds(steps, "distinct", middle)
    gap = "" if stall is None else f"{1e3 * stall.loading:.2f} ÷ {1e3 * stall.usual:.2f} ms, {stall.loads} loads"
    return [
        Law(1, f"mix: all same ÷ all distinct, {middle} rows", mix, 0.95, f"{ms('one')} ÷ {ms('distinct')} ms"),
        Law(2, "tax: one adapter, worst size", taxes.get(worst, math.nan), 0.08, f"{worst} rows", most=True),
        Law(2, f"tax: all distinct, {middle} rows", tax(steps, "distinct", middle), 0.12,
            f"{ms('distinct')} − {ms('none')} ms", most=True),
        Law(3, "idle tax: base without ÷ with adapters there", idle, 0.99, f"{middle} rows"),
        Law(11, f"floor: decode step, worst up to {LIMIT} rows",
            math.nan if farthest is None else farthest.ratio(limits), 1.35,
            "" if farthest is None else f"{farthest.mix}, {farthest.rows} rows", most=True),
        Law(6, "stall: worst gap while an adapter loads ÷ usual", math.nan if stall is None else stall.ratio, 1.1, gap,
            most=True),
    ]  # fmt: skip


def step_table(steps: Sequence[Step], limits: Limits) -> str:
    """A row a size: milliseconds, tokens a second, ratio to the floor, tax."""
    rows = []
    for size in sorted({each.rows for each in steps}):
        cells = [str(size)]
        for mix in MIXES:
            found = step(steps, mix, size)
            ratio = math.nan if found is None else found.ratio(limits)
            cells += [number(1e3 * seconds(steps, mix, size), 2), number(ratio, 2)]
            cells += [] if mix == "none" else [number(100 * tax(steps, mix, size), 1)]
        rows.append([*cells, number(size / seconds(steps, "distinct", size), 0)])
    rows += [
        [f"{each.rows} {each.mix}", *["–"] * 5, number(1e3 * each.seconds, 2), number(each.ratio(limits), 2),
         number(100 * (each.seconds / seconds(steps, "none", each.rows) - 1), 1), number(each.rows / each.seconds, 0)]
        for each in steps
        if each.mix not in MIXES
    ]  # fmt: skip
    header = ["rows", "base ms", "÷ floor", "one ms", "÷ floor", "tax %", "distinct ms", "÷ floor", "tax %", "tok/s"]
    return table(header, rows)


def stall(
    streams: Sequence[Sequence[float]], loads: Sequence[tuple[float, float]], quiet: tuple[float, float]
) -> Stall:
    """Gaps of streams, by whether an adapter was loading.

    Args:
        streams: when each stream's tokens came.
        loads: from when to when adapters were loading, each.
        quiet: a time without loads, longer than any of them.
    """
    gaps = sorted(gap for times in streams for gap in pairwise(times))
    length = statistics.median(end - begin for begin, end in loads)
    usual = [_worst(gaps, begin, begin + length) for begin in _starts(quiet, length)]
    loading = [_worst(gaps, *each) for each in loads]
    return Stall(statistics.median(usual), statistics.median(loading), max(loading), len(loads))


def _worst(gaps: Sequence[tuple[float, float]], begin: float, end: float) -> float:
    """The longest gap that touches the time."""
    return max((b - a for a, b in gaps if a < end and b > begin), default=0.0)


def _starts(whole: tuple[float, float], length: float) -> Iterator[float]:
    """Where stretches of `length` begin that lie within `whole`, one after the other; at least one."""
    yield whole[0]
    start = whole[0] + length
    while start + length <= whole[1]:
        yield start
        start += length
