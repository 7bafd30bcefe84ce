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
from lora_serve.engine.training.fused_pass import FusedPass
from lora_serve.engine.training.loss_formulas import LossValue
from lora_serve.engine.training.method_settings import (
    AdapterSettings,
    Ia3Settings,
    adapter_settings,
)
from lora_serve.engine.training.micro_batch import MicroBatch, TrainingSequence
from lora_serve.engine.training.trainable_adapter import TrainableAdapter, adapter_bytes
from lora_serve.engine.training.trained_files import save_peft
from lora_serve.engine.training.training_settings import AdamSettings, LoraSettings
from lora_serve.engine.training.virtual_token_settings import (
    PrefixTuningSettings,
    PromptTuningSettings,
    PTuningSettings,
)
from lora_serve.errors import BadRequest
from lora_serve.model.dropped_delta import dropout_factors
from lora_serve.model.training_step import DeltaDropout
from lora_serve.training_messages import RunSettings

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

STEPS, RATE = 10, 5e-3
LINEAR = {"llama": ("o_proj", "up_proj", "down_proj"), "gpt2": ("mlp.c_proj",), "gemma2": ("down_proj",)}


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> TrainingDriver:
    return TrainingDriver(save("llama", tmp_path_factory.mktemp("base")))


@pytest.fixture(autouse=True)
def closed(driver: TrainingDriver) -> Iterator[None]:
    """Close a test's adapters."""
    yield
    for adapter in [*driver.trainer.adapters.values()]:
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
def test_ia3_prompt_and_prefix_tuning_equal_peft(architecture: str, tmp_path: Path) -> None:
    """In one batch with LoRA, over positions and embeddings that the model scales or adds to."""
    driver = TrainingDriver(save(architecture, tmp_path / "base"), slots=7)
    kinds: dict[str, AdapterSettings] = {
        "ia3": Ia3Settings(feedforward_modules=LINEAR[architecture]),
        "prompt": PromptTuningSettings(5, seed=1),
        "prefix": PrefixTuningSettings(4, seed=2),
        "encoder": PTuningSettings(5, encoder_hidden_size=24, seed=3),
        "lstm": PTuningSettings(4, "LSTM", 10, 2, seed=4),
        "projection": PrefixTuningSettings(4, prefix_projection=True, encoder_hidden_size=20, seed=5),
        "lora": LoraSettings(r=4, lora_alpha=6),
    }
    check_parity(driver, reference(architecture), tmp_path, kinds, STEPS)


