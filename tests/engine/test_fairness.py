"""Turns: who is seated when more adapters are wanted than there are slots."""

from __future__ import annotations

from collections import Counter

from lora_serve.engine.fairness import Turns


def test_all_are_seated_when_all_fit() -> None:
    assert Turns(3, 4).seat(1, [("a",), ("b",), ("a",), ()]) == {"a", "b"}


def test_the_oldest_are_seated_first() -> None:
    assert Turns(2, 4).seat(1, [("a",), ("b",), ("c",)]) == {"a", "b"}


def test_a_turn_lasts_a_quantum_and_then_the_longest_waiting_sits() -> None:
    turns = Turns(1, 3)
    seated = [turns.seat(step, [("a",), ("b",), ("c",)]) for step in range(1, 11)]
    assert seated == [{"a"}] * 3 + [{"b"}] * 3 + [{"c"}] * 3 + [{"a"}]


def test_a_seat_is_free_at_once_when_nobody_wants_it_any_more() -> None:
    turns = Turns(1, 100)
    turns.seat(1, [("a",)])
    assert turns.seat(2, [("b",)]) == {"b"}


def test_new_arrivals_do_not_starve_one_that_yielded() -> None:
    turns = Turns(1, 2)
    served: Counter[str] = Counter()
    parties = [("old",)]
    for step in range(1, 60):
        parties = [("old",), *((f"new{arrival}",) for arrival in range(max(0, step - 3), step))]
        served.update(turns.seat(step, parties))
    assert served["old"] >= 10


def test_every_one_of_many_gets_the_same_share() -> None:
    turns = Turns(4, 5)
    served: Counter[str] = Counter()
    for step in range(1, 401):
        served.update(turns.seat(step, [(f"a{i}",) for i in range(10)]))
    assert sum(served.values()) == 1600
    assert max(served.values()) - min(served.values()) <= 10


def test_a_composition_is_seated_whole_or_not_at_all() -> None:
    turns = Turns(3, 2)
    for step in range(1, 40):
        seated = turns.seat(step, [("a", "b"), ("c", "d"), ("e",)])
        assert len(seated) <= 3
        assert any(seated >= set(party) for party in [("a", "b"), ("c", "d")])


def test_compositions_take_turns_too() -> None:
    turns = Turns(2, 2)
    whole: Counter[tuple[str, ...]] = Counter()
    parties = [("a", "b"), ("b", "c"), ("d",)]
    for step in range(1, 61):
        seated = turns.seat(step, parties)
        whole.update(party for party in parties if seated >= set(party))
    assert min(whole[party] for party in parties) >= 10


def test_pinned_adapters_keep_their_seats() -> None:
    turns = Turns(2, 2)
    for step in range(1, 20):
        seated = turns.seat(step, [("p",), ("a",), ("b",)], pinned={"p"})
        assert "p" in seated
        assert len(seated) == 2


SIZES = {"a": 10, "b": 20, "c": 30, "large": 40}


def test_bytes_limit_seats_as_slots_do() -> None:
    turns = Turns(9, 2, 50, SIZES.__getitem__)
    assert turns.seat(1, [("a",), ("b",), ("c",)]) == {"a", "b"}
    assert turns.seat(2, [("b",), ("c",)]) == {"b", "c"}


def test_a_large_adapter_s_turn_comes_and_takes_as_many_seats_as_it_needs() -> None:
    turns = Turns(9, 2, 50, SIZES.__getitem__)
    line = [("a",), ("b",), ("large",)]
    assert turns.seat(1, line) == {"a", "b"}
    assert turns.seat(2, line) == {"a", "b"}
    assert turns.seat(3, line) == {"large"}  # beside it "b" has no room, nor "a" behind that one in the line
    assert turns.seat(5, line) == {"a", "b"}


def test_pinned_adapters_bytes_count() -> None:
    turns = Turns(9, 2, 50, SIZES.__getitem__)
    assert turns.seat(1, [("b",), ("a",)], {"c"}) == {"b", "c"}
    assert not turns.fits({"large"}, {"b"})
