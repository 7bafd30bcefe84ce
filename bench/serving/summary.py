"""Throughput, TTFT, inter-token and end-to-end latency of a run, and tables of them."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.report import number, table
from bench.serving.client import Timing

COLUMNS = {  # column → field, digits; seconds are shown in milliseconds
    "tok/s": ("throughput", 1),
    "TTFT ms": ("ttft_median", 0),
    "TTFT P99": ("ttft_p99", 0),
    "ITL ms": ("itl_median", 1),
    "ITL P99": ("itl_p99", 1),
    "worst ITL": ("itl_worst", 0),
    "E2E ms": ("e2e_median", 0),
    "E2E P99": ("e2e_p99", 0),
    "requests": ("requests", 0),
    "errors": ("errors", 0),
}
NOT_SECONDS = {"throughput", "requests", "errors"}


@dataclass(frozen=True)
class Summary:
    """Figures of one run: throughput in tokens per second, latencies in seconds; NaN where nothing was measured."""

    throughput: float
    ttft_median: float
    ttft_p99: float
    itl_median: float
    itl_p99: float
    itl_worst: float
    e2e_median: float
    e2e_p99: float
    requests: int
    errors: int
    tokens: int
    seconds: float
    failures: tuple[tuple[str, int], ...] = ()


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest-rank percentile, so always a measured value; NaN of none."""
    if not values:
        return float("nan")
    return sorted(values)[max(0, math.ceil(len(values) * share) - 1)]


def summarise(timings: Sequence[Timing]) -> Summary:
    """Figures of one run; a failed request counts as an error and in the duration, nowhere else."""
    good = [timing for timing in timings if timing.error is None]
    seconds = max(t.finished for t in timings) - min(t.sent for t in timings) if timings else 0.0
    tokens = sum(timing.tokens for timing in good)
    ttft = [timing.ttft for timing in good]
    gaps = [gap for timing in good for gap in timing.gaps]
    e2e = [timing.finished - timing.sent for timing in good]
    failures = Counter(timing.error for timing in timings if timing.error is not None)
    return Summary(
        throughput=tokens / seconds if seconds else float("nan"),
        ttft_median=_median(ttft),
        ttft_p99=percentile(ttft, 0.99),
        itl_median=_median(gaps),
        itl_p99=percentile(gaps, 0.99),
        itl_worst=max(gaps, default=float("nan")),
        e2e_median=_median(e2e),
        e2e_p99=percentile(e2e, 0.99),
        requests=len(timings),
        errors=len(timings) - len(good),
        tokens=tokens,
        seconds=seconds,
        failures=tuple(failures.most_common(3)),
    )


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("nan")


def medians(runs: Sequence[Summary]) -> dict[str, float]:
    """Each figure's median over the repeats, ignoring NaN; for errors the worst run's count."""
    found = {}
    for field in (name for name, _ in COLUMNS.values()):
        values = [value for run in runs if not math.isnan(value := float(getattr(run, field)))]
        found[field] = statistics.median(values) if values else math.nan
    return found | {"errors": float(max((run.errors for run in runs), default=0))}


def summary_table(results: Mapping[str, Sequence[Summary]]) -> str:
    """A Markdown table with one row per scenario: medians over its repeats."""
    rows = []
    for name, runs in results.items():
        found = medians(runs)
        cells = [
            number(found[field] * (1 if field in NOT_SECONDS else 1000), digits) for field, digits in COLUMNS.values()
        ]
        rows.append([name, *cells])
    return table(["load", *COLUMNS], rows)


def failures(results: Mapping[str, Sequence[Summary]]) -> list[str]:
    """The most frequent errors, one line per kind."""
    return [f"{name}: {count} × {why}" for name, runs in results.items() for run in runs for why, count in run.failures]


def records(results: Mapping[str, Sequence[Summary]]) -> dict[str, Any]:
    """Medians and every run, for `json_line`."""
    return {name: {"median": medians(runs), "runs": [asdict(run) for run in runs]} for name, runs in results.items()}
