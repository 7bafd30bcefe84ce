"""A base quantised at load: adapters are lowered against, and served over, its dequantised weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from driver import Driver
from parity import logits, read_adapter
from support import reference, save

from lora_serve.adapters.checkpoint import read
from lora_serve.adapters.formats.dispatch import lower
from lora_serve.adapters.formats.report import complete
from lora_serve.kernels.packed_weight import Scheme

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT talks about heads and ties

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "kasa": {"kasa_config": peft.KasaConfig()},
    "bias": {"lora_bias": True},
    "saved": {"modules_to_save": ["lm_head", "o_proj"], "target_modules": LINEAR[:3]},
}


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("native", [True, False], ids=["native", "reference"])
def test_adapters_over_a_quantised_base_equal_peft_over_the_dequantised_one(
    scheme: Scheme, native: bool, tmp_path: Path
) -> None:
    driver = Driver(save("llama", tmp_path / "base"), max_tokens=23, scheme=scheme, native=native)
    theirs = copy.deepcopy(reference("llama"))
    with torch.no_grad():
        for name in driver.loaded.shape.sites:
            theirs.get_submodule(name).weight.copy_(driver.loaded.shape.weight(name))
    models, routes = [theirs], [[]]
    for index, (name, options) in enumerate(ADAPTERS.items()):
        torch.manual_seed(index)
        config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": LINEAR} | options)
        model = peft.get_peft_model(copy.deepcopy(theirs), config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.08)
        model.save_pretrained(tmp_path / name)
        models.append(peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path / name).eval())
        routes.append([(driver.load_adapter(read_adapter(driver, tmp_path / name)), 1.0)])
    rows = driver.teach([[5, 9, 33, 60, 21, 7, 8, 40, 41, 50]] * len(models), decode=3, adapters=routes)
    for tokens, got, model in zip(driver.sequences, rows, models, strict=True):
        wanted = logits(model, tokens)
        # Inputs are rounded to int8 at every linear map, which no other adapter's numbers could hide behind.
        apart = [(got - logits(other, tokens)).norm().item() for other in models]
        assert apart[models.index(model)] < 0.05 * wanted.norm()
        assert apart[models.index(model)] == min(apart)
    checkpoint = read(tmp_path / "dora", max_bytes=1 << 20)
    report = complete(lower(checkpoint, driver.loaded.shape), checkpoint, driver.loaded.shape)
    assert any(f"dequantised from {scheme}" in note for note in report["lowered"])


@pytest.mark.parametrize("feature", ["plain", "dora", "pissa", "bias"])
def test_a_bf16_base_is_as_close_to_exact_as_peft_in_bf16(feature: str, tmp_path: Path) -> None:
    driver = Driver(save("llama", tmp_path / "base"), dtype="bfloat16")
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": LINEAR} | ADAPTERS[feature])
    rounded = copy.deepcopy(reference("llama")).to(torch.bfloat16)
    exact = peft.get_peft_model(copy.deepcopy(rounded).float(), config).eval()
    with torch.no_grad():
        for parameter in exact.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    exact.save_pretrained(tmp_path / "a")
    route = [(driver.load_adapter(read_adapter(driver, tmp_path / "a")), 1.0)]
    rows = driver.teach([[5, 9, 33, 60, 21, 7, 8, 40]] * 2, decode=3, adapters=[route, []])[0].float()
    truth = logits(exact, driver.sequences[0])
    theirs = logits(peft.PeftModel.from_pretrained(rounded, tmp_path / "a").eval(), driver.sequences[0]).float()
    assert (rows - truth).norm() <= 1.25 * (theirs - truth).norm()
