"""Host and device memory: least recently used goes, what is kept stays, bytes freed are bytes taken."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft_folders import BASE, PREFIX, tensors

from lora_serve.adapters.adapter import Adapter, Lowered, flatten
from lora_serve.adapters.device_slots import DeviceSlots, slots_to_free
from lora_serve.adapters.host_cache import HostCache, adapters_to_evict
from lora_serve.errors import TooLarge
from lora_serve.kernels.contract import Delta

CPU = torch.device("cpu")


def adapter(name: str, rank: int = 4) -> Adapter:
    found = tensors(sum(name.encode()), rank)
    deltas = {
        site: Delta(found[f"{PREFIX}{site}.lora_A.weight"], found[f"{PREFIX}{site}.lora_B.weight"].T.contiguous())
        for site in BASE.sites
    }
    return flatten(name, Lowered(deltas, {}), torch.float32)


def nobody(digest: str) -> bool:
    return False


@given(
    sizes=st.dictionaries(st.text(min_size=1, max_size=3), st.integers(1, 50), max_size=10),
    needed=st.integers(1, 100),
    capacity=st.integers(1, 200),
)
def test_just_enough_leave_in_order(sizes: dict[str, int], needed: int, capacity: int) -> None:
    gone = adapters_to_evict(sizes, needed, capacity, nobody)
    if gone is None:
        assert needed > capacity
        return
    assert gone == [*sizes][: len(gone)]
    left = sum(sizes.values()) - sum(sizes[digest] for digest in gone)
    assert left + needed <= capacity
    assert not gone or left + sizes[gone[-1]] + needed > capacity


def test_the_least_recently_used_adapter_leaves_the_cache() -> None:
    size = adapter("a").nbytes
    cache = HostCache(2 * size)
    cache.put(adapter("a"), nobody)
    cache.put(adapter("b"), nobody)
    cache.get("a")
    cache.put(adapter("c"), nobody)
    assert ("a" in cache, "b" in cache, "c" in cache) == (True, False, True)
    assert repr(cache) == f"<HostCache 2 adapters, {2 * size} of {2 * size} bytes>"
    assert cache.evictions == 1


def test_what_is_kept_stays_even_over_the_budget() -> None:
    cache = HostCache(adapter("a").nbytes)
    cache.put(adapter("a"), nobody)
    cache.put(adapter("b"), lambda digest: digest == "a")
    assert "a" in cache
    assert "b" in cache


def test_an_adapter_larger_than_the_cache_is_refused() -> None:
    with pytest.raises(TooLarge):
        HostCache(10).put(adapter("a"), nobody)


def test_vacating_takes_the_oldest_that_may_go() -> None:
    sizes = {"a": 10, "b": 20, "c": 30}
    assert slots_to_free(sizes, 5, 4, None, set()) == []
    assert slots_to_free(sizes, 5, 3, None, {"a"}) == ["b"]
    assert slots_to_free({"a": 1, "b": 1}, 1, 1, None, {"a"}) is None
    assert slots_to_free(sizes, 40, 9, 100, set()) == []
    assert slots_to_free(sizes, 45, 9, 100, set()) == ["a"]
    assert slots_to_free(sizes, 65, 9, 100, {"a"}) == ["b", "c"]
    assert slots_to_free(sizes, 65, 9, 70, {"a", "b"}) is None


def test_a_slot_is_a_column_of_pointers_to_the_adapter_s_own_tensor() -> None:
    device_slots = DeviceSlots(BASE, 2, torch.float32, CPU)
    found = adapter("a", rank=3)
    slot = device_slots.load(found)
    assert slot != 0
    group = device_slots.groups[("layers.0.q_proj", "layers.0.k_proj")]
    place = found.offsets["layers.0.k_proj"]
    assert group.a[1, slot].item() == found.flat.data_ptr() + 4 * place.a
    assert group.b[1, slot].item() == found.flat.data_ptr() + 4 * place.b
    assert group.rank[:, slot].tolist() == [3, 3]
    assert device_slots.bytes == found.nbytes


def test_eviction_zeroes_the_column_and_returns_exactly_what_was_taken() -> None:
    device_slots = DeviceSlots(BASE, 2, torch.float32, CPU)
    before = {names: (group.a.clone(), group.a.data_ptr()) for names, group in device_slots.groups.items()}
    for digest in ("a", "b"):
        device_slots.load(adapter(digest))
    assert (device_slots.slots - len(device_slots.resident), device_slots.resident) == (0, ["a", "b"])
    assert repr(device_slots) == f"<DeviceSlots 2 of 2 slots, {2 * adapter('a').nbytes} bytes>"
    device_slots.evict("a")
    device_slots.evict("b")
    device_slots.evict("never there")
    assert (device_slots.resident, device_slots.bytes, device_slots.evictions) == ([], 0, 2)
    for names, group in device_slots.groups.items():
        assert torch.equal(group.a, before[names][0])
        assert group.a.data_ptr() == before[names][1]
        assert not group.rank.any()
        assert all(delta is None for row in group.deltas for delta in row)


def test_looking_a_slot_up_makes_it_recent() -> None:
    device_slots = DeviceSlots(BASE, 2, torch.float32, CPU)
    device_slots.load(adapter("a"))
    device_slots.load(adapter("b"))
    assert device_slots.slot("a") is not None
    assert device_slots.slot("z") is None
    assert device_slots.resident == ["b", "a"]
