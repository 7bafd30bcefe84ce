"""`lora-serve top`: what a running server does, as a table that is drawn again every second.

Everything is read from `/metrics`, so the key needs `metrics: true`. Rates and quantiles are of the time between two
reads.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families
from pydantic import Field
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table

from lora_serve.errors import ServeError, Unavailable
from lora_serve.remote import RemoteCommand

ROWS = 20  # adapters that are shown
NOTHING = "–"

Labels = frozenset[tuple[str, str]]


class Reading(NamedTuple):
    """Metrics at one time, in seconds, by name and labels."""

    time: float
    values: Mapping[str, Mapping[Labels, float]]

    @classmethod
    def of(cls, text: str, now: float) -> Reading:
        """Parse Prometheus' text format."""
        values: dict[str, dict[Labels, float]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                values.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
        return cls(now, values)

    def total(self, name: str) -> float:
        """The sum over all labels."""
        return sum(self.values.get(name, {}).values())

    def by(self, name: str, label: str) -> dict[str, float]:
        """The sums by one label."""
        found: dict[str, float] = {}
        for labels, value in self.values.get(name, {}).items():
            key = dict(labels).get(label, "")
            found[key] = found.get(key, 0.0) + value
        return found


class AdapterRow(NamedTuple):
    """One adapter, or the base: generated tokens and requests a second, all requests so far, and where it is."""

    name: str
    tokens: float
    requests: float
    all_requests: int
    where: str


class Interval:
    """What happened between two readings."""

    def __init__(self, before: Reading, after: Reading) -> None:
        self._before, self.after = before, after
        self.seconds = max(1e-9, after.time - before.time)

    def rate(self, name: str) -> float:
        """How fast a counter grew, a second; it may have begun anew."""
        now = self.after.total(name)
        grown = now - self._before.total(name)
        return (grown if grown >= 0 else now) / self.seconds

    def mean(self, histogram: str) -> float | None:
        """Mean of what was observed; None if nothing was."""
        count = self.rate(f"{histogram}_count")
        return self.rate(f"{histogram}_sum") / count if count else None

    def quantile(self, histogram: str, share: float) -> float | None:
        """A quantile of what was observed, at most the upper bound of its bucket; None if nothing was."""
        before = self._before.by(f"{histogram}_bucket", "le")
        grown = [
            (float(bound), count - before.get(bound, 0.0))
            for bound, count in self.after.by(f"{histogram}_bucket", "le").items()
        ]
        grown.sort()
        if not grown or grown[-1][1] <= 0:
            return None
        wanted, lower, counted = share * grown[-1][1], 0.0, 0.0
        for bound, count in grown:
            if count >= wanted:
                if math.isinf(bound):
                    return lower
                return lower + (bound - lower) * (wanted - counted) / max(1e-9, count - counted)
            lower, counted = bound, count
        return lower

    def adapters(self) -> list[AdapterRow]:
        """All adapters that were used or are in memory, the busiest first."""
        pairs = [(self._before.by(name, "adapter"), self.after.by(name, "adapter")) for name in (TOKENS, REQUESTS)]
        (tokens_before, tokens), (requests_before, requests) = pairs
        level = {
            dict(labels)["adapter_name"]: dict(labels) for labels in self.after.values.get(LOADED, {}) if dict(labels)
        }
        rows = []
        for name in {*requests, *level}:
            where = {"gpu": "device", "cpu": "host"}.get(level.get(name, {}).get("level", ""), "disk")
            pinned = ", pinned" if level.get(name, {}).get("pinned") == "true" else ""
            rows.append(
                AdapterRow(
                    name,
                    max(0.0, tokens.get(name, 0.0) - tokens_before.get(name, 0.0)) / self.seconds,
                    max(0.0, requests.get(name, 0.0) - requests_before.get(name, 0.0)) / self.seconds,
                    int(requests.get(name, 0.0)),
                    "" if name in (BASE, OTHER) and name not in level else where + pinned,
                )
            )
        return sorted(rows, key=lambda row: (-row.tokens, -row.requests, -row.all_requests, row.name))


TOKENS, REQUESTS, LOADED = (
    "lora_serve_adapter_tokens_total",
    "lora_serve_adapter_requests_total",
    "vllm:lora_adapter_loaded",
)
BASE, OTHER = "base", "other"


class TopCommand(RemoteCommand):
    """Show what a server does, like top: rates, latencies, the queue, and the busiest adapters."""

    interval: float = Field(1.0, gt=0, description="seconds between two reads")
    once: bool = Field(False, description="show it once and end (also if the output is not a terminal)")

    def run(self) -> None:
        with suppress(KeyboardInterrupt):  # the way to end it
            self._show()

    def _show(self) -> None:
        console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)
        before = self._read()
        time.sleep(self.interval)
        interval = Interval(before, self._read())
        if self.once or not console.is_terminal:
            console.print(draw(interval))
            return
        with Live(draw(interval), console=console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(self.interval)
                try:
                    interval = Interval(interval.after, self._read())
                except Unavailable as error:  # it may come back
                    live.update(error.message, refresh=True)
                else:
                    live.update(draw(interval), refresh=True)

    def _read(self) -> Reading:
        content = self.fetch("GET", "/metrics")
        try:
            return Reading.of(content.decode(), time.monotonic())
        except ValueError:
            raise ServeError(f"{self.url}/metrics are not metrics of lora-serve") from None


def draw(interval: Interval) -> RenderableType:
    """The table of a terminal."""
    now = interval.after
    head = Table.grid(padding=(0, 4, 0, 0))
    for name, values in (
        ("requests", [f"{interval.rate('lora_serve_requests_total'):.1f}/s", *_queue(now)]),
        (
            "tokens",
            [
                f"{interval.rate('lora_serve_completion_tokens_total'):,.0f}/s generated",
                f"{interval.rate('lora_serve_prompt_tokens_total'):,.0f}/s prompt",
            ],
        ),
        ("first token", _quantiles(interval, "lora_serve_time_to_first_token_seconds")),
        ("between tokens", _quantiles(interval, "lora_serve_inter_token_seconds")),
        (
            "batch",
            [
                f"{_number(interval.mean('lora_serve_batch_sequences'))} sequences",
                f"{_number(interval.mean('lora_serve_batch_adapters'))} adapters",
                f"{_number(interval.mean('lora_serve_step_seconds'), 1000)} ms a step",
            ],
        ),
        (
            "memory",
            [
                f"KV {100 * now.total('lora_serve_kv_usage_ratio'):.0f} %",
                f"{now.total('lora_serve_adapters_resident'):.0f} of {now.total('lora_serve_adapter_slots'):.0f} slots",
                f"{now.total('lora_serve_adapters'):.0f} adapters published",
            ],
        ),
    ):
        head.add_row(name, *values)
    table = Table("adapter", box=None, padding=(0, 3, 0, 0))
    for title in ("tokens/s", "requests/s", "requests"):
        table.add_column(title, justify="right")
    table.add_column("where")
    rows = interval.adapters()
    for row in rows[:ROWS]:
        numbers = f"{row.tokens:,.0f}", f"{row.requests:.1f}", f"{row.all_requests:,}"
        table.add_row(row.name, *numbers, row.where)
    more = [f"and {len(rows) - ROWS} more"] if len(rows) > ROWS else []
    return Group(head, "", table, *more)


def _queue(now: Reading) -> Iterable[str]:
    yield f"{now.total('lora_serve_sequences_running'):.0f} running"
    yield f"{now.total('lora_serve_sequences_waiting'):.0f} waiting"


def _quantiles(interval: Interval, histogram: str) -> list[str]:
    found = {share: interval.quantile(histogram, share / 100) for share in (50, 95, 99)}
    return [f"p{share} {_number(seconds, 1000)} ms" for share, seconds in found.items()]


def _number(value: float | None, factor: float = 1.0) -> str:
    return NOTHING if value is None else f"{value * factor:.1f}"
