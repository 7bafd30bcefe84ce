"""Forward and backward pass over micro-batches of several adapters in one flat batch, in quanta.

A quantum is one layer forwards, one layer backwards, or the LM head over some rows. An engine runs them between its own
steps, and may stop for good after any of them. Micro-batches meet in nothing but products of rows with weights: each
one's loss is its own, and what is not finite, or raises, in one of them reaches no other.

    embed · layer 0 … layer n-1 · LM head, a few hundred rows at a time · layer n-1 … layer 0
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_serve.engine.training.micro_batch import MicroBatch, MicroBatchResult
from lora_serve.kernels.contract import Segments
from lora_serve.kernels.host_device_copy import to_device
from lora_serve.model.trainable_base import TrainableBase
from lora_serve.model.training_step import AdapterSpan, TrainingStep

LOGITS_BYTES = 1 << 28  # of the logits that are computed at a time
_BLOCK = 1 << 20  # logits that are widened to float32 at a time


def pass_bytes(base: TrainableBase, tokens: int, kept_layers: int = 0) -> int:
    """Bytes that a pass takes at most, beside the base and the adapters.

    The inputs of all layers; what one layer saves, and as much again of gradients and intermediate results; logits; one
    part of a weight, unpacked and transposed. Layers that are kept add what they save.
    """
    item = base.dtype.itemsize
    widest = max(site.in_features * site.out_features for site in base.shape.sites.values())
    rows = min(tokens, _chunk_rows(base))
    return (
        tokens * base.shape.hidden_size * item * (base.layers + 2)
        + (2 + kept_layers) * tokens * base.token_bytes
        + rows * base.vocabulary * item + 3 * 4 * _BLOCK
        + 3 * 4 * min(widest, 1 << 23)
    )  # fmt: skip


def _chunk_rows(base: TrainableBase) -> int:
    return max(1, LOGITS_BYTES // (base.vocabulary * base.dtype.itemsize))


@dataclass(frozen=True)
class _Part:
    """A micro-batch's share of the flat batch: rows, and of these the ones that have a loss."""

    batch: MicroBatch
    rows: slice
    losses: slice


