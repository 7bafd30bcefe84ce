"""LoRA affinity: which replica gets a request."""

from __future__ import annotations

import random
from collections import Counter

from lora_serve.replicas.affinity import ReplicaLoad, SentAdapters, rank, residency_level

IDS = ["a", "b", "c"]


def idle(**levels: int) -> list[ReplicaLoad]:
    return [ReplicaLoad(id, 0, levels.get(id, 0)) for id in IDS]


def test_a_request_goes_where_its_adapter_is_and_rather_to_the_device_than_to_host_memory() -> None:
    assert rank("x", idle(b=2), spill_at=8)[0] == "b"
    assert rank("x", idle(a=1, c=2), spill_at=8)[:2] == ["c", "a"]


def test_among_those_that_have_it_the_one_with_less_to_do_is_first() -> None:
    assert rank("x", [ReplicaLoad("a", 5, 2), ReplicaLoad("b", 3, 2), ReplicaLoad("c", 0)], spill_at=8)[0] == "b"


def test_an_adapter_that_none_has_gets_the_same_home_from_every_router_and_homes_are_spread() -> None:
    homes = {f"adapter-{number}": rank(f"adapter-{number}", idle(), 8)[0] for number in range(300)}
    shuffled = idle()
    random.Random(1).shuffle(shuffled)
    assert all(rank(adapter, shuffled, 8)[0] == home for adapter, home in homes.items())
    assert min(Counter(homes.values()).values()) > 70


def test_when_a_replica_goes_only_its_adapters_move() -> None:
    for number in range(100):
        before = rank(f"adapter-{number}", idle(), 8)[0]
        after = rank(f"adapter-{number}", idle()[:2], 8)[0]
        assert after == before or before == "c"


def test_a_busy_home_does_not_get_a_new_adapter() -> None:
    home = rank("x", idle(), 8)[0]
    loads = [ReplicaLoad(id, 7 if id == home else 0) for id in IDS]
    assert rank("x", loads, spill_at=8)[0] != home
    assert rank("x", loads, spill_at=8)[-1] == home


def test_a_saturated_replica_gives_away_and_one_below_the_bound_does_not() -> None:
    def loads(busy: int, others: int) -> list[ReplicaLoad]:
        return [ReplicaLoad("a", busy, 2), ReplicaLoad("b", others), ReplicaLoad("c", others + 1)]

    assert rank("x", loads(8, 1), spill_at=8) == ["b", "c", "a"]
    assert rank("x", loads(7, 1), spill_at=8)[0] == "a"
    assert rank("x", loads(8, 4), spill_at=8)[0] == "a"  # they have as much to do


def test_the_base_goes_to_the_replica_with_the_least_to_do() -> None:
    assert rank("", [ReplicaLoad("a", 2, 2), ReplicaLoad("b", 0, 2), ReplicaLoad("c", 1, 2)], 8) == ["b", "c", "a"]


def test_replicas_that_failed_or_take_no_requests_are_the_last_resort() -> None:
    loads = [ReplicaLoad("a", 0, 2), ReplicaLoad("b", 0, 2, ready=False), ReplicaLoad("c", 5)]
    assert rank("x", loads, 8, avoid=["a"]) == ["c", "a", "b"]
    assert rank("", loads, 8, avoid=["a"]) == ["c", "a", "b"]
    assert rank("x", [], 8) == []


def test_a_composition_is_as_near_as_its_furthest_adapter() -> None:
    assert residency_level(["x", "y"], {"x", "y"}, set()) == 2
    assert residency_level(["x", "y"], {"x"}, {"y"}) == 1
    assert residency_level(["x", "y"], {"x"}, set()) == 0
    assert residency_level([], set(), set()) == 2


def test_what_was_sent_to_a_replica_is_there_before_statistics_say_so() -> None:
    now = 100.0
    sent = SentAdapters(lambda: now)
    sent.note("x", "a")
    assert sent.holds("x", "a")
    assert not sent.holds("x", "b")
    now += 11
    assert not sent.holds("x", "a")  # they know better by now
