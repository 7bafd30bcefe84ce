"""Forward and backward pass over micro-batches of several adapters in one flat batch, in quanta.

A quantum is one layer forwards, one layer backwards, or the LM head over some rows. An engine runs them between its own
steps, and may stop for good after any of them. Micro-batches meet in nothing but products of rows with weights: each
one's loss is its own, and what is not finite, or raises, in one of them reaches no other.

    embed · layer 0 … layer n-1 · LM head, a few hundred rows at a time · layer n-1 … layer 0
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_serve.engine.training.loss_formulas import MeanMetric
from lora_serve.engine.training.micro_batch import MicroBatch, MicroBatchResult
from lora_serve.kernels.contract import Segments
from lora_serve.kernels.host_device_copy import to_device
from lora_serve.model.trainable_base import TrainableBase
from lora_serve.model.training_step import AdapterSpan, TrainedPrefix, TrainingStep, VirtualTokens

LOGITS_BYTES = 1 << 28  # of the logits that are computed at a time, at most
HEAD_ROWS = 64  # that are computed at a time at least: fewer take as long, as the whole weight is read and unpacked
_BLOCK = 1 << 20  # logits that are widened to float32 at a time


def pass_bytes(base: TrainableBase, tokens: int, kept_layers: int = 0) -> int:
    """Bytes that a pass takes at most, beside the base and the adapters.

    The inputs of all layers; what one layer saves, and as much again of gradients and intermediate results; logits; one
    part of a weight, unpacked and transposed. Layers that are kept add what they save.
    """
    item = base.dtype.itemsize
    widest = max(site.in_features * site.out_features for site in base.shape.sites.values())
    rows = min(tokens, _chunk_rows(base, tokens))
    return (
        tokens * base.shape.hidden_size * item * (base.layers + 2)
        + (2 + kept_layers) * tokens * base.token_bytes
        + rows * base.vocabulary * item + 3 * 4 * _BLOCK
        + 3 * 4 * min(widest, 1 << 23)
    )  # fmt: skip


def _chunk_rows(base: TrainableBase, tokens: int) -> int:
    """Rows of the LM head that take about as long as a layer of so many tokens."""
    like_a_layer = tokens * base.layer_weights // (base.vocabulary * base.shape.hidden_size)
    return max(1, min(max(HEAD_ROWS, like_a_layer), LOGITS_BYTES // (base.vocabulary * base.dtype.itemsize)))


@dataclass(frozen=True)
class _Part:
    """A micro-batch's rows of the flat batch."""

    batch: MicroBatch
    rows: slice


