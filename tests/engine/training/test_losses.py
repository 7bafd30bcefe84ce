"""Loss functions: values and gradients are those of formulas written down a second time, over PEFT's model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import VOCABULARY, reference, save
from torch import Tensor
from training_driver import TrainingDriver, load_trainable

from lora_serve.engine.training.loss_formulas import FORMULAS, LossTerms, MeanMetric
from lora_serve.engine.training.losses import find_loss, mean_metrics
from lora_serve.engine.training.micro_batch import MicroBatchResult
from lora_serve.engine.training.trainable_adapter import TrainableAdapter
from lora_serve.engine.training.trained_files import save_peft
from lora_serve.engine.training.training_settings import LoraSettings
from lora_serve.errors import BadRequest
from lora_serve.training_messages import TrainingExample

Rows = Sequence[tuple[Tensor, dict[str, list[float]]]]  # of each example: its targets' log-probabilities, its inputs


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> TrainingDriver:
    return TrainingDriver(save("llama", tmp_path_factory.mktemp("base")))


def data(name: str, count: int = 4, seed: int = 0) -> list[TrainingExample]:
    """Random examples, whose first targets, the prompt's, are sent as Tinker's clients send them."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in torch.randint(5, 12, (count,), generator=generator).tolist():
        tokens = torch.randint(3, VOCABULARY, (length + 1,), generator=generator).tolist()
        part = [0.0] * 2 + [1.0] * (length - 2)

        def drawn(low: float, high: float, part: list[float] = part, length: int = length) -> list[float]:
            values = torch.empty(length, dtype=torch.float64).uniform_(low, high, generator=generator).tolist()
            return [value * own for value, own in zip(values, part, strict=True)]

        inputs = {"weights": drawn(-2, 2) if name == "cross_entropy" else part, "logprobs": drawn(-6.0, -5.2)}
        inputs |= {"advantages": drawn(-2, 2), "sequence_ratio_mask": part}
        found.append(TrainingExample(tokens[:-1], tokens[1:], {key: inputs[key] for key in FORMULAS[name].inputs}))
    return found


def policy(term: Callable[[Tensor, float, float], Tensor]) -> Callable[[Rows], Tensor]:
    """The sum of a term of (log-probability, q, A) over targets with an advantage."""

    def total(rows: Rows) -> Tensor:
        terms = [
            term(lp, q, a)
            for logprobs, inputs in rows
            for lp, q, a in zip(logprobs, inputs["logprobs"], inputs["advantages"], strict=True)
            if a != 0
        ]
        return torch.stack(terms).sum()

    return total


def surrogate(ratio: Tensor, a: float) -> Tensor:
    return -torch.minimum(ratio * a, torch.clamp(ratio, 0.8, 1.2) * a)


def gspo(rows: Rows) -> Tensor:
    total = torch.zeros(())
    for logprobs, inputs in rows:
        q, advantages = (torch.tensor(inputs[key], dtype=logprobs.dtype) for key in ("logprobs", "advantages"))
        mask = torch.tensor(inputs["sequence_ratio_mask"], dtype=torch.bool)
        sequence = (logprobs - q)[mask].mean().exp().detach()
        for lp, a in zip(logprobs, advantages.tolist(), strict=True):
            total = total + surrogate(sequence * lp.exp() / lp.detach().exp(), a) if a != 0 else total
    return total


def dpo(rows: Rows) -> Tensor:
    gains = [
        sum((lp - q) * w for lp, q, w in zip(logprobs, inputs["logprobs"], inputs["weights"], strict=True))
        for logprobs, inputs in rows
    ]
    pairs: list[Any] = list(zip(gains[0::2], gains[1::2], strict=True))
    return torch.stack([torch.log1p(torch.exp(-0.1 * (chosen - rejected))) for chosen, rejected in pairs]).sum()


def cross_entropy(rows: Rows) -> Tensor:
    return -torch.stack([w * lp for own, inputs in rows for lp, w in zip(own, inputs["weights"], strict=True)]).sum()


FORMULAS_AGAIN: dict[str, Callable[[Rows], Tensor]] = {
    "cross_entropy": cross_entropy,
    "importance_sampling": policy(lambda lp, q, a: -(lp - q).exp() * a),
    "ppo": policy(lambda lp, q, a: surrogate((lp - q).exp(), a)),
    "cispo": policy(lambda lp, q, a: -torch.clamp((lp - q).exp(), 0.8, 1.2).detach() * a * lp),
    "dro": policy(lambda lp, q, a: -(lp * a - 0.5 * 0.05 * (lp - q) ** 2)),
    "gspo": gspo,
    "dpo": dpo,
}


def run(
    driver: TrainingDriver, adapter: TrainableAdapter, name: str, parts: Sequence[Sequence[TrainingExample]]
) -> Any:
    loss = find_loss(name, {})
    for part in parts:
        loss.check(part)
    return driver.trainer.forward_backward([loss.micro_batch(adapter, part) for part in parts]).finish()


