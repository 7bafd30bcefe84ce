"""The loop of a fine-tuning job: batches, optimizer steps, validation and checkpoints, over a run of the engine.

    order, schedule = BatchOrder(…), LearningRate(…)
    position = await train(call, "run", objective, validation, order, schedule, trainer, position, progress)

What a step computes is a function of the position, the run's state and the data, so that a loop that goes on from a
save computes what the one that made it would have.
"""

from __future__ import annotations

import asyncio
import math
from typing import Protocol

import msgspec

from lora_serve.api.fine_tuning.batch_order import BatchOrder
from lora_serve.api.fine_tuning.job_records import Position, TrainerSettings
from lora_serve.api.fine_tuning.objectives import TOKEN_ACCURACY, BatchLoss, Call, Objective
from lora_serve.errors import BadRequest, ServeError
from lora_serve.learning_rate import LearningRate
from lora_serve.training_messages import OptimizerStep, StepResult

EPS = 1e-8  # AdamW's, as in torch

Metrics = dict[str, float]


class Diverged(ServeError):
    """The loss is no number any more."""

    kind = "training_diverged"


class LoopProgress(Protocol):
    """What is told of a loop, and may end it by an exception."""

    async def before_step(self, position: Position) -> None:
        """A step is about to begin: the time to pause."""

    async def stepped(self, position: Position, metrics: Metrics) -> None:
        """A step was done."""

    async def epoch_ended(self, position: Position, metrics: Metrics) -> None:
        """An epoch was done: the time for a checkpoint. `stepped` was called before."""


async def train(
    call: Call,
    run: str,
    objective: Objective,
    validation: Objective | None,
    order: BatchOrder,
    schedule: LearningRate,
    trainer: TrainerSettings,
    position: Position,
    progress: LoopProgress,
) -> Position:
    """Train from a position to the end; returns the last position. Raises `Diverged`, and what `call` raises."""
    scale = objective.gradient_scale
    while not is_complete(trainer, order, position):
        await progress.before_step(position)
        batch = await asyncio.to_thread(order.batch, position.step)  # at an epoch's begin it shuffles
        found = await objective.learn(call, run, batch)
        if not math.isfinite(found.loss):
            raise Diverged(f"the loss of step {position.step + 1} is not finite: try a lower learning rate")
        rate = schedule.at(position.step)
        # AdamW divides the scale of gradients out, but for eps and the largest norm.
        operation = OptimizerStep(
            run,
            rate,
            eps=EPS * scale,
            weight_decay=trainer.weight_decay,
            max_grad_norm=trainer.max_grad_norm * scale,
        )
        try:
            step = msgspec.convert(await call(operation), StepResult)
        except BadRequest as error:
            raise Diverged(f"step {position.step + 1} cannot be made: {error.message}") from None
        position = msgspec.structs.replace(position, step=position.step + 1, tokens=position.tokens + found.tokens)
        metrics = {
            "step": position.step,
            "total_steps": order.steps,
            "trained_tokens": position.tokens,
            "train_loss": found.loss,
            **{f"train_{name}": value for name, value in found.metrics.items()},
            "learning_rate": rate,
            "grad_norm": step.grad_norm / scale,
        }
        if order.ends_epoch(position.step):
            if validation is not None:
                measured = await validation.measure(call, run)
                if not math.isfinite(measured.loss):
                    raise Diverged(f"the validation loss of step {position.step} is not finite: try a lower rate")
                metrics |= _validation_metrics(measured)
                position = _compared(position, measured.loss)
            await progress.stepped(position, metrics)
            await progress.epoch_ended(position, metrics)
        else:
            await progress.stepped(position, metrics)
    return position


def _validation_metrics(measured: BatchLoss) -> Metrics:
    own = {name: value for name, value in measured.metrics.items() if name == TOKEN_ACCURACY}
    return {
        "valid_loss": measured.loss,
        **{f"valid_{name}": value for name, value in own.items()},
        "full_valid_loss": measured.loss,
        **{f"full_valid_{name}": value for name, value in measured.metrics.items()},
    }


def _compared(position: Position, loss: float) -> Position:
    """The position after a validation with this loss."""
    if position.best_loss is None or loss < position.best_loss:
        return msgspec.structs.replace(position, best_loss=loss, best_step=position.step, worse=0)
    return msgspec.structs.replace(position, worse=position.worse + 1)


def is_complete(trainer: TrainerSettings, order: BatchOrder, position: Position) -> bool:
    """Whether training ends at a position: after all steps, or early."""
    patience = trainer.early_stopping_patience
    return position.step >= order.steps or (patience is not None and position.worse >= patience)
