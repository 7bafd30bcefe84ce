"""Metrics: names, values, and counters that never decrease."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lora_serve.messages import SharedStatus, Stats, StepReport, Update
from lora_serve.metrics import MOST_ADAPTER_LABELS, Metrics
from lora_serve.request import Admitted, Tokens


class FakeEngineMetrics:
    """Metrics of an engine whose statistics and clocks are set by the test."""

    def __init__(self) -> None:
        self.stats = Stats()
        self.restarts = 0
        self.now = 100.0
        self.metrics = Metrics(lambda: self.stats, lambda: self.restarts, clock=self.clock, wall=self.clock)

    def clock(self) -> float:
        return self.now

    def read(self) -> dict[str, float]:
        """Every sample as `name{label=value,…}`."""
        found = {}
        for family in text_string_to_metric_families(self.metrics.render().decode()):
            for sample in family.samples:
                labels = ",".join(f"{key}={value}" for key, value in sample.labels.items())
                found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
        return found


@pytest.fixture
def engine() -> FakeEngineMetrics:
    return FakeEngineMetrics()


def test_how_many_were_ahead_of_a_request_is_counted_when_it_joins_the_queue(engine: FakeEngineMetrics) -> None:
    engine.metrics.observe(Update([Admitted("one", [], ahead=0), Tokens("other", [5]), Admitted("two", [], ahead=7)]))
    read = engine.read()
    assert read["lora_serve_queue_ahead_bucket{le=0.0}"] == 1
    assert read["lora_serve_queue_ahead_bucket{le=8.0}"] == 2
    assert read["lora_serve_queue_ahead_sum"] == 7


def test_a_request_is_counted_once_with_its_times_and_tokens(engine: FakeEngineMetrics) -> None:
    timer = engine.metrics.begin("completions")
    timer.admitted("poet")
    engine.now += 0.5
    timer.token()
    engine.now += 0.2
    timer.token(2)
    assert engine.read()["lora_serve_adapter_tokens_total{adapter=poet}"] == 3  # while it runs
    timer.end("stop", prompt_tokens=7, completion_tokens=4)  # with an end token
    timer.end("abort", prompt_tokens=7, completion_tokens=3)
    read = engine.read()
    assert read["lora_serve_requests_total{endpoint=completions,outcome=stop}"] == 1
    assert "lora_serve_requests_total{endpoint=completions,outcome=abort}" not in read
    assert read["lora_serve_time_to_first_token_seconds_sum{endpoint=completions}"] == pytest.approx(0.5)
    assert read["lora_serve_inter_token_seconds_sum{endpoint=completions}"] == pytest.approx(0.2)
    assert read["lora_serve_inter_token_seconds_count{endpoint=completions}"] == 2
    assert read["lora_serve_request_seconds_sum{endpoint=completions}"] == pytest.approx(0.7)
    assert read["lora_serve_prompt_tokens_total"] == 7
    assert read["lora_serve_completion_tokens_total"] == 4
    assert read["lora_serve_adapter_requests_total{adapter=poet}"] == 1
    assert read["lora_serve_adapter_tokens_total{adapter=poet}"] == 4


def ended(engine: FakeEngineMetrics, adapter: str) -> None:
    timer = engine.metrics.begin("chat")
    timer.admitted(adapter)
    timer.end("stop", 1, 1)


def test_the_number_of_adapter_labels_is_bounded(engine: FakeEngineMetrics) -> None:
    for number in range(MOST_ADAPTER_LABELS + 5):
        ended(engine, f"a{number}")
    ended(engine, "a0")
    engine.metrics.begin("chat").end("stop", 1, 1)
    requests = {name: value for name, value in engine.read().items() if "adapter_requests_total" in name}
    assert len(requests) == MOST_ADAPTER_LABELS + 2
    assert requests["lora_serve_adapter_requests_total{adapter=a0}"] == 2
    assert requests["lora_serve_adapter_requests_total{adapter=other}"] == 5
    assert requests["lora_serve_adapter_requests_total{adapter=base}"] == 1


def test_steps_are_recorded_in_histograms(engine: FakeEngineMetrics) -> None:
    engine.metrics.observe(Update([], step=StepReport(sequences=8, tokens=70, adapters=5, seconds=0.04)))
    engine.metrics.observe(Update([]))
    read = engine.read()
    for name, total in (("batch_sequences", 8), ("batch_tokens", 70), ("batch_adapters", 5), ("step_seconds", 0.04)):
        assert read[f"lora_serve_{name}_sum"] == pytest.approx(total)
        assert read[f"lora_serve_{name}_count"] == 1


def test_the_engine_s_statistics_are_shown_with_their_current_values(engine: FakeEngineMetrics) -> None:
    engine.stats = Stats(
        waiting=3,
        running=4,
        kv_blocks_used=25,
        kv_blocks=100,
        evictions_total={"device": 2},
        load_seconds_total={"host": 1.5},
        bytes={"host": 1000},
        training_runs=2,
        training_tokens_total=7,
        training_seconds_total={"forward": 0.5},
    )
    read = engine.read()
    assert read["lora_serve_kv_usage_ratio"] == read["vllm:kv_cache_usage_perc"] == 0.25
    assert read["lora_serve_sequences_waiting"] == read["vllm:num_requests_waiting"] == 3
    assert read["lora_serve_sequences_running"] == read["vllm:num_requests_running"] == 4
    assert read["lora_serve_adapter_evictions_total{tier=device}"] == 2
    assert read["lora_serve_adapter_load_seconds_total{tier=host}"] == 1.5
    assert read["lora_serve_adapter_bytes{tier=host}"] == 1000
    assert read["lora_serve_training_runs"] == 2
    assert read["lora_serve_training_tokens_total"] == 7
    assert read["lora_serve_training_seconds_total{kind=forward}"] == 0.5


@pytest.mark.parametrize("after", [2, 50])
def test_counters_keep_growing_when_the_engine_is_restarted(engine: FakeEngineMetrics, after: int) -> None:
    engine.stats = Stats(steps_total=10, cache_hits_total={"host": 10})
    engine.read()
    engine.restarts = 1
    engine.stats = Stats(steps_total=after, cache_hits_total={"host": after})
    read = engine.read()
    assert read["lora_serve_steps_total"] == 10 + after
    assert read["lora_serve_adapter_hits_total{tier=host}"] == 10 + after
    assert read["lora_serve_engine_restarts_total"] == 1


def test_zero_statistics_between_two_engines_lose_no_counts(engine: FakeEngineMetrics) -> None:
    for steps in (10, 0, 0, 3, 4):
        engine.stats = Stats(steps_total=steps)
        engine.read()
    assert engine.read()["lora_serve_steps_total"] == 14


def test_lora_info_has_one_set_of_adapters_and_the_time_of_its_last_change(engine: FakeEngineMetrics) -> None:
    engine.stats = Stats(adapter_slots=8, resident=["a", "b"])
    engine.metrics.observe(Update([], stats=engine.stats))
    engine.now = 200.0
    assert lora_info(engine) == {"{max_lora=8,running_lora_adapters=a,b,waiting_lora_adapters=}": 100.0}
    engine.stats = Stats(adapter_slots=8, resident=["b"], waiting_adapters=["c"])
    assert lora_info(engine) == {"{max_lora=8,running_lora_adapters=b,waiting_lora_adapters=c}": 200.0}


def lora_info(engine: FakeEngineMetrics) -> dict[str, float]:
    name = "vllm:lora_requests_info"
    return {key.removeprefix(name): value for key, value in engine.read().items() if key.startswith(name)}


def test_routers_see_every_adapter_in_memory_with_its_tier(engine: FakeEngineMetrics) -> None:
    engine.stats = Stats(
        adapter_slots=8,
        kv_blocks=100,
        resident=["a", "twin of a"],
        resident_in_host=["a", "b", "twin of a"],
        pinned=["b"],
        loads_total={"host": 3, "device": 2},
        load_seconds_total={"host": 1.5, "device": 0.25},
    )
    text = engine.metrics.render().decode()
    assert [line for line in text.splitlines() if line.startswith("vllm:lora_adapter_loaded{")] == [
        'vllm:lora_adapter_loaded{adapter_name="a",level="gpu",pinned="false"} 1.0',
        'vllm:lora_adapter_loaded{adapter_name="b",level="cpu",pinned="true"} 1.0',
        'vllm:lora_adapter_loaded{adapter_name="twin of a",level="gpu",pinned="false"} 1.0',
    ]
    for line in (
        "vllm:num_gpu_loaded_lora_adapters 2.0",
        "vllm:num_cpu_loaded_lora_adapters 3.0",
        "vllm:max_gpu_lora_adapters 8.0",
        'vllm:cache_config_info{block_size="16",num_gpu_blocks="100"} 1.0',
        'vllm:lora_adapter_load_seconds_count{level="gpu"} 2.0',
        'vllm:lora_adapter_load_seconds_sum{level="cpu"} 1.5',
    ):
        assert line in text.splitlines()


def test_a_shared_store_shows_how_far_it_is_followed_and_none_shows_nothing(engine: FakeEngineMetrics) -> None:
    assert not any("shared_store" in name for name in engine.read())
    engine.stats.shared = SharedStatus(generation=7, behind=2, age=0.4, errors=3, reachable=False)
    engine.read()
    engine.restarts = 1
    engine.stats.shared = SharedStatus(generation=8, behind=0, age=0.1, errors=1, reachable=True)
    read = engine.read()
    assert read["lora_serve_shared_store_generation"] == 8
    assert read["lora_serve_shared_store_up"] == 1
    assert read["lora_serve_shared_store_errors_total"] == 4
