"""The prefill budget bounds how much prompts slow down the streams beside them, from durations of earlier steps."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from lora_serve.engine.prefill_pacer import (
    FIRST,
    GRANULE,
    MOST_EXCEEDED,
    MOST_HELD,
    UNNOTICED_GAP,
    Demand,
    PrefillPacer,
    _rounded,
)
from lora_serve.engine.step_costs import padded

Step = Callable[[int, int], float]  # rows that decode, prompt tokens → seconds


def cpu(decoding: int, prompt: int) -> float:
    """Reads weights in 40 ms and computes a row in 2 ms, beside which the weights are read."""
    return max(0.040, 0.002 * (decoding + prompt)) + 0.002


def eager_gpu(decoding: int, prompt: int) -> float:
    """Replays steps that decode; any prompt token costs 19 ms more, further ones nearly nothing."""
    return 0.005 + 2e-5 * decoding + (0.019 + 2e-5 * prompt if prompt else 0.0)


class Clock:
    """Seconds that a test lets pass."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def demand(decoding: int, prefills: int, tokens: int) -> Demand:
    return Demand(decoding, prefills, tokens, oldest=0.0)


def taught(
    step: Step, *, itl: float | None = None, ttft: float | None = None, clock: Callable[[], float] = lambda: 0.0
) -> PrefillPacer:
    """A pacer that saw some steps of every kind."""
    pacer, draw = PrefillPacer(itl, ttft, clock), random.Random(0)
    for _ in range(40):
        rows, prompt = draw.choice((0, 1, 8, 32)), draw.choice((0, 0, 16, 64, 256))
        if rows or prompt:
            pacer.record(rows, prompt, step(rows, prompt))
    return pacer


def run(pacer: PrefillPacer, step: Step, waiting: Demand, clock: Clock | None = None) -> tuple[float, int]:
    """Steps until all these prompts are computed: seconds, and steps with prompt tokens."""
    clock, mixed = clock or Clock(), 0
    begin = clock.now
    while waiting.tokens > 0:
        prompt = min(pacer.budget(waiting), waiting.tokens)
        pacer.record(waiting.decoding, prompt, step(waiting.decoding, prompt))
        clock.now += step(waiting.decoding, prompt)
        mixed += prompt > 0
        waiting = waiting._replace(tokens=waiting.tokens - prompt)
        assert clock.now - begin < 100
    return clock.now - begin, mixed


def test_steps_with_prompts_take_less_than_twice_a_decode_step() -> None:
    draw, pacer = random.Random(0), PrefillPacer()
    assert pacer.budget(demand(8, 1, 500)) == FIRST
    pacer.record(0, 512, cpu(0, 512))
    for _ in range(200):
        prompt = min(pacer.budget(demand(8, 1, 500)), draw.choice([0, 8, 500, 500]))
        seconds = cpu(8, prompt) * draw.uniform(0.95, 1.1)
        pacer.record(8, prompt, seconds)
        assert seconds < 2 * cpu(8, 0)
    assert pacer.budget(demand(8, 1, 500)) >= 16  # what the machine can do in that time
    assert not pacer.gaps_exceeded


def test_a_fixed_cost_does_not_make_the_budget_small_for_ever() -> None:
    """Every prompt token costs 19 ms here, and 500 cost 29: chunks keep no bound and only multiply the cost."""
    pacer = PrefillPacer()
    pacer.record(0, 128, eager_gpu(0, 128))
    for _ in range(50):
        pacer.record(32, 0, eager_gpu(32, 0))
    seconds, mixed = run(pacer, eager_gpu, demand(32, 4, 512))
    for _ in range(5):
        seconds, mixed = run(pacer, eager_gpu, demand(32, 4, 512))
    assert mixed <= 3
    assert seconds < 2 * MOST_HELD + 0.1  # held before each of them
    assert pacer.gaps_exceeded


def test_prompts_wait_for_each_other_only_where_steps_with_prompts_have_a_fixed_cost() -> None:
    one = demand(32, 1, 100)
    assert taught(cpu).budget(one) > 0
    pacer, waited = taught(eager_gpu), 0.0
    while not pacer.budget(one):
        pacer.record(32, 0, eager_gpu(32, 0))
        waited += eager_gpu(32, 0)
    assert 0.02 < waited < MOST_HELD
    many, waited_many = taught(eager_gpu), 0.0
    while not many.budget(demand(32, 16, 1600)):
        many.record(32, 0, eager_gpu(32, 0))
        waited_many += eager_gpu(32, 0)
    assert waited_many < waited / 2  # together they have waited for as long sooner


def test_the_budget_grows_with_the_number_of_waiting_prompts_per_stream() -> None:
    pacer = taught(lambda decoding, prompt: 0.04 + 0.002 * prompt)
    budgets = [pacer.budget(demand(decoding, prompts, 1000)) for decoding, prompts in ((1, 7), (2, 6), (4, 4), (7, 1))]
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[0] >= 5 * budgets[-1] > 0