@pytest.mark.parametrize(
    "settings",
    [
        Ia3Settings(["k_proj", "v_proj", "down_proj"], feedforward_modules=r".*\.down_proj"),
        PromptTuningSettings(3, "SAMPLE_VOCAB"),
        PrefixTuningSettings(3),
        PTuningSettings(3, encoder_hidden_size=16),
        PTuningSettings(3, "LSTM", encoder_num_layers=1),
        PrefixTuningSettings(3, prefix_projection=True),
        LoraSettings(r=4, init_lora_weights="pissa"),
        LoraSettings(r=24, init_lora_weights="pissa", target_modules=["k_proj"]),
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
        product = own.b.T @ own.a
        torch.testing.assert_close(delta.b.T @ delta.a, product, atol=1e-6, rtol=1e-4)
        rounded = delta.b.bfloat16().float().T @ delta.a.bfloat16().float()  # as it is served
        assert float((rounded - product).norm() / product.norm()) < 0.01
    assert lowered.overrides.keys() == served.overrides.keys()
    for name, override in lowered.overrides.items():
        assert override.tensors.keys() == served.overrides[name].tensors.keys()
        for role, tensor in override.tensors.items():
            assert tensor.equal(served.overrides[name].tensors[role])
    if lowered.prefix is not None:
        assert served.prefix is not None
        assert lowered.prefix.tensors.keys() == served.prefix.tensors.keys()
        assert all(tensor.equal(served.prefix.tensors[role]) for role, tensor in lowered.prefix.tensors.items())


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
    settings = LoraSettings(r=4, lora_alpha=6, init_lora_weights="orthogonal", use_dora=dora)
    adapter = driver.trainer.create("start", settings)
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights="orthogonal", target_modules="all-linear")
    theirs: Any = peft.get_peft_model(copy.deepcopy(reference("llama")), config)
    for name, layer in adapter.layers.items():
        module = theirs.get_submodule(f"base_model.model.{name}")
        given = (module.lora_A["default"].weight, module.lora_B["default"].weight.T)
        for own, other in zip((layer.a(adapter.masters), layer.b(adapter.masters)), given, strict=True):
            assert torch.linalg.matrix_rank(own) == torch.linalg.matrix_rank(other) == 2
            assert float(own.std()) == pytest.approx(float(other.std()), rel=0.5)
        product = layer.b(adapter.masters).T @ layer.a(adapter.masters)
        torch.testing.assert_close(product, torch.zeros_like(product), atol=1e-5, rtol=0)
    driver.trainer.close(adapter)
    check_parity(driver, reference("llama"), tmp_path, {"orthogonal": settings}, 3)


def test_a_randomised_decomposition_finds_nearly_the_largest_components(driver: TrainingDriver) -> None:
    exact, fast, again = (
        driver.trainer.create(str(index), LoraSettings(r=4, lora_alpha=4, init_lora_weights=method))
        for index, method in enumerate(("pissa", "pissa_niter_8", "pissa_niter_8"))
    )
    state = torch.random.get_rng_state()
    assert fast.masters.equal(again.masters)
    assert torch.random.get_rng_state().equal(state)
    for name, layer in fast.layers.items():
        weight = driver.trainable.weight(name)
        left = [
            torch.linalg.matrix_norm(weight - layer.b(each.masters).T @ layer.a(each.masters)) for each in (exact, fast)
        ]
        assert float(left[1]) == pytest.approx(float(left[0]), rel=0.01)


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


def with_random_weights(adapter: TrainableAdapter) -> TrainableAdapter:
    """The adapter, with a delta that is not zero."""
    drawn = 0.1 * torch.randn(adapter.masters.shape, generator=torch.Generator().manual_seed(5))
    adapter.restore(adapter.state() | {"masters": drawn})
    return adapter


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
    with_random_weights(adapter)
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
        trainer.memory += (1 << 30) * kept
        result = trainer.forward_backward(batches).finish()[1]
        trainer.memory -= (1 << 30) * kept
        assert result.loss == pytest.approx(wanted, abs=LOSS)
    gradients = driver.trainer.create("once", settings)
    with_random_weights(gradients).passes = adapter.passes - 1
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


def test_passes_without_gradients_have_no_dropout_and_each_other_pass_a_mask_of_its_own(driver: TrainingDriver) -> None:
    settings = LoraSettings(r=4, lora_dropout=0.5, train_lm_head=True)
    adapter = with_random_weights(driver.trainer.create("dropped", settings))
    plain = with_random_weights(driver.trainer.create("plain", replace(settings, lora_dropout=0.0)))
    batch = examples(2, VOCABULARY, 0)
    results = [driver.trainer.evaluate([MicroBatch(each, batch)]).finish()[0] for each in (adapter, plain)]
    assert results[0].loss == results[1].loss
    drawn = [dropout_factors(DeltaDropout(0.5, 1), name, torch.zeros(4, 64)) for name in ("q_proj", "k_proj")]
    assert not drawn[0].equal(drawn[1])
    assert drawn[0].unique().tolist() == [0, 2]
    losses = [driver.trainer.forward_backward([MicroBatch(adapter, batch)]).finish()[0].loss for _ in range(3)]
    assert len({*losses, results[0].loss}) == 4


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_a_function_of_log_probabilities_sees_the_masks_that_its_gradient_goes_through(
    driver: TrainingDriver, rate: float
) -> None:
    """Dropout of an adapted LM head is the same when its logits are computed a second time."""
    settings = LoraSettings(r=4, lora_dropout=rate, train_lm_head=True)
    one, two = (with_random_weights(driver.trainer.create(name, settings)) for name in ("one", "two"))
    batch = examples(2, VOCABULARY, 0)
    share = next(weight for weight in batch[0].weights if weight)
    given = driver.trainer.forward_backward([MicroBatch(one, batch)]).finish()[0]
    function = MicroBatch(two, batch, lambda logprobs: LossValue(-share * logprobs.sum()))
    found = driver.trainer.forward_backward([function]).finish()[0]
    assert found.loss == pytest.approx(given.loss, rel=1e-5)
    torch.testing.assert_close(two.gradients, one.gradients, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["gemma2", "gpt2"])
def test_a_head_is_trained_beside_a_tied_embedding(architecture: str, tmp_path: Path) -> None:
    driver = TrainingDriver(save(architecture, tmp_path / "base"))
    assert driver.loaded.shape.tied
    check_parity(driver, reference(architecture), tmp_path, {"head": LoraSettings(r=4, train_lm_head=True)}, 4)


@pytest.mark.parametrize(
    "settings",
    [
        LoraSettings(r=4, lora_dropout=0.2),
        LoraSettings(r=4, init_lora_weights="olora"),
        Ia3Settings(feedforward_modules=["down_proj"]),
        PromptTuningSettings(4),
        PrefixTuningSettings(4),
        PTuningSettings(4, encoder_hidden_size=16),
        PTuningSettings(4, "LSTM", 16),
        PrefixTuningSettings(4, prefix_projection=True),
    ],
    ids=str,
)
def test_training_goes_on_from_a_saved_state_and_takes_the_bytes_that_were_said(
    driver: TrainingDriver, settings: AdapterSettings
) -> None:
    data = [examples(2, VOCABULARY, step) for step in range(4)]
    straight, first = (driver.trainer.create(name, settings) for name in ("straight", "first"))
    train(driver, straight, data)
    train(driver, first, data[:2])
    state = first.state()
    again = settings if isinstance(settings, Ia3Settings) else replace(settings, seed=7)
    second = driver.trainer.create("second", again)
    second.restore(state)
    train(driver, second, data[2:])
    assert second.masters.equal(straight.masters)
    tensors = [first.masters, first.gradients, first._computed, state["exp_avg"], state["exp_avg_sq"]]
    held, encoder = sum(each.nbytes for each in tensors), first.layout.encoder
    working = 0 if encoder is None else 4 * encoder.encoder.working
    assert adapter_bytes(driver.loaded.shape, settings) == first.nbytes == held + working


def test_split_passes_are_clipped_as_one(driver: TrainingDriver) -> None:
    """The norm is that of all gradients since the last step, whatever the passes that added them."""
    settings = LoraSettings(r=4)
    small = AdamSettings(max_grad_norm=1e-3)
    whole, parts = (driver.trainer.create(name, settings, small) for name in ("whole", "parts"))
    batch = examples(4, VOCABULARY, 0)
    driver.trainer.forward_backward([MicroBatch(whole, batch)]).finish()
    for part in (batch[:1], batch[1:2], batch[2:]):
        driver.trainer.forward_backward([MicroBatch(parts, part)]).finish()
    norms = [each.optimizer_step(RATE).grad_norm for each in (whole, parts)]
    assert norms[0] > 1e-2
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    torch.testing.assert_close(parts.masters, whole.masters, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "settings", [LoraSettings(r=4, use_dora=True), Ia3Settings(feedforward_modules=["down_proj"])], ids=str
)
def test_what_gains_and_magnitudes_save_is_counted(driver: TrainingDriver, settings: AdapterSettings) -> None:
    """Measured as the bytes that a kept layer saves beyond what it does for an adapter without them."""
    saved = []
    for index, own in enumerate((settings, LoraSettings(r=4))):
        adapter = driver.trainer.create(str(index), own)
        found: dict[int, int] = {}

        def note(tensor: Tensor, found: dict[int, int] = found) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        batch = MicroBatch(adapter, examples(2, VOCABULARY, 0))
        running = FusedPass(driver.trainable, [batch], gradients=True, kept_layers=driver.trainable.layers)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            for _ in range(1 + driver.trainable.layers):
                running.advance()
        saved.append(sum(found.values()))
        running.finish()
        if index == 0:
            counted = batch.tokens * 4 * adapter.layout.saved
    assert saved[0] - saved[1] == pytest.approx(counted, rel=0.05)


def test_virtual_tokens_count_in_a_sequence_s_length(driver: TrainingDriver) -> None:
    adapter = driver.trainer.create("long", PromptTuningSettings(28))
    fits = TrainingSequence([5] * 100, [5] * 100, [1.0] * 100)
    batch = MicroBatch(adapter, [fits, fits])
    assert batch.tokens == 256
    driver.trainer.evaluate([batch])
    with pytest.raises(BadRequest, match="has 101 tokens; at most 100 are trained"):
        driver.trainer.evaluate([MicroBatch(adapter, [TrainingSequence([5] * 101, [5] * 101, [1.0] * 101)])])


P_TUNING = {"peft_type": "P_TUNING", "num_virtual_tokens": 4}
LSTM = {**P_TUNING, "encoder_reparameterization_type": "LSTM"}


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"peft_type": "LOHA"}, "peft_type"),
        ({"peft_type": "IA3", "use_dora": True}, "use_dora"),
        ({"num_virtual_tokens": 4}, "num_virtual_tokens"),
        ({"peft_type": "PROMPT_TUNING"}, "num_virtual_tokens"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "prompt_tuning_init": "TEXT"}, "prompt_tuning_init"),
        ({"peft_type": "P_TUNING"}, "num_virtual_tokens"),
        ({**P_TUNING, "encoder_reparameterization_type": "GRU"}, "encoder_reparameterization_type"),
        ({**P_TUNING, "encoder_num_layers": 3}, "encoder_num_layers"),
        ({**LSTM, "encoder_num_layers": 0}, "encoder_num_layers"),
        ({**LSTM, "encoder_dropout": 0.1}, "encoder_dropout"),
        ({**P_TUNING, "encoder_hidden_size": -1}, "encoder_hidden_size"),
        ({**P_TUNING, "prefix_projection": True}, "prefix_projection"),
        ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4, "encoder_hidden_size": 8}, "encoder_hidden_size"),
        ({"peft_type": "IA3", "feedforward_modules": "(?=a)b"}, "feedforward_modules"),
        ({"init_lora_weights": "eva"}, "init_lora_weights"),
        ({"init_lora_weights": "pissa_niter_0"}, "init_lora_weights"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "r"),
        ({"init_lora_weights": "pissa", "r": 65}, "r"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"seed": 1 << 63}, "seed"),
        ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4, "seed": -1}, "seed"),
        ({"lora_dropout": 0.1, "use_dora": True}, "lora_dropout"),
        ({"lora_dropout": 0.1, "init_lora_weights": "pissa"}, "lora_dropout"),
        ({"target_modules": ["embed_tokens"]}, "target_modules"),
    ],
    ids=str,
)
def test_what_a_method_does_not_train_is_refused_by_name(
    driver: TrainingDriver, given: dict[str, Any], param: str
) -> None:
    with pytest.raises(BadRequest) as raised:
        driver.trainer.create("refused", adapter_settings(RunSettings(**given)))
    assert raised.value.param == param


