"""Markdown tables for people, one line of JSON for machines, and measured values beside their targets."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Goal:
    """A measured value beside its target; met if `value` is at least `target` (with `at_most`: at most).

    NaN, which stands for a value that could not be measured, meets no target.
    """

    number: int
    name: str
    value: float
    target: float
    of: str
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.value <= self.target if self.at_most else self.value >= self.target


def goal_table(goals: Sequence[Goal]) -> str:
    """A Markdown table with one row per goal."""
    rows = [
        [
            f"{goal.number} {goal.name}",
            goal.of,
            number(goal.value, 3),
            f"{'≤' if goal.at_most else '≥'} {goal.target:g}",
            "yes" if goal.met else "no",
        ]
        for goal in goals
    ]
    return table(["goal", "of", "measured", "target", "met"], rows)


def goal_records(goals: Sequence[Goal]) -> list[dict[str, Any]]:
    """The goals for `json_line`."""
    return [asdict(goal) | {"met": goal.met} for goal in goals]


def number(value: float, digits: int) -> str:
    """A figure with thousands separators; NaN is a dash."""
    return "–" if math.isnan(value) else f"{value:,.{digits}f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with padded columns, first column left-aligned, figures right-aligned."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True)))
        return "| " + " | ".join(padded) + " |"

    rule = "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths))
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)])


def json_line(content: Any) -> str:
    """JSON on one line; NaN and infinity become null."""
    return json.dumps(_plain(content), allow_nan=False, default=str)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
