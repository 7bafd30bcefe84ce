"""Device slots: columns of pointers into flat tensors, and memory that is freed exactly."""

from __future__ import annotations

import torch
from peft_folders import BASE, PREFIX, tensors

from lora_serve.adapters.adapter import Adapter, Lowered, flatten
from lora_serve.adapters.device_slots import DeviceSlots
from lora_serve.kernels.contract import Delta

CPU = torch.device("cpu")


def adapter(name: str, rank: int = 4) -> Adapter:
    found = tensors(sum(name.encode()), rank)
    deltas = {
        site: Delta(found[f"{PREFIX}{site}.lora_A.weight"], found[f"{PREFIX}{site}.lora_B.weight"].T.contiguous())
        for site in BASE.sites
    }
    return flatten(name, Lowered(deltas, {}), torch.float32)


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
    slots = [device_slots.load(adapter(digest)) for digest in ("a", "b")]
    assert repr(device_slots) == f"<DeviceSlots 2 of 2 slots, {2 * adapter('a').nbytes} bytes>"
    for slot in slots:
        device_slots.evict(slot)
    assert device_slots.bytes == 0
    for names, group in device_slots.groups.items():
        assert torch.equal(group.a, before[names][0])
        assert group.a.data_ptr() == before[names][1]
        assert not group.rank.any()
        assert all(group.get(module, slot) is None for module in range(len(names)) for slot in slots)
    assert device_slots.load(adapter("c")) in slots


def test_a_slot_s_deltas_are_views_into_the_device_tensor_while_it_is_resident() -> None:
    device_slots = DeviceSlots(BASE, 2, torch.float32, CPU)
    found = adapter("a", rank=3)
    slot = device_slots.load(found)
    group = device_slots.groups[("layers.0.q_proj", "layers.0.k_proj")]
    delta, own = group.get(1, slot), found.delta(BASE.sites["layers.0.k_proj"])
    assert delta is not None
    assert own is not None
    assert torch.equal(delta.a, own.a)
    assert delta.b.data_ptr() == own.b.data_ptr() == group.b[1, slot].item()
    assert group.get(1, 3 - slot) is None
