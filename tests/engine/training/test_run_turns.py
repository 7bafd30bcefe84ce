"""Who is next: priority, then owners' time, then age."""

from __future__ import annotations

from collections import Counter

from lora_serve.engine.training.run_turns import RunTurn, RunTurns


def serve(turns: RunTurns, waiting: list[RunTurn], times: int, seconds: dict[str, float]) -> Counter[str]:
    """Serve the first one again and again; the seconds that each run got."""
    got: Counter[str] = Counter()
    for _ in range(times):
        first = turns.in_order(waiting)[0]
        turns.charge(first.owner, seconds[first.run])
        got[first.run] += seconds[first.run]
    return got


def test_owners_get_equal_time_however_many_runs_they_have_and_however_long_these_take() -> None:
    waiting = [RunTurn("a1", "a", 0, 0), RunTurn("a2", "a", 0, 1), RunTurn("b", "b", 0, 2)]
    got = serve(RunTurns(), waiting, 400, {"a1": 1.0, "a2": 1.0, "b": 4.0})
    assert got["a1"] + got["a2"] == got["b"]


def test_a_higher_priority_goes_first_and_among_equals_who_came_first() -> None:
    waiting = [RunTurn("late", "a", 0, 3), RunTurn("early", "b", 0, 1), RunTurn("urgent", "c", 1, 9)]
    assert [turn.run for turn in RunTurns().in_order(waiting)] == ["urgent", "early", "late"]


def test_who_was_away_has_no_claim_to_the_time_before() -> None:
    turns = RunTurns()
    a, b = RunTurn("a", "a", 0, 0), RunTurn("b", "b", 0, 1)
    serve(turns, [a], 100, {"a": 1.0})
    got = serve(turns, [a, b], 100, {"a": 1.0, "b": 1.0})
    assert got["a"] == got["b"]
    turns.forget("a")
    assert turns.in_order([b, a])[0].run == "a"
