"""Methods beside plain LoRA train as in PEFT, and what is saved is read by PEFT and by this server."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support import VOCABULARY, reference, save
from torch import Tensor, nn
from training_driver import LOSS, WEIGHTS, TrainingDriver, check_parity, examples, load_trainable, train_peft

from lora_serve.adapters.adapter import Lowered
from lora_serve.adapters.checkpoint import read
from lora_serve.adapters.formats.dispatch import lower
from lora_serve.engine.training.method_settings import (
    AdapterSettings,
    Ia3Settings,
    PromptTuningSettings,
)
from lora_serve.engine.training.micro_batch import MicroBatch, TrainingSequence
from lora_serve.engine.training.trainable_adapter import TrainableAdapter
from lora_serve.engine.training.trained_files import save_peft
from lora_serve.engine.training.training_settings import AdamSettings, LoraSettings
from lora_serve.model.dropped_delta import dropout_factors
from lora_serve.model.training_step import DeltaDropout

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

STEPS, RATE = 10, 5e-3
LINEAR = {"llama": ("o_proj", "down_proj"), "gpt2": ("mlp.c_proj",), "gemma2": ("down_proj",)}


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> TrainingDriver:
    return TrainingDriver(save("llama", tmp_path_factory.mktemp("base")))


@pytest.fixture(autouse=True)
def closed(driver: TrainingDriver) -> Iterator[None]:
    """Close a test's adapters."""
    yield
    for adapter in [*driver.trainer._adapters.values()]:
        driver.trainer.close(adapter)


def train(driver: TrainingDriver, adapter: TrainableAdapter, data: list[list[TrainingSequence]]) -> list[float]:
    """Train alone; the losses."""
    losses = []
    for own in data:
        losses.append(driver.trainer.forward_backward([MicroBatch(adapter, own)]).finish()[0].loss)
        adapter.optimizer_step(RATE)
    return losses


def read_back(driver: TrainingDriver, adapter: TrainableAdapter, folder: Path) -> tuple[Lowered, Tensor, Tensor]:
    """The adapter's files as this server reads them, and logits: PEFT's with the files, and the trainer's."""
    save_peft(adapter, folder)
    (sequence,) = examples(1, VOCABULARY, 99)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(reference("llama")), folder).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([sequence.tokens]), use_cache=False).logits[0][-len(sequence.tokens) :]
    theirs = logits.log_softmax(-1).gather(1, torch.tensor(sequence.targets)[:, None])[:, 0]
    whole = replace(sequence, weights=[1.0] * len(sequence.tokens))
    (result,) = driver.trainer.evaluate([MicroBatch(adapter, [whole])]).finish()
    return lower(read(folder, max_bytes=1 << 30), driver.loaded.shape), theirs, result.logprobs[0]


@pytest.mark.parametrize("architecture", LINEAR)
def test_ia3_and_prompt_tuning_equal_peft(architecture: str, tmp_path: Path) -> None:
    """In one batch with LoRA, over positions and embeddings that the model scales or adds to."""
    driver = TrainingDriver(save(architecture, tmp_path / "base"))
    kinds: dict[str, AdapterSettings] = {
        "ia3": Ia3Settings(feedforward_modules=LINEAR[architecture]),
        "prompt": PromptTuningSettings(5, seed=1),
        "lora": LoraSettings(r=4, lora_alpha=6),
    }
    check_parity(driver, reference(architecture), tmp_path, kinds, STEPS)