def test_a_stated_gap_is_kept_and_what_cannot_be_kept_is_said() -> None:
    pacer = taught(cpu, itl=0.060)
    for _ in range(30):
        budget = pacer.budget(demand(8, 1, 500))
        assert cpu(8, budget) <= 0.066
        pacer.record(8, budget, cpu(8, budget))
    assert budget == 20  # 24 take 66 ms
    assert not pacer.gaps_exceeded
    impossible = taught(cpu, itl=0.010)
    while not (budget := impossible.budget(demand(8, 1, 500))):
        impossible.record(8, 0, cpu(8, 0))
    assert budget > 200
    assert impossible.gaps_exceeded


@pytest.mark.parametrize("ttft", [0.3, 1.0])
def test_a_stated_time_to_the_first_token_makes_chunks_larger(ttft: float) -> None:
    def linear(decoding: int, prompt: int) -> float:
        return 0.040 + 0.001 * prompt

    clock = Clock()
    alone, _ = run(taught(linear, itl=0.060), linear, demand(8, 1, 480))
    sooner, _ = run(taught(linear, itl=0.060, ttft=ttft, clock=clock), linear, demand(8, 1, 480), clock)
    assert alone > 1.3
    assert sooner < max(1.55 * ttft, 0.85)  # neither can be kept with 0.3: the gap is exceeded too


def test_a_small_gap_is_allowed_however_short_steps_are() -> None:
    pacer = taught(lambda decoding, prompt: 0.001 + 1e-5 * prompt)
    budgets = []
    for _ in range(20):
        budgets.append(pacer.budget(demand(8, 1, 10_000)))
        pacer.record(8, budgets[-1], 0.001 + 1e-5 * budgets[-1])
    assert max(budgets) >= 2000
    assert 0.001 + 1e-5 * max(budgets) <= 1.1 * UNNOTICED_GAP


def test_budgets_are_rounded_so_that_few_differ_unless_all_is_computed() -> None:
    pacer = taught(cpu)
    assert pacer.budget(demand(8, 1, 5)) >= 5
    budgets = {_rounded(budget) for budget in range(1, 1025)}
    assert len(budgets) == 3 + 4 * 8 + 1
    assert all(0.8 * budget < _rounded(budget) <= budget for budget in range(4, 1025))


def test_one_outlier_hardly_changes_the_budget() -> None:
    pacer = taught(cpu)
    usual = pacer.budget(demand(8, 1, 500))
    pacer.record(8, 0, 5.0)
    assert abs(pacer.budget(demand(8, 1, 500)) - usual) <= 2 * GRANULE


BUCKETS = (16, 32, 64, 128, 256, 384, 512, 768, 1024)


def graphed_gpu(decoding: int, prompt: int) -> float:
    """Replays steps of all kinds; those with prompts are padded to a bucket."""
    return (
        0.005 + 2e-5 * decoding + (0.0005 + 2.2e-5 * (padded(decoding + prompt, BUCKETS) - decoding) if prompt else 0)
    )


def unheld(pacer: PrefillPacer, waiting: Demand) -> int:
    """The first budget that is not 0: steps that only decode may come before."""
    while not (budget := pacer.budget(waiting)):
        pacer.record(waiting.decoding, 0, graphed_gpu(waiting.decoding, 0))
    return budget


@pytest.mark.parametrize("decoding", [1, 8, 31, 32, 60, 64, 200])
def test_chunks_fill_buckets_where_steps_are_padded_and_grow_from_one_to_the_next(decoding: int) -> None:
    pacer, waiting = PrefillPacer(buckets=BUCKETS), demand(decoding, 1, 100_000)
    pacer.record(decoding, 0, graphed_gpu(decoding, 0))
    for _ in range(40):
        budget = unheld(pacer, waiting)
        assert decoding + budget in BUCKETS
        pacer.record(decoding, budget, graphed_gpu(decoding, budget))
    gap = pacer._gap(waiting)
    assert graphed_gpu(decoding, budget) <= MOST_EXCEEDED * gap
    following = next(bucket for bucket in BUCKETS if bucket > decoding + budget)
    assert graphed_gpu(decoding, following - decoding) > 0.95 * gap


def test_all_that_waits_is_computed_at_once_if_its_padding_keeps_the_bound() -> None:
    pacers = PrefillPacer(buckets=BUCKETS), PrefillPacer(0.012, buckets=BUCKETS)
    for pacer in pacers:
        draw = random.Random(0)
        for _ in range(60):
            decoding, prompt = draw.choice((1, 16, 32)), draw.choice((0, 16, 100, 200, 400))
            pacer.record(decoding, prompt, graphed_gpu(decoding, prompt))
        pacer.record(32, 400, graphed_gpu(32, 400))
    free, stated = pacers
    assert unheld(free, demand(32, 1, 230)) == 230  # padded to 384, 14 ms
    assert unheld(stated, demand(32, 1, 230)) == 256 - 32
    assert not stated.gaps_exceeded


@pytest.mark.parametrize("every", [1, 3, 10])
def test_prompts_that_others_hold_as_well_begin_in_bounded_time(every: int) -> None:
    """Training holds them for one step now and then: that counts as waiting."""
    pacer, waiting, now, step = taught(eager_gpu), demand(32, 1, 200), 0.0, 0
    while True:
        budget = pacer.hold(waiting) if step % (every + 1) == 0 else pacer.budget(waiting)
        step += 1
        if budget:
            break
        pacer.record(32, 0, eager_gpu(32, 0))
        now += eager_gpu(32, 0)
        assert now <= MOST_HELD + 3 * eager_gpu(32, 0), step
