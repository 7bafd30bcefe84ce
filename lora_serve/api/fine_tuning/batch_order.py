"""The order in which a job goes through its examples: a function of its seed, so that it can go on anywhere."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field


@dataclass
class BatchOrder:
    """Batches of examples, each epoch in another order; the last batch of an epoch may be smaller.

    Attributes:
        examples: how many there are.
    """

    examples: int
    batch_size: int
    epochs: int
    seed: int
    _epoch: int = field(default=-1, init=False)  # whose order is in `_order`
    _order: list[int] = field(default_factory=list, init=False)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.examples / self.batch_size)

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def batch(self, step: int) -> list[int]:
        """The examples of a step, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = list(range(self.examples))
            random.Random(f"{self.seed} {epoch}").shuffle(self._order)
            self._epoch = epoch
        return self._order[place * self.batch_size : (place + 1) * self.batch_size]

    def ends_epoch(self, steps: int) -> bool:
        """Whether an epoch is complete after so many steps."""
        return steps % self.steps_per_epoch == 0
