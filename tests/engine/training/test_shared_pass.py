"""Passes of several parts: what comes of them does not depend on which parts a pass has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import VOCABULARY, save
from training_driver import TrainingDriver
from training_session import batch

from lora_serve.engine.training import head_rows
from lora_serve.engine.training.losses import find_loss
from lora_serve.engine.training.run_operations import QueuedPass, TrainingRun, parts_of
from lora_serve.engine.training.shared_pass import SharedPass, fill_pass
from lora_serve.engine.training.training_settings import LoraSettings
from lora_serve.errors import BadRequest
from lora_serve.training_messages import ForwardBackward, TrainingExample


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> TrainingDriver:

    return TrainingDriver(save("llama", tmp_path_factory.mktemp("base")))


def gradients(
    driver: TrainingDriver, settings: LoraSettings, wanted: int, others: int = 0
) -> tuple[torch.Tensor, list[float]]:
    """Gradients and loss of a batch in passes of so many tokens, beside other runs before it."""
    runs = []
    for number in range(others, -1, -1):
        name = f"run-{wanted}-{number}"
        run = TrainingRun(name, "", 0, adapter=driver.trainer.create(name, settings))
        operation = ForwardBackward(name, batch(30, seed=number))
        loss = find_loss("cross_entropy", {})
        parts, sizes = parts_of(operation, loss.group, 48)
        answers: list[float] = []
        queued = QueuedPass(
            operation, lambda found, own=answers: own.append(found.loss), 0, loss=loss, parts=parts, sizes=sizes
        )
        run.operations.append(queued)
        runs.append((run, queued, answers))
    while any(run.operations for run, _, _ in runs):
        candidates = [(run, queued) for run, queued, _ in runs if run.operations]
        shared = SharedPass(driver.trainer, fill_pass(candidates, wanted, 10_000))
        while shared.advance():
            pass
        shared.finish()
    found = runs[-1][0].trained.gradients.clone()
    for run, _, _ in runs:
        driver.trainer.close(run.trained)
    return found, runs[-1][2]


@pytest.mark.parametrize("more", [{}, {"train_lm_head": True, "lora_dropout": 0.3}])
def test_gradients_have_the_same_bits_in_passes_of_any_size_and_beside_others(
    driver: TrainingDriver, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_rows, "LOGITS_BYTES", 30 * 4 * VOCABULARY)
    settings = LoraSettings(r=4, seed=1, init_lora_weights="orthogonal", **more)
    wanted = gradients(driver, settings, 10_000)
    assert wanted[0].count_nonzero() > 0
    for tokens, others in ((1, 0), (100, 0), (200, 2)):
        found = gradients(driver, settings, tokens, others)
        assert torch.equal(found[0], wanted[0]), (tokens, others)
        assert found[1] == wanted[1]


def test_parts_are_whole_groups_up_to_a_size() -> None:
    examples = [TrainingExample([1] * length, [1] * length, {}) for length in (3, 3, 5, 5, 20, 20, 1, 1)]
    operation = ForwardBackward("run", examples)
    assert parts_of(operation, 1, 8)[1] == [6, 5, 5, 20, 20, 2]
    parts, sizes = parts_of(operation, 2, 16)
    assert sizes == [16, 40, 2]
    assert [len(part) for part in parts] == [4, 2, 2]
    with pytest.raises(BadRequest):
        parts_of(ForwardBackward("run", []), 1, 8)
