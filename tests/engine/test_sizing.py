"""Size of the KV cache, and the error if it does not fit; choice of the device."""

from __future__ import annotations

import pytest
import torch

from lora_serve.config import ServeConfig
from lora_serve.engine.base_setup import device_of
from lora_serve.engine.sizing import CPU_KV_BYTES, GpuMemory, adapter_memory, kv_memory
from lora_serve.errors import ModelUnsupported
from lora_serve.kv.tensors import LayerShape

GIB = 1 << 30
LAYERS = [LayerShape(8, 128, 128)] * 32  # 128 KiB a token in bf16
MEMORY = GpuMemory(total=80 * GIB, taken=16 * GIB, passes=2 * GIB, graphs=GIB, adapters=8 * GIB)


def kv(needs: GpuMemory | None, **options: object) -> int:
    return kv_memory(ServeConfig(model="m", **options), needs, LAYERS, torch.bfloat16)  # type: ignore[arg-type]


def test_on_a_gpu_kv_gets_what_is_left_of_the_memory_utilization() -> None:
    assert kv(MEMORY) == 72 * GIB - 27 * GIB
    assert kv(MEMORY, gpu_memory_utilization=0.5) == 40 * GIB - 27 * GIB


def test_on_a_cpu_kv_has_a_fixed_default_size() -> None:
    assert kv(None) == CPU_KV_BYTES
    assert kv(None, kv_cache_memory="3GiB") == 3 * GIB


def test_a_configured_size_is_used_if_it_fits_the_memory_at_all() -> None:
    assert kv(MEMORY, kv_cache_memory="53GiB") == 53 * GIB
    with pytest.raises(ModelUnsupported, match="no room for the KV cache"):
        kv(MEMORY, kv_cache_memory="54GiB")


def test_if_nothing_is_left_the_error_has_the_numbers() -> None:
    with pytest.raises(ModelUnsupported) as caught:
        kv(GpuMemory(total=24 * GIB, taken=16 * GIB, passes=int(2.2 * GIB), graphs=GIB, adapters=int(2.4 * GIB)))
    text = caught.value.message
    for part in ("24.00 GiB", "16.00", "2.20", "1.00", "2.40", "0 MiB are left", "--max-num-batched-tokens"):
        assert part in text


def test_on_a_cpu_adapters_have_no_device_memory_limit_by_default() -> None:
    assert adapter_memory(ServeConfig(model="m"), torch.device("cpu")) is None
    assert adapter_memory(ServeConfig(model="m", adapter_device_memory="1GiB"), torch.device("cpu")) == GIB  # type: ignore[arg-type]


def test_auto_and_cuda_mean_the_first_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(device_of("cpu")) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [str(device_of(name)) for name in ("auto", "cuda", "cuda:3")] == ["cuda:0", "cuda:0", "cuda:3"]


@pytest.mark.parametrize("name", ["cuda:4", "cuda:99", "gpu", "cuda:x"])
def test_a_missing_device_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ModelUnsupported, match=f"--device {name}"):
        device_of(name)


def test_the_error_says_if_torch_sees_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelUnsupported, match="sees 0 GPUs here"):
        device_of("cuda")
