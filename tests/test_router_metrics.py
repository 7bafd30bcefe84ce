"""`/metrics` as the endpoint picker of the Kubernetes gateway reads it: by the rules of GAIE's model server protocol.

The rules are those of llm-d-router's and the Gateway API Inference Extension's metrics extractor with its built-in
mapping for vLLM (`kubernetes-sigs/gateway-api-inference-extension`, docs/proposals/003-model-server-protocol;
`llm-d/llm-d-router`, pkg/epp/framework/plugins/datalayer/extractor/metrics). A family that is missing, or a label that
is not a number, makes a scrape an error, and the endpoint is then not routed to.
"""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from lora_serve.messages import Stats
from lora_serve.metrics import Metrics
from lora_serve.names import check_name

QUEUED = "vllm:num_requests_waiting"
RUNNING = "vllm:num_requests_running"
KV_USAGE = "vllm:kv_cache_usage_perc"
LORA = "vllm:lora_requests_info"
CACHE = "vllm:cache_config_info"


def scrape(text: str) -> dict[str, Any]:
    """What the endpoint picker knows of a server after a scrape. Raises where it would report an error."""
    families = {family.name: family for family in text_string_to_metric_families(text)}
    lora = latest_lora(families[LORA]).labels
    cache = only(families[CACHE]).labels
    return {
        "queued": int(only(families[QUEUED]).value),
        "running": int(only(families[RUNNING]).value),
        "kv_usage": only(families[KV_USAGE]).value,
        "active": adapters(lora["running_lora_adapters"]),
        "waiting": adapters(lora["waiting_lora_adapters"]),
        "max_active": int(lora["max_lora"]),
        "block_size": int(cache["block_size"]),
        "blocks": int(cache["num_gpu_blocks"]),
    }


def only(family: Metric) -> Sample:
    """The one sample of a gauge: of several, without timestamps, which one is taken would be chance."""
    assert family.type == "gauge"
    (sample,) = family.samples
    return sample


def latest_lora(family: Metric) -> Sample:
    """Of a family whose values are times of creation, the latest sample."""
    assert family.type == "gauge"
    latest = max(family.samples, key=lambda sample: sample.value)
    assert latest.value > -1
    return latest


def adapters(listed: str) -> set[str]:
    """Names in a list that is separated by commas, blanks around them left out."""
    return {name.strip() for name in listed.split(",")} - {""}


def text_of(stats: Stats) -> str:
    return Metrics(lambda: stats, lambda: 0, block_size=32).render().decode()


def test_queue_kv_use_and_adapters_are_read_from_a_busy_server() -> None:
    stats = Stats(
        waiting=7,
        running=3,
        kv_blocks_used=55,
        kv_blocks=100,
        adapter_slots=4,
        resident=["adapter-a", "adapter.b"],
        waiting_adapters=["adapter-c"],
    )
    assert scrape(text_of(stats)) == {
        "queued": 7,
        "running": 3,
        "kv_usage": 0.55,  # 0 to 1
        "active": {"adapter-a", "adapter.b"},
        "waiting": {"adapter-c"},
        "max_active": 4,
        "block_size": 32,
        "blocks": 100,
    }


def test_a_server_that_has_loaded_nothing_yet_can_be_routed_to() -> None:
    """vLLM has no LoRA family before its first adapter, and old endpoint pickers take that for a failure."""
    found = scrape(text_of(Stats(adapter_slots=4)))
    assert (found["active"], found["waiting"], found["max_active"], found["kv_usage"]) == (set(), set(), 4, 0.0)


def test_the_latest_set_of_adapters_is_the_only_one() -> None:
    now = 100.0
    stats = Stats(adapter_slots=4, resident=["old"])
    metrics = Metrics(lambda: stats, lambda: 0, wall=lambda: now)
    metrics.render()
    stats, now = Stats(adapter_slots=4, resident=["new"]), 200.0
    assert scrape(metrics.render().decode())["active"] == {"new"}


@pytest.mark.parametrize("name", ["a,b", " a", "a b", 'a"'])
def test_no_adapter_has_a_name_that_would_break_the_list(name: str) -> None:
    with pytest.raises(Exception, match="name"):
        check_name(name)
