"""Virtual tokens that an encoder computes: memory, gradients over several passes, and runs that go on from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from support import VOCABULARY, save
from torch.profiler import ProfilerActivity, profile
from training_driver import TrainingDriver, examples
from training_session import TrainingSession, batch, create

from lora_serve.engine.training.method_settings import AdapterSettings
from lora_serve.engine.training.micro_batch import MicroBatch
from lora_serve.engine.training.table_encoder import TableEncoder
from lora_serve.engine.training.trainable_layout import TrainableLayout
from lora_serve.engine.training.training_settings import AdamSettings
from lora_serve.engine.training.virtual_token_settings import PrefixTuningSettings, PTuningSettings
from lora_serve.training_messages import ExportRun, ForwardBackward, OptimizerStep, RestoreRun, SaveRun

RUNS: dict[str, dict[str, Any]] = {
    "mlp": {"peft_type": "P_TUNING", "num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "lstm": {"peft_type": "P_TUNING", "num_virtual_tokens": 4, "encoder_reparameterization_type": "LSTM"},
    "projection": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4, "prefix_projection": True},
}
DEFAULTS = {"r": 16, "lora_alpha": 32}  # of LoRA, which is not asked for


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> TrainingDriver:
    return TrainingDriver(save("llama", tmp_path_factory.mktemp("base")), slots=8)


@pytest.mark.parametrize("kind", RUNS)
def test_a_restored_run_goes_on_bit_for_bit_and_exports_the_encoder_s_output(
    session: TrainingSession, kind: str, tmp_path: Path
) -> None:
    info = session.call(create("straight", **DEFAULTS, **RUNS[kind]))
    for step in range(4):
        _step(session, "straight", step)
        if step == 1:
            session.call(SaveRun("straight", str(tmp_path / "saved")))
    session.call(create("second", **DEFAULTS, **RUNS[kind], seed=9))
    session.call(RestoreRun("second", str(tmp_path / "saved")))
    for step in (2, 3):
        _step(session, "second", step)
    for run in ("straight", "second"):
        session.call(ExportRun(run, str(tmp_path / run)))
    straight, second = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("straight", "second"))
    assert [*straight] == ["prompt_embeddings"]
    assert straight["prompt_embeddings"].equal(second["prompt_embeddings"])
    config = peft.PeftConfig.from_pretrained(tmp_path / "straight")
    config.inference_mode = False
    theirs = (peft.PromptEncoder if config.peft_type == "P_TUNING" else peft.PrefixEncoder)(config)  # type: ignore[no-untyped-call]
    assert info["parameters"] == sum(each.numel() for each in theirs.parameters())


def _step(session: TrainingSession, run: str, seed: int) -> None:
    session.call(ForwardBackward(run, batch(2, seed=seed)))
    session.call(OptimizerStep(run, 5e-3))


def test_a_run_with_another_encoder_is_not_restored(session: TrainingSession, tmp_path: Path) -> None:
    session.call(create("run", **DEFAULTS, **RUNS["mlp"]))
    session.call(SaveRun("run", str(tmp_path / "saved")))
    prompt = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}
    for name, settings in {"wider": RUNS["mlp"] | {"encoder_hidden_size": 17}, "none": prompt}.items():
        session.call(create(name, **DEFAULTS, **settings))
        assert session.failure(RestoreRun(name, str(tmp_path / "saved"))).param == "folder"


@pytest.mark.parametrize(
    "settings",
    [
        PTuningSettings(3, encoder_hidden_size=16),
        PTuningSettings(3, "LSTM", 16),
        PrefixTuningSettings(3, prefix_projection=True),
        PrefixTuningSettings(3),
    ],
    ids=str,
)
def test_gradients_of_several_passes_are_those_of_one_and_clipped_over_the_parameters(
    driver: TrainingDriver, settings: AdapterSettings
) -> None:
    adam = AdamSettings(max_grad_norm=1e-3)
    whole, parts = (driver.trainer.create(f"{name} {settings}", settings, adam) for name in ("whole", "parts"))
    data = examples(4, VOCABULARY, 0)
    for step in range(2):
        driver.trainer.forward_backward([MicroBatch(whole, data[:2]), MicroBatch(whole, data[2:])]).finish()
        for own in (data[:2], data[2:]):
            driver.trainer.forward_backward([MicroBatch(parts, own)]).finish()
        norm, encoder = whole.gradients.norm(), whole.layout.encoder
        if encoder is not None:
            leaves = {name: each.clone().requires_grad_() for name, each in encoder.parameters(whole.masters).items()}
            output = encoder.encoder(leaves)
            output.backward(encoder.table.values(whole.gradients).view_as(output))  # type: ignore[no-untyped-call]
            norm = torch.stack([each.grad.norm() for each in leaves.values() if each.grad is not None]).norm()
        norms = [each.optimizer_step(5e-3).grad_norm for each in (whole, parts)]
        assert norms[0] == pytest.approx(float(norm), rel=1e-5)
        assert norms[0] > 1e-3
        assert norms[0] == norms[1]
        assert whole.masters.equal(parts.masters), step


@pytest.mark.parametrize(
    "encoder",
    [
        TableEncoder.mlp(20, 32, 96),
        TableEncoder.projection(40, 32, 16, 256),
        TableEncoder.lstm(20, 32, 64, 2),
        TableEncoder.lstm(200, 16, 8, 2),
    ],
    ids=str,
)
def test_the_memory_of_an_encoder_s_gradients_is_counted(encoder: TableEncoder) -> None:
    layout = TrainableLayout.of_virtual_tokens(encoder.tokens, encoder.widths[-1], encoder)
    masters, gradients = torch.ones(layout.size), torch.ones(layout.size)
    assert layout.encoder is not None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        layout.encoder.backward(masters, gradients)
    assert profiled.profiler is not None
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held = peak = 0
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 0.25 * encoder.working < peak / 4 <= encoder.working


@pytest.mark.parametrize("kind", RUNS)
def test_an_encoder_begins_with_the_parameters_of_peft_s(kind: str) -> None:
    """As many, of the same shapes and distributions."""
    torch.manual_seed(0)
    width, tokens, hidden = 48, 32, 64
    task: dict[str, Any] = {
        "task_type": "CAUSAL_LM", "num_virtual_tokens": tokens, "token_dim": width, "num_transformer_submodules": 1,
        "num_layers": 3, "num_attention_heads": 4, "encoder_hidden_size": hidden,
    }  # fmt: skip
    theirs: Any
    if kind == "projection":
        encoder = TableEncoder.projection(tokens, width, hidden, 3 * 2 * width)
        theirs = peft.PrefixEncoder(peft.PrefixTuningConfig(prefix_projection=True, **task))  # type: ignore[no-untyped-call]
    else:
        encoder = (
            TableEncoder.mlp(tokens, width, hidden) if kind == "mlp" else TableEncoder.lstm(tokens, width, hidden, 2)
        )
        config = peft.PromptEncoderConfig(encoder_reparameterization_type=kind.upper(), **task)
        theirs = peft.PromptEncoder(config)  # type: ignore[no-untyped-call]
    ours = dict(encoder.initial(torch.Generator().manual_seed(1)))
    assert {name: each.shape for name, each in ours.items()} == {
        name: each.shape for name, each in theirs.state_dict().items()
    }
    for name, each in theirs.state_dict().items():
        if each.ndim > 1:
            assert float(ours[name].std()) == pytest.approx(float(each.std()), rel=0.1), name
            if name != "embedding.weight":
                assert float(ours[name].abs().max()) == pytest.approx(float(each.abs().max()), rel=0.02), name
        else:
            assert float(ours[name].abs().max()) == pytest.approx(float(each.abs().max()), rel=0.2), name
    theirs.load_state_dict(ours)
    torch.testing.assert_close(encoder(ours), theirs(torch.arange(tokens)[None])[0].detach())