@pytest.mark.parametrize("name", FORMULAS)
def test_losses_and_gradients_equal_autograd_over_peft(driver: TrainingDriver, name: str, tmp_path: Path) -> None:
    adapter = driver.trainer.create(name, LoraSettings(r=4, lora_alpha=6, target_modules=["v_proj", "down_proj"]))
    examples = data(name)
    save_peft(adapter, tmp_path)
    model = load_trainable(reference("llama"), tmp_path)
    rows, hits = [], 0
    for example in examples:
        logits = model(input_ids=torch.tensor([example.tokens]), use_cache=False).logits[0].float()
        example.targets[-1] = int(logits[-1].argmax())  # so that there is a hit
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(example.targets)[:, None])[:, 0]
        rows.append((logprobs, example.inputs))
        (part,) = (each.weights for each in find_loss(name, {}).sequences([example]))
        hits += int(((logits.argmax(1) == torch.tensor(example.targets)) & (torch.tensor(part) != 0)).sum())
    wanted = FORMULAS_AGAIN[name](rows)
    wanted.backward()  # type: ignore[no-untyped-call]
    (whole,) = run(driver, adapter, name, [examples])
    assert (whole.error, whole.hits) == (None, hits)
    assert hits >= len(examples)
    assert whole.loss == pytest.approx(float(wanted.detach()), rel=1e-4, abs=1e-5)
    for path, layer in adapter.layers.items():
        own = model.get_submodule(f"base_model.model.{path}").lora_B["default"].weight.grad
        got = layer.b(adapter.gradients) * layer.module.scaling
        torch.testing.assert_close(got, own.T, atol=2e-5, rtol=1e-3)
    gradients = adapter.gradients.clone()
    adapter.gradients.zero_()
    halves = run(driver, adapter, name, [examples[:2], examples[2:]])
    assert sum(half.loss for half in halves) == pytest.approx(whole.loss, rel=1e-4, abs=1e-5)
    torch.testing.assert_close(adapter.gradients, gradients, atol=2e-5, rtol=1e-3)
    assert mean_metrics([half.metrics for half in halves]) == pytest.approx(mean_metrics([whole.metrics]), rel=1e-4)
    driver.trainer.close(adapter)


@pytest.mark.parametrize("name", [name for name in FORMULAS if name != "cross_entropy"])
def test_formulas_pass_gradcheck(name: str) -> None:
    """Except where a formula stops a gradient: there the derivative is that of the formula written again."""
    examples = data(name)
    loss = find_loss(name, {})
    parts = [loss.formula.takes_part(example.inputs) for example in examples]
    function = loss.token_loss(examples)
    assert function is not None
    generator = torch.Generator().manual_seed(3)
    count = sum(map(sum, parts))
    given = -5.5 + 0.2 * torch.randn(count, dtype=torch.float64, generator=generator)
    given.requires_grad_()
    if name not in ("cispo", "gspo"):
        assert torch.autograd.gradcheck(lambda own: function(own).loss, given)
    rows, rest = [], given
    for example, part in zip(examples, parts, strict=True):
        values = torch.full((len(part),), -5.0, dtype=torch.float64)
        values = values.masked_scatter(torch.tensor(part), rest[: sum(part)])
        rest = rest[sum(part) :]
        rows.append((values, example.inputs))
    wanted = FORMULAS_AGAIN[name](rows)
    got = function(given).loss
    torch.testing.assert_close(got, wanted.to(got))
    torch.testing.assert_close(*(torch.autograd.grad(each, given)[0] for each in (got, wanted)))


def test_a_clipped_ratio_that_overflows_has_no_gradient() -> None:
    terms = {"logprobs": torch.tensor([-1000.0, -1.0]), "advantages": torch.tensor([1.0, -1.0])}
    for name in ("ppo", "gspo"):
        logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
        inputs = terms | {"sequence_ratio_mask": torch.ones(2)}
        formula = find_loss(name, {}).formula
        assert formula.value is not None
        value = formula.value(LossTerms(logprobs, inputs, torch.tensor([0, 1]), 2), find_loss(name, {}).config)
        (gradient,) = torch.autograd.grad(value.loss, logprobs)
        assert not gradient.any()
        assert float(value.loss.detach()) == pytest.approx(-1.2 + 0.8)
        assert value.metrics["clipped"] == MeanMetric(2.0, 2)


def test_an_impossible_target_without_an_advantage_changes_nothing(driver: TrainingDriver) -> None:
    """Its log-probability may be -∞, and 0 · ∞ would be NaN."""
    for name in ("importance_sampling", "ppo", "cispo", "dro"):
        (example,) = data(name, 1)
        sequence = find_loss(name, {}).sequences([example])[0]
        assert list(sequence.weights) == [0.0] * 2 + [1.0] * (len(example.tokens) - 2)
    only_sampled = TrainingExample([5, 6], [6, 7], {"advantages": [0.0, 0.0], "logprobs": [0.0, -1.5]})
    assert find_loss("dro", {}).sequences([only_sampled])[0].weights == [0.0, 1.0]


