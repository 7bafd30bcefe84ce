"""LoadedSets: adapter sets take part in the slot rotation while all of their adapters are in memory."""

from __future__ import annotations

from lora_serve.engine.fairness import AdapterSet, Fairness
from lora_serve.engine.loaded_sets import LoadedSets
from lora_serve.engine.slot_rotation import SlotRotation


class Sets:
    """Needed sets, and the adapters that are in memory."""

    def __init__(self) -> None:
        self.fairness = Fairness()
        self.rotation = SlotRotation(self.fairness, 4, 1)
        self.sets = LoadedSets(self.rotation, lambda: self.fairness.adapter_sets)
        self.memory: set[str] = set()
        self.asked = 0

    def is_loaded(self, digest: str) -> bool:
        self.asked += 1
        return digest in self.memory

    def need(self, *adapter_set: str) -> AdapterSet:
        self.fairness.enter("", 1.0, 0, adapter_set)
        self.sets.add(adapter_set)
        return adapter_set

    def resident(self) -> set[str]:
        return self.rotation.assign(1)


def test_a_set_takes_part_once_its_last_adapter_has_arrived() -> None:
    each = Sets()
    both = each.need("a", "b")
    each.memory = {"a"}
    each.sets.look_up((), each.is_loaded)
    assert (both in each.sets, each.resident()) == (False, set())
    each.memory = {"a", "b"}
    each.sets.look_up(["b"], each.is_loaded)
    assert (both in each.sets, each.resident()) == (True, {"a", "b"})


def test_a_set_that_left_memory_takes_no_part_until_it_is_back() -> None:
    each = Sets()
    one = each.need("a")
    each.memory = {"a"}
    each.sets.look_up((), each.is_loaded)
    each.memory = set()
    assert not each.sets.check([one], each.is_loaded)
    assert (one in each.sets, each.resident()) == (False, set())
    each.memory = {"a"}
    each.sets.look_up(["a"], each.is_loaded)
    assert one in each.sets


def test_only_what_is_new_or_has_arrived_is_looked_up() -> None:
    each = Sets()
    for number in range(100):
        each.need(f"a{number}")
    each.sets.look_up((), each.is_loaded)
    each.asked = 0
    each.sets.look_up(["a5"], each.is_loaded)
    assert each.asked == 1


def test_the_base_alone_is_always_there() -> None:
    assert () in Sets().sets