def test_runs_ask_for_methods_in_peft_s_words() -> None:
    assert adapter_settings(RunSettings(r=4, use_dora=True)) == LoraSettings(r=4, use_dora=True)
    ia3 = RunSettings(peft_type="IA3", target_modules=["v_proj"], feedforward_modules=["down_proj"], seed=3)
    assert adapter_settings(ia3) == Ia3Settings(["v_proj"], ["down_proj"])
    prompt = RunSettings(peft_type="PROMPT_TUNING", num_virtual_tokens=8, seed=3)
    assert adapter_settings(prompt) == PromptTuningSettings(8, seed=3)


METHODS: dict[str, AdapterSettings] = {
    "lora": LoraSettings(r=3),
    "dora": LoraSettings(r=4, use_dora=True),
    "dropout": LoraSettings(r=5, lora_dropout=0.2),
    "ia3": Ia3Settings(),
    "prompt": PromptTuningSettings(3),
    "prefix": PrefixTuningSettings(3),
    "encoder": PTuningSettings(3, encoder_hidden_size=8),
}


@pytest.mark.parametrize("sick", METHODS)
def test_weights_that_are_no_numbers_change_no_bit_of_another_method_s_run(sick: str, tmp_path: Path) -> None:
    """In one pass with all methods, on a base in bf16 and int8: compared with the same pass while they are numbers."""
    driver = TrainingDriver(save("qwen2", tmp_path), dtype="bfloat16", scheme="int8", slots=len(METHODS) + 1)
    adapters = [driver.trainer.create(name, settings) for name, settings in {**METHODS, "sick": METHODS[sick]}.items()]
    data, broken = examples(2, VOCABULARY, 7, shortest=2), adapters[-1]
    found: list[list[tuple[float, Tensor]]] = []
    for masters in (broken.masters.clone(), torch.full_like(broken.masters, torch.nan)):
        broken.restore(broken.state() | {"masters": masters})
        for adapter in adapters:
            adapter.gradients.zero_()
            adapter.passes = 0  # the same mask again
        order = [*adapters[:3], broken, *adapters[3:-1]]
        results = driver.trainer.forward_backward([MicroBatch(each, data) for each in order]).finish()
        losses = {each.name: result.loss for each, result in zip(order, results, strict=True)}
        found.append([(losses[each.name], each.gradients.clone()) for each in adapters[:-1]])
    for before, after in zip(*found, strict=True):
        assert before[0] == after[0]
        assert before[1].isfinite().all()
        assert before[1].equal(after[1])


def test_experts_and_embeddings_are_refused_by_what_they_are(tmp_path: Path) -> None:
    driver = TrainingDriver(save("qwen3_moe", tmp_path))
    for name, what in (("gate_up_proj", "experts, which are not trained"), ("embed_tokens", "is an embedding")):
        with pytest.raises(BadRequest, match=what):
            driver.trainer.create("refused", LoraSettings(target_modules=[name]))
