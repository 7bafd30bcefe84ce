"""What a training pass computes: sequences of one adapter, with targets and the weights of their losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lora_serve.engine.training.loss_formulas import LossValue, MeanMetric
from lora_serve.engine.training.trainable_adapter import TrainableAdapter
from lora_serve.errors import BadRequest

TokenLoss = Callable[[Tensor], LossValue]
"""A loss of the log-probabilities [targets] of all targets of a micro-batch with a weight other than 0, in order."""


@dataclass(frozen=True)
class TrainingSequence:
    """Tokens, and for each the token that should follow it.

    Attributes:
        tokens, targets: [n]
        weights: [n], of each target's loss; 0: the target does not matter, and no logits are computed for it.
    """

    tokens: Sequence[int]
    targets: Sequence[int]
    weights: Sequence[float]

    @classmethod
    def completion(cls, prompt: Sequence[int], completion: Sequence[int], weight: float = 1.0) -> TrainingSequence:
        """A prompt, which has no loss, and its completion, whose tokens have this weight."""
        both = [*prompt, *completion]
        first = max(0, len(prompt) - 1)
        weights = [0.0] * first + [weight] * (len(both) - 1 - first)
        return cls(both[:-1], both[1:], weights)

    def check(self, vocabulary: int, max_length: int) -> None:
        """Raise BadRequest unless a base with these limits can train on it."""
        if not len(self.tokens) == len(self.targets) == len(self.weights) > 0:
            raise BadRequest(
                f"{len(self.tokens)} tokens, {len(self.targets)} targets and {len(self.weights)} weights do not fit",
                param="weights",
            )
        if len(self.tokens) > max_length:
            raise BadRequest(
                f"a sequence has {len(self.tokens)} tokens; at most {max_length} are trained", param="tokens"
            )
        for param, ids in (("tokens", self.tokens), ("targets", self.targets)):
            if min(ids) < 0 or max(ids) >= vocabulary:
                wrong = next(token for token in ids if not 0 <= token < vocabulary)
                raise BadRequest(f"{wrong} is no token; there are {vocabulary}", param=param)
        if not all(map(math.isfinite, self.weights)):
            raise BadRequest("a weight is not finite", param="weights")


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of one adapter.

    Attributes:
        loss: None: cross-entropy, -Σ weight · log-probability. Otherwise the weights only say which targets matter.
        all_logprobs: compute the log-probabilities of the targets with weight 0 as well.
    """

    adapter: TrainableAdapter
    sequences: Sequence[TrainingSequence]
    loss: TokenLoss | None = None
    all_logprobs: bool = False

    @property
    def tokens(self) -> int:
        """Rows of a flat batch, virtual tokens among them."""
        return sum(len(each.tokens) + self.adapter.virtual_tokens for each in self.sequences)


@dataclass(frozen=True)
class MicroBatchResult:
    """What a pass found for one micro-batch.

    Attributes:
        loss: the loss; not finite if it diverged.
        logprobs: log-probabilities of each sequence's targets, in float32; 0 where the weight is 0, unless asked for.
        error: what the micro-batch's own loss function raised; then nothing was added to its gradients.
        metrics: what its loss function found.
        hits: targets with a weight that no other token has a higher logit than.
    """

    loss: float
    logprobs: Sequence[Tensor]
    error: Exception | None = None
    metrics: Mapping[str, MeanMetric] = field(default_factory=dict)
    hits: int = 0
