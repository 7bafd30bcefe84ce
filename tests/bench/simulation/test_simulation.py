"""What the scheduler, pacer, fairness and residency promise, shown by the real engine on simulated devices."""

from __future__ import annotations

import random
from statistics import median

import pytest

from bench.report import Goal
from bench.simulation import scenarios
from bench.simulation.best import best_throughput
from bench.simulation.costs import CPU_BF16, CPU_INT8, H200_INTENDED, H200_MEASURED, Costs
from bench.simulation.serving import Hardware, Job, Simulation

DEVICES = [CPU_INT8, H200_MEASURED, H200_INTENDED]


def assert_met(goals: list[Goal]) -> None:
    assert goals
    for goal in goals:
        assert goal.met, goal


@pytest.mark.parametrize("costs", DEVICES, ids=lambda costs: costs.name)
def test_64_clients_get_nine_tenths_of_what_the_best_schedule_would_give(costs: Costs) -> None:
    assert_met(scenarios.throughput(costs, 64, 0, prompt=64, output=64).goals)


@pytest.mark.parametrize("costs", DEVICES, ids=lambda costs: costs.name)
def test_streams_keep_their_pace_beside_long_prompts(costs: Costs) -> None:
    assert_met(scenarios.long_prompts(costs).goals)


@pytest.mark.parametrize("by_key", [False, True], ids=["adapters", "keys"])
def test_others_keep_their_share_beside_one_with_ten_times_the_load(by_key: bool) -> None:
    outcome, _ = scenarios.hog(CPU_INT8, by_key)
    assert_met(outcome.goals)


def test_twice_as_many_hot_adapters_as_slots_do_not_make_the_first_token_late() -> None:
    assert_met(scenarios.cliff(CPU_BF16, "slots").goals)
    assert_met(scenarios.cliff(CPU_INT8, "slots").goals)


def test_twice_as_many_hot_adapters_as_host_memory_holds_take_turns_in_it() -> None:
    outcome = scenarios.cliff(CPU_BF16, "host memory")
    assert outcome.goals[0].value < 2  # 4 if each kept its place until its requests end


def test_requests_that_are_aborted_leave_nothing_and_delay_nobody_for_ever() -> None:
    assert_met(scenarios.aborts(CPU_INT8).goals)


def test_eight_that_arrive_together_with_adapters_wait_no_longer_than_with_the_base() -> None:
    base, own = scenarios.burst(CPU_INT8, adapters=False), scenarios.burst(CPU_INT8, adapters=True)
    assert own.figures["TTFT p99"] <= 1.3 * base.figures["TTFT p99"]


def test_urgent_requests_wait_less_and_the_others_not_for_ever() -> None:
    simulation = Simulation(Hardware(CPU_INT8, seqs=4), {})
    for client in range(20):
        job = Job(32, 32, key="one", priority=-1 if client < 4 else 1)
        simulation.closed_loop([job] * 10)
    served = simulation.run(10_000)
    waits = {level: [each.ttft for each in served if each.job.priority == level] for level in (-1, 1)}
    assert median(waits[-1]) < 0.2 * median(waits[1])
    assert all(each.finished and not each.failed for each in served)


def test_keys_are_served_by_their_weights() -> None:
    simulation = Simulation(Hardware(CPU_INT8, seqs=8), {})
    for key, weight in (("light", 1.0), ("heavy", 3.0)):
        for _ in range(12):
            simulation.closed_loop([Job(16, 32, key=key, weight=weight)] * 100)
    served = simulation.run(40.0)
    tokens = {key: sum(len(each.tokens) for each in served if each.job.key == key) for key in ("light", "heavy")}
    assert tokens["heavy"] / tokens["light"] == pytest.approx(3.0, rel=0.1)


