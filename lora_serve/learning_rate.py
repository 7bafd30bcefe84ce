"""Learning rate schedules: constant, linear and cosine, each after a linear warm-up, as in transformers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lora_serve.errors import BadRequest

Decay = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class LearningRate:
    """The learning rate of each optimizer step.

    Attributes:
        peak: the rate after the warm-up.
        steps: optimizer steps in all, at which "linear" and "cosine" reach zero.
        warmup: of these, those over which the rate grows from zero.
    """

    peak: float
    steps: int = 1
    warmup: int = 0
    decay: Decay = "constant"

    def __post_init__(self) -> None:
        if not math.isfinite(self.peak) or self.peak < 0:
            raise BadRequest(f"a learning rate of {self.peak} is none", param="learning_rate")
        if self.steps < 1 or not 0 <= self.warmup <= self.steps:
            raise BadRequest(f"{self.warmup} of {self.steps} steps cannot be a warm-up", param="warmup")

    def at(self, step: int) -> float:
        """The rate of a step, counted from 0."""
        if step < self.warmup:
            return self.peak * step / self.warmup
        if self.decay == "constant":
            return self.peak
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.peak * (1 - done if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done)))
