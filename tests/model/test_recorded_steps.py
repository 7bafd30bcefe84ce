"""Recorded steps are bit-identical to the eager pass; a pass that cannot be recorded stays eager."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from driver import Driver
from parity import make_adapter, read_adapter
from support import ARCHITECTURES, save
from torch import Tensor

from lora_serve.model.input_buffers import InputBuffers
from lora_serve.model.recorded_steps import RecordedSteps

PROMPTS = [[3, 5, 7, 11], [2, 4, 6], [9, 8, 7, 6, 5]]


class Counted:
    """A forward pass that counts how often it runs through Python."""

    def __init__(self, run: Any) -> None:
        self.run = run
        self.passes = 0

    def __call__(self, step: InputBuffers) -> Tensor:
        self.passes += 1
        logits: Tensor = self.run(step)
        return logits


def counted(driver: Driver) -> Counted:
    eager = driver.base._eager
    eager.forward = Counted(eager.forward)
    return eager.forward


BRANCHING = {"mixtral", "qwen3_moe"}  # on values: which experts have rows


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steps_of_known_bases_are_replayed_and_are_bit_identical_to_eager_ones(
    architecture: str, tmp_path: Path
) -> None:
    folder = save(architecture, tmp_path / "base")
    replayed, eager = Driver(folder), Driver(folder)
    eager.base._steps.disabled = "a test wants eager steps"
    count = counted(replayed)
    got, wanted = replayed.teach(PROMPTS, 12), eager.teach(PROMPTS, 12)
    assert (count.passes > 10) == (architecture in BRANCHING)
    assert all(torch.equal(left, right) for left, right in zip(got, wanted, strict=True))


def test_a_recording_stays_valid_while_adapters_are_loaded_and_evicted(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "base")
    replayed, eager = Driver(folder), Driver(folder)
    eager.base._steps.disabled = "a test wants eager steps"
    for seed in range(3):
        make_adapter(
            "llama", tmp_path / str(seed), seed, peft.LoraConfig(r=2 + seed, target_modules=["q_proj", "down_proj"])
        )
    names = [
        [driver.load_adapter(read_adapter(driver, tmp_path / str(seed))) for seed in range(3)]
        for driver in (replayed, eager)
    ]
    count = counted(replayed)
    for first, second, third in ([0], [1], [2]), ([], [0], [0, 1]), ([2], [2], []), ([], [], []):
        results = []
        for driver, own in zip((replayed, eager), names, strict=True):
            uses = [[(own[index], 0.5) for index in chosen] for chosen in (first, second, third)]
            results.append(driver.teach(PROMPTS, 6, uses))
        assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))
    assert count.passes == 7  # with segments and without: two of prompts (one without), two of single tokens


def test_a_pass_that_branches_on_values_is_not_recorded(tmp_path: Path) -> None:
    driver = Driver(save("llama", tmp_path / "base"))
    driver.base._steps = RecordedSteps(driver.base._eager, driver.kernels)
    norm = driver.loaded.model.model.norm
    norm.register_forward_hook(lambda module, given, output: output * (1 + int(output.sum().item() > 0)))
    count = counted(driver)
    driver.teach(PROMPTS, 6)
    assert count.passes == 7
    assert driver.base._steps.disabled


def test_a_pass_with_internal_state_fails_the_check(tmp_path: Path) -> None:
    driver = Driver(save("llama", tmp_path / "base"))
    driver.base._steps = RecordedSteps(driver.base._eager, driver.kernels)
    steps = iter(range(100))
    driver.loaded.model.model.norm.register_forward_hook(
        lambda module, given, output: output * (1 + 1e-5 * next(steps))
    )
    driver.base.prepare(4, 16, 8)
    assert driver.base._steps.disabled


def test_the_least_recently_used_recording_is_dropped_at_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(save("llama", tmp_path / "base"))
    monkeypatch.setattr("lora_serve.model.recorded_steps.MAX_RECORDINGS", 3)
    for rows in (1, 2, 1, 3, 1):
        driver.teach(PROMPTS[:rows], 5)
    recorded = driver.base._steps._steps
    assert len(recorded) == 3
    assert next(reversed(recorded)).rows == 1
