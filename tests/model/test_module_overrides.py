"""Module overrides cost only the batches with such adapters, and never change other rows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from driver import Driver
from parity import make_adapter, read_adapter
from support import reference, save
from torch import nn

from lora_serve.adapters.adapter import BaseShape, Lowered, ModuleOverride, flatten
from lora_serve.adapters.checkpoint import Checkpoint
from lora_serve.adapters.formats.dispatch import FORMATS, lower
from lora_serve.kernels.contract import Delta

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT talks about heads and ties

PROMPT = [5, 9, 33, 60, 21]


class Hooks:
    """Counts the hooks on all modules of a base at the moment it embeds its tokens."""

    def __init__(self, driver: Driver) -> None:
        self.model: nn.Module = driver.loaded.model
        self.most = 0
        driver.loaded.model.get_submodule("model.rotary_emb").register_forward_hook(self.count)

    def count(self, module: nn.Module, args: Any, output: Any) -> None:
        found = sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in self.model.modules()) - 1
        self.most = max(self.most, found)


def test_a_batch_without_overrides_runs_no_hooks(tmp_path: Path) -> None:
    driver = Driver(save("llama", tmp_path / "base"))
    options: dict[str, dict[str, Any]] = {
        "plain": {"target_modules": ["q_proj"]},
        "dora": {"target_modules": ["q_proj", "up_proj"], "use_dora": True, "modules_to_save": ["model.norm"]},
    }
    resident = {}
    for seed, (name, each) in enumerate(options.items()):
        make_adapter("llama", tmp_path / name, seed, peft.LoraConfig(r=4, lora_alpha=8, **each))
        resident[name] = driver.load_adapter(read_adapter(driver, tmp_path / name))
    hooks = Hooks(driver)
    driver.teach([PROMPT] * 2, decode=2, adapters=[[], [(resident["plain"], 1.0)]])
    assert hooks.most == 0
    driver.teach([PROMPT] * 2, decode=2, adapters=[[], [(resident["dora"], 1.0)]])
    assert hooks.most == 3 * 2 + 1  # two gains a layer, and the norm
    driver.teach([PROMPT], decode=2, adapters=[[]])
    assert sum(len(each._forward_hooks) for each in driver.loaded.model.modules()) == 1  # the counter's own


def test_gains_and_shifts_are_kept_in_float32_in_the_flat_tensor() -> None:
    gain, shift = torch.tensor([1.001, 2.0, 3.0]), torch.tensor([0.1, 0.2, 0.3])
    override = ModuleOverride(parameters={"weight": torch.ones(3, 2)}, gain_out=gain, shift=shift)
    adapter = flatten(
        "d", Lowered({"q": Delta(torch.ones(1, 2), torch.ones(1, 3))}, {}, {"q": override}), torch.bfloat16
    )
    overrides, _ = adapter.override_views(adapter.flat.clone())
    assert overrides["q"].gain_out is not None
    assert overrides["q"].gain_out.equal(gain)
    assert overrides["q"].shift is not None
    assert overrides["q"].shift.equal(shift)
    assert overrides["q"].parameters["weight"].dtype == torch.bfloat16
    assert overrides["q"].gain_out.data_ptr() % 64 == adapter.flat.clone().data_ptr() % 64
    assert adapter.nbytes == 64 * 5  # each in a cache line of its own: A, B, weight, gain, constant


def test_overrides_leave_other_rows_bit_identical(tmp_path: Path) -> None:
    driver = Driver(save("llama", tmp_path / "base"))
    make_adapter("llama", tmp_path / "a", 0, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    make_adapter(
        "llama", tmp_path / "b", 1, peft.LoraConfig(r=4, target_modules=["k_proj"], modules_to_save=["mlp", "norm"])
    )
    plain, changed = (driver.load_adapter(read_adapter(driver, tmp_path / name)) for name in "ab")
    routes: list[list[tuple[str, float]]] = [[], [(plain, 1.0)], [(plain, 0.5)]]
    alone = driver.teach([PROMPT] * 3, decode=2, adapters=routes)
    beside = driver.teach([PROMPT] * 3, decode=2, adapters=[routes[0], routes[1], [(changed, 1.0)]])
    assert beside[0].equal(alone[0])
    assert beside[1].equal(alone[1])


def toy(checkpoint: Checkpoint, base: BaseShape) -> Lowered:
    """A format that nobody has: y = -2 (W x) + B (A x) + 1 at one module, A and B of rank one."""
    name = checkpoint.config["module"]
    site = base.sites[name]
    delta = Delta(torch.full((1, site.in_features), 0.1), torch.full((1, site.out_features), -0.05))
    override = ModuleOverride(gain_out=torch.full((site.out_features,), -2.0), shift=torch.ones(site.out_features))
    return Lowered({name: delta}, {"method": "toy"}, {name: override})


def test_a_new_format_is_one_function_and_needs_no_other_module(tmp_path: Path) -> None:
    """Registered in a table of the test's own, it is stored, loaded, batched and served like any other."""
    driver = Driver(save("llama", tmp_path / "base"))
    name = "model.layers.1.mlp.down_proj"
    checkpoint = Checkpoint({"peft_type": "TOY", "module": name}, {}, 0)
    lowered = lower(checkpoint, driver.loaded.shape, {**FORMATS, "TOY": toy})
    route = [(driver.load_adapter(flatten("an adapter", lowered, torch.float32)), 1.0)]
    rows = driver.teach([PROMPT] * 2, decode=0, adapters=[route, []])

    def by_hand(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return -2 * (output - 0.005 * args[0].sum(-1, keepdim=True)) + 1

    model = reference("llama")
    with torch.inference_mode():
        plain = model(input_ids=torch.tensor([PROMPT])).logits[0]
        handle = model.get_submodule(name).register_forward_hook(by_hand)
        try:
            expected = model(input_ids=torch.tensor([PROMPT])).logits[0]
        finally:
            handle.remove()
    torch.testing.assert_close(rows[0], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rows[1], plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", FORMATS)
def test_every_format_states_its_formula_keys_and_source(method: str) -> None:
    said = sys.modules[FORMATS[method].__module__].__doc__ or ""
    assert "key" in said
    assert "Source: PEFT" in said
    assert "=" in said


def test_the_bases_own_parameters_can_be_read_while_an_adapters_stand_in(tmp_path: Path) -> None:
    """As lowering does in other threads, to tell what an adapter brings from what the base has."""
    driver = Driver(save("llama", tmp_path / "base"))
    make_adapter("llama", tmp_path / "a", 0, peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"]))
    resident = driver.load_adapter(read_adapter(driver, tmp_path / "a"))
    own = driver.loaded.shape.parameter("model.norm.weight").clone()
    norm, seen = driver.loaded.model.model.norm, []
    rms_norm = norm._kernels.rms_norm

    def watched(*args: Any, **options: Any) -> torch.Tensor:
        seen.append((args[1], driver.loaded.shape.parameter("model.norm.weight").equal(own)))
        result: torch.Tensor = rms_norm(*args, **options)
        return result

    norm._kernels.rms_norm = watched
    driver.teach([PROMPT], decode=1, adapters=[[(resident, 1.0)]])
    assert any(not weight.equal(own) for weight, _ in seen if weight.shape == own.shape)
    assert all(right for _, right in seen)
