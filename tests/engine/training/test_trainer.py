"""What the trainer promises beside parity: jobs do not meet, quanta are short, memory is counted, refusals say why."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from support import ARCHITECTURES, VOCABULARY, make_model, save
from torch import Tensor
from training_driver import MEMORY, TrainingDriver, examples

from lora_serve.adapters.adapter import Adapter
from lora_serve.adapters.checkpoint import read
from lora_serve.adapters.formats.dispatch import lower
from lora_serve.engine.training.fused_pass import FusedPass, pass_bytes
from lora_serve.engine.training.loss_formulas import LossValue
from lora_serve.engine.training.micro_batch import MicroBatch, TrainingSequence
from lora_serve.engine.training.trainable_adapter import TrainableAdapter
from lora_serve.engine.training.trained_files import save_peft
from lora_serve.engine.training.trainer import Trainer
from lora_serve.engine.training.training_settings import AdamSettings, LoraSettings
from lora_serve.errors import BadRequest, Overloaded

RATE = 5e-3


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> TrainingDriver:
    return TrainingDriver(save("llama", tmp_path_factory.mktemp("base")))


def train(driver: TrainingDriver, adapter: TrainableAdapter, steps: int, first: int = 0) -> list[float]:
    """Train alone; the losses."""
    losses = []
    for step in range(first, first + steps):
        (result,) = driver.trainer.forward_backward([MicroBatch(adapter, examples(2, VOCABULARY, step))]).finish()
        losses.append(result.loss)
        adapter.optimizer_step(RATE)
    return losses


def test_a_job_that_diverges_leaves_its_neighbours_alone(driver: TrainingDriver) -> None:
    healthy, sick, other = (driver.trainer.create(name, LoraSettings(r=4)) for name in ("healthy", "sick", "other"))
    alone = driver.trainer.create("alone", LoraSettings(r=4))
    wanted = train(driver, alone, 3)
    sick.restore(sick.state() | {"masters": torch.full_like(sick.masters, math.nan)})
    losses = []
    for step in range(3):
        own = examples(2, VOCABULARY, step)
        running = driver.trainer.forward_backward([MicroBatch(each, own) for each in (sick, healthy, other)])
        results = running.finish()
        assert math.isnan(results[0].loss)
        losses.append(results[1].loss)
        with pytest.raises(BadRequest, match="gradient of 'sick' is not finite"):
            sick.optimizer_step(RATE)
        healthy.optimizer_step(RATE)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(wanted), atol=1e-5, rtol=0)
    torch.testing.assert_close(healthy.masters, alone.masters, atol=1e-5, rtol=0)
    for adapter in (healthy, sick, other, alone):
        driver.trainer.close(adapter)


def test_a_loss_function_gets_log_probabilities_and_its_errors_are_its_own(driver: TrainingDriver) -> None:
    names = ("given", "function", "broken")
    given, function, broken = (driver.trainer.create(name, LoraSettings(r=4)) for name in names)
    own = examples(2, VOCABULARY, 0)
    count = sum(weight != 0 for each in own for weight in each.weights)

    def mean(logprobs: Tensor) -> LossValue:
        return LossValue(-logprobs.mean())

    def fails(logprobs: Tensor) -> LossValue:
        raise ZeroDivisionError("the caller's own")

    batches = [MicroBatch(given, own), MicroBatch(function, own, mean), MicroBatch(broken, own, fails)]
    results = driver.trainer.forward_backward(batches).finish()
    assert results[1].error is None
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-5)
    assert sum(len(each) for each in results[1].logprobs) == sum(len(each.tokens) for each in own)
    assert float(torch.cat(list(results[1].logprobs)).sum()) == pytest.approx(-count * results[1].loss, rel=1e-5)
    assert isinstance(results[2].error, ZeroDivisionError)
    torch.testing.assert_close(function.gradients, given.gradients, atol=1e-6, rtol=1e-4)
    assert not broken.gradients.any()
    for adapter in (given, function, broken):
        driver.trainer.close(adapter)


def test_the_base_serves_between_any_two_quanta(driver: TrainingDriver) -> None:
    one, two = (driver.trainer.create(name, LoraSettings(r=4)) for name in ("one", "two"))
    before, batch = driver.serve(), examples(3, VOCABULARY, 0)
    running = driver.trainer.forward_backward([MicroBatch(one, batch)])
    while running.advance():
        assert driver.serve().equal(before)
    assert running.done == len(running.quanta) == 1 + 2 * driver.trainable.layers + 2 * 3
    driver.trainer.forward_backward([MicroBatch(two, batch)]).finish()
    assert one.gradients.equal(two.gradients)
    driver.trainer.close(one)
    driver.trainer.close(two)


def test_two_passes_may_take_turns(driver: TrainingDriver) -> None:
    names = ("one", "two", "three", "four")
    adapters = [driver.trainer.create(name, LoraSettings(r=4)) for name in names]
    batches = [MicroBatch(adapter, examples(2, VOCABULARY, index % 2)) for index, adapter in enumerate(adapters)]
    running = [driver.trainer.forward_backward([batch]) for batch in batches[:2]]
    while sum(each.advance() for each in running):
        pass
    for batch in batches[2:]:
        driver.trainer.forward_backward([batch]).finish()
    assert adapters[0].gradients.equal(adapters[2].gradients)
    assert adapters[1].gradients.equal(adapters[3].gradients)
    for adapter in adapters:
        driver.trainer.close(adapter)


def test_gradients_add_up_until_the_optimizer_s_step(driver: TrainingDriver) -> None:
    whole, parts = (driver.trainer.create(name, LoraSettings(r=4)) for name in ("whole", "parts"))
    batch = examples(4, VOCABULARY, 0)
    driver.trainer.forward_backward([MicroBatch(whole, batch)]).finish()
    for part in (batch[:1], batch[1:]):
        driver.trainer.forward_backward([MicroBatch(parts, part)]).finish()
    torch.testing.assert_close(parts.gradients, whole.gradients, atol=1e-6, rtol=1e-4)
    driver.trainer.close(whole)
    driver.trainer.close(parts)


def test_layers_are_not_computed_twice_where_there_is_memory(driver: TrainingDriver) -> None:
    adapter, batch = driver.trainer.create("kept", LoraSettings(r=4)), examples(2, VOCABULARY, 0)
    called: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *args, name=name: called.append(name))
        for name, module in driver.trainable._model.named_modules()
        if name.endswith("input_layernorm")
    ]
    counts, gradients = [], []
    for kept in (0, 2, driver.trainable.layers):
        called.clear()
        FusedPass(driver.trainable, [MicroBatch(adapter, batch)], gradients=True, kept_layers=kept).finish()
        counts.append(len(called))
        gradients.append(adapter.gradients.clone())
        adapter.gradients.zero_()
    for hook in hooks:
        hook.remove()
    assert gradients[0].equal(gradients[1])
    assert gradients[0].equal(gradients[2])
    assert counts == [6, 4, 3]
    driver.trainer.close(adapter)


def test_evaluating_changes_nothing(driver: TrainingDriver) -> None:
    adapter = driver.trainer.create("evaluated", LoraSettings(r=4))
    batch = [MicroBatch(adapter, examples(2, VOCABULARY, 0))]
    (found,) = driver.trainer.evaluate(batch).finish()
    assert not adapter.gradients.any()
    assert driver.trainer.forward_backward(batch).finish()[0].loss == pytest.approx(found.loss, rel=1e-6)
    driver.trainer.close(adapter)


@pytest.mark.parametrize("dora", [False, True])
def test_training_goes_on_from_a_saved_state(driver: TrainingDriver, dora: bool) -> None:
    settings = LoraSettings(r=4, use_dora=dora)
    straight, first = (driver.trainer.create(name, settings) for name in ("straight", "first"))
    train(driver, straight, 4)
    train(driver, first, 2)
    state = first.state()
    driver.trainer.close(first)
    second = driver.trainer.create("second", settings)
    second.restore(state)
    train(driver, second, 2, first=2)
    assert second.masters.equal(straight.masters)
    with pytest.raises(BadRequest, match="other settings"):
        second.restore(state | {"masters": torch.zeros(1)})
    driver.trainer.close(straight)
    driver.trainer.close(second)


def test_what_is_trained_is_what_is_served_from_its_files(driver: TrainingDriver, tmp_path: Path) -> None:
    adapter = driver.trainer.create("saved", LoraSettings(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"]))
    train(driver, adapter, 1)
    save_peft(adapter, tmp_path)
    deltas = lower(read(tmp_path, max_bytes=1 << 30), driver.loaded.shape).deltas
    served = adapter.lowered
    assert deltas.keys() == served.offsets.keys() == adapter.layers.keys()
    for name, delta in deltas.items():
        own = served.delta(driver.loaded.shape.sites[name])
        assert own is not None
        torch.testing.assert_close(own.a, delta.a, atol=0, rtol=1e-6)
        torch.testing.assert_close(own.b, delta.b, atol=0, rtol=1e-6)
    driver.trainer.close(adapter)


def test_memory_is_known_before_and_refused_with_numbers(driver: TrainingDriver) -> None:
    settings = LoraSettings(r=4, use_dora=True)
    needed = driver.trainer.needed(settings, tokens=100)
    adapter = driver.trainer.create("counted", settings)
    train(driver, adapter, 1)
    state = adapter.state()
    tensors = [adapter.masters, adapter.gradients, adapter._computed, state["exp_avg"], state["exp_avg_sq"]]
    assert needed.adapter == adapter.nbytes == driver.trainer.used == sum(each.nbytes for each in tensors)
    assert needed.running == pass_bytes(driver.trainable, 100) > 100 * driver.trainable.token_bytes > 0
    driver.trainer.close(adapter)
    assert driver.trainer.used == 0
    small = Trainer(driver.trainable, needed.adapter * 3 // 2)
    adapter = small.create("one", settings)
    with pytest.raises(Overloaded, match=r"takes 0.2 MiB, .* 0.0 MiB of 0.4 MiB and 3 of 4 slots are free"):
        small.create("two", settings)
    with pytest.raises(BadRequest, match=r"a pass over \d+ tokens takes [0-9.]+ MiB; 0.0 MiB of 0.4 MiB are free"):
        small.forward_backward([MicroBatch(adapter, examples(60, VOCABULARY, 0))])
    small.close(adapter)
    with pytest.raises(BadRequest, match=r"all training has 0\.0 MiB"):
        Trainer(driver.trainable, 1000).create("none", settings)


def test_what_a_model_does_to_logits_is_counted(tmp_path: Path) -> None:
    """Gemma 2 bounds them by tanh, whose result is saved."""
    counted = []
    for cap in (None, 30.0):
        config = copy.deepcopy(ARCHITECTURES["gemma2"])
        config.final_logit_softcapping = cap
        make_model(config).save_pretrained(tmp_path / str(cap))
        counted.append(TrainingDriver(tmp_path / str(cap)).trainable.logit_bytes)
    assert counted[1] == counted[0] + 4


def test_there_is_no_second_copy_of_the_weights(driver: TrainingDriver) -> None:
    resident = {each.data_ptr() for each in driver.loaded.model.parameters()}
    model = driver.trainable._model
    assert {each.data_ptr() for each in model.parameters()} <= resident
    assert not {name for name, _ in model.named_parameters() if "proj" in name or "embed" in name or "head" in name}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (LoraSettings(target_modules=["nothing"]), "nothing is no linear module of the base; some are down_proj"),
        (LoraSettings(r=0), "r in adapter_config.json|rank 0"),
        (LoraSettings(r=5000), "rank 5000; 1 to 1024"),
        (LoraSettings(lora_alpha=-1), "alpha -1"),
        (LoraSettings(target_modules="(?=a)b"), "target_modules is not a plain regular expression"),
    ],
)
def test_settings_that_do_not_fit_are_refused(driver: TrainingDriver, settings: LoraSettings, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        driver.trainer.create("refused", settings)
    assert driver.trainer.used == 0


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        (TrainingSequence([1, 2], [2], [1.0]), "2 tokens, 1 targets and 1 weights"),
        (TrainingSequence([], [], []), "0 tokens"),
        (TrainingSequence([1, VOCABULARY], [2, 3], [1.0, 1.0]), f"{VOCABULARY} is no token"),
        (TrainingSequence([1], [-1], [1.0]), "-1 is no token"),
        (TrainingSequence([1], [2], [math.nan]), "a weight is not finite"),
        (TrainingSequence([1] * 200, [1] * 200, [1.0] * 200), "has 200 tokens; at most 128"),
    ],
)
def test_data_that_do_not_fit_are_refused(driver: TrainingDriver, sequence: TrainingSequence, message: str) -> None:
    adapter = driver.trainer.create("data", LoraSettings(r=4))
    try:
        with pytest.raises(BadRequest, match=message):
            driver.trainer.forward_backward([MicroBatch(adapter, [sequence])])
    finally:
        driver.trainer.close(adapter)


def test_an_adapter_that_could_not_be_made_keeps_no_slot(driver: TrainingDriver) -> None:
    gradients = driver.trainable.gradients
    nothing = Adapter("nothing", torch.zeros(4), {})
    taken = [gradients.load(nothing) for _ in range(gradients.slots)]
    with pytest.raises(IndexError):  # as any other fault of a device
        driver.trainer.create("failed", LoraSettings(r=4))
    for slot in reversed(taken):
        gradients.evict(slot)
    assert driver.trainer.used == 0
    assert driver.trainable.free_slots == gradients.slots
    driver.trainer.close(driver.trainer.create("made", LoraSettings(r=4)))


def test_a_closed_adapter_is_not_trained(driver: TrainingDriver) -> None:
    adapter = driver.trainer.create("closed", LoraSettings(r=4))
    driver.trainer.close(adapter)
    with pytest.raises(BadRequest, match="'closed' is not in training"):
        driver.trainer.evaluate([MicroBatch(adapter, examples(1, VOCABULARY, 0))])


def test_a_base_in_half_precision_learns(driver: TrainingDriver, tmp_path: Path) -> None:
    half = TrainingDriver(save("llama", tmp_path), dtype="bfloat16")
    adapter = half.trainer.create("half", LoraSettings(r=8), AdamSettings())
    batch = [MicroBatch(adapter, examples(2, VOCABULARY, 0))]
    losses = []
    for _ in range(12):
        losses.append(half.trainer.forward_backward(batch).finish()[0].loss)
        adapter.optimizer_step(2e-2)
    assert losses[-1] < 0.5 * losses[0]
    assert MEMORY > half.trainer.used > 0
