"""Decisions over plain state: what is loaded, what gets slots, what is evicted for it, and what is refused."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from lora_serve.adapters.lowered_file import Summary
from lora_serve.adapters.residency import Budget, Loads, Residency, Version
from lora_serve.adapters.store.records import NameRecord
from lora_serve.adapters.traits import Traits
from lora_serve.errors import AdapterBusy, AdapterNotFound, BadRequest, TooLarge
from lora_serve.request import AdapterUse


def residency(host: int = 100, slots: int = 3, device: int | None = None, training: int = 0, **sizes: int) -> Residency:
    """Adapters named by a letter, of so many bytes each, on disk; name and digest are the same."""
    state = Residency(Budget(slots, host, device, training), keep_versions=2)
    for name, size in sizes.items():
        state.versions[name] = Version(Summary(name, "", "", size, "", 1, 1, 1, {}, Traits()), 0.0)
        state.apply(name, NameRecord([name]))
    return state


def lease(state: Residency, *names: str) -> list[int]:
    return [state.lease(state.versions[name]) for name in names]


def load(state: Residency, *names: str) -> None:
    for name in names:
        state.begin_load(state.versions[name])
        state.end_load(state.versions[name], now=0.0)


def test_leased_versions_are_loaded_oldest_lease_first_and_the_least_recently_used_are_evicted() -> None:
    state = residency(a=40, b=40, c=40, d=40)
    load(state, "a", "b")
    lease(state, "c", "d")
    assert state.decide_loads(limit=1) == Loads(["a"], ["c"], [])
    assert state.decide_loads(limit=2) == Loads(["a", "b"], ["c", "d"], [])


def test_only_as_many_as_needed_are_evicted() -> None:
    state = residency(a=40, b=40, c=20)
    load(state, "a", "b")
    lease(state, "c")
    assert state.decide_loads() == Loads([], ["c"], [])


def test_a_younger_lease_gives_way_to_an_older_one_and_not_the_reverse() -> None:
    state = residency(host=80, a=40, b=40, c=40)
    numbers = lease(state, "a", "b")
    load(state, "a", "b")
    (third,) = lease(state, "c")
    assert state.decide_loads() == Loads([], [], [])
    state.release(state.versions["a"], numbers[0])
    lease(state, "a")  # again, now the youngest
    assert state.decide_loads() == Loads(["a"], ["c"], [])
    state.release(state.versions["c"], third)
    assert state.decide_loads() == Loads([], [], [])


def test_a_memory_that_holds_fewer_than_are_in_use_is_used_in_turns() -> None:
    state = residency(a=60, b=60)
    load(state, "a")
    lease(state, "a", "b")
    assert state.decide_loads() == Loads([], [], [])
    assert state.unmet
    assert not state.end_turns(now=0.9, length=1.0)
    assert state.end_turns(now=1.0, length=1.0)
    assert state.decide_loads() == Loads(["a"], ["b"], [])
    state.leave_host(state.versions["a"])
    load(state, "b")
    state.versions["b"].since = 1.0
    assert not state.end_turns(now=1.9, length=1.0)
    assert state.end_turns(now=2.0, length=1.0)
    assert state.decide_loads() == Loads(["b"], ["a"], [])


def test_what_is_loading_counts_and_is_not_loaded_twice() -> None:
    state = residency(host=80, a=40, b=40, c=40)
    lease(state, "a", "b", "c")
    state.begin_load(state.versions["a"])
    assert state.host_bytes == 40
    assert state.decide_loads(limit=3) == Loads([], ["b"], [])
    assert state.decide_loads(limit=1) == Loads([], [], [])


def test_a_version_whose_load_failed_is_not_loaded_again_for_the_same_requests() -> None:
    state = residency(a=40)
    (number,) = lease(state, "a")
    state.versions["a"].failure = TooLarge("too large")
    assert state.decide_loads() == Loads([], [], [])
    state.release(state.versions["a"], number)
    state.versions["a"].failure = None  # as the next request has it
    lease(state, "a")
    assert state.decide_loads() == Loads([], ["a"], [])


def test_an_operation_s_load_is_refused_while_requests_take_all_memory() -> None:
    state = residency(host=80, a=40, b=40, c=40)
    load(state, "a", "b")
    lease(state, "a", "b")
    assert state.decide_loads(["c"]) == Loads([], [], ["c"])
    assert state.decide_loads(["a"]) == Loads([], [], [])


def test_on_a_gpu_what_is_on_the_device_needs_no_host_memory() -> None:
    state = residency(host=40, device=80, a=40, b=40)
    state.enter_device(state.versions["a"], 1)
    lease(state, "a", "b")
    assert state.decide_loads() == Loads([], ["b"], [])


def test_slots_go_to_the_least_recently_used_versions_that_are_neither_needed_nor_pinned() -> None:
    state = residency(a=10, b=20, c=30, d=40)
    for slot, name in enumerate("abc"):
        state.enter_device(state.versions[name], slot)
    assert state.decide_slots(["a"]) == []
    assert state.decide_slots(["d"]) == ["a"]
    state.apply("a", NameRecord(["a"], pinned=True))
    assert state.decide_slots(["b", "d"]) == ["c"]
    assert state.decide_slots(["b", "c", "d"]) is None


def test_slots_are_bounded_by_the_device_s_bytes_too() -> None:
    state = residency(device=60, slots=9, a=10, b=20, c=30, d=40)
    for slot, name in enumerate("abc"):
        state.enter_device(state.versions[name], slot)
    assert state.decide_slots(["d"]) == ["a", "b", "c"]
    state.leave_device(state.versions["c"])
    assert state.decide_slots(["c"]) == []
    assert state.decide_slots(["a", "d"]) == ["b"]


def test_pins_leave_a_slot_and_half_of_the_memory() -> None:
    state = residency(host=100, slots=3, a=30, b=30, c=10, d=10)
    state.check_pins("a", "a", 30)
    state.apply("a", NameRecord(["a"], pinned=True))
    with pytest.raises(AdapterBusy, match="50 bytes"):
        state.check_pins("b", "b", 30)
    state.check_pins("c", "c", 10)
    state.apply("c", NameRecord(["c"], pinned=True))
    with pytest.raises(AdapterBusy, match="no slot"):
        state.check_pins("d", "d", 10)
    with pytest.raises(AdapterBusy):
        state.check_publish("a", "new", 60)
    state.check_publish("a", "new", 20)


def test_requests_must_fit_beside_pinned_versions() -> None:
    state = residency(host=100, slots=2, a=30, b=30, c=10)
    state.check_fits(["a", "b"])
    state.apply("c", NameRecord(["c"], pinned=True))
    state.check_fits(["a", "c"])
    with pytest.raises(BadRequest, match="beside pinned"):
        state.check_fits(["a", "b"])
    large = residency(host=100, slots=9, a=60, b=50)
    with pytest.raises(BadRequest, match="110 bytes; 100"):
        large.check_fits(["a", "b"])
    with pytest.raises(TooLarge, match="101 bytes"):
        large.check_size(101)


def test_earlier_versions_are_found_by_digest_and_go_with_their_last_lease() -> None:
    state = residency(v1=1, v2=1, v3=1)
    for name in ("v1", "v2", "v3"):
        state.apply(name, None)
    (number,) = lease(state, "v1")
    state.apply("a", NameRecord(["v3", "v2", "v1"]))
    assert state.stored("a", state.names["a"]).versions == ["v3", "v2"]
    assert state.find(AdapterUse("a", "v1")).digest == "v1"
    with pytest.raises(BadRequest, match="more than one"):
        state.find(AdapterUse("a", "v"))
    state.release(state.versions["v1"], number)
    with pytest.raises(AdapterNotFound):
        state.find(AdapterUse("a", "v1"))
    assert state.find(AdapterUse("a", "v2")).digest == "v2"
    assert not state.versions["v1"].names


def test_under_random_use_memory_is_never_exceeded_and_the_oldest_request_is_always_served() -> None:
    rng = random.Random(0)
    for _ in range(60):
        device = rng.choice((None, 60))
        names = "abcdefgh"
        state = residency(100, 3, device, **{name: rng.randrange(1, 31) for name in names})
        held: list[tuple[Version, int]] = []
        for _ in range(200):
            action = rng.random()
            if action < 0.5 and len(held) < 12:
                version = state.versions[rng.choice(names)]
                held.append((version, state.lease(version)))
            elif action < 0.6 and len(state.pinned) < 2:
                name = rng.choice(names)
                try:
                    state.check_pins(name, name, state.versions[name].bytes)
                    state.apply(name, NameRecord([name], pinned=True))
                except AdapterBusy:
                    pass
            elif action < 0.7 and state.pinned:
                name = rng.choice(sorted(state.pinned))
                state.apply(name, NameRecord([name]))
            decision = state.decide_loads(limit=8)
            for digest in decision.evict:
                version = state.versions[digest]
                if device is None and version.slot is not None:
                    state.leave_device(version)
                state.leave_host(version)
            load(state, *decision.load)
            assert state.host_bytes <= 100
            assert not set(decision.evict) & (state.pinned | {"none"})
            if held:
                oldest, number = held[0]
                assert oldest.in_memory
                evict = state.decide_slots([oldest.digest])
                assert evict is not None
                for digest in evict:
                    state.leave_device(state.versions[digest])
                if oldest.slot is None:
                    state.enter_device(oldest, 1)
                state.touch(oldest)
                assert len(state.device) <= 3
                assert device is None or state.device.bytes <= device
                if rng.random() < 0.7:
                    state.release(oldest, number)
                    held.pop(0)


def test_decisions_do_not_depend_on_how_many_versions_are_on_disk() -> None:
    class NotIterated(dict[str, Version]):
        def __iter__(self) -> Iterator[str]:
            raise AssertionError("a decision looked at every version")

        values = items = keys = __iter__  # type: ignore[assignment]

    state = residency(a=40, b=40, c=40, d=40)
    load(state, "a", "b")
    lease(state, "c", "d")
    state.versions = NotIterated(state.versions)
    assert state.decide_loads(limit=2) == Loads(["a", "b"], ["c", "d"], [])
    assert state.decide_slots(["a", "b"]) == []
    assert state.host_bytes == 80
    assert repr(state) == "<Residency 4 names, 4 versions, 80 of 100 bytes, 0 of 3 slots>"


# --- what training shares ---------------------------------------------------------------------------


def test_adapters_stay_in_what_training_does_not_use_and_leave_when_it_begins() -> None:
    state = residency(training=60, a=40, b=40, c=40, d=40, e=40)
    load(state, "a", "b", "c")
    assert (state.host_bytes, state.excess) == (120, 20)
    (lease_of_d,) = lease(state, "d")
    assert state.decide_loads() == Loads([], ["d"], [])  # 160 of 160
    load(state, "d")
    lease(state, "e")
    assert state.decide_loads() == Loads(["a"], ["e"], [])
    assert state.decide_training() == ["a", "b"]
    state.release(state.versions["d"], lease_of_d)
    for name in ("a", "b"):
        state.leave_host(state.versions[name])
    state.training = True
    assert state.decide_loads() == Loads(["c"], ["e"], [])  # 100 are there now
    assert state.decide_training() == []


def test_requests_and_pins_are_never_promised_what_training_takes() -> None:
    state = residency(training=60, a=110, b=60, c=60)
    with pytest.raises(TooLarge):
        state.check_size(110)
    with pytest.raises(AdapterBusy):
        state.check_pins("b", "b", 60)
    lease(state, "b", "c")
    assert state.decide_loads(limit=2).load == ["b"]  # both would fit now, and not while something is trained


def test_what_is_leased_or_pinned_does_not_leave_for_training() -> None:
    state = residency(training=60, a=50, b=50, c=50)
    load(state, "a", "b", "c")
    lease(state, "a", "c")
    assert state.decide_training() == ["b"]
    lease(state, "b")
    assert state.decide_training() is None
    assert state.excess == 50


def test_on_a_device_of_its_own_training_shares_the_device_only() -> None:
    state = residency(host=100, device=50, training=50, a=40, b=40, c=40)
    load(state, "a", "b")
    state.enter_device(state.versions["a"], 1)
    assert state.decide_slots(["b"]) == []
    state.enter_device(state.versions["b"], 2)
    lease(state, "c")
    assert state.decide_loads() == Loads(["a"], ["c"], [])  # host memory is not shared
    assert state.decide_training() == ["a"]
    state.leave_device(state.versions["a"])
    state.training = True
    assert state.decide_slots(["b", "a"]) is None
