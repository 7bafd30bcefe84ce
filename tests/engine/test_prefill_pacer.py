"""Prompts are read no faster than the streams beside them can bear, as far as the steps so far tell."""

from __future__ import annotations

import random

from lora_serve.engine.prefill_pacer import LEAST, PrefillPacer


def step(decoding: int, prompt: int) -> float:
    """Seconds on a machine that reads weights in 40 ms and computes a row in 2 ms."""
    return max(0.040, 0.002 * (decoding + prompt)) + 0.002


def test_steps_with_a_prompt_stay_below_twice_the_usual() -> None:
    draw = random.Random(0)
    pace = PrefillPacer()
    assert pace.room(8, 1) == 2 * LEAST
    pace.note(0, 512, step(0, 512))
    for _ in range(200):
        prompt = draw.choice([0, pace.room(8, 1), draw.randint(1, pace.room(8, 1))])
        seconds = step(8, prompt) * draw.uniform(0.95, 1.1)
        pace.note(8, prompt, seconds)
        assert seconds < 2 * step(8, 0)
    assert pace.room(8, 1) > 16  # what the machine can do in that time


def test_the_more_prompts_wait_for_a_stream_the_longer_it_waits_for_them() -> None:
    pace = PrefillPacer()
    pace.note(0, 512, step(0, 512))
    pace.note(1, 0, step(1, 0))
    rooms = [pace.room(decoding, prompts) for decoding, prompts in ((1, 7), (2, 6), (4, 4), (7, 1))]
    assert rooms == sorted(rooms, reverse=True)
    assert rooms[0] >= 7 * rooms[-1] > 0


def test_where_prompt_tokens_cost_little_many_are_taken_and_where_much_a_few() -> None:
    quick, slow = PrefillPacer(), PrefillPacer()
    for pace, each in (quick, 1e-6), (slow, 1.0):
        pace.note(4, 0, 0.01)
        pace.note(0, 2000, 2000 * each)
    assert quick.room(4, 1) > 1000
    assert slow.room(4, 1) == LEAST


def test_one_odd_step_does_not_change_the_pace() -> None:
    pace = PrefillPacer()
    pace.note(0, 100, 0.2)
    for _ in range(9):
        pace.note(4, 0, 0.05)
    usual = pace.room(4, 1)
    pace.note(4, 0, 5.0)
    assert pace.room(4, 1) == usual
