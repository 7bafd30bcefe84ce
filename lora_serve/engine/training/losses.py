"""The loss functions of training runs, by name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lora_serve.engine.training.micro_batch import MicroBatch, TrainingSequence
from lora_serve.engine.training.trainable_adapter import TrainableAdapter
from lora_serve.errors import BadRequest
from lora_serve.training_messages import TrainingExample


@dataclass(frozen=True)
class ConfiguredLoss:
    """A loss function with its numbers.

    Attributes:
        group: number of consecutive examples that belong together; only multiples of it are a micro-batch.
    """

    name: str
    group: int = 1
    is_linear: bool = True  # in the log-probabilities, so that the gradient does not depend on them

    def check(self, examples: Sequence[TrainingExample]) -> None:
        """Raise BadRequest, naming the input, unless these examples have what the loss function reads."""
        for index, example in enumerate(examples):
            weights = example.inputs.get("weights")
            place = f"examples.{index}.inputs.weights"
            if weights is None or len(weights) != len(example.targets):
                raise BadRequest(f"{self.name} reads 'weights' for each target", param=place)
            if not all(map(math.isfinite, weights)):
                raise BadRequest("weights has a number that is not finite", param=place)

    def micro_batch(self, adapter: TrainableAdapter, examples: Sequence[TrainingExample]) -> MicroBatch:
        """Whole groups of checked examples as a micro-batch of a pass."""
        return MicroBatch(
            adapter, [TrainingSequence(each.tokens, each.targets, each.inputs["weights"]) for each in examples]
        )


def find_loss(name: str, config: Mapping[str, float]) -> ConfiguredLoss:
    """The loss function of a name. Raises BadRequest for a name, or a number in `config`, that there is not."""
    if name != "cross_entropy":
        raise BadRequest(f"{name!r} is no loss function; there is cross_entropy", param="loss")
    if config:
        raise BadRequest(f"{name} reads no numbers in its config", param=f"config.{next(iter(config))}")
    return ConfiguredLoss(name)


def mean_metrics(parts: Iterable[Mapping[str, object]]) -> dict[str, float]:
    """Means over all parts of a batch, by name."""
    return {}
