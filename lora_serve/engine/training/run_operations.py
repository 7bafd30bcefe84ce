"""What a training run still has to do: its operations in order, and how far the first one is."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_serve.engine.training.losses import ConfiguredLoss, mean_metrics
from lora_serve.engine.training.micro_batch import MicroBatchResult
from lora_serve.engine.training.trainable_adapter import TrainableAdapter
from lora_serve.errors import BadRequest, ServeError
from lora_serve.training_messages import CreateRun, ForwardBackward, PassResult, RunInfo, RunOperation, TrainingExample

PART_TOKENS = 128  # of examples whose gradients are added up at once

Done = Callable[[Any], None]  # called with a result or a ServeError


@dataclass(eq=False)
class QueuedOperation:
    """An operation that is not finished.

    Attributes:
        order: of all operations, in which it came.
        prepared: by a thread: the checkpoint of a `RestoreRun`, what the adapter of a `CreateRun` begins with.
        memory: of a `CreateRun`: bytes that its adapter takes.
    """

    operation: RunOperation
    done: Done
    order: int
    prepared: Any = None
    memory: int = 0


@dataclass(eq=False)
class QueuedPass(QueuedOperation):
    """A `ForwardBackward`, which several passes may carry out, some of its parts each.

    Gradients are added up part by part, so that their bits do not depend on which passes the parts were in.

    Attributes:
        parts: consecutive examples that stay together.
        sizes: tokens of each part.
        taken: parts that were given to a pass.
        results: of the parts that were finished.
    """

    loss: ConfiguredLoss = field(kw_only=True)
    parts: list[Sequence[TrainingExample]] = field(kw_only=True)
    sizes: list[int] = field(kw_only=True)
    taken: int = 0
    results: list[MicroBatchResult] = field(default_factory=list)

    @property
    def forward_only(self) -> bool:
        assert isinstance(self.operation, ForwardBackward)
        return self.operation.forward_only

    @property
    def result(self) -> PassResult:
        """What all its passes found."""
        return PassResult(
            loss=sum(each.loss for each in self.results),
            logprobs=[values.tolist() for each in self.results for values in each.logprobs],
            metrics=mean_metrics(each.metrics for each in self.results),
            tokens=sum(self.sizes),
            hits=sum(each.hits for each in self.results),
        )


@dataclass(eq=False)
class TrainingRun:
    """An adapter in training, or one that will be.

    Attributes:
        virtual_tokens: before every sequence.
        adapter: None until it is created.
        operations: not finished, in order.
        waits: whether a thread reads or writes files for the first one.
        lost: whether gradients were lost, so that the optimizer's next step is refused.
        closed: whether it only waits for the end of the pass that it takes part in.
        on_close: called when it has gone.
    """

    name: str
    owner: str
    priority: int
    virtual_tokens: int = 0
    adapter: TrainableAdapter | None = None
    operations: deque[QueuedOperation] = field(default_factory=deque)
    waits: bool = False
    lost: bool = False
    closed: bool = False
    on_close: list[Done] = field(default_factory=list)

    @classmethod
    def of(cls, operation: CreateRun) -> TrainingRun:
        return cls(operation.run, operation.owner, operation.priority, operation.settings.num_virtual_tokens)

    @property
    def first(self) -> QueuedOperation | None:
        """The operation whose turn it is, unless a thread works on it."""
        return None if self.waits or self.closed or not self.operations else self.operations[0]

    @property
    def trained(self) -> TrainableAdapter:
        """The adapter, which operations after the first one find created."""
        assert self.adapter is not None
        return self.adapter

    def finish(self, result: Any) -> None:
        """End the first operation with its result, or a ServeError."""
        self.waits = False
        self.operations.popleft().done(result)

    def fail_all(self, error: ServeError) -> None:
        """End all operations with an error."""
        while self.operations:
            self.operations.popleft().done(error)

    def lose_gradients(self) -> None:
        """Drop gradients of which only a part was added."""
        self.trained.gradients.zero_()
        self.lost = True

    def describe(self) -> RunInfo:
        adapter, flat = self.trained, self.trained.masters
        parts = [part for layer in adapter.layers.values() for part in (layer.a(flat), layer.b(flat))]
        parts += [layer.m(flat) for layer in adapter.layers.values() if layer.magnitude >= 0]
        parts += [gain.values(flat) for gain in adapter.layout.gains.values()]
        if adapter.layout.encoder is not None:
            parts += adapter.layout.encoder.parameters(flat).values()
        else:
            parts += [each.values(flat) for each in (adapter.layout.table, adapter.layout.prefix) if each is not None]
        return RunInfo(self.name, sum(part.numel() for part in parts), adapter.nbytes, adapter.steps)


def parts_of(
    operation: ForwardBackward, group: int, most: int, virtual_tokens: int = 0
) -> tuple[list[Sequence[TrainingExample]], list[int]]:
    """The parts of an operation, and their tokens; only the examples decide. Raises BadRequest if there are none.

    Args:
        group: number of consecutive examples that belong together.
        most: tokens of a part, if it has more than one group.
        virtual_tokens: before each example, which count as well.
    """
    if not operation.examples:
        raise BadRequest("there are no examples", param="examples")
    parts: list[Sequence[TrainingExample]] = []
    sizes: list[int] = []
    for start in range(0, len(operation.examples), group):
        examples = operation.examples[start : start + group]
        tokens = sum(len(example.tokens) + virtual_tokens for example in examples)
        if sizes and sizes[-1] + tokens <= most:
            parts[-1] = [*parts[-1], *examples]
            sizes[-1] += tokens
        else:
            parts.append(examples)
            sizes.append(tokens)
    return parts, sizes


def parts_within(sizes: list[int], taken: int, most: int) -> int:
    """How many parts after those that were taken have at most so many tokens together."""
    tokens = 0
    for index in range(taken, len(sizes)):  # a slice would be a copy of all that remain, for each pass
        tokens += sizes[index]
        if tokens > most:
            return index - taken
    return len(sizes) - taken