def test_rewards_of_pairs_are_measured() -> None:
    loss = find_loss("dpo", {"beta": 0.5})
    examples = [TrainingExample([5], [6], {"weights": [1.0], "logprobs": [-2.0]}) for _ in range(4)]
    function = loss.token_loss(examples)
    assert function is not None
    value = function(torch.tensor([-1.0, -3.0, -2.5, -2.25], requires_grad=True))
    assert mean_metrics([value.metrics]) == pytest.approx(
        {"rewards_chosen": 0.125, "rewards_rejected": -0.3125, "rewards_margin": 0.4375, "rewards_accuracy": 0.5}
    )


@pytest.mark.parametrize("name", ["cross_entropy", "importance_sampling"])
def test_all_log_probabilities_are_given_where_asked_for(driver: TrainingDriver, name: str) -> None:
    adapter = driver.trainer.create("asked", LoraSettings(r=4))
    loss, examples = find_loss(name, {}), data(name)
    plain, asked = (loss.micro_batch(adapter, examples, all_logprobs=every) for every in (False, True))
    ones = [TrainingExample(each.tokens, each.targets, {"weights": [1.0] * len(each.tokens)}) for each in examples]
    (wanted,) = driver.trainer.evaluate([find_loss("cross_entropy", {}).micro_batch(adapter, ones)]).finish()
    found: list[MicroBatchResult] = []
    for gradients in (False, True):
        start = driver.trainer.forward_backward if gradients else driver.trainer.evaluate
        passes = [start([batch]) for batch in (plain, asked)]
        found.extend(own for running in passes for own in running.finish())
        assert len(passes[1].quanta) == len(passes[0].quanta) + len(driver.trainable.head_parts)
    for index, result in enumerate(found):
        every = index % 2 == 1
        assert result.loss == pytest.approx(found[0].loss, rel=1e-5)
        for own, theirs in zip(result.logprobs, wanted.logprobs, strict=True):
            assert bool(own[:2].any()) == every
            torch.testing.assert_close(own[2:], theirs[2:], atol=1e-5, rtol=1e-5)
            if every:
                torch.testing.assert_close(own, theirs, atol=1e-5, rtol=1e-5)
    driver.trainer.close(adapter)


@pytest.mark.parametrize(
    ("name", "config", "param"),
    [
        ("nothing", {}, "loss"),
        ("cross_entropy", {"beta": 1.0}, "config.beta"),
        ("ppo", {"clip_low_threshold": -0.1}, "config.clip_low_threshold"),
        ("ppo", {"clip_high_threshold": math.inf}, "config.clip_high_threshold"),
        ("cispo", {"clip_high_threshold": 0.5}, "config.clip_low_threshold"),
        ("dpo", {"beta": 0.0}, "config.beta"),
    ],
)
def test_unknown_losses_and_numbers_are_refused(name: str, config: dict[str, float], param: str) -> None:
    with pytest.raises(BadRequest) as raised:
        find_loss(name, config)
    assert raised.value.param == param


@pytest.mark.parametrize(
    ("name", "inputs", "param"),
    [
        ("cross_entropy", {}, "examples.0.inputs.weights"),
        ("cross_entropy", {"weights": [1.0]}, "examples.0.inputs.weights"),
        ("cross_entropy", {"weights": [1.0, math.nan]}, "examples.0.inputs.weights"),
        ("cross_entropy", {"weights": [1.0, 1.0], "mask": [1.0, 1.0]}, "examples.0.inputs.mask"),
        ("ppo", {"advantages": [1.0, 1.0], "logprobs": [-math.inf, 0.0]}, "examples.0.inputs.logprobs"),
        (
            "gspo",
            {"advantages": [1.0, 1.0], "logprobs": [-1.0, 0.0], "sequence_ratio_mask": [0.0, 0.0]},
            "examples.0.inputs.sequence_ratio_mask",
        ),
        ("dpo", {"weights": [1.0, 1.0], "logprobs": [0.0, 0.0]}, "examples"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(name: str, inputs: dict[str, list[float]], param: str) -> None:
    with pytest.raises(BadRequest) as raised:
        find_loss(name, {}).check([TrainingExample([5, 6], [6, 7], inputs)])
    assert raised.value.param == param


def test_weights_of_pairs_are_0_or_1_and_targets_are_as_many_as_tokens() -> None:
    pair = [TrainingExample([5, 6], [6, 7], {"weights": [1.0, 0.5], "logprobs": [0.0, 0.0]})] * 2
    with pytest.raises(BadRequest, match="weights of dpo are 0 or 1"):
        find_loss("dpo", {}).check(pair)
    with pytest.raises(BadRequest, match="2 tokens have 1 targets"):
        find_loss("cross_entropy", {}).check([TrainingExample([5, 6], [6], {"weights": [1.0]})])