def test_whatever_arrives_all_is_served_and_nothing_is_left() -> None:
    """Random arrivals of all kinds, with little KV, few slots, and little memory for adapters."""
    draw = random.Random(0)
    names = [f"a{number}" for number in range(12)]
    hardware = Hardware(H200_MEASURED, slots=3, host=5 << 20, device=3 << 20, seqs=6, tokens=64, kv_tokens=2000)
    simulation = Simulation(hardware, dict.fromkeys(names, 1 << 20))
    arrivals = []
    for _ in range(400):
        patience = draw.uniform(0.1, 5) if draw.random() < 0.2 else None
        adapter = draw.choice([None, *names])
        job = Job(
            draw.randint(1, 300), draw.randint(1, 60), adapter, draw.choice("abc"), draw.choice((1.0, 4.0)),
            draw.choice((-1, 0, 2)), patience,
        )  # fmt: skip
        arrivals.append((draw.uniform(0, 20), job))
    simulation.open_loop(arrivals)
    served = simulation.run(10_000)
    assert len(served) == 400
    assert all(each.finished is not None and not each.failed for each in served)
    assert all(len(each.tokens) == each.job.output for each in served if each.job.patience is None)
    assert simulation.scheduler.pool.used == 0
    assert not simulation.scheduler.running
    assert not simulation.scheduler.waiting
    assert not simulation.scheduler.fairness.adapter_sets


def test_the_best_schedule_waits_for_others_only_where_that_pays() -> None:
    def speed(costs: Costs, clients: int) -> float:
        return best_throughput(costs, seqs=64, tokens=2048, clients=clients, sizes=[(64, 64)])

    fixed = Costs("", 0.005, 0.0, (0.02, 0.02), 0.0, 0.0, 0.0, 0.0, None, False)
    free = Costs("", 0.005, 0.0, (0.0, 0.0), 0.0, 0.0, 0.0, 0.0, None, False)
    assert speed(free, 64) == pytest.approx(64 / 0.005, rel=0.05)
    assert speed(fixed, 1) == pytest.approx(64 / (64 * 0.005 + 0.02), rel=0.02)
    assert 0.8 < speed(fixed, 64) / speed(free, 64) < 1.0


def test_memory_for_one_adapter_is_enough_for_requests_of_two() -> None:
    """The oldest request's adapter takes the place of one whose sequences run: they must not keep what it needs."""
    hardware = Hardware(CPU_INT8, slots=4, host=1 << 20, seqs=8, kv_tokens=1000)
    simulation = Simulation(hardware, {"a": 1 << 20, "b": 1 << 20})
    for client in range(6):
        simulation.closed_loop([Job(40, 60, "b", key=str(client))] * 20)
    simulation.open_loop([(1.0, Job(600, 5, "a", key="long"))])
    served = simulation.run(10_000)
    assert all(each.finished is not None and not each.failed for each in served)


def test_one_who_asked_for_little_for_long_stops_nobody_when_it_asks_for_more() -> None:
    simulation = Simulation(Hardware(CPU_INT8, seqs=8), {})
    for _ in range(7):
        simulation.closed_loop([Job(10, 200, key="steady")] * 1000)
    for _ in range(2):
        simulation.closed_loop([Job(10, 20, key="modest")] * 10_000)
    for _ in range(20):
        simulation.closed_loop([Job(10, 200, key="modest")] * 1000, start=60.0)
    served = simulation.run(90.0)
    silence = max(gap for each in served if each.job.key == "steady" for gap in each.gaps)
    assert silence < 0.5


def test_costs_are_learnt_although_the_first_step_is_slow_and_all_begin_together() -> None:
    simulation = Simulation(Hardware(CPU_INT8, seqs=32), {})
    simulation.runner.extra = [1.0]
    for _ in range(8):
        simulation.closed_loop([Job(10, 400)] * 100)
    for client in range(2):
        simulation.closed_loop([Job(4000, 2)] * 100, start=5.0 + client)
    served = simulation.run(120.0)
    gaps = sorted(gap for each in served if each.job.prompt == 10 for gap in each.gaps)
    assert gaps[int(0.99 * len(gaps))] < 0.06
