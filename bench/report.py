"""Figures for people (Markdown tables) and for machines (one line of JSON)."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bench.load import Summary

SHOWN = {  # column → field, digits; seconds are shown in milliseconds
    "tok/s": ("throughput", 1),
    "TTFT ms": ("ttft_median", 0),
    "TTFT P99": ("ttft_p99", 0),
    "ITL ms": ("itl_median", 1),
    "ITL P99": ("itl_p99", 1),
    "worst gap": ("itl_worst", 0),
    "E2E ms": ("e2e_median", 0),
    "E2E P99": ("e2e_p99", 0),
    "requests": ("requests", 0),
    "errors": ("errors", 0),
}
COUNTS = {"throughput", "requests", "errors"}


def medians(runs: Sequence[Summary]) -> dict[str, float]:
    """Each figure's median over the repeats, NaN ones left out; errors are the worst run's."""
    found = {}
    for field in (name for name, _ in SHOWN.values()):
        values = [value for run in runs if not math.isnan(value := float(getattr(run, field)))]
        found[field] = statistics.median(values) if values else math.nan
    return found | {"errors": float(max((run.errors for run in runs), default=0))}


def summary_table(results: Mapping[str, Sequence[Summary]]) -> str:
    """One row a scenario: medians over its repeats."""
    rows = []
    for name, runs in results.items():
        found = medians(runs)
        cells = [number(found[field] * (1 if field in COUNTS else 1000), digits) for field, digits in SHOWN.values()]
        rows.append([name, *cells])
    return table(["load", *SHOWN], rows)


def number(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:,.{digits}f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with padded columns, text left and figures right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True)))
        return "| " + " | ".join(padded) + " |"

    rule = "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths))
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)])


def failures(results: Mapping[str, Sequence[Summary]]) -> list[str]:
    """What went wrong, a line a kind."""
    return [f"{name}: {count} × {why}" for name, runs in results.items() for run in runs for why, count in run.failures]


def record(results: Mapping[str, Sequence[Summary]]) -> dict[str, Any]:
    """Medians and every run, ready for `json_line`."""
    return {name: {"median": medians(runs), "runs": [asdict(run) for run in runs]} for name, runs in results.items()}


def json_line(content: Any) -> str:
    """JSON on one line; what was not measured is null."""
    return json.dumps(_plain(content), allow_nan=False, default=str)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
