"""Learning rate schedules are those of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from lora_serve.errors import BadRequest
from lora_serve.learning_rate import Decay, LearningRate

NAMES: dict[Decay, str] = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


@pytest.mark.parametrize("decay", NAMES)
@pytest.mark.parametrize("warmup", [0, 4])
def test_rates_are_those_of_transformers(decay: Decay, warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler = get_scheduler(NAMES[decay], optimizer, num_warmup_steps=warmup, num_training_steps=20)
    rate = LearningRate(0.3, steps=20, warmup=warmup, decay=decay)
    for step in range(21):
        assert rate.at(step) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


def test_impossible_schedules_are_refused() -> None:
    with pytest.raises(BadRequest, match="learning rate of -1"):
        LearningRate(-1)
    with pytest.raises(BadRequest, match="30 of 20 steps"):
        LearningRate(1, steps=20, warmup=30)
