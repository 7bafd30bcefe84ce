"""StepCosts: fixed times and times per row are told apart from durations of steps alone."""

from __future__ import annotations

import random

import pytest

from lora_serve.engine.step_costs import StepCosts, padded


def learn(decode: float, row: float, fixed: float, token: float, *, steps: int = 60, noise: float = 0.05) -> StepCosts:
    draw, costs = random.Random(0), StepCosts()
    for _ in range(steps):
        rows, prompt = draw.randrange(1, 33), draw.choice((0, 0, 16, 64, 200, 512))
        seconds = decode + row * rows + (fixed + token * prompt if prompt else 0.0)
        costs.record(rows, prompt, seconds * draw.uniform(1 - noise, 1 + noise))
    return costs


@pytest.mark.parametrize(
    ("decode", "row", "fixed", "token"),
    [(0.0235, 6e-4, 0.0, 0.0021), (0.0049, 3e-5, 0.0175, 1.4e-5), (0.0049, 3e-5, 5e-4, 2.2e-5)],
    ids=["a CPU", "a GPU whose prompts are not replayed", "a GPU whose prompts are"],
)
def test_the_parts_of_a_step_are_told_apart(decode: float, row: float, fixed: float, token: float) -> None:
    costs = learn(decode, row, fixed, token)
    for rows in (2, 30):
        assert costs.decode(rows) == pytest.approx(decode + row * rows, rel=0.15)
        for prompt in (32, 400):
            whole = decode + row * rows + fixed + token * prompt
            assert costs.mixed(rows, prompt) == pytest.approx(whole, rel=0.2)
    assert costs.fixed == pytest.approx(fixed, abs=0.15 * (decode + fixed))


def test_a_change_is_learnt_and_an_outlier_is_not() -> None:
    costs = learn(0.02, 5e-4, 0.0, 0.002)
    before = costs.mixed(8, 100)
    costs.record(8, 100, 5.0)
    assert costs.mixed(8, 100) < 1.6 * before
    for _ in range(40):
        costs.record(8, 100, 0.1)
    assert costs.mixed(8, 100) == pytest.approx(0.1, rel=0.1)


def test_nothing_is_known_before_steps_of_both_kinds() -> None:
    costs = StepCosts()
    costs.record(4, 100, 9.0)  # the first step is no example of the others
    assert not costs.known
    costs.record(4, 0, 0.02)
    assert not costs.known
    costs.record(0, 100, 0.1)
    assert costs.known


def test_padding_counts_as_prompt_tokens_and_chunks_can_fill_it() -> None:
    buckets = (16, 64, 128, 256)
    costs = StepCosts(buckets)
    for rows, prompt in (
        (8, 0),
        (8, 0),
        *((8, prompt) for prompt in (40, 56, 100, 120, 200, 248) * 10),
        *((8, 0),) * 9,
    ):
        shown = padded(rows + prompt, buckets) - rows if prompt else 0
        costs.record(rows, prompt, 0.005 + (0.001 if prompt else 0) + 1e-4 * shown)
    assert costs.mixed(8, 57) == costs.mixed(8, 120) == pytest.approx(0.005 + 0.001 + 1e-4 * 120, rel=0.1)
    assert costs.mixed(8, 300) > costs.mixed(8, 248)  # beyond the last nothing is padded
    assert [costs.filling(8, prompt) for prompt in (1, 8, 55, 56, 119, 120, 247, 248, 249)] == [
        *(8, 8, 8, 56, 56, 120, 120, 248, 249)
    ]
    assert costs.filling(60, 3) == 4  # no smaller bucket holds the rows that decode
    assert costs.next_filling(8, 56) == 120
    assert StepCosts().filling(8, 55) == StepCosts().next_filling(8, 54) == 55
