"""An engine that trains, driven by messages."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import torch
from engine_session import Session
from support import VOCABULARY

from lora_serve.errors import Failure
from lora_serve.messages import Call, Operation
from lora_serve.training_messages import (
    CreateRun,
    ForwardBackward,
    OptimizerStep,
    RunSettings,
    TrainingExample,
)


class TrainingSession(Session):
    """A session whose calls are numbered."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, **{"training_memory": 1 << 25, "dtype": "float32", **options})
        self._ids = itertools.count(1)
        self.created: set[str] = set()  # names of runs

    @property
    def quanta(self) -> int:
        """Of training, so far."""
        return sum(self.engine.stats().training_quanta_total.values())

    def submit(self, operation: Operation) -> int:
        """Send an operation; the id of its reply."""
        call = next(self._ids)
        if isinstance(operation, CreateRun):
            self.created.add(operation.run)
        self.engine.receive(Call(call, operation))
        return call

    def answer(self, call: int) -> Any:
        """The result of a call, or its Failure, once it is there."""
        deadline = time.monotonic() + 20
        while call not in self.replies:
            self.step()
            assert time.monotonic() < deadline, "no answer"
        reply = self.replies[call]
        return reply.result if reply.failure is None else reply.failure

    def call(self, operation: Operation) -> Any:
        """The result of an operation, which must not fail."""
        found = self.answer(self.submit(operation))
        assert not isinstance(found, Failure), found
        return found

    def failure(self, operation: Operation) -> Failure:
        """How an operation fails."""
        found = self.answer(self.submit(operation))
        assert isinstance(found, Failure), found
        return found

    def train(self, run: str, steps: range, rate: float = 5e-3) -> list[float]:
        """Steps of a run, whose batches their numbers determine; the losses."""
        losses = []
        for step in steps:
            losses.append(self.call(ForwardBackward(run, batch(2, seed=step)))["loss"])
            self.call(OptimizerStep(run, rate))
        return losses


def create(run: str, **settings: Any) -> CreateRun:
    """A small run."""
    return CreateRun(run, RunSettings(**{"r": 4, "lora_alpha": 8, **settings}), owner=run)


def batch(count: int, seed: int = 0, length: int = 12, weight: float = 0.1) -> list[TrainingExample]:
    """Random sequences, whose second halves have a loss."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, VOCABULARY, (count, length + 1), generator=generator).tolist()
    half = length // 2
    return [TrainingExample(row[:-1], row[1:], {"weights": [0.0] * half + [weight] * (length - half)}) for row in rows]
