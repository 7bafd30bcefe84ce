"""The prefill budget bounds how much prompts slow down the streams beside them, from durations of earlier steps."""

from __future__ import annotations

import random

from lora_serve.engine.prefill_pacer import MIN_BUDGET, PrefillPacer


def step(decoding: int, prompt: int) -> float:
    """Seconds on a machine that reads weights in 40 ms and computes a row in 2 ms."""
    return max(0.040, 0.002 * (decoding + prompt)) + 0.002


def test_steps_with_prefill_take_less_than_twice_a_decode_step() -> None:
    draw = random.Random(0)
    pacer = PrefillPacer()
    assert pacer.budget(8, 1) == 2 * MIN_BUDGET
    pacer.record(0, 512, step(0, 512))
    for _ in range(200):
        prompt = draw.choice([0, pacer.budget(8, 1), draw.randint(1, pacer.budget(8, 1))])
        seconds = step(8, prompt) * draw.uniform(0.95, 1.1)
        pacer.record(8, prompt, seconds)
        assert seconds < 2 * step(8, 0)
    assert pacer.budget(8, 1) > 16  # what the machine can do in that time


def test_the_budget_grows_with_the_number_of_waiting_prompts_per_stream() -> None:
    pacer = PrefillPacer()
    pacer.record(0, 512, step(0, 512))
    pacer.record(1, 0, step(1, 0))
    budgets = [pacer.budget(decoding, prompts) for decoding, prompts in ((1, 7), (2, 6), (4, 4), (7, 1))]
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[0] >= 7 * budgets[-1] > 0


def test_the_budget_is_large_if_prompt_tokens_are_cheap_and_small_if_they_are_not() -> None:
    quick, slow = PrefillPacer(), PrefillPacer()
    for pacer, each in (quick, 1e-6), (slow, 1.0):
        pacer.record(4, 0, 0.01)
        pacer.record(0, 2000, 2000 * each)
    assert quick.budget(4, 1) > 1000
    assert slow.budget(4, 1) == MIN_BUDGET


def test_one_outlier_does_not_change_the_budget() -> None:
    pacer = PrefillPacer()
    pacer.record(0, 100, 0.2)
    for _ in range(9):
        pacer.record(4, 0, 0.05)
    usual = pacer.budget(4, 1)
    pacer.record(4, 0, 5.0)
    assert pacer.budget(4, 1) == usual
