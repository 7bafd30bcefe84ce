"""Loss functions of log-probabilities, by name: cross-entropy, policy gradients, preferences.

    lp  log-probability of a target under the adapter       A  its `advantages`
    q   the same when it was sampled: its `logprobs`        r = exp(lp − q), lo and hi the clip thresholds

    cross_entropy         −Σ w·lp                                           w its `weights`, of any sign and size
    importance_sampling   −Σ r·A
    ppo                   −Σ min(r·A, clip(r, lo, hi)·A)                    Schulman et al. 2017
    cispo                 −Σ stopgrad(clip(r, lo, hi))·A·lp                 MiniMax-M1, 2025
    dro                   −Σ (lp·A − ½·beta·(lp − q)²)                      Richemond et al. 2024
    gspo                  ppo with one ratio per sequence, exp(mean (lp − q)) over `sequence_ratio_mask` ≠ 0, whose
                          gradient in each term is that of the target's own lp    Zheng et al. 2025, GSPO-token
    dpo                   −Σ log σ(beta·(Σ(lp − q) of the chosen − Σ(lp − q) of the rejected))   Rafailov et al. 2023;
                          examples 2i are chosen, 2i + 1 rejected, q is the reference's, `weights` are 0 or 1

A loss is a sum over targets and examples. A target without an effect on it takes no part: weight 0, advantage 0 (in
dro: and q = 0, which is how prompts are sent; in gspo: and not in the mask). No term is formed for it, as 0 · ∞ is no
number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Inputs = Mapping[str, Sequence[float]]  # of one example, by name


class MeanMetric(NamedTuple):
    """A metric as a sum and the number of its terms, so that parts of a batch can be added up."""

    total: float
    terms: int


@dataclass(frozen=True)
class LossValue:
    """A loss, a scalar tensor, and the metrics found with it."""

    loss: Tensor
    metrics: Mapping[str, MeanMetric] = field(default_factory=dict)


@dataclass(frozen=True)
class LossTerms:
    """What a formula reads of the targets that take part, in order.

    Attributes:
        logprobs: [targets]; the gradient goes through it.
        inputs: by name [targets].
        example: [targets], the index of each target's example.
        examples: number of examples.
    """

    logprobs: Tensor
    inputs: Mapping[str, Tensor]
    example: Tensor
    examples: int

    def by_example(self, values: Tensor) -> Tensor:
        """Sums [examples] of values [targets]."""
        return values.new_zeros(self.examples).index_add(0, self.example, values)


@dataclass(frozen=True)
class ConfigNumber:
    """A number in a loss function's configuration, from `lowest` to `highest`."""

    default: float
    lowest: float = 0.0
    highest: float = math.inf


@dataclass(frozen=True)
class LossFormula:
    """A loss function.

    Attributes:
        inputs: names of the inputs that it reads; all are required.
        takes_part: which targets of an example take part.
        value: None: cross-entropy, whose gradient does not depend on the log-probabilities.
        group: number of consecutive examples that belong together; the loss is a sum over these groups.
        config: its numbers.
        binary: inputs that are 0 or 1.
        mask: the input over which a sequence's mean is formed; it is not 0 everywhere in a sequence with advantages.
    """

    inputs: tuple[str, ...]
    takes_part: Callable[[Inputs], list[bool]]
    value: Callable[[LossTerms, Mapping[str, float]], LossValue] | None
    group: int = 1
    config: Mapping[str, ConfigNumber] = field(default_factory=dict)
    binary: tuple[str, ...] = ()
    mask: str = ""


def _importance_sampling(terms: LossTerms, config: Mapping[str, float]) -> LossValue:
    ratios = (terms.logprobs - terms.inputs["logprobs"]).exp()
    return LossValue(-(ratios * terms.inputs["advantages"]).sum(), {"ratio": _mean(ratios)})


def _ppo(terms: LossTerms, config: Mapping[str, float]) -> LossValue:
    return _clipped(terms.logprobs - terms.inputs["logprobs"], terms.inputs["advantages"], config)


