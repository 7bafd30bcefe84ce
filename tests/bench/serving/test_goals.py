"""Goals follow from the measured runs."""

from __future__ import annotations

from bench.report import goal_table
from bench.serving.goals import evaluate
from bench.serving.summary import Summary


def summary(throughput: float) -> Summary:
    nan = float("nan")
    return Summary(throughput, nan, nan, nan, nan, nan, nan, nan, 1, 0, 1, 1.0)


def test_each_goal_is_the_ratio_that_it_names_beside_its_target() -> None:
    over_http = {
        "none": [summary(100.0), summary(90.0), summary(500.0)],
        "one": [summary(80.0)],
        "distinct": [summary(78.0)],
        "plain base": [summary(101.0)],
    }
    decode = {"step": 0.06, "floor": 0.03, "ratio": 2.0, "bandwidth": 3e10, "flops": 3e11}
    in_process = [
        {
            "engine": {"distinct": 104.0},
            "decode": {"none": decode},
            "memory": {"bytes_over_file": 1.01, "taken": 10, "freed": 10, "adapters": 1},
        },
        {"engine": {"distinct": 104.0}, "decode": {"none": decode}},
    ]
    goals = evaluate(over_http, in_process, [1, 2, 3, 9, 11, 12])
    assert [(goal.number, round(goal.value, 3), goal.met) for goal in goals] == [
        (1, 0.975, True),
        (2, 0.8, False),
        (3, 0.99, True),
        (9, 1.01, True),
        (9, 1.0, True),
        (11, 2.0, False),
        (12, 0.75, False),
    ]
    assert [goal.number for goal in evaluate(over_http, [], [2])] == [2]
    printed = goal_table(goals).splitlines()
    assert len({len(line) for line in printed}) == 1
    assert "80.0 ÷ 100.0 tok/s" in printed[3]
    assert printed[3].rstrip(" |").endswith("no")
