"""Prompts are read no faster than the streams beside them can bear, as far as the steps so far tell."""

from __future__ import annotations

import random

from lora_serve.engine.prefill_pacer import MIN_BUDGET, PrefillPacer


def step(decoding: int, prompt: int) -> float:
    """Seconds on a machine that reads weights in 40 ms and computes a row in 2 ms."""
    return max(0.040, 0.002 * (decoding + prompt)) + 0.002


def test_steps_with_a_prompt_stay_below_twice_the_usual() -> None:
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


def test_the_more_prompts_wait_for_a_stream_the_longer_it_waits_for_them() -> None:
    pacer = PrefillPacer()
    pacer.record(0, 512, step(0, 512))
    pacer.record(1, 0, step(1, 0))
    budgets = [pacer.budget(decoding, prompts) for decoding, prompts in ((1, 7), (2, 6), (4, 4), (7, 1))]
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[0] >= 7 * budgets[-1] > 0


def test_where_prompt_tokens_cost_little_many_are_taken_and_where_much_a_few() -> None:
    quick, slow = PrefillPacer(), PrefillPacer()
    for pacer, each in (quick, 1e-6), (slow, 1.0):
        pacer.record(4, 0, 0.01)
        pacer.record(0, 2000, 2000 * each)
    assert quick.budget(4, 1) > 1000
    assert slow.budget(4, 1) == MIN_BUDGET


def test_one_odd_step_does_not_change_the_pace() -> None:
    pacer = PrefillPacer()
    pacer.record(0, 100, 0.2)
    for _ in range(9):
        pacer.record(4, 0, 0.05)
    usual = pacer.budget(4, 1)
    pacer.record(4, 0, 5.0)
    assert pacer.budget(4, 1) == usual
