"""Forward and backward pass over micro-batches of several adapters in one flat batch, in quanta.

A quantum is one layer forwards, one layer backwards, or a part of the LM head's vocabulary, forwards or backwards. An
engine runs them between its own steps, and may stop for good after any of them. Micro-batches meet in nothing but
products of rows with weights: each one's loss is its own, and what is not finite, or raises, in one of them reaches no
other.

    embed · layer 0 … layer n-1 · parts of the LM head, forwards, then backwards · layer n-1 … layer 0
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lora_serve.engine.training.head_rows import WIDENED, HeadBlock, HeadRows, block_rows
from lora_serve.engine.training.heap_limit import HeapLimit, growth, heap_bytes
from lora_serve.engine.training.loss_formulas import MeanMetric
from lora_serve.engine.training.micro_batch import MicroBatch, MicroBatchResult
from lora_serve.kernels.contract import Segments
from lora_serve.kernels.host_device_copy import to_device
from lora_serve.model.trainable_base import TrainableBase
from lora_serve.model.training_step import AdapterSpan, DeltaDropout, TrainedPrefix, TrainingStep, VirtualTokens


def pass_bytes(base: TrainableBase, tokens: int, kept_layers: int = 0) -> int:
    """Bytes that a pass takes at most, beside the base and the adapters.

    The inputs of all layers; what one layer saves, and as much again of gradients and intermediate results; logits of a
    block of rows; weights that are unpacked; on a CPU what its allocator keeps of freed memory.
    Layers that are kept add what they save. Compared with a process's memory by `bench/training_memory.py`.
    """
    item = base.dtype.itemsize
    rows = min(tokens, block_rows(base))
    return (
        tokens * base.shape.hidden_size * item * (base.layers + 2)
        + (2 + kept_layers) * tokens * base.token_bytes
        + rows * base.vocabulary * base.logit_bytes + 3 * 4 * WIDENED
        + base.unpacked_bytes
        + (heap_bytes(tokens * base.token_bytes) if base.device.type == "cpu" else 0)
    )  # fmt: skip


class Quantum(NamedTuple):
    """What a quantum is, and how much: embed, forward and backward over tokens, head and head_backward over rows."""

    kind: str
    size: int


@dataclass(frozen=True)
class _Part:
    """A micro-batch's rows of the flat batch."""

    batch: MicroBatch
    rows: slice


