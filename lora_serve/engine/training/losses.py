"""Loss functions over examples: what is asked for, checked, and as a micro-batch of a pass.

    loss = find_loss("dpo", {"beta": 0.2})
    loss.check(examples)
    parts = [loss.micro_batch(adapter, own) for own in (examples[:4], examples[4:])]      # multiples of loss.group
    results = trainer.forward_backward(parts).finish()
    metrics = mean_metrics([result.metrics for result in results])

A loss is a sum over groups of `loss.group` consecutive examples, so the parts' losses and gradients add up to those of
all, whatever the parts, as long as no group is cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_serve.engine.training.loss_formulas import FORMULAS, LossFormula, LossTerms, LossValue, MeanMetric
from lora_serve.engine.training.micro_batch import MicroBatch, TokenLoss, TrainingSequence
from lora_serve.engine.training.trainable_adapter import TrainableAdapter
from lora_serve.errors import BadRequest
from lora_serve.training_messages import TrainingExample

_LARGEST = torch.finfo(torch.float32).max
_CLIP = ("clip_low_threshold", "clip_high_threshold")


@dataclass(frozen=True)
class ConfiguredLoss:
    """A loss function with its numbers.

    Attributes:
        config: complete, with defaults.
    """

    name: str
    formula: LossFormula
    config: Mapping[str, float]

    @property
    def group(self) -> int:
        """Number of consecutive examples that belong together; only multiples of it are a micro-batch."""
        return self.formula.group

    def check(self, examples: Sequence[TrainingExample]) -> None:
        """Raise BadRequest, naming the input, unless these examples have what the loss function reads.

        Their tokens and lengths are checked by the trainer.
        """
        if len(examples) % self.group:
            raise BadRequest(
                f"{self.name} takes examples in groups of {self.group}; {len(examples)} are no multiple of it",
                param="examples",
            )
        for index, example in enumerate(examples):
            place = f"examples.{index}"
            if len(example.targets) != len(example.tokens):
                raise BadRequest(
                    f"{len(example.tokens)} tokens have {len(example.targets)} targets", param=f"{place}.targets"
                )
            for name in self.formula.inputs:
                self._check_input(example, name, f"{place}.inputs.{name}")
            unknown = next((name for name in example.inputs if name not in self.formula.inputs), None)
            if unknown is not None:
                raise BadRequest(
                    f"{self.name} does not read {unknown!r}, only {', '.join(self.formula.inputs)}",
                    param=f"{place}.inputs.{unknown}",
                )
            if self.formula.mask and any(example.inputs["advantages"]) and not any(example.inputs[self.formula.mask]):
                raise BadRequest(
                    f"advantages need a {self.formula.mask} other than 0 somewhere in their sequence",
                    param=f"{place}.inputs.{self.formula.mask}",
                )

    def _check_input(self, example: TrainingExample, name: str, place: str) -> None:
        values = example.inputs.get(name)
        if values is None:
            raise BadRequest(f"{self.name} reads {name!r} for each target", param=place)
        if len(values) != len(example.targets):
            raise BadRequest(f"{len(example.targets)} targets have {len(values)} {name}", param=place)
        if not all(abs(value) <= _LARGEST for value in values):  # NaN is not either
            raise BadRequest(f"{name} has a number that is not finite in float32", param=place)
        if name in self.formula.binary and not set(values) <= {0, 1}:
            raise BadRequest(f"{name} of {self.name} are 0 or 1", param=place)

    def micro_batch(
        self, adapter: TrainableAdapter, examples: Sequence[TrainingExample], *, all_logprobs: bool = False
    ) -> MicroBatch:
        """Whole groups of checked examples as a micro-batch of a pass.

        Args:
            all_logprobs: compute the log-probabilities of targets that take no part as well.
        """
        return MicroBatch(adapter, self.sequences(examples), self.token_loss(examples), all_logprobs=all_logprobs)

    def sequences(self, examples: Sequence[TrainingExample]) -> list[TrainingSequence]:
        """The examples with cross-entropy's weights, or 1 for targets that take part and 0 for the others."""
        given = self.formula.value is None
        return [
            TrainingSequence(
                example.tokens,
                example.targets,
                example.inputs["weights"] if given else list(map(float, self.formula.takes_part(example.inputs))),
            )
            for example in examples
        ]

    def token_loss(self, examples: Sequence[TrainingExample]) -> TokenLoss | None:
        """The loss of the log-probabilities of all targets that take part; None: cross-entropy."""
        return None if self.formula.value is None else _ExampleLoss(self, examples)


class _ExampleLoss:
    """A `TokenLoss` of examples."""

    def __init__(self, loss: ConfiguredLoss, examples: Sequence[TrainingExample]) -> None:
        parts = [loss.formula.takes_part(example.inputs) for example in examples]
        self._loss, self._examples = loss, len(examples)
        self._inputs = {
            name: [
                value
                for example, part in zip(examples, parts, strict=True)
                for value, own in zip(example.inputs[name], part, strict=True)
                if own
            ]
            for name in loss.formula.inputs
        }
        self._example = [index for index, part in enumerate(parts) for _ in range(sum(part))]

    def __call__(self, logprobs: Tensor) -> LossValue:
        assert self._loss.formula.value is not None
        inputs = {
            name: torch.tensor(values, dtype=logprobs.dtype, device=logprobs.device)
            for name, values in self._inputs.items()
        }
        example = torch.tensor(self._example, dtype=torch.int64, device=logprobs.device)
        return self._loss.formula.value(LossTerms(logprobs, inputs, example, self._examples), self._loss.config)


def find_loss(name: str, config: Mapping[str, float]) -> ConfiguredLoss:
    """The loss function of a name. Raises BadRequest for a name, or a number in `config`, that there is not."""
    formula = FORMULAS.get(name)
    if formula is None:
        raise BadRequest(f"{name[:100]!r} is no loss function; there are {', '.join(FORMULAS)}", param="loss")
    complete = {key: number.default for key, number in formula.config.items()}
    for key, value in config.items():
        key = key[:100]
        place = f"config.{key}"
        if key not in formula.config:
            known = f"only {', '.join(formula.config)}" if formula.config else "no numbers"
            raise BadRequest(f"{name} reads {known} in its config", param=place)
        number = formula.config[key]
        if not math.isfinite(value) or not number.lowest <= value <= number.highest:
            raise BadRequest(f"{key} = {value} is not from {number.lowest:g} to {number.highest:g}", param=place)
        complete[key] = value
    low, high = (complete.get(key, 1.0) for key in _CLIP)
    if low > high:
        raise BadRequest(f"{_CLIP[0]} = {low} is above {_CLIP[1]} = {high}", param=f"config.{_CLIP[0]}")
    return ConfiguredLoss(name, formula, complete)


def mean_metrics(parts: Iterable[Mapping[str, MeanMetric]]) -> dict[str, float]:
    """Means over all parts of a batch, by name; a metric without terms is left out."""
    sums: dict[str, MeanMetric] = {}
    for part in parts:
        for name, own in part.items():
            total, terms = sums.get(name, MeanMetric(0.0, 0))
            sums[name] = MeanMetric(total + own.total, terms + own.terms)
    return {name: own.total / own.terms for name, own in sums.items() if own.terms}
