"""The goals of the GPU path: which figures there are, their targets, and how each follows from measurements.

`GOALS` is the whole list. A command reports all of it or the part that it measures; what is missing is NaN, which meets
no target, and says why.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.gpu.figures import GOAL_ROWS, Limits, Stall, Step, find_step, seconds
from bench.gpu.steps import MIXED_NAME, StepFigures
from bench.report import Goal
from bench.shapes import Shape
from lora_serve.kernels.packed_weight import Scheme

LONG = 2048  # tokens of a prompt from which the stricter goals hold
QUANTIZED_ROWS = 32  # largest batch of the goals of quantised bases
EIGHT_BITS: tuple[Scheme, ...] = ("int8", "fp8")
FOUR_BITS: tuple[Scheme, ...] = ("int4",)
Value = tuple[float, str]  # and what it is made of


@dataclass(frozen=True)
class GoalRow:
    """One goal: its law's number (0: none), its name, and the part of `serving_check` that measures it."""

    law: int
    name: str
    target: float
    part: str
    at_most: bool = False

    def reached(self, value: float, of: str) -> Goal:
        return Goal(self.law, self.name, value, self.target, of, at_most=self.at_most)


HTTP_SMALL = "HTTP, 64 clients ÷ decode rate of the same batch, small shape"
HTTP_LARGE = "HTTP, 64 clients ÷ decode rate of the same batch, large shape"
ONE, DISTINCT = "decode kept with one adapter, worst batch size", f"decode kept with all distinct, {GOAL_ROWS} rows"
MIXED = f"decode kept with {MIXED_NAME}, {GOAL_ROWS} rows"
FLOOR = f"decode step of the base ÷ byte floor, worst up to {GOAL_ROWS} rows"
PROMPT_FLOOR, PROMPT_KEPT = "prompt of {} ÷ compute floor", "prompt of {} kept with one adapter"
MIXED_STEP = "mixed step, {} ÷ its two parts"
IDLE, REGISTRY = "base without ÷ with adapters loaded", "registry: many ÷ few adapters in use"
CLIFF, STALL = (
    "cliff: TTFT, twice as many as fit ÷ all fitting",
    "stall: worst token gap while an adapter loads ÷ usual",
)
COLD_HOST, COLD_DISK = "cold start: TTFT, host ÷ resident", "cold start: TTFT, disk − read ÷ resident"
START = "start of the large shape with its adapters, files in memory, seconds"
EIGHT, FOUR = "decode with eight-bit weights ÷ bf16, worst rate", "decode with four-bit weights ÷ bf16, worst rate"

GOALS: tuple[GoalRow, ...] = (
    GoalRow(12, HTTP_SMALL, 0.85, "small server"),
    GoalRow(12, HTTP_LARGE, 0.85, "large server"),
    GoalRow(2, ONE, 0.92, "steps"),
    GoalRow(1, DISTINCT, 0.88, "steps"),
    GoalRow(1, MIXED, 0.75, "steps"),
    GoalRow(11, FLOOR, 1.2, "steps", at_most=True),
    GoalRow(11, PROMPT_FLOOR.format("512"), 1.3, "steps", at_most=True),
    GoalRow(11, PROMPT_FLOOR.format("2,048"), 1.15, "steps", at_most=True),
    GoalRow(2, PROMPT_KEPT.format("512"), 0.93, "steps"),
    GoalRow(2, PROMPT_KEPT.format("2,048"), 0.93, "steps"),
    GoalRow(0, MIXED_STEP.format("base"), 1.15, "steps", at_most=True),
    GoalRow(0, MIXED_STEP.format("one adapter"), 1.15, "steps", at_most=True),
    GoalRow(3, IDLE, 0.99, "steps"),
    GoalRow(4, REGISTRY, 0.97, "registry"),
    GoalRow(5, CLIFF, 2.0, "cliff", at_most=True),
    GoalRow(6, STALL, 1.1, "large server", at_most=True),
    GoalRow(7, COLD_HOST, 1.1, "large server", at_most=True),
    GoalRow(7, COLD_DISK, 1.1, "large server", at_most=True),
    GoalRow(0, START, 25.0, "large server", at_most=True),
    GoalRow(0, EIGHT, 1.5, "quantized"),
    GoalRow(0, FOUR, 2.0, "quantized"),
)


def reached(
    values: Mapping[str, Value], rows: Iterable[GoalRow] = GOALS, missing: Mapping[str, str] | None = None
) -> list[Goal]:
    """The goals of the rows, in their order; NaN where there is no value, with the reason of its part."""
    given = missing or {}
    return [row.reached(*values.get(row.name, (math.nan, given.get(row.part, "not measured")))) for row in rows]