@pytest.mark.parametrize(
    "settings",
    [
        Ia3Settings(["k_proj", "v_proj", "down_proj"], feedforward_modules=r".*\.down_proj"),
        PromptTuningSettings(3, "SAMPLE_VOCAB"),
        LoraSettings(r=4, init_lora_weights="pissa"),
        LoraSettings(r=4, init_lora_weights="olora", use_rslora=True, rank_pattern={"o_proj": 6}),
    ],
    ids=str,
)
def test_what_is_saved_is_read_by_peft_and_by_this_server(
    driver: TrainingDriver, settings: AdapterSettings, tmp_path: Path
) -> None:
    adapter = driver.trainer.create("saved", settings)
    train(driver, adapter, [examples(2, VOCABULARY, step) for step in range(3)])
    lowered, theirs, ours = read_back(driver, adapter, tmp_path)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    served = adapter.lowered
    assert lowered.deltas.keys() == served.offsets.keys()
    for name, delta in lowered.deltas.items():
        own = served.delta(driver.loaded.shape.sites[name])
        assert own is not None
        torch.testing.assert_close(own.a, delta.a, atol=0, rtol=1e-6)
        torch.testing.assert_close(own.b, delta.b, atol=0, rtol=1e-6)
    assert lowered.overrides.keys() == served.overrides.keys()
    for name, override in lowered.overrides.items():
        assert override.tensors.keys() == served.overrides[name].tensors.keys()
        for role, tensor in override.tensors.items():
            assert tensor.equal(served.overrides[name].tensors[role])
    if lowered.prefix is not None:
        assert served.prefix is not None
        assert torch.equal(lowered.prefix.tensors["embeddings"], served.prefix.tensors["embeddings"])


@pytest.mark.parametrize(
    "settings",
    [
        LoraSettings(r=4, lora_alpha=6, init_lora_weights="pissa"),
        LoraSettings(r=3, lora_alpha=5, init_lora_weights="pissa", use_rslora=True, use_dora=True),
        LoraSettings(r=4, lora_alpha=6, init_lora_weights="olora"),
    ],
    ids=str,
)
def test_initialisations_that_change_the_base_in_peft_train_alike(
    driver: TrainingDriver, settings: LoraSettings
) -> None:
    """PEFT takes the initial delta out of the base's weight; here it is subtracted."""
    base = reference("llama")
    names = ("r", "lora_alpha", "init_lora_weights", "use_rslora", "use_dora")
    config = peft.LoraConfig(
        target_modules="all-linear", task_type="CAUSAL_LM", **{name: getattr(settings, name) for name in names}
    )
    model: Any = peft.get_peft_model(copy.deepcopy(base), config).eval()
    adapter = driver.trainer.create("changed", settings, AdamSettings(weight_decay=0.01))
    start = driver.trainer.evaluate([MicroBatch(adapter, examples(2, VOCABULARY, 0))]).finish()[0].loss
    plain = driver.trainer.create("plain", LoraSettings(r=4))
    untrained = driver.trainer.evaluate([MicroBatch(plain, examples(2, VOCABULARY, 0))]).finish()[0].loss
    assert start == pytest.approx(untrained, abs=1e-5)
    data = [examples(2, VOCABULARY, step) for step in range(STEPS)]
    wanted = train_peft(model, data, [RATE] * STEPS, weight_decay=0.01)
    torch.testing.assert_close(torch.tensor(train(driver, adapter, data)), torch.tensor(wanted), atol=LOSS, rtol=0)
    for name, layer in adapter.layers.items():
        theirs = model.get_submodule(f"base_model.model.{name}")
        with torch.no_grad():
            changed = theirs.base_layer.weight + theirs.get_delta_weight("default")
            views = layer.offsets.views(layer.module.site, adapter._computed)
            delta = (views.a.T @ views.b).T
            torch.testing.assert_close(delta, changed - base.get_submodule(name).weight, atol=WEIGHTS, rtol=0)
        if settings.use_dora:
            own = layer.m(adapter.masters)
            torch.testing.assert_close(own, theirs.lora_magnitude_vector["default"].weight, atol=WEIGHTS, rtol=0)


@pytest.mark.parametrize("dora", [False, True])
def test_an_orthogonal_start_trains_as_in_peft(driver: TrainingDriver, tmp_path: Path, dora: bool) -> None:
    """Its first delta is not zero, and its magnitudes are those of W + s·BA, as PEFT computes them."""
    settings = LoraSettings(r=4, lora_alpha=6, init_lora_weights="orthogonal", use_dora=dora)
    adapter = driver.trainer.create("start", settings)
    save_peft(adapter, tmp_path / "start")
    for name, layer in adapter.layers.items():
        product = layer.a(adapter.masters) @ layer.a(adapter.masters).T
        assert torch.linalg.matrix_rank(product) == 2, "half of Q's rows are in A"
        mixed = layer.b(adapter.masters).T @ layer.a(adapter.masters)
        torch.testing.assert_close(mixed, torch.zeros_like(mixed), atol=1e-5, rtol=0)
        if dora:
            theirs = load_trainable(reference("llama"), tmp_path / "start").get_submodule(f"base_model.model.{name}")
            norm = theirs.lora_magnitude_vector["default"].get_weight_norm(
                theirs.base_layer.weight,
                theirs.get_delta_weight("default") / layer.module.scaling,
                layer.module.scaling,
            )
            torch.testing.assert_close(layer.m(adapter.masters), norm.detach(), atol=1e-5, rtol=1e-5)
            break
    driver.trainer.close(adapter)
    check_parity(driver, reference("llama"), tmp_path, {"orthogonal": settings}, 3)


