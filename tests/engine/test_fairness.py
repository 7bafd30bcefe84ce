"""Fairness: who was served least, by key, priority and adapters, is owed most; nobody waits for ever."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from lora_serve.engine.fairness import LEVEL, Fairness, Share


def serve(shares: dict[str, Share], steps: int, active: tuple[str, ...] = ()) -> Counter[str]:
    """Serve a token at a time to the share that is owed most; tokens by name."""
    served: Counter[str] = Counter()
    for _ in range(steps):
        name = min(active or shares, key=lambda each: shares[each].rank)
        shares[name].charge(0, 1)
        served[name] += 1
    return served


def test_keys_share_by_weight_whatever_the_number_of_their_adapters() -> None:
    fairness = Fairness()
    shares = {"one": fairness.enter("one", 1, 0, ()), "heavy": fairness.enter("heavy", 3, 0, ())}
    shares |= {f"many{n}": fairness.enter("many", 1, 0, (str(n),)) for n in range(10)}
    served = serve(shares, 5000)
    many = sum(count for name, count in served.items() if name.startswith("many"))
    assert served["one"] == pytest.approx(1000, abs=2)
    assert served["heavy"] == pytest.approx(3000, abs=5)
    assert many == pytest.approx(1000, abs=2)
    assert max(served[f"many{n}"] for n in range(10)) - min(served[f"many{n}"] for n in range(10)) <= 1


def test_a_priority_level_gets_most_and_never_all() -> None:
    fairness = Fairness()
    shares = {"urgent": fairness.enter("", 1, -1, ()), "usual": fairness.enter("", 1, 0, ())}
    served = serve(shares, 900)
    assert served["urgent"] / served["usual"] == pytest.approx(LEVEL, rel=0.02)


def test_who_was_away_does_not_make_up_for_it() -> None:
    fairness = Fairness()
    shares = {"steady": fairness.enter("steady", 1, 0, ()), "late": fairness.enter("late", 1, 0, ())}
    fairness.leave(shares["late"])
    serve(shares, 1000, ("steady",))
    shares["late"] = fairness.enter("late", 1, 0, ())
    served = serve(shares, 100)
    assert abs(served["steady"] - served["late"]) <= 2


def test_leaving_and_coming_back_gains_nothing() -> None:
    fairness = Fairness()
    steady, coming = fairness.enter("steady", 1, 0, ()), fairness.enter("coming", 1, 0, ())
    served: Counter[str] = Counter()
    for _ in range(1000):
        share = min((steady, coming), key=lambda each: each.rank)
        share.charge(0, 1)
        served["steady" if share is steady else "coming"] += 1
        if share is coming:
            fairness.leave(coming)
            coming = fairness.enter("coming", 1, 0, ())
    assert served["coming"] <= served["steady"] + 2


def test_rows_of_a_full_step_that_a_share_has_a_right_to() -> None:
    fairness = Fairness()
    hog, other = fairness.enter("hog", 1, 0, ()), fairness.enter("other", 1, 0, ("a",))
    hog.add_rows(8)
    assert other.is_entitled(8)
    assert not hog.is_entitled(8)
    other.add_rows(4)
    assert not other.is_entitled(8)
    sibling = fairness.enter("other", 1, 0, ("b",))
    assert sibling.is_entitled(8)  # within its key
    assert not fairness.enter("other", 1, 0, ("a",)).is_entitled(8)


def test_a_set_is_owed_what_its_share_that_is_owed_most_is_owed() -> None:
    fairness = Fairness()
    first, second = fairness.enter("x", 1, 0, ("a",)), fairness.enter("y", 1, 0, ("a",))
    first.charge(5, 0)
    assert fairness.rank(("a",)) == second.rank < first.rank
    fairness.leave(second)
    assert fairness.rank(("a",)) == first.rank
    fairness.leave(first)
    assert not fairness.adapter_sets


def test_nothing_is_kept_of_shares_that_are_gone() -> None:
    fairness, draw = Fairness(), random.Random(0)
    active: list[Share] = []
    for number in range(20_000):
        active.append(fairness.enter(f"key{number}", 1, draw.choice((0, 1)), (str(draw.randrange(9)),)))
        active[-1].charge(10, 1)
        if len(active) > 50:
            fairness.leave(active.pop(draw.randrange(len(active))))
    assert len(fairness._root.children) < 5000
    for share in active:
        fairness.leave(share)
    assert fairness._root.active == 0
    assert fairness._root.active_weight == 0.0
