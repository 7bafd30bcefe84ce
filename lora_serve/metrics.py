"""Prometheus metrics of the server.

Requests are counted here; step and engine statistics come from the engine's updates. A few `vllm:` gauges are exported
for LoRA-aware routers. Metric names are a public interface: dashboards and routers depend on them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from lora_serve.job_metrics import JobCollector
from lora_serve.messages import SharedStatus, Stats, Update
from lora_serve.request import Admitted
from lora_serve.source_metrics import SourceCollector
from lora_serve.sources.totals import SourceTotals

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MOST_ADAPTER_LABELS = 200  # adapters with their own label; each costs memory here and in Prometheus
BASE = "base"
OTHER = "other"

COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
TOKEN_SECONDS = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5)
REQUEST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

Clock = Callable[[], float]

TOTALS = {  # totals in `Stats` → metric name and help text
    "prefix_tokens_total": ("lora_serve_prefix_tokens", "Prompt tokens looked up in the prefix cache."),
    "prefix_hit_tokens_total": ("lora_serve_prefix_hit_tokens", "Prompt tokens found in the prefix cache."),
    "preemptions_total": ("lora_serve_preemptions", "Sequences put back into the queue for want of KV blocks."),
    "steps_total": ("lora_serve_steps", "Steps of the engine."),
    "gaps_exceeded_total": (
        "lora_serve_prefill_gaps_exceeded",
        "Steps whose prompts exceed the bound on gaps in streams.",
    ),
    "training_tokens_total": ("lora_serve_training_tokens", "Tokens of training passes."),
}
TOTALS_BY_QUANTUM = {  # totals in `Stats` by kind of quantum
    "training_quanta_total": ("lora_serve_training_quanta", "Pieces of training that ran between steps."),
    "training_seconds_total": ("lora_serve_training_seconds", "Seconds of the engine that training took."),
}
TOTALS_BY_TIER = {  # totals in `Stats` by tier
    "cache_hits_total": ("lora_serve_adapter_hits", "Adapters found in a tier."),
    "cache_misses_total": ("lora_serve_adapter_misses", "Adapters not found in a tier."),
    "evictions_total": ("lora_serve_adapter_evictions", "Adapters that left a tier to make room."),
    "loads_total": ("lora_serve_adapter_loads", "Adapters brought into a tier."),
    "load_seconds_total": ("lora_serve_adapter_load_seconds", "Seconds spent bringing adapters into a tier."),
}
SHARED_ERRORS = "shared_errors"  # a total in `Stats.shared`


class Timer:
    """Metrics of one request, from arrival to end. Made by `Metrics.begin`; `end` must be called on every path."""

    def __init__(self, metrics: Metrics, endpoint: str) -> None:
        self._metrics = metrics
        self._endpoint = endpoint
        self._adapter = BASE
        self._begun = metrics._clock()
        self._last: float | None = None
        self._counted = 0  # tokens of the adapter
        self._ended = False

    def admitted(self, adapter: str) -> None:
        """The engine admitted the request, so `adapter` is the name of an existing adapter."""
        self._adapter = self._metrics._label(adapter)

    def token(self, count: int = 1) -> None:
        """`count` tokens are ready to be sent: records time to first token, then inter-token time, evenly divided."""
        if count < 1:
            return
        now = self._metrics._clock()
        self._adapter_tokens.inc(count)
        self._counted += count
        if self._last is None:
            self._metrics._first_token.labels(self._endpoint).observe(now - self._begun)
        else:
            for _ in range(count):
                self._gaps.observe((now - self._last) / count)
        self._last = now

    @cached_property
    def _adapter_tokens(self) -> Counter:
        return self._metrics._adapter_tokens.labels(self._adapter)

    @cached_property
    def _gaps(self) -> Histogram:
        return self._metrics._between_tokens.labels(self._endpoint)

    def end(self, outcome: str, prompt_tokens: int, completion_tokens: int) -> None:
        """The request has ended: `outcome` is a finish reason or an error kind. A second call is ignored."""
        if self._ended:
            return
        self._ended = True
        self._adapter_tokens.inc(max(0, completion_tokens - self._counted))  # an end token
        self._metrics._end(self._endpoint, self._adapter, outcome, self._begun, prompt_tokens, completion_tokens)


class Metrics:
    """All metrics of one server, in a registry of its own.

    Args:
        engine_stats: returns the latest engine statistics.
        restarts: returns the number of engine restarts.
        sources: what was fetched from sources.
        jobs: metrics of fine-tuning jobs.
        block_size: tokens of a KV block.
        clock: for durations.
        wall: seconds since the epoch, for the time of the last change.
    """

    def __init__(
        self,
        engine_stats: Callable[[], Stats],
        restarts: Callable[[], int],
        sources: SourceTotals | None = None,
        jobs: JobCollector | None = None,
        *,
        block_size: int = 16,
        clock: Clock = time.perf_counter,
        wall: Clock = time.time,
    ) -> None:
        self._clock = clock
        self._registry = registry = CollectorRegistry()
        self._engine = _EngineCollector(engine_stats, restarts, block_size, wall)
        registry.register(self._engine)
        if sources is not None:
            registry.register(SourceCollector(sources))
        if jobs is not None:
            registry.register(jobs)
        self._labelled: set[str] = set()

        def histogram(name: str, meaning: str, buckets: Iterable[float], labels: tuple[str, ...] = ()) -> Histogram:
            return Histogram(f"lora_serve_{name}", meaning, labels, buckets=tuple(buckets), registry=registry)

        def counter(name: str, meaning: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"lora_serve_{name}", meaning, labels, registry=registry)

        self._sequences = histogram("batch_sequences", "Sequences in a step.", COUNTS)
        self._tokens = histogram("batch_tokens", "Tokens in a step.", COUNTS)
        self._adapters = histogram("batch_adapters", "Distinct adapters in a step.", (0, *COUNTS))
        self._ahead = histogram(
            "queue_ahead", "Sequences that waited already when a request joined the queue.", (0, *COUNTS)
        )
        self._step = histogram("step_seconds", "Seconds a step took.", STEP_SECONDS)
        by_endpoint = ("endpoint",)
        self._first_token = histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", REQUEST_SECONDS, by_endpoint
        )
        self._between_tokens = histogram(
            "inter_token_seconds", "Between a request's tokens.", TOKEN_SECONDS, by_endpoint
        )
        self._whole = histogram("request_seconds", "From a request's arrival to its end.", REQUEST_SECONDS, by_endpoint)
        self._requests = counter("requests", "Requests by endpoint and outcome.", ("endpoint", "outcome"))
        self._errors = counter("http_errors", "HTTP requests that ended with an error.", ("status", "error"))
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of ended requests.")
        self._completion_tokens = counter("completion_tokens", "Generated tokens of ended requests.")
        self._adapter_requests = counter("adapter_requests", "Ended requests by adapter.", ("adapter",))
        self._adapter_tokens = counter(
            "adapter_tokens", "Generated tokens by adapter, also of running requests.", ("adapter",)
        )
        self._adapter_prompt_tokens = counter("adapter_prompt_tokens", "Prompt tokens by adapter.", ("adapter",))

    def observe(self, update: Update) -> None:
        """Process an engine update; register with `EngineClient.observe`."""
        for event in update.events:
            if isinstance(event, Admitted):
                self._ahead.observe(event.ahead)
        if update.step is not None:
            self._sequences.observe(update.step.sequences)
            self._tokens.observe(update.step.tokens)
            self._adapters.observe(update.step.adapters)
            self._step.observe(update.step.seconds)
        if update.stats is not None:
            self._engine.update(update.stats)

    def begin(self, endpoint: str) -> Timer:
        """Start timing a request; it counts as the base's until `Timer.admitted` names an adapter."""
        return Timer(self, endpoint)

    def count_error(self, status: int, kind: str) -> None:
        """Count an HTTP request that ended with an error of this kind."""
        self._errors.labels(str(status), kind).inc()

    def render(self) -> bytes:
        """All metrics in Prometheus' text format (`CONTENT_TYPE`)."""
        return generate_latest(self._registry)

    def _label(self, adapter: str) -> str:
        if adapter not in self._labelled:
            if len(self._labelled) >= MOST_ADAPTER_LABELS:
                return OTHER
            self._labelled.add(adapter)
        return adapter

    def _end(self, endpoint: str, adapter: str, outcome: str, begun: float, prompt: int, completion: int) -> None:
        self._requests.labels(endpoint, outcome).inc()
        self._whole.labels(endpoint).observe(self._clock() - begun)
        self._prompt_tokens.inc(prompt)
        self._completion_tokens.inc(completion)
        self._adapter_requests.labels(adapter).inc()
        self._adapter_prompt_tokens.labels(adapter).inc(prompt)


