"""Fairness: who was served least, by key, priority and adapters, is owed most; nobody waits for ever."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from lora_serve.api.openai.schemas import MOST_PRIORITY
from lora_serve.engine.fairness import LEVEL, Fairness, Share


def enter(fairness: Fairness, key: str, weight: float, priority: int, adapters: tuple[str, ...]) -> Share:
    """The share of a sequence that waits."""
    share = fairness.enter(key, weight, priority, adapters)
    share.begin_waiting()
    return share


def leave(fairness: Fairness, share: Share) -> None:
    """The only sequence of a share goes."""
    share.end_waiting()
    fairness.leave(share)


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
    shares = {"one": enter(fairness, "one", 1, 0, ()), "heavy": enter(fairness, "heavy", 3, 0, ())}
    shares |= {f"many{n}": enter(fairness, "many", 1, 0, (str(n),)) for n in range(10)}
    served = serve(shares, 5000)
    many = sum(count for name, count in served.items() if name.startswith("many"))
    assert served["one"] == pytest.approx(1000, abs=2)
    assert served["heavy"] == pytest.approx(3000, abs=5)
    assert many == pytest.approx(1000, abs=2)
    assert max(served[f"many{n}"] for n in range(10)) - min(served[f"many{n}"] for n in range(10)) <= 1


def test_a_priority_level_gets_most_and_never_all() -> None:
    fairness = Fairness()
    shares = {"urgent": enter(fairness, "", 1, -1, ()), "usual": enter(fairness, "", 1, 0, ())}
    served = serve(shares, 900)
    assert served["urgent"] / served["usual"] == pytest.approx(LEVEL, rel=0.02)


def test_who_was_away_does_not_make_up_for_it() -> None:
    fairness = Fairness()
    shares = {"steady": enter(fairness, "steady", 1, 0, ()), "late": enter(fairness, "late", 1, 0, ())}
    leave(fairness, shares["late"])
    serve(shares, 1000, ("steady",))
    shares["late"] = enter(fairness, "late", 1, 0, ())
    served = serve(shares, 100)
    assert abs(served["steady"] - served["late"]) <= 2


def test_leaving_and_coming_back_gains_nothing() -> None:
    fairness = Fairness()
    steady, coming = enter(fairness, "steady", 1, 0, ()), enter(fairness, "coming", 1, 0, ())
    served: Counter[str] = Counter()
    for _ in range(1000):
        share = min((steady, coming), key=lambda each: each.rank)
        share.charge(0, 1)
        served["steady" if share is steady else "coming"] += 1
        if share is coming:
            leave(fairness, coming)
            coming = enter(fairness, "coming", 1, 0, ())
    assert served["coming"] <= served["steady"] + 2


def test_rows_of_a_full_step_that_a_share_has_a_right_to() -> None:
    fairness = Fairness()
    hog, other = enter(fairness, "hog", 1, 0, ()), enter(fairness, "other", 1, 0, ("a",))
    hog.add_holders(8)
    assert other.is_entitled(8)
    assert not hog.is_entitled(8)
    other.add_holders(4)
    assert not other.is_entitled(8)
    sibling = enter(fairness, "other", 1, 0, ("b",))
    assert sibling.is_entitled(8)  # within its key
    assert not enter(fairness, "other", 1, 0, ("a",)).is_entitled(8)


def test_a_set_is_owed_what_its_share_that_is_owed_most_is_owed() -> None:
    fairness = Fairness()
    first, second = enter(fairness, "x", 1, 0, ("a",)), enter(fairness, "y", 1, 0, ("a",))
    first.charge(5, 0)
    assert fairness.rank(("a",)) == second.rank < first.rank
    leave(fairness, second)
    assert fairness.rank(("a",)) == first.rank
    leave(fairness, first)
    assert not fairness.adapter_sets


def test_nothing_is_kept_of_shares_that_are_gone() -> None:
    fairness, draw = Fairness(), random.Random(0)
    active: list[Share] = []
    for number in range(20_000):
        active.append(enter(fairness, f"key{number}", 1, draw.choice((0, 1)), (str(draw.randrange(9)),)))
        active[-1].charge(10, 1)
        if len(active) > 50:
            leave(fairness, active.pop(draw.randrange(len(active))))
    assert len(fairness._root.children) < 5000
    for share in active:
        leave(fairness, share)
    assert fairness._root.active == 0
    assert fairness._root.active_weight == 0.0


def test_what_was_not_asked_for_is_not_made_up_for_by_who_always_asked_for_a_little() -> None:
    fairness = Fairness()
    hog, modest = enter(fairness, "hog", 1, 0, ()), enter(fairness, "modest", 1, 0, ())
    modest.end_waiting()  # it runs all the time, and never waits
    serve({"hog": hog}, 1000)
    serve({"modest": modest}, 10)
    modest.begin_waiting()
    served = serve({"hog": hog, "modest": modest}, 100)
    assert abs(served["hog"] - served["modest"]) <= 2


@pytest.mark.parametrize("levels", [(0, -MOST_PRIORITY, 0), (MOST_PRIORITY, -MOST_PRIORITY, 3), (1, 0, -1)])
def test_weights_of_all_sizes_are_summed_exactly(levels: tuple[int, ...]) -> None:
    """A sum that forgets a small weight beside a large one is zero when that leaves, and nobody has a share of zero."""
    fairness, draw = Fairness(), random.Random(0)
    for weight in (1 / 1024, 1.0, 1000.0):
        shares = [fairness.enter("key", weight, level, ()) for level in levels]
        others = [fairness.enter(f"key{n}", round(draw.uniform(0.01, 1000) * 1024) / 1024, 0, ()) for n in range(50)]
        for share in others:
            fairness.leave(share)
        fairness.leave(shares.pop(1))
        assert all(isinstance(share.is_entitled(8), bool) for share in shares)
        for share in shares:
            fairness.leave(share)
        assert fairness._root.active_weight == 0.0


def test_a_changed_weight_counts_at_once() -> None:
    fairness = Fairness()
    shares = {"one": fairness.enter("one", 1, 0, ()), "two": fairness.enter("two", 1, 0, ())}
    fairness.enter("two", 3, 0, ())
    served = serve(shares, 400)
    assert served["two"] / served["one"] == pytest.approx(3, rel=0.05)
    assert fairness._root.active_weight == 4.0
