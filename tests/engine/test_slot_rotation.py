"""SlotRotation: which adapters are resident when more are needed than there are slots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Set

from lora_serve.engine.fairness import AdapterSet, Fairness
from lora_serve.engine.slot_rotation import SlotRotation


def assign(rotation: SlotRotation, step: int, wanted: Iterable[AdapterSet], pinned: Set[str] = frozenset()) -> set[str]:
    """The resident adapters of a step in which exactly these sets are needed."""
    sets = dict.fromkeys(each for each in wanted if each)
    before = {each for sets in rotation._wanted.values() for each in sets}
    for each in before - sets.keys():
        for share in list(rotation._fairness.shares(each)):
            rotation._fairness.leave(share)
            rotation.forget(share)
        rotation.remove(each)
    for each in sets:
        if each not in before:
            rotation._fairness.enter("", 1.0, 0, each)
            rotation.add(each)
    return rotation.assign(step, pinned)


def test_all_are_resident_if_all_fit() -> None:
    assert assign(SlotRotation(Fairness(), 3, 4), 1, [("a",), ("b",), ("a",), ()]) == {"a", "b"}


def test_the_oldest_sets_get_slots_first() -> None:
    assert assign(SlotRotation(Fairness(), 2, 4), 1, [("a",), ("b",), ("c",)]) == {"a", "b"}


def test_after_a_quantum_the_longest_waiting_set_gets_the_slot() -> None:
    rotation = SlotRotation(Fairness(), 1, 3)
    resident = [assign(rotation, step, [("a",), ("b",), ("c",)]) for step in range(1, 11)]
    assert resident == [{"a"}] * 3 + [{"b"}] * 3 + [{"c"}] * 3 + [{"a"}]


def test_it_says_whose_turn_began() -> None:
    rotation = SlotRotation(Fairness(), 1, 3)
    began = []
    for step in range(1, 8):
        assign(rotation, step, [("a",), ("b",), ("c",)])
        began.append(rotation.began)
    assert began == [["a"], [], [], ["b"], [], [], ["c"]]


def test_a_slot_is_free_as_soon_as_its_adapter_is_not_needed() -> None:
    rotation = SlotRotation(Fairness(), 1, 100)
    assign(rotation, 1, [("a",)])
    assert assign(rotation, 2, [("b",)]) == {"b"}


def test_new_arrivals_do_not_starve_one_that_yielded() -> None:
    rotation = SlotRotation(Fairness(), 1, 2)
    served: Counter[str] = Counter()
    adapter_sets = [("old",)]
    for step in range(1, 60):
        adapter_sets = [("old",), *((f"new{arrival}",) for arrival in range(max(0, step - 3), step))]
        served.update(assign(rotation, step, adapter_sets))
    assert served["old"] >= 10


def test_all_adapters_get_the_same_number_of_steps() -> None:
    rotation = SlotRotation(Fairness(), 4, 5)
    served: Counter[str] = Counter()
    for step in range(1, 401):
        served.update(assign(rotation, step, [(f"a{i}",) for i in range(10)]))
    assert sum(served.values()) == 1600
    assert max(served.values()) - min(served.values()) <= 10


def test_a_composition_is_resident_completely_or_not_at_all() -> None:
    rotation = SlotRotation(Fairness(), 3, 2)
    for step in range(1, 40):
        resident = assign(rotation, step, [("a", "b"), ("c", "d"), ("e",)])
        assert len(resident) <= 3
        assert any(resident >= set(adapter_set) for adapter_set in [("a", "b"), ("c", "d")])


def test_compositions_take_turns_too() -> None:
    rotation = SlotRotation(Fairness(), 2, 2)
    whole: Counter[tuple[str, ...]] = Counter()
    adapter_sets = [("a", "b"), ("b", "c"), ("d",)]
    for step in range(1, 61):
        resident = assign(rotation, step, adapter_sets)
        whole.update(adapter_set for adapter_set in adapter_sets if resident >= set(adapter_set))
    assert min(whole[adapter_set] for adapter_set in adapter_sets) >= 10


def test_pinned_adapters_keep_their_slots() -> None:
    rotation = SlotRotation(Fairness(), 2, 2)
    for step in range(1, 20):
        resident = assign(rotation, step, [("p",), ("a",), ("b",)], pinned={"p"})
        assert "p" in resident
        assert len(resident) == 2


SIZES = {"a": 10, "b": 20, "c": 30, "large": 40}


def test_capacity_in_bytes_limits_residents_as_slots_do() -> None:
    rotation = SlotRotation(Fairness(), 9, 2, 50, SIZES.__getitem__)
    assert assign(rotation, 1, [("a",), ("b",), ("c",)]) == {"a", "b"}
    assert assign(rotation, 2, [("b",), ("c",)]) == {"b", "c"}


def test_a_large_adapter_gets_its_turn_and_displaces_as_many_as_needed() -> None:
    rotation = SlotRotation(Fairness(), 9, 2, 50, SIZES.__getitem__)
    line = [("a",), ("b",), ("large",)]
    assert assign(rotation, 1, line) == {"a", "b"}
    assert assign(rotation, 2, line) == {"a", "b"}
    assert assign(rotation, 3, line) == {"large"}  # "b" does not fit beside it, and "a" is queued behind "b"
    assert assign(rotation, 5, line) == {"a", "b"}


def test_pinned_adapters_count_towards_the_capacity() -> None:
    rotation = SlotRotation(Fairness(), 9, 2, 50, SIZES.__getitem__)
    assert assign(rotation, 1, [("b",), ("a",)], {"c"}) == {"b", "c"}
    assert not rotation.fits({"large"}, {"b"})