class _HeadRows:
    """Rows whose targets' log-probabilities are computed, in order.

    Attributes:
        parts: of each micro-batch, which of these rows are its own.
        logprobs, hits: [rows], once they are computed; a target is hit if no other token has a higher logit.
    """

    def __init__(
        self, batches: Sequence[MicroBatch], wanted: Callable[[MicroBatch, float], bool], device: torch.device
    ) -> None:
        rows: list[int] = []
        targets: list[int] = []
        weights: list[float] = []
        self.parts, first = [], 0
        for batch in batches:
            start = len(rows)
            for sequence in batch.sequences:
                first += batch.adapter.virtual_tokens
                for row, (target, weight) in enumerate(zip(sequence.targets, sequence.weights, strict=True), first):
                    if wanted(batch, weight):
                        rows.append(row)
                        targets.append(target)
                        weights.append(weight)
                first += len(sequence.tokens)
            self.parts.append(slice(start, len(rows)))
        self.count = len(rows)
        self.rows, self.targets = (to_device(each, torch.int64, device) for each in (rows, targets))
        self.weights = torch.tensor(weights, device=device)
        self.logprobs = torch.zeros(self.count, device=device)
        self.hits = torch.zeros(self.count, dtype=torch.bool, device=device)

    def chunks(self, size: int) -> list[slice]:
        """All rows, about equally many at a time and at most `size`."""
        count = -(-self.count // size)
        return [slice(self.count * i // count, self.count * (i + 1) // count) for i in range(count)]


class FusedPass:
    """A pass over micro-batches; `advance` runs its next quantum.

    Attributes:
        quanta: number of quanta in all.
        done: of these, those that have run.
        tokens: of the batch.
        backward: whether it goes backwards: gradients are wanted, and there is a loss.

    Args:
        gradients: add the gradients of the losses to those of the adapters; else only the losses are computed.
        kept_layers: number of layers, the last ones, that are not computed again for their backward pass.
    """

    def __init__(
        self, base: TrainableBase, batches: Sequence[MicroBatch], *, gradients: bool, kept_layers: int = 0
    ) -> None:
        self._base, self._gradients = base, gradients
        self._first_kept = base.layers - kept_layers
        self._parts, rows = [], 0
        for batch in batches:
            self._parts.append(_Part(batch, slice(rows, rows + batch.tokens)))
            rows += batch.tokens
        self.tokens = rows
        sequences = [(batch.adapter.virtual_tokens, each.tokens) for batch in batches for each in batch.sequences]
        self._ids = [token for virtual, tokens in sequences for token in (*[0] * virtual, *tokens)]
        self._lengths = [virtual + len(tokens) for virtual, tokens in sequences]
        self._dropouts = [batch.adapter.draw_dropout() if gradients else None for batch in batches]
        self._losses = _HeadRows(batches, lambda batch, weight: weight != 0, base.device)
        self._others = _HeadRows(batches, lambda batch, weight: batch.all_logprobs and weight == 0, base.device)
        self._errors: dict[int, Exception] = {}
        self._values: dict[int, float] = {}  # of loss functions
        self._metrics: dict[int, Mapping[str, MeanMetric]] = {}
        self._known = all(
            batch.loss is None for batch in batches
        )  # whether gradients do not depend on log-probabilities
        chunks, more = (len(each.chunks(_chunk_rows(base, self.tokens))) for each in (self._losses, self._others))
        self.backward = gradients and chunks > 0
        heads = 2 * chunks if self.backward and not self._known else chunks
        self.quanta = 1 + base.layers + more + heads + (base.layers if self.backward else 0)
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
                if not self.backward:
                    self._coefficients()  # for the losses only
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
        terms = -(self._losses.weights * self._losses.logprobs).cpu()
        given, others = self._losses.logprobs.cpu(), self._others.logprobs.cpu()
        hits = self._losses.hits.cpu()
        found = []
        for index, part in enumerate(self._parts):
            own, rest, each_sequence = given[self._losses.parts[index]], others[self._others.parts[index]], []
            for sequence in part.batch.sequences:
                weighted = torch.tensor(sequence.weights) != 0
                count, values = int(weighted.sum()), torch.zeros(len(sequence.weights))
                values[weighted], own = own[:count], own[count:]
                if part.batch.all_logprobs:
                    count = len(values) - count
                    values[~weighted], rest = rest[:count], rest[count:]
                each_sequence.append(values)
            loss = self._values.get(index, float(terms[self._losses.parts[index]].sum()))
            error, metrics = self._errors.get(index), self._metrics.get(index, {})
            own_hits = int(hits[self._losses.parts[index]].sum())
            found.append(MicroBatchResult(loss, each_sequence, error, metrics, own_hits))
        return found

    def _quanta(self) -> Generator[None]:
        base = self._base
        spans, segments = self._spans([part.rows for part in self._parts])
        step = TrainingStep(self._lengths, spans, segments, self._virtual_tokens(), self._prefixes())
        before = [part.batch.adapter.prefix_tokens for part in self._parts for _ in part.batch.sequences]
        positions = [
            first + place for first, length in zip(before, self._lengths, strict=True) for place in range(length)
        ]
        ids, at = (to_device(each, torch.int64, base.device) for each in (self._ids, positions))
        running = base.begin(step, ids, at, gradients=self.backward)
        yield
        for layer in range(base.layers):
            running.forward(gradients=self._gradients, keep=layer >= self._first_kept)
            yield
        hidden, rows = running.hidden[0], self._losses.rows
        for chunk in self._others.chunks(_chunk_rows(base, self.tokens)):
            self._logits(hidden, self._others, chunk, None)
            yield
        chunks = self._losses.chunks(_chunk_rows(base, self.tokens))
        if not self._known or not self.backward:
            for chunk in chunks:
                self._logits(hidden, self._losses, chunk, None)
                yield
        if not self.backward:
            return
        coefficients = self._coefficients()
        grad = torch.zeros_like(hidden)
        for chunk in chunks:
            grad[rows[chunk]] = self._logits(hidden, self._losses, chunk, coefficients[chunk])
            yield
        flowing = grad[None]
        for _ in range(base.layers):
            flowing = running.backward(flowing)
            yield

    def _logits(self, hidden: Tensor, heads: _HeadRows, chunk: slice, coefficients: Tensor | None) -> Tensor:
        """Log-probabilities of a chunk's targets; with coefficients [rows], the gradient of their hidden states."""
        edges = range(*chunk.indices(heads.count))
        spans = [
            slice(max(part.start, edges.start) - edges.start, min(part.stop, edges.stop) - edges.start)
            for part in heads.parts
        ]
        step = TrainingStep((len(edges),), *self._spans(spans, edges.start + 1))
        given = hidden[heads.rows[chunk]].detach().requires_grad_(coefficients is not None)
        with torch.set_grad_enabled(coefficients is not None):
            logits = self._base.logits(step, given)
        targets = heads.targets[chunk]
        sums, heads.logprobs[chunk], heads.hits[chunk] = _log_probabilities(logits.detach(), targets)
        if coefficients is None:
            return given
        _gradient_in_place(logits.detach(), targets, sums, coefficients)
        (found,) = torch.autograd.grad(logits, given, logits.detach())
        return found

    def _coefficients(self) -> Tensor:
        """The gradient [losses] of the losses by their targets' log-probabilities, which loss functions read."""
        coefficients = -self._losses.weights
        for index, part in enumerate(self._parts):
            own = self._losses.parts[index]
            if part.batch.loss is None:
                continue
            given = self._losses.logprobs[own].clone().requires_grad_()
            try:
                with torch.enable_grad():
                    value = part.batch.loss(given)
                    (coefficients[own],) = torch.autograd.grad(value.loss, given)
                self._values[index], self._metrics[index] = float(value.loss.detach()), value.metrics
            except Exception as error:  # the loss function is the caller's
                self._errors[index], self._values[index] = error, math.nan
                coefficients[own] = 0
        return coefficients

    def _spans(self, rows: Sequence[slice], draw: int = 0) -> tuple[list[AdapterSpan], Segments]:
        """Spans and segments of the parts' rows; parts without rows have none.

        Args:
            draw: which of the pass's masks dropout takes.
        """
        spans = []
        for part, dropout, own in zip(self._parts, self._dropouts, rows, strict=True):
            adapter = part.batch.adapter
            if own.start < own.stop:
                assert adapter.slot is not None, "a closed adapter is not trained"
                drawn = None if dropout is None else replace(dropout, seed=dropout.seed + draw)
                spans.append(AdapterSpan(own.start, own.stop, adapter.slot, adapter.magnitudes, adapter.gains, drawn))
        device, plain = self._base.device, [span for span in spans if span.dropout is None]
        start, end, slot = (
            to_device([getattr(span, name) for span in plain], torch.int32, device) for name in ("start", "end", "slot")
        )
        longest = max((span.end - span.start for span in plain), default=0)
        rank = max((part.batch.adapter.rank for part in self._parts), default=0)
        return spans, Segments(start, end, slot, torch.ones(len(plain), device=device), longest, rank)

    def _virtual_tokens(self) -> list[VirtualTokens]:
        """The parts' learned embeddings, and the rows that they are."""
        found = []
        for part in self._parts:
            if part.batch.adapter.table is None:
                continue
            table, gradient = part.batch.adapter.table
            first = part.rows.start
            rows: list[int] = []
            for sequence in part.batch.sequences:
                rows.extend(range(first, first + len(table)))
                first += len(table) + len(sequence.tokens)
            own = to_device(rows, torch.int64, self._base.device).view(-1, len(table))
            found.append(VirtualTokens(table.detach().requires_grad_(self.backward), gradient, own))
        return found

    def _prefixes(self) -> list[TrainedPrefix]:
        """The parts' learned keys and values, and the sequences that attend to them."""
        found, first = [], 0
        for part in self._parts:
            own = range(first, first + len(part.batch.sequences))
            first = own.stop
            if part.batch.adapter.prefix is not None:
                found.append(TrainedPrefix(own, *part.batch.adapter.prefix))
        return found


def _log_probabilities(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of logits [rows, vocabulary]: log of the exponentials' sum, the target's log-probability and hit."""
    blocks = torch.split(logits, _block_rows(logits))
    sums = torch.cat([block.float().logsumexp(1) for block in blocks])
    highest = torch.cat([block.amax(1) for block in blocks])
    own = logits.gather(1, targets[:, None])[:, 0]
    return sums, own.float() - sums, own >= highest


def _gradient_in_place(logits: Tensor, targets: Tensor, sums: Tensor, coefficients: Tensor) -> None:
    """Write the gradient of Σ coefficient · log-probability of the target over the logits."""
    parts = (torch.split(each, _block_rows(logits)) for each in (logits, targets, sums, coefficients))
    for block, own, own_sums, factor in zip(*parts, strict=True):
        wide = (block.float() - own_sums[:, None]).exp_().mul_(-factor[:, None])
        wide.scatter_add_(1, own[:, None], factor[:, None])
        block.copy_(wide)


def _block_rows(logits: Tensor) -> int:
    return max(1, _BLOCK // logits.shape[1])
