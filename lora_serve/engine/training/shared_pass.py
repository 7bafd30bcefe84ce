"""A pass for several runs at once: which examples of which runs it has, and what comes of it for each of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from lora_serve.engine.training.fused_pass import Quantum
from lora_serve.engine.training.micro_batch import MicroBatch, MicroBatchResult
from lora_serve.engine.training.run_operations import QueuedPass, TrainingRun, parts_within
from lora_serve.engine.training.trainer import Trainer
from lora_serve.errors import EngineFault, ServeError
from lora_serve.training_messages import ForwardBackward

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PassShare:
    """Parts of a run's examples, the first ones that no pass has had yet, and their tokens."""

    run: TrainingRun
    operation: QueuedPass
    parts: int
    tokens: int


def fill_pass(candidates: Sequence[tuple[TrainingRun, QueuedPass]], wanted: int, most: int) -> list[PassShare]:
    """What a pass should have: whole parts of the runs in this order, of one kind: with gradients or without.

    Args:
        wanted: tokens that are aimed at; at least one part is taken.
        most: tokens that memory allows.
    """
    shares: list[PassShare] = []
    for run, operation in candidates:
        if shares and not _go_together(shares[0].operation, operation):
            continue
        free = min(wanted, most) - sum(share.tokens for share in shares)
        count = parts_within(operation.sizes, operation.taken, free)
        if not shares and not count:
            count = 1
        if count:
            tokens = sum(operation.sizes[operation.taken : operation.taken + count])
            shares.append(PassShare(run, operation, count, tokens))
    return shares


def _go_together(one: QueuedPass, other: QueuedPass) -> bool:
    """Whether two are the same work: a pass that needs log-probabilities first takes longer for all."""
    return one.forward_only == other.forward_only and _is_linear(one) == _is_linear(other)


def _is_linear(operation: QueuedPass) -> bool:
    """Whether the gradient does not depend on log-probabilities."""
    return operation.loss.formula.value is None


class SharedPass:
    """A running pass.

    Attributes:
        next: the next quantum.

    Raises BadRequest if a share does not fit the base or the memory.
    """

    def __init__(self, trainer: Trainer, shares: Sequence[PassShare]) -> None:
        self.shares = shares
        self.gradients = not shares[0].operation.forward_only
        batches = [batch for share in shares for batch in _micro_batches(share)]
        self._pass = trainer.forward_backward(batches) if self.gradients else trainer.evaluate(batches)
        for share in shares:
            share.operation.taken += share.parts

    def __repr__(self) -> str:
        return f"<SharedPass of {len(self.shares)} runs, {self._pass!r}>"

    @property
    def tokens(self) -> int:
        return self._pass.tokens

    @property
    def next(self) -> Quantum:
        return self._pass.quanta[self._pass.done]

    def advance(self) -> bool:
        """Run a quantum; whether more remain."""
        return self._pass.advance()

    def finish(self) -> None:
        """Give the results to the runs; operations that are complete are answered."""
        results = iter(self._pass.results)
        for share in self.shares:
            run, operation = share.run, share.operation
            own = list(islice(results, share.parts))
            if run.closed:
                continue
            failed = next((each for each in own if each.error is not None), None)
            if failed is not None:
                self._fail(share, _loss_error(run, failed))
                continue
            operation.results += own
            if operation.taken == len(operation.sizes):
                run.finish(operation.result)

    def fail(self, error: ServeError) -> None:
        """End the operations with an error; gradients that they added are lost."""
        for share in self.shares:
            if not share.run.closed and share.run.first is share.operation:  # it may be finished already
                self._fail(share, error)

    def _fail(self, share: PassShare, error: ServeError) -> None:
        if self.gradients:
            share.run.lose_gradients()
        share.run.finish(error)


def _micro_batches(share: PassShare) -> list[MicroBatch]:
    """The share's parts."""
    operation = share.operation.operation
    assert isinstance(operation, ForwardBackward)
    taken = share.operation.taken
    return [
        share.operation.loss.micro_batch(share.run.trained, part, all_logprobs=operation.all_logprobs)
        for part in share.operation.parts[taken : taken + share.parts]
    ]


def _loss_error(run: TrainingRun, result: MicroBatchResult) -> ServeError:
    """What the client is told of a loss function that raised."""
    if isinstance(result.error, ServeError):
        return result.error
    log.error("the loss function of run %s failed", run.name, exc_info=result.error)
    return EngineFault("the loss function failed on these examples")
