"""The account of memory at start: what is refused with numbers, what is noted, what is shown."""

from __future__ import annotations

import pytest
import torch

from lora_serve.config import ServeConfig
from lora_serve.engine.host_memory import HostMemory
from lora_serve.engine.memory_plan import MemoryPlan, gpu_plans, host_plan
from lora_serve.engine.sizing import GpuMemory
from lora_serve.errors import ModelUnsupported

GIB = 1 << 30


def plan(total: int, free: int | None = None, *, kv: int = GIB, **options: object) -> MemoryPlan:
    """Of a base of 2 GiB whose steps take 0.5."""
    config = ServeConfig(model="m", **options)  # type: ignore[arg-type]
    host = HostMemory(total * GIB, (total - 2 if free is None else free) * GIB)
    return host_plan(config, 2 * GIB, GIB // 2, kv, host)


def test_what_fits_is_shown_by_part() -> None:
    found = plan(16, training_memory="4GiB")
    found.check()
    assert found.note is None
    shown = "host memory: 9.50 of 16.00 GiB at most (base 2.00, step 0.50, KV 1.00, adapters 2.00, training 4.00)"
    assert str(found) == shown


def test_what_was_asked_for_and_can_never_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(ModelUnsupported) as caught:
        plan(8, training_memory="6GiB").check()
    for part in ("11.50 of 8.00 GiB", "base 2.00", "KV 1.00", "adapters 2.00", "training 6.00", "--training-memory"):
        assert part in caught.value.message
    with pytest.raises(ModelUnsupported):
        plan(8, kv=6 * GIB, kv_cache_memory="6GiB").check()
    with pytest.raises(ModelUnsupported):
        plan(8, adapter_cache_memory="6GiB").check()


def test_defaults_on_a_small_machine_are_not_refused_and_noted() -> None:
    found = plan(4)
    found.check()
    assert found.note is not None
    assert "more than there is" in found.note
    assert "--adapter-cache-memory" in found.note


def test_what_other_processes_take_is_noted() -> None:
    assert plan(16, free=4).note is None
    found = plan(16, free=3)
    found.check()  # they may end
    assert found.note is not None
    assert "3.00 GiB are free now" in found.note


def test_where_the_system_does_not_say_nothing_is_refused() -> None:
    found = host_plan(ServeConfig(model="m"), 2 * GIB, 0, GIB, None)
    found.check()
    assert found.note is None
    assert str(found).startswith("host memory: 5.00 GiB at most")


def test_processes_that_share_a_base_on_one_host_are_all_counted() -> None:
    found = host_plan(ServeConfig(model="m"), GIB, 0, GIB, HostMemory(16 * GIB, 16 * GIB), processes=2)
    assert found.parts == {"base": 2 * GIB, "step": 0, "KV": 2 * GIB, "adapters": 6 * GIB, "training": 0}


def test_a_gpu_has_a_plan_of_its_own_and_the_host_one_beside_it() -> None:
    memory = GpuMemory(total=24 * GIB, taken=8 * GIB, passes=GIB, graphs=0, adapters=2 * GIB, training=4 * GIB)
    config = ServeConfig(model="m", training_memory="4GiB")  # type: ignore[arg-type]
    device, host = gpu_plans(config, torch.device("cuda", 0), memory, GIB, 6 * GIB, HostMemory(8 * GIB, 7 * GIB))
    assert str(device) == (
        "cuda:0: 21.00 of 24.00 GiB at most (base 8.00, step 1.00, KV 6.00, adapters 2.00, training 4.00)"
    )
    assert str(host) == "host memory: 3.00 of 8.00 GiB at most (base 1.00, adapters 2.00)"
