"""What a job's examples contribute: cross-entropy of replies (`supervised`), preferences between two (`dpo`).

An objective turns examples into passes of the engine. The gradient of a batch is that of the mean: over all tokens that
are learnt of it (supervised), or over as many pairs as batches usually have (dpo).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from lora_serve.adapters.store.disk import Disk
from lora_serve.api.fine_tuning.encoded_data import EncodedData
from lora_serve.api.fine_tuning.job_records import ChosenNumbers, MethodName
from lora_serve.training_messages import ForwardBackward, PassResult, RunOperation

TOKEN_ACCURACY = "mean_token_accuracy"
MOST_TOKENS = 1 << 14  # in one message to the engine, which makes passes of them as its memory allows

Call = Callable[[RunOperation], Awaitable[Any]]


@dataclass(frozen=True)
class BatchLoss:
    """What was found of examples.

    Attributes:
        loss: mean, as the objective defines it.
        metrics: other means, by name.
        tokens: computed.
    """

    loss: float
    metrics: dict[str, float] = field(default_factory=dict)
    tokens: int = 0


class Objective(Protocol):
    """What a job learns, of encoded data."""

    @property
    def examples(self) -> int:
        """How many there are."""

    @property
    def gradient_scale(self) -> float:
        """How many times the gradient of the mean the engine gets."""

    async def learn(self, call: Call, run: str, batch: Sequence[int]) -> BatchLoss:
        """Add the gradients of a batch."""

    async def measure(self, call: Call, run: str) -> BatchLoss:
        """The loss over all examples, without gradients."""


class SupervisedObjective:
    """Cross-entropy of the tokens that are learnt."""

    gradient_scale = 1.0

    def __init__(self, data: EncodedData) -> None:
        self._data = data

    @property
    def examples(self) -> int:
        return self._data.sequences

    async def learn(self, call: Call, run: str, batch: Sequence[int]) -> BatchLoss:
        learnt = sum(map(self._data.learnt, batch))
        return await self._pass(call, run, batch, learnt, 1.0 / learnt)

    async def measure(self, call: Call, run: str) -> BatchLoss:
        learnt = self._data.learnt_tokens
        total = await self._pass(call, run, range(self.examples), learnt, 1.0, forward_only=True)
        return BatchLoss(total.loss / learnt, total.metrics, total.tokens)

    async def _pass(
        self, call: Call, run: str, batch: Iterable[int], learnt: int, weight: float, *, forward_only: bool = False
    ) -> BatchLoss:
        loss, tokens, hits = 0.0, 0, 0
        for part in _parts(batch, self._data.length):
            examples = [self._data.example(index, weight) for index in part]
            result = await _forward_backward(call, ForwardBackward(run, examples, forward_only=forward_only))
            loss, tokens, hits = loss + result.loss, tokens + result.tokens, hits + result.hits
        return BatchLoss(loss, {TOKEN_ACCURACY: hits / learnt}, tokens)


class PreferenceObjective:
    """Direct preference optimization (Rafailov et al. 2023), against the base.

    Args:
        data: whose reference was written by `write_reference`.
        batch_size: pairs of a batch.
    """

    def __init__(self, data: EncodedData, beta: float, batch_size: int) -> None:
        self._data, self._beta = data, beta
        self.gradient_scale = float(batch_size)

    @property
    def examples(self) -> int:
        return self._data.sequences // 2

    async def learn(self, call: Call, run: str, batch: Sequence[int]) -> BatchLoss:
        return await self._pass(call, run, batch)

    async def measure(self, call: Call, run: str) -> BatchLoss:
        return await self._pass(call, run, range(self.examples), forward_only=True)

    async def _pass(self, call: Call, run: str, batch: Iterable[int], *, forward_only: bool = False) -> BatchLoss:
        loss, tokens, pairs = 0.0, 0, 0
        sums: dict[str, float] = {}
        for part in _parts(batch, self._length):
            operation = ForwardBackward(
                run,
                [self._data.example(2 * index + side, reference=True) for index in part for side in (0, 1)],
                loss="dpo",
                config={"beta": self._beta},
                forward_only=forward_only,
            )
            result = await _forward_backward(call, operation)
            loss, tokens, pairs = loss + result.loss, tokens + result.tokens, pairs + len(part)
            for name, value in result.metrics.items():
                sums[name] = sums.get(name, 0.0) + value * len(part)
        return BatchLoss(loss / pairs, {name: value / pairs for name, value in sums.items()}, tokens)

    def _length(self, index: int) -> int:
        return self._data.length(2 * index) + self._data.length(2 * index + 1)


def make_objective(method: MethodName, numbers: ChosenNumbers, data: EncodedData) -> Objective:
    """The objective of a job's method."""
    if method == "supervised":
        return SupervisedObjective(data)
    return PreferenceObjective(data, numbers.beta or 0.0, numbers.batch_size)


async def write_reference(call: Call, run: str, data: EncodedData, disk: Disk) -> None:
    """Write the log-probabilities of a run that has learnt nothing yet, and so computes what the base does.

    Raises OSError.
    """
    writer = data.reference_writer(disk)
    try:
        for part in _parts(range(data.sequences), data.length):
            examples = [data.example(index) for index in part]
            result = await _forward_backward(call, ForwardBackward(run, examples, forward_only=True))
            for logprobs in result.logprobs:
                writer.add(logprobs)
        writer.finish()
    finally:
        writer.close()


def _parts(batch: Iterable[int], length: Callable[[int], int]) -> Iterator[list[int]]:
    """Consecutive examples with few enough tokens for one message; one that has more is alone."""
    part: list[int] = []
    tokens = 0
    for index in batch:
        if part and tokens + length(index) > MOST_TOKENS:
            yield part
            part, tokens = [], 0
        part.append(index)
        tokens += length(index)
    if part:
        yield part


async def _forward_backward(call: Call, operation: ForwardBackward) -> PassResult:
    return msgspec.convert(await call(operation), PassResult)
