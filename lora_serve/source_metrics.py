"""Prometheus metrics of what is fetched from sources."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lora_serve.sources.totals import SourceTotals


class SourceCollector(Collector):
    """What `SourceTotals` say, at the time of the scrape."""

    def __init__(self, totals: SourceTotals) -> None:
        self._totals = totals

    def collect(self) -> Iterator[Metric]:
        totals = self._totals
        fetches = CounterMetricFamily(
            "lora_serve_source_fetches",
            "Fetches of adapters by source and outcome: fetched, or the kind of an error.",
            labels=["source", "outcome"],
        )
        for (source, outcome), count in sorted(totals.fetches.items()):
            fetches.add_metric([source, outcome], count)
        yield fetches
        received = CounterMetricFamily(
            "lora_serve_source_bytes", "Bytes received from a source, also of running fetches.", labels=["source"]
        )
        for source, size in sorted(totals.bytes.items()):
            received.add_metric([source], size)
        yield received
        took = CounterMetricFamily(
            "lora_serve_source_fetch_seconds", "Seconds that successful fetches took.", labels=["source"]
        )
        for source, seconds in sorted(totals.seconds.items()):
            took.add_metric([source], seconds)
        yield took
        running, so_far, expected = Counter[str](), Counter[str](), Counter[str]()
        for fetch in totals.running:
            running[fetch.source] += 1
            so_far[fetch.source] += fetch.received
            expected[fetch.source] += max(fetch.received, fetch.expected or 0)
        for name, meaning, values in (
            ("fetches_running", "Fetches under way.", running),
            ("running_received_bytes", "Bytes that running fetches have received.", so_far),
            ("running_expected_bytes", "Bytes that running fetches will receive, as far as is known.", expected),
        ):
            gauge = GaugeMetricFamily(f"lora_serve_source_{name}", meaning, labels=["source"])
            for source, value in sorted(values.items()):
                gauge.add_metric([source], value)
            yield gauge
        yield GaugeMetricFamily("lora_serve_source_waiting", "Requests that wait for a fetch.", totals.waiting)
        yield CounterMetricFamily(
            "lora_serve_source_remembered",
            "Requests refused because a fetch of their adapter had failed a moment before.",
            totals.remembered,
        )