class FusedPass:
    """A pass over micro-batches; `advance` runs its next quantum.

    Attributes:
        quanta: all of them.
        done: number of these that have run.
        tokens: of the batch.
        backward: whether it goes backwards: gradients are wanted, and there is a loss.

    Args:
        gradients: add the gradients of the losses to those of the adapters; else only the losses are computed.
        kept_layers: number of layers, the last ones, that are not computed again for their backward pass.
        heap: bounds what the allocator keeps of freed memory; None on a device with another allocator.
    """

    def __init__(
        self,
        base: TrainableBase,
        batches: Sequence[MicroBatch],
        *,
        gradients: bool,
        kept_layers: int = 0,
        heap: HeapLimit | None = None,
    ) -> None:
        self._base, self._heap = base, heap
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
        self._losses = HeadRows(batches, lambda batch, weight: weight != 0, base.device)
        self._others = HeadRows(batches, lambda batch, weight: batch.all_logprobs and weight == 0, base.device)
        self._errors: dict[int, Exception] = {}
        self._values: dict[int, float] = {}  # of loss functions
        self._metrics: dict[int, Mapping[str, MeanMetric]] = {}
        self._known = all(batch.loss is None for batch in batches)  # coefficients do not depend on log-probabilities
        self._blocks = self._losses.blocks(block_rows(base))
        self.backward = gradients and len(self._blocks) > 0
        self.quanta = self._plan()
        self.done = 0
        self._run = self._quanta()

    def __repr__(self) -> str:
        parts = len(self._parts)
        return f"<FusedPass {self.tokens} tokens of {parts} micro-batches, quantum {self.done} of {len(self.quanta)}>"

    def advance(self) -> bool:
        """Run one quantum; whether more remain. Raises torch.OutOfMemoryError, after which the pass is lost."""
        if self.done < len(self.quanta):
            next(self._run)
            self.done += 1
            if self._heap is not None:
                self._heap.check(growth(self.tokens * self._base.token_bytes))
            if self.done == len(self.quanta):
                self._run.close()
                if not self.backward:
                    self._coefficients()  # for the losses only
        return self.done < len(self.quanta)

    def finish(self) -> list[MicroBatchResult]:
        """Run what remains, and return the results."""
        while self.advance():
            pass
        return self.results

    @property
    def results(self) -> list[MicroBatchResult]:
        """One for each micro-batch, once no quantum remains."""
        assert self.done == len(self.quanta)
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
        spans, segments = self._spans([part.rows for part in self._parts], self._dropouts)
        step = TrainingStep(self._lengths, spans, segments, self._virtual_tokens(), self._prefixes())
        before = [part.batch.adapter.prefix_tokens for part in self._parts for _ in part.batch.sequences]
        positions = [
            first + place for first, length in zip(before, self._lengths, strict=True) for place in range(length)
        ]
        ids, at = (to_device(each, torch.int64, base.device) for each in (self._ids, positions))
        running = base.begin(step, ids, at, gradients=self.backward)
        yield
        for layer in range(base.layers):
            running.forward(gradients=self.backward, keep=layer >= self._first_kept)
            yield
        hidden = running.hidden[0]
        for block in self._others.blocks(block_rows(base)):
            yield from self._evaluate(hidden, self._others, block)
        if self._evaluates_first:
            for block in self._blocks:
                yield from self._evaluate(hidden, self._losses, block)
        if not self.backward:
            return
        coefficients = self._coefficients() if self._known or self._evaluates_first else None
        grad = torch.zeros_like(hidden)
        for block in self._blocks:
            head = self._head_block(hidden, self._losses, block, gradients=True)
            yield from self._forward(head, self._losses, block)
            if coefficients is None:
                coefficients = self._coefficients()
            for part in base.head_parts[:-1]:
                head.backward(part, coefficients[block])
                yield
            head.backward(base.head_parts[-1], coefficients[block])
            grad[self._losses.rows[block]] = head.gradient()
            yield
        flowing = grad[None]
        for _ in range(base.layers):
            flowing = running.backward(flowing)
            yield

    def _plan(self) -> list[Quantum]:
        """What `_quanta` does."""
        base, parts = self._base, len(self._base.head_parts)
        plan = [Quantum("embed", self.tokens)] + base.layers * [Quantum("forward", self.tokens)]
        evaluated = self._others.blocks(block_rows(base)) + (self._blocks if self._evaluates_first else [])
        for block in evaluated:
            plan += parts * [Quantum("head", block.stop - block.start)]
        for block in self._blocks if self.backward else ():
            rows = block.stop - block.start
            plan += parts * [Quantum("head", rows)] + parts * [Quantum("head_backward", rows)]
        return plan + (base.layers * [Quantum("backward", self.tokens)] if self.backward else [])

    @property
    def _evaluates_first(self) -> bool:
        """Whether all log-probabilities are computed before any gradient.

        Loss functions read those of all rows, so more than one block of them is computed twice.
        """
        return not self.backward or not (self._known or len(self._blocks) == 1)

    def _evaluate(self, hidden: Tensor, heads: HeadRows, block: slice) -> Generator[None]:
        yield from self._forward(self._head_block(hidden, heads, block, gradients=False), heads, block)

    def _forward(self, head: HeadBlock, heads: HeadRows, block: slice) -> Generator[None]:
        for part in self._base.head_parts[:-1]:
            head.forward(part)
            yield
        head.forward(self._base.head_parts[-1])
        heads.logprobs[block], heads.hits[block] = head.logprobs, head.hits
        yield

    def _head_block(self, hidden: Tensor, heads: HeadRows, block: slice, *, gradients: bool) -> HeadBlock:
        spans, dropouts = [], []
        for part, dropout in zip(heads.parts, self._dropouts, strict=True):
            own = slice(max(part.start, block.start), min(part.stop, block.stop))
            spans.append(slice(own.start - block.start, own.stop - block.start))
            dropouts.append(
                dropout and replace(dropout, first=own.start - part.start, count=part.stop - part.start)
            )  # a row's mask does not depend on the block that it is in
        step = TrainingStep((block.stop - block.start,), *self._spans(spans, dropouts))
        return HeadBlock(self._base, step, hidden[heads.rows[block]], heads.targets[block], gradients=gradients)

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

    def _spans(
        self, rows: Sequence[slice], dropouts: Sequence[DeltaDropout | None]
    ) -> tuple[list[AdapterSpan], Segments]:
        """Spans and segments of the parts' rows; parts without rows have none."""
        spans = []
        for part, dropout, own in zip(self._parts, dropouts, rows, strict=True):
            adapter = part.batch.adapter
            if own.start < own.stop:
                assert adapter.slot is not None, "a closed adapter is not trained"
                spans.append(AdapterSpan(own.start, own.stop, adapter.slot, adapter.magnitudes, adapter.gains, dropout))
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
