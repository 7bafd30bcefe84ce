"""Host cache and device slots: LRU eviction, adapters that must stay, and exact accounting of bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft_folders import BASE, PREFIX, tensors

from lora_serve.adapters.adapter import Adapter, Lowered, flatten
from lora_serve.adapters.device_slots import DeviceSlots, residents_to_evict
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


def keep_none(digest: str) -> bool:
    return False


@given(
    sizes=st.dictionaries(st.text(min_size=1, max_size=3), st.integers(1, 50), max_size=10),
    needed=st.integers(1, 100),
    capacity=st.integers(1, 200),
)
def test_only_as_many_as_needed_are_evicted_in_lru_order(sizes: dict[str, int], needed: int, capacity: int) -> None:
    gone = adapters_to_evict(sizes, needed, capacity, keep_none)
    if gone is None:
        assert needed > capacity
        return
    assert gone == [*sizes][: len(gone)]
    left = sum(sizes.values()) - sum(sizes[digest] for digest in gone)
    assert left + needed <= capacity
    assert not gone or left + sizes[gone[-1]] + needed > capacity


def test_the_least_recently_used_adapter_is_evicted_from_the_cache() -> None:
    size = adapter("a").nbytes
    cache = HostCache(2 * size)
    cache.put(adapter("a"), keep_none)
    cache.put(adapter("b"), keep_none)
    cache.get("a")
    cache.put(adapter("c"), keep_none)
    assert ("a" in cache, "b" in cache, "c" in cache) == (True, False, True)
    assert repr(cache) == f"<HostCache 2 adapters, {2 * size} of {2 * size} bytes>"
    assert cache.evictions == 1


def test_kept_adapters_stay_even_over_the_capacity() -> None:
    cache = HostCache(adapter("a").nbytes)
    cache.put(adapter("a"), keep_none)
    cache.put(adapter("b"), lambda digest: digest == "a")
    assert "a" in cache
    assert "b" in cache


def test_an_adapter_larger_than_the_cache_is_refused() -> None:
    with pytest.raises(TooLarge):
        HostCache(10).put(adapter("a"), keep_none)


def test_slots_to_free_are_the_least_recently_used_that_are_not_kept() -> None:
    sizes = {"a": 10, "b": 20, "c": 30}
    assert residents_to_evict(sizes, 5, 4, None, set()) == []
    assert residents_to_evict(sizes, 5, 3, None, {"a"}) == ["b"]
    assert residents_to_evict({"a": 1, "b": 1}, 1, 1, None, {"a"}) is None
    assert residents_to_evict(sizes, 40, 9, 100, set()) == []
    assert residents_to_evict(sizes, 45, 9, 100, set()) == ["a"]
    assert residents_to_evict(sizes, 65, 9, 100, {"a"}) == ["b", "c"]
    assert residents_to_evict(sizes, 65, 9, 70, {"a", "b"}) is None


def test_a_slot_is_a_column_of_pointers_into_the_adapter_s_flat_tensor() -> None:
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


def test_eviction_zeroes_the_column_and_frees_exactly_what_was_allocated() -> None:
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


def test_looking_up_a_slot_marks_it_as_recently_used() -> None:
    device_slots = DeviceSlots(BASE, 2, torch.float32, CPU)
    device_slots.load(adapter("a"))
    device_slots.load(adapter("b"))
    assert device_slots.slot("a") is not None
    assert device_slots.slot("z") is None
    assert device_slots.resident == ["b", "a"]