class _MonotonicTotals:
    """Counters that keep growing across engine restarts, from engine totals that restart at zero."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, str], float] = {}
        self._total: dict[tuple[str, str], float] = {}

    def update(self, name: str, values: Mapping[str, float]) -> None:
        for label, value in values.items():
            key = (name, label)
            last = self._last.get(key, 0.0)
            self._total[key] = self._total.get(key, 0.0) + (value - last if value >= last else value)
            self._last[key] = value

    def reset(self) -> None:
        self._last.clear()

    def by_label(self, name: str) -> Iterator[tuple[str, float]]:
        return ((label, total) for (of, label), total in sorted(self._total.items()) if of == name)


class _EngineCollector(Collector):
    def __init__(self, stats: Callable[[], Stats], restarts: Callable[[], int], block_size: int, wall: Clock) -> None:
        self._stats = stats
        self._block_size = block_size
        self._restarts = restarts
        self._wall = wall
        self._engine = restarts()
        self._totals = _MonotonicTotals()
        self._residents: tuple[str, str, str] | None = None
        self._changed = 0.0

    def update(self, stats: Stats) -> None:
        if (engine := self._restarts()) != self._engine:
            self._engine = engine
            self._totals.reset()
        for field in TOTALS:
            self._totals.update(field, {"": getattr(stats, field)})
        for field in TOTALS_BY_TIER | TOTALS_BY_QUANTUM:
            self._totals.update(field, getattr(stats, field))
        if stats.shared is not None:
            self._totals.update(SHARED_ERRORS, {"": stats.shared.errors})
        residents = (str(stats.adapter_slots), ",".join(stats.resident), ",".join(stats.waiting_adapters))
        if residents != self._residents:
            self._residents = residents
            self._changed = self._wall()

    def describe(self) -> list[Metric]:
        return []  # do not query the engine when registering

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        self.update(stats)
        usage = stats.kv_blocks_used / stats.kv_blocks if stats.kv_blocks else 0.0
        for name, meaning, value in (
            ("lora_serve_sequences_waiting", "Sequences in the queue.", stats.waiting),
            ("lora_serve_sequences_running", "Sequences being served.", stats.running),
            ("lora_serve_kv_blocks_used", "KV blocks in use.", stats.kv_blocks_used),
            ("lora_serve_kv_blocks", "KV blocks in all.", stats.kv_blocks),
            ("lora_serve_kv_usage_ratio", "KV blocks in use, 0 to 1.", usage),
            ("lora_serve_adapters", "Published adapters.", stats.adapters),
            ("lora_serve_adapters_resident", "Adapters on the device.", stats.versions_resident),
            ("lora_serve_adapter_slots", "Adapters that fit on the device at once.", stats.adapter_slots),
            ("lora_serve_queue_oldest_seconds", "How long the oldest sequence in the queue waits.", stats.oldest_wait),
            ("lora_serve_queue_expected_seconds", "How long one that comes now would wait.", stats.expected_wait),
            ("lora_serve_training_runs", "Training runs.", stats.training_runs),
            ("lora_serve_training_bytes", "Bytes that adapters in training take.", stats.training_bytes),
            ("vllm:num_requests_waiting", "Sequences in the queue.", stats.waiting),
            ("vllm:num_requests_running", "Sequences being served.", stats.running),
            ("vllm:kv_cache_usage_perc", "KV blocks in use, 0 to 1.", usage),
            ("vllm:num_gpu_loaded_lora_adapters", "Adapters on the device.", len(stats.resident)),
            ("vllm:num_cpu_loaded_lora_adapters", "Adapters in host memory.", len(stats.resident_in_host)),
            ("vllm:max_gpu_lora_adapters", "Adapters that fit on the device at once.", stats.adapter_slots),
        ):
            yield GaugeMetricFamily(name, meaning, value)
        costs = GaugeMetricFamily(
            "lora_serve_step_cost_seconds",
            "What a step costs as learnt: one that decodes, any prompt token, and each.",
            labels=["part"],
        )
        for part, seconds in sorted(stats.step_costs.items()):
            costs.add_metric([part], seconds)
        yield costs
        sizes = GaugeMetricFamily("lora_serve_adapter_bytes", "Bytes that adapters take in a tier.", labels=["tier"])
        for tier, size in sorted(stats.bytes.items()):
            sizes.add_metric([tier], size)
        yield sizes
        planned = GaugeMetricFamily(
            "lora_serve_memory_planned_bytes", "Bytes that a part may take of a memory.", labels=["memory", "part"]
        )
        for place, parts in sorted(stats.memory.items()):
            for part, size in parts.items():
                planned.add_metric([place, part], size)
        yield planned
        for field, (name, meaning) in (TOTALS | TOTALS_BY_TIER | TOTALS_BY_QUANTUM).items():
            by = ["tier"] if field in TOTALS_BY_TIER else ["kind"] if field in TOTALS_BY_QUANTUM else []
            total = CounterMetricFamily(name, meaning, labels=by)
            for label, value in self._totals.by_label(field):
                total.add_metric([label] if by else [], value)
            yield total
        yield CounterMetricFamily("lora_serve_engine_restarts", "Engines started after one was lost.", self._restarts())
        if stats.shared is not None:
            yield from _of_shared_store(stats.shared, sum(total for _, total in self._totals.by_label(SHARED_ERRORS)))
        yield from self._for_routers(stats)

    def _for_routers(self, stats: Stats) -> Iterator[Metric]:
        """What LoRA-aware routers read: vLLM's older gauge, of adapters in use, and its newer ones, of residency."""
        config = GaugeMetricFamily(
            "vllm:cache_config_info", "The KV cache's blocks.", labels=["block_size", "num_gpu_blocks"]
        )
        config.add_metric([str(self._block_size), str(stats.kv_blocks)], 1)
        yield config
        loaded = GaugeMetricFamily(
            "vllm:lora_adapter_loaded", "1 for each adapter in memory.", labels=["adapter_name", "level", "pinned"]
        )
        on_device, pinned = set(stats.resident), set(stats.pinned)
        for name in sorted({*stats.resident, *stats.resident_in_host}):
            level = "gpu" if name in on_device else "cpu"
            loaded.add_metric([name, level, str(name in pinned).lower()], 1)
        yield loaded
        seconds = SummaryMetricFamily(
            "vllm:lora_adapter_load_seconds", "Seconds an adapter took to be loaded.", labels=["level"]
        )
        counts = dict(self._totals.by_label("loads_total"))
        for tier, total in self._totals.by_label("load_seconds_total"):
            seconds.add_metric([{"device": "gpu", "host": "cpu"}[tier]], int(counts.get(tier, 0)), total)
        yield seconds
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Time of the last change of the adapters on the device and in the queue.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        if self._residents is not None:
            info.add_metric(self._residents, self._changed)
        yield info


def _of_shared_store(status: SharedStatus, errors: float) -> Iterator[Metric]:
    """How far this replica is with the catalog of a shared store."""
    for name, meaning, value in (
        ("generation", "Generation of the shared store's catalog that is followed.", status.generation),
        ("behind", "Adapters and aliases that are not what the catalog says.", status.behind),
        ("age_seconds", "Seconds since the catalog was read.", status.age),
        ("up", "Whether the shared store could be read the last time.", float(status.reachable)),
    ):
        yield GaugeMetricFamily(f"lora_serve_shared_store_{name}", meaning, value)
    yield CounterMetricFamily(
        "lora_serve_shared_store_errors", "Times that the shared store could not be read.", errors
    )