def _clipped(log_ratios: Tensor, advantages: Tensor, config: Mapping[str, float]) -> LossValue:
    """−Σ min(r·A, clip(r, lo, hi)·A) of log r and A [targets].

    Clipped terms are constants and left out of the graph: a ratio that overflows has no gradient to multiply by 0.
    """
    low, high = config["clip_low_threshold"], config["clip_high_threshold"]
    with torch.no_grad():
        ratios = log_ratios.exp()
        clipped = torch.where(advantages > 0, ratios > high, (ratios < low) & (advantages != 0))
        constants = (ratios.clamp(low, high) * advantages)[clipped].sum()
    loss = -(log_ratios[~clipped].exp() * advantages[~clipped]).sum() - constants
    return LossValue(loss, {"ratio": _mean(ratios), "clipped": _mean(clipped)})


def _cispo(terms: LossTerms, config: Mapping[str, float]) -> LossValue:
    low, high = config["clip_low_threshold"], config["clip_high_threshold"]
    ratios = (terms.logprobs.detach() - terms.inputs["logprobs"]).exp()
    clamped = ratios.clamp(low, high)
    loss = -(clamped * terms.inputs["advantages"] * terms.logprobs).sum()
    return LossValue(loss, {"ratio": _mean(ratios), "clipped": _mean(clamped != ratios)})


def _dro(terms: LossTerms, config: Mapping[str, float]) -> LossValue:
    distance = (terms.logprobs - terms.inputs["logprobs"]).square()
    rewarded = terms.inputs["advantages"] != 0
    gained = (terms.logprobs[rewarded] * terms.inputs["advantages"][rewarded]).sum()
    return LossValue(0.5 * config["beta"] * distance.sum() - gained, {"squared_log_ratio": _mean(distance)})


def _gspo(terms: LossTerms, config: Mapping[str, float]) -> LossValue:
    logprobs, counted = terms.logprobs, terms.inputs["sequence_ratio_mask"] != 0
    own = torch.where(counted, logprobs.detach() - terms.inputs["logprobs"], 0.0)
    means = terms.by_example(own) / terms.by_example(counted.to(own)).clamp(min=1)
    rewarded = terms.inputs["advantages"] != 0
    lp = logprobs[rewarded]
    return _clipped(means[terms.example[rewarded]] + lp - lp.detach(), terms.inputs["advantages"][rewarded], config)


def _dpo(terms: LossTerms, config: Mapping[str, float]) -> LossValue:
    rewards = config["beta"] * terms.by_example(terms.logprobs - terms.inputs["logprobs"])
    chosen, rejected = rewards[0::2], rewards[1::2]
    metrics = {
        "rewards_chosen": _mean(chosen),
        "rewards_rejected": _mean(rejected),
        "rewards_margin": _mean(chosen - rejected),
        "rewards_accuracy": _mean(chosen > rejected),
    }
    return LossValue(-logsigmoid(chosen - rejected).sum(), metrics)


def _mean(values: Tensor) -> MeanMetric:
    return MeanMetric(float(values.detach().sum(dtype=torch.float64)), values.numel())


def _weighted(inputs: Inputs) -> list[bool]:
    return [weight != 0 for weight in inputs["weights"]]


def _advantaged(inputs: Inputs) -> list[bool]:
    return [advantage != 0 for advantage in inputs["advantages"]]


def _either(second: str) -> Callable[[Inputs], list[bool]]:
    """Targets with an advantage, or with another input that is not 0."""

    def takes_part(inputs: Inputs) -> list[bool]:
        return [bool(a or b) for a, b in zip(inputs["advantages"], inputs[second], strict=True)]

    return takes_part


_POLICY = ("logprobs", "advantages")
_CLIP = {"clip_low_threshold": ConfigNumber(0.8), "clip_high_threshold": ConfigNumber(1.2)}

FORMULAS: Mapping[str, LossFormula] = {
    "cross_entropy": LossFormula(("weights",), _weighted, None),
    "importance_sampling": LossFormula(_POLICY, _advantaged, _importance_sampling),
    "ppo": LossFormula(_POLICY, _advantaged, _ppo, config=_CLIP),
    "cispo": LossFormula(_POLICY, _advantaged, _cispo, config=_CLIP),
    "dro": LossFormula(_POLICY, _either("logprobs"), _dro, config={"beta": ConfigNumber(0.05)}),
    "gspo": LossFormula(
        (*_POLICY, "sequence_ratio_mask"),
        _either("sequence_ratio_mask"),
        _gspo,
        config=_CLIP,
        mask="sequence_ratio_mask",
    ),
    "dpo": LossFormula(
        ("weights", "logprobs"), _weighted, _dpo, 2, {"beta": ConfigNumber(0.1, lowest=1e-6)}, binary=("weights",)
    ),
}
