"""The LM head of a pass: log-probabilities of targets, and the gradient of the hidden states.

Rows are computed in blocks whose logits fit into memory, and a block's logits one part of the vocabulary after another:
each part is one quantum. A block's logits are kept until its backward pass has overwritten them by their gradient.

    log p = logit of the target - log Σ exp(logits)         dL/dlogits = (exp(logits - log Σ) - [target]) · -dL/dlog p
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lora_serve.engine.training.micro_batch import MicroBatch
from lora_serve.kernels.host_device_copy import to_device
from lora_serve.model.trainable_base import HeadCall, TrainableBase
from lora_serve.model.training_step import TrainingStep

LOGITS_BYTES = 1 << 27  # of the logits of a block and what is saved of them, at most
WIDENED = 1 << 20  # logits that are widened to float32 at a time


def block_rows(base: TrainableBase) -> int:
    """The most rows of a block."""
    return max(1, LOGITS_BYTES // (base.vocabulary * base.logit_bytes))


class HeadRows:
    """Rows whose targets' log-probabilities are computed, in order.

    Attributes:
        parts: of each micro-batch, which of these rows are its own.
        rows: of the batch.
        logprobs, hits: [rows], once they are computed; a target is hit if no other token has a higher logit.

    Args:
        wanted: whether a target takes part, of a micro-batch and the target's weight.
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

    def blocks(self, size: int) -> list[slice]:
        """All rows, at most `size` at a time.

        Where a micro-batch is cut depends on its own rows only: sums over rows have the same bits beside any others.
        """
        found: list[slice] = []
        open_ = slice(0, 0)  # whole micro-batches
        for part in self.parts:
            count = part.stop - part.start
            if part.stop - open_.start <= size:
                open_ = slice(open_.start, part.stop)
                continue
            found.append(open_)
            open_ = part
            if count > size:
                cuts = -(-count // size)
                edges = [part.start + count * cut // cuts for cut in range(cuts + 1)]
                found += [slice(*pair) for pair in pairwise(edges)]
                open_ = slice(part.stop, part.stop)
        return [each for each in (*found, open_) if each.start < each.stop]


class HeadBlock:
    """A block at the LM head.

    Args:
        step: the adapters of its rows.
        hidden: [rows, hidden], of the last layer.
        targets: int64 [rows].
        gradients: whether `backward` will be called.
    """

    def __init__(
        self, base: TrainableBase, step: TrainingStep, hidden: Tensor, targets: Tensor, *, gradients: bool
    ) -> None:
        self._base, self._step, self._targets = base, step, targets
        self._given, self._gradients = hidden.detach().requires_grad_(gradients), gradients
        self._sums, self._highest, self._own = (
            torch.full(targets.shape, -torch.inf, device=targets.device) for _ in range(3)
        )
        self._calls: list[HeadCall] = []
        self._norm: HeadCall | None = None
        self._gradient: Tensor | None = None  # of what the head reads

    @property
    def logprobs(self) -> Tensor:
        """Of the targets, float32 [rows], once all parts are computed."""
        return self._own - self._sums

    @property
    def hits(self) -> Tensor:
        """Whether no token has a higher logit than the target, [rows]."""
        return self._own >= self._highest

    def forward(self, part: slice) -> None:
        """Compute the logits of the next part of the vocabulary."""
        with torch.set_grad_enabled(self._gradients):
            call = self._base.head(self._step, self._given, part)
        logits = call.logits.detach()
        blocks = torch.split(logits, max(1, WIDENED // logits.shape[1]))
        sums = torch.cat([block.float().logsumexp(1) for block in blocks])
        # Not logaddexp, whose bits depend on a row's place.
        self._sums = torch.stack((self._sums, sums), 1).logsumexp(1)
        self._highest = torch.maximum(self._highest, torch.cat([block.amax(1) for block in blocks]).float())
        places, inside = self._places(part)
        self._own = torch.where(inside, logits.gather(1, places[:, None])[:, 0].float(), self._own)
        if self._gradients:
            self._norm = self._norm or call
            self._calls.append(call)

    def backward(self, part: slice, coefficients: Tensor) -> None:
        """Add the gradient through the first part that remains, which this one is.

        Args:
            coefficients: [rows], the gradient of the losses by the targets' log-probabilities.
        """
        call = self._calls.pop(0)
        logits = call.logits.detach()
        places, inside = self._places(part)
        factors = torch.where(inside, coefficients, 0.0)
        rows = max(1, WIDENED // logits.shape[1])
        parts = (torch.split(each, rows) for each in (logits, places, self._sums, coefficients, factors))
        for block, own, sums, coefficient, factor in zip(*parts, strict=True):
            wide = (block.float() - sums[:, None]).exp_().mul_(-coefficient[:, None])
            wide.scatter_add_(1, own[:, None], factor[:, None])
            block.copy_(wide)
        (found,) = torch.autograd.grad(call.logits, call.given, logits)
        self._gradient = found.float() if self._gradient is None else self._gradient.add_(found)

    def gradient(self) -> Tensor:
        """The gradient [rows, hidden] of the hidden states, once no part remains."""
        assert not self._calls
        assert self._norm is not None
        assert self._gradient is not None
        (found,) = torch.autograd.grad(self._norm.normed, self._given, self._gradient.to(self._given.dtype))
        return found

    def _places(self, part: slice) -> tuple[Tensor, Tensor]:
        """Where the targets are in a part, and whether they are in it; those that are not are anywhere."""
        inside = (self._targets >= part.start) & (self._targets < part.stop)
        return torch.where(inside, self._targets - part.start, 0), inside