def step_values(figures: StepFigures, shape: Shape, limits: Limits) -> dict[str, Value]:
    """Values of the goals that steps without an engine are measured for."""
    decode = figures.decode
    sizes = sorted({each.rows for each in decode if each.mix == "none"})
    middle = max((rows for rows in sizes if rows <= GOAL_ROWS), default=0)
    found: dict[str, Value] = {}
    kept = {rows: _kept(decode, "one", rows) for rows in sizes}
    worst = min(kept, key=lambda rows: kept[rows], default=0)
    for name, mix, rows in ((ONE, "one", worst), (DISTINCT, "distinct", middle), (MIXED, MIXED_NAME, middle)):
        if find_step(decode, mix, rows) and find_step(decode, "none", rows):
            of = f"{_ms(seconds(decode, 'none', rows))} ÷ {_ms(seconds(decode, mix, rows))} ms, {rows} rows"
            found[name] = _kept(decode, mix, rows), of
    base = [each for each in decode if each.mix == "none" and each.rows <= GOAL_ROWS]
    if base:
        farthest = max(base, key=lambda each: each.ratio(limits))
        floor = farthest.nbytes / limits.read
        of = f"{_ms(farthest.seconds)} ÷ {_ms(floor)} ms, {farthest.rows} rows"
        found[FLOOR] = farthest.ratio(limits), of
    if not math.isnan(figures.idle):
        found[IDLE] = figures.idle, f"{middle} rows"
    return found | dict(_prompt_values(figures, shape, limits)) | dict(_mixed_values(figures))


def _prompt_values(figures: StepFigures, shape: Shape, limits: Limits) -> Iterator[tuple[str, Value]]:
    for tokens in sorted({int(name.split()[0]) for name in figures.prompts}):
        base, one = (figures.prompts.get(f"{tokens} {mix}", math.nan) for mix in ("base", "one"))
        floor = compute_floor(shape, tokens, limits)
        yield PROMPT_FLOOR.format(f"{tokens:,}"), (base / floor, f"{_ms(base)} ÷ {_ms(floor)} ms")
        yield PROMPT_KEPT.format(f"{tokens:,}"), (base / one, f"{_ms(base)} ÷ {_ms(one)} ms")


def _mixed_values(figures: StepFigures) -> Iterator[tuple[str, Value]]:
    for mix, name in (("base", "base"), ("one", "one adapter")):
        if mix in figures.mixed:
            whole, *parts = figures.mixed[mix]
            yield MIXED_STEP.format(name), (whole / sum(parts), f"{_ms(whole)} ÷ ({' + '.join(map(_ms, parts))}) ms")


def quantized_values(decode: Sequence[Step], quantized: Mapping[str, Mapping[int, float]]) -> dict[str, Value]:
    """Values of the goals of quantised bases: of each width the faster scheme, at the rows where it gains least.

    Args:
        decode: steps of the base in bf16, among others.
        quantized: seconds of a decode step without adapters, by scheme and rows.
    """
    found: dict[str, Value] = {}
    for name, schemes in ((EIGHT, EIGHT_BITS), (FOUR, FOUR_BITS)):
        for scheme in schemes:
            gains = {
                rows: seconds(decode, "none", rows) / each
                for rows, each in quantized.get(scheme, {}).items()
                if rows <= QUANTIZED_ROWS and find_step(decode, "none", rows)
            }
            if gains:
                rows = min(gains, key=lambda rows: gains[rows])
                of = f"{_ms(seconds(decode, 'none', rows))} ÷ {_ms(quantized[scheme][rows])} ms, {scheme}, {rows} rows"
                found[name] = max(found.get(name, (-math.inf, "")), (gains[rows], of))
    return found


def stall_value(stall: Stall) -> Value:
    """Of the goal of loads beside streams, from an engine without HTTP."""
    return stall.ratio, f"{1e3 * stall.loading:.2f} ÷ {1e3 * stall.usual:.2f} ms, {stall.loads} loads"


def compute_floor(shape: Shape, tokens: int, limits: Limits) -> float:
    """Seconds of a prompt's arithmetic at the device's peak: linear modules, causal attention, one row of the head."""
    linear = shape.layers * sum(wide * tall for wide, tall in shape.linears().values())
    attention = shape.layers * shape.heads * shape.head_dim * tokens * (tokens + 1)
    return (2 * linear * tokens + 2 * attention + 2 * shape.vocabulary * shape.hidden) / limits.flops


def _kept(decode: Sequence[Step], mix: str, rows: int) -> float:
    return seconds(decode, "none", rows) / seconds(decode, mix, rows)


def _ms(each: float) -> str:
    return f"{1e3 * each:.2f}"