class FusedPass:
    """A pass over micro-batches; `advance` runs its next quantum.

    Attributes:
        quanta: number of quanta in all.
        done: of these, those that have run.
        tokens: of the batch.

    Args:
        gradients: add the gradients of the losses to those of the adapters; else only the losses are computed.
        kept_layers: number of layers, the last ones, that are not computed again for their backward pass.
    """

    def __init__(
        self, base: TrainableBase, batches: Sequence[MicroBatch], *, gradients: bool, kept_layers: int = 0
    ) -> None:
        self._base, self._gradients = base, gradients
        self._first_kept = base.layers - kept_layers
        self._parts, rows, losses = [], 0, 0
        for batch in batches:
            count = sum(weight != 0 for each in batch.sequences for weight in each.weights)
            self._parts.append(_Part(batch, slice(rows, rows + batch.tokens), slice(losses, losses + count)))
            rows, losses = rows + batch.tokens, losses + count
        self.tokens = rows
        sequences = [each for batch in batches for each in batch.sequences]
        weights = [weight for each in sequences for weight in each.weights]
        self._loss_rows = [row for row, weight in enumerate(weights) if weight]
        self._ids = [token for each in sequences for token in each.tokens]
        targets = [target for each in sequences for target in each.targets]
        self._targets = to_device([targets[row] for row in self._loss_rows], torch.int64, base.device)
        self._weights = torch.tensor([weights[row] for row in self._loss_rows], device=base.device)
        self._lengths = [len(each.tokens) for each in sequences]
        self._logprobs = torch.zeros(losses, device=base.device)
        self._errors: dict[int, Exception] = {}
        self._losses: dict[int, float] = {}  # of loss functions
        self._known = all(
            batch.loss is None for batch in batches
        )  # whether gradients do not depend on log-probabilities
        self._heads, backward = -(-losses // _chunk_rows(base)), gradients and losses > 0
        heads = 2 * self._heads if backward and not self._known else self._heads
        self.quanta = 1 + base.layers + heads + (base.layers if backward else 0)
        self.done = 0
        self._run = self._quanta()

    def __repr__(self) -> str:
        parts = len(self._parts)
        return f"<FusedPass {self.tokens} tokens of {parts} micro-batches, quantum {self.done} of {self.quanta}>"

    def advance(self) -> bool:
        """Run one quantum; whether more remain. Raises torch.OutOfMemoryError, after which the pass is lost."""
        if self.done < self.quanta:
            next(self._run)
            self.done += 1
            if self.done == self.quanta:
                self._run.close()
        return self.done < self.quanta

    def finish(self) -> list[MicroBatchResult]:
        """Run what remains, and return the results."""
        while self.advance():
            pass
        return self.results

    @property
    def results(self) -> list[MicroBatchResult]:
        """One for each micro-batch, once no quantum remains."""
        assert self.done == self.quanta
        logprobs = self._logprobs.cpu()
        terms = -(self._weights.cpu() * logprobs)
        found = []
        for index, part in enumerate(self._parts):
            own, each_sequence = logprobs[part.losses], []
            for sequence in part.batch.sequences:
                given = torch.tensor(sequence.weights) != 0
                values = torch.zeros(len(sequence.weights))
                values[given] = own[: int(given.sum())]
                own = own[int(given.sum()) :]
                each_sequence.append(values)
            loss = self._losses.get(index, float(terms[part.losses].sum()))
            found.append(MicroBatchResult(loss, each_sequence, self._errors.get(index)))
        return found

    def _quanta(self) -> Generator[None]:
        base = self._base
        step = TrainingStep(self._lengths, *self._spans([part.rows for part in self._parts]))
        positions = [position for length in self._lengths for position in range(length)]
        ids, at = (to_device(each, torch.int64, base.device) for each in (self._ids, positions))
        running = base.begin(step, ids, at)
        yield
        for layer in range(base.layers):
            running.forward(gradients=self._gradients, keep=layer >= self._first_kept)
            yield
        rows = to_device(self._loss_rows, torch.int64, base.device)
        count, losses = self._heads, len(self._loss_rows)
        chunks = [slice(losses * i // count, losses * (i + 1) // count) for i in range(count)]
        hidden = running.hidden[0]
        if not self._known or not self._gradients:
            for chunk in chunks:
                self._logits(hidden[rows[chunk]], chunk, None)
                yield
        coefficients = self._coefficients()
        if not chunks or not self._gradients:
            return
        grad = torch.zeros_like(hidden)
        for chunk in chunks:
            grad[rows[chunk]] = self._logits(hidden[rows[chunk]], chunk, coefficients[chunk])
            yield
        flowing = grad[None]
        for _ in range(base.layers):
            flowing = running.backward(flowing)
            yield

    def _logits(self, hidden: Tensor, chunk: slice, coefficients: Tensor | None) -> Tensor:
        """Log-probabilities of a chunk's targets; with coefficients [rows], the gradient of hidden."""
        edges = range(*chunk.indices(len(self._loss_rows)))
        spans = [
            slice(max(part.losses.start, edges.start) - edges.start, min(part.losses.stop, edges.stop) - edges.start)
            for part in self._parts
        ]
        step = TrainingStep((len(edges),), *self._spans(spans))
        given = hidden.detach().requires_grad_(coefficients is not None)
        with torch.set_grad_enabled(coefficients is not None):
            logits = self._base.logits(step, given)
        targets = self._targets[chunk]
        sums, self._logprobs[chunk] = _log_probabilities(logits.detach(), targets)
        if coefficients is None:
            return hidden
        _gradient_in_place(logits.detach(), targets, sums, coefficients)
        (found,) = torch.autograd.grad(logits, given, logits.detach())
        return found

    def _coefficients(self) -> Tensor:
        """The gradient [losses] of the losses by their targets' log-probabilities, which loss functions read."""
        coefficients = -self._weights
        for index, part in enumerate(self._parts):
            if part.batch.loss is None:
                continue
            given = self._logprobs[part.losses].clone().requires_grad_()
            try:
                with torch.enable_grad():
                    loss = part.batch.loss(given)
                    (coefficients[part.losses],) = torch.autograd.grad(loss, given)
                self._losses[index] = float(loss.detach())
            except Exception as error:  # the loss function is the caller's
                self._errors[index], self._losses[index] = error, math.nan
                coefficients[part.losses] = 0
        return coefficients

    def _spans(self, rows: Sequence[slice]) -> tuple[list[AdapterSpan], Segments]:
        """Spans and segments of the parts' rows; parts without rows have none."""
        spans = []
        for part, own in zip(self._parts, rows, strict=True):
            adapter = part.batch.adapter
            if own.start < own.stop:
                assert adapter.slot is not None, "a closed adapter is not trained"
                spans.append(AdapterSpan(own.start, own.stop, adapter.slot, adapter.magnitudes))
        device = self._base.device
        start, end, slot = (
            to_device([getattr(span, name) for span in spans], torch.int32, device) for name in ("start", "end", "slot")
        )
        longest = max((span.end - span.start for span in spans), default=0)
        rank = max((part.batch.adapter.rank for part in self._parts), default=0)
        return spans, Segments(start, end, slot, torch.ones(len(spans), device=device), longest, rank)


def _log_probabilities(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of logits [rows, vocabulary]: the log of its exponentials' sum, and its target's log-probability."""
    sums = torch.cat([block.float().logsumexp(1) for block in torch.split(logits, _block_rows(logits))])
    return sums, logits.gather(1, targets[:, None])[:, 0].float() - sums


def _gradient_in_place(logits: Tensor, targets: Tensor, sums: Tensor, coefficients: Tensor) -> None:
    """Write the gradient of Σ coefficient · log-probability of the target over the logits."""
    parts = (torch.split(each, _block_rows(logits)) for each in (logits, targets, sums, coefficients))
    for block, own, own_sums, factor in zip(*parts, strict=True):
        wide = (block.float() - own_sums[:, None]).exp_().mul_(-factor[:, None])
        wide.scatter_add_(1, own[:, None], factor[:, None])
        block.copy_(wide)


def _block_rows(logits: Tensor) -> int:
    return max(1, _BLOCK // logits.shape[1])