def test_initialisations_have_peft_s_distributions(driver: TrainingDriver) -> None:
    drawn = {}
    for method in ("default", "gaussian"):
        adapter = driver.trainer.create(method, LoraSettings(r=8, init_lora_weights=method))
        layers = adapter.layers.values()
        drawn[method] = torch.cat(
            [layer.a(adapter.masters).flatten() for layer in layers if layer.a(adapter.masters).shape[1] == 64]
        )
        assert not any(layer.b(adapter.masters).any() for layer in layers)
        driver.trainer.close(adapter)
    assert float(drawn["gaussian"].std()) == pytest.approx(1 / 8, rel=0.05)
    assert float(drawn["default"].abs().max()) == pytest.approx(1 / 8, rel=0.05)  # 1/√in


class GivenDropout(nn.Module):
    """Takes the place of PEFT's dropout: the masks that the trainer draws."""

    def __init__(self, module: str, dropout: DeltaDropout) -> None:
        super().__init__()
        self.module, self.dropout = module, dropout

    def forward(self, x: Tensor) -> Tensor:
        return x * dropout_factors(self.dropout, self.module, x[0])


@pytest.mark.parametrize("kept", [False, True])
def test_dropout_is_that_of_peft_with_the_same_masks(driver: TrainingDriver, tmp_path: Path, kept: bool) -> None:
    """Also in the layers that are computed again for their gradients, and beside an adapter without dropout."""
    settings = LoraSettings(r=4, lora_alpha=6, lora_dropout=0.3, target_modules=["q_proj", "v_proj", "down_proj"])
    adapter, twin = (driver.trainer.create(name, settings) for name in ("adapter", "twin"))
    neighbour = driver.trainer.create("neighbour", LoraSettings(r=4))
    save_peft(adapter, tmp_path)
    model = load_trainable(reference("llama"), tmp_path)
    for step in range(4):
        data = examples(1, VOCABULARY, step)
        dropout = twin.draw_dropout()
        assert dropout is not None
        for name in adapter.layers:
            model.get_submodule(f"base_model.model.{name}").lora_dropout["default"] = GivenDropout(name, dropout)
        (wanted,) = train_peft(model, [data], [0.0], max_grad_norm=1e9)
        batches = [MicroBatch(neighbour, examples(1, VOCABULARY, 9)), MicroBatch(adapter, data)]
        trainer = driver.trainer
        trainer._memory += (1 << 30) * kept
        result = trainer.forward_backward(batches).finish()[1]
        trainer._memory -= (1 << 30) * kept
        assert result.loss == pytest.approx(wanted, abs=LOSS)
    gradients = driver.trainer.create("once", settings)
    gradients.passes = adapter.passes - 1
    driver.trainer.forward_backward([MicroBatch(gradients, data)]).finish()
    logits = model(input_ids=torch.tensor([data[0].tokens]), use_cache=False).logits[0]
    terms = nn.functional.cross_entropy(logits, torch.tensor(data[0].targets), reduction="none")
    (terms * torch.tensor(data[0].weights)).sum().backward()  # type: ignore[no-untyped-call]
    for name, layer in gradients.layers.items():
        theirs = model.get_submodule(f"base_model.model.{name}")
        own = layer.b(gradients.gradients) * layer.module.scaling
        torch.testing.assert_close(own.T, theirs.lora_B["default"].weight.grad, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            layer.a(gradients.gradients), theirs.lora_A["default"].weight.grad, atol=1e-5, rtol=1e-4
        )
