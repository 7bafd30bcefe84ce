"""Adapters on one base of every kind: its own names, norms, positions, heads, latents, experts and routers.

Weights are not centred, as in `test_precision.py`: what is only nearly the same norm or bias gives other logits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from architectures import BASES, Architecture
from driver import Driver
from parity import logits, read_adapter
from support import uncentred
from torch import Tensor
from transformers import AutoModelForCausalLM

from lora_serve.adapters.checkpoint import read
from lora_serve.adapters.formats.dispatch import lower
from lora_serve.errors import AdapterInvalid

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT talks about heads and ties
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def configs(base: Architecture) -> list[peft.LoraConfig]:
    """What people train: every linear module, experts and routers, and modules saved whole."""
    first = base.linear[:1]
    alone = base.alone
    options: list[dict[str, Any]] = [
        {"target_modules": base.linear},
        {"target_modules": [*alone, "lm_head"], "use_dora": True, "bias": "all"},
        {"target_modules": [*first, base.embedding, "lm_head"], "use_rslora": True},
        {"target_modules": first, "modules_to_save": base.norms},
        {"target_modules": first, "modules_to_save": [base.embedding, "lm_head"]},
        {"target_modules": first, "trainable_token_indices": [5, 40, 95]},
    ]
    if base.stacked:
        options.append({"target_modules": first, "target_parameters": list(base.stacked)})
    if base.router:
        options.append({"target_modules": first, "target_parameters": list(base.router)})
    return [peft.LoraConfig(**{"r": 4, "lora_alpha": 6} | each) for each in options]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A base's folder `base` and its adapters' folders `0`, `1`, …, as PEFT saves them."""

    @cache
    def save(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        model = uncentred(BASES[name].config)
        model.save_pretrained(folder / "base")
        for index, config in enumerate(configs(BASES[name])):
            torch.manual_seed(index)
            adapted = peft.get_peft_model(copy.deepcopy(model), config)
            with torch.no_grad():
                for parameter in adapted.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter) * 0.08)
            adapted.save_pretrained(folder / str(index))
        return folder

    return save


def load(folder: Path, adapter: int | None, dtype: torch.dtype, exact: bool = False) -> Any:
    """Transformers' and PEFT's model in a dtype; `exact`: with the weights of that dtype, in float32."""
    model = AutoModelForCausalLM.from_pretrained(
        folder / "base", dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    model = model.float() if exact else model
    return model if adapter is None else peft.PeftModel.from_pretrained(model, folder / str(adapter)).eval()


def errors(got: Tensor, wanted: Tensor) -> Tensor:
    """Relative error of each row; a median of them ignores the tokens that rounding sends to another expert."""
    return (got.float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", BASES)
def test_a_mixed_batch_equals_peft_row_by_row(name: str, dtype: str, saved: Callable[[str], Path]) -> None:
    folder, kind = saved(name), getattr(torch, dtype)
    driver = Driver(folder / "base", dtype=dtype, max_tokens=23)
    adapters = [None, *range(len(configs(BASES[name])))]
    routes = [
        [] if each is None else [(driver.load_adapter(read_adapter(driver, folder / str(each))), 1.0)]
        for each in adapters
    ]
    generator = torch.Generator().manual_seed(9)
    prompts = [torch.randint(3, 90, (17 + 2 * index,), generator=generator).tolist() for index in range(len(adapters))]
    rows = driver.teach(prompts, decode=3, adapters=routes)
    base = load(folder, None, kind, exact=True)
    ours, theirs = [], []
    for adapter, tokens, got in zip(adapters, driver.sequences, rows, strict=True):
        wanted = logits(load(folder, adapter, kind, exact=True), tokens)
        assert (adapter is None) == torch.allclose(wanted, logits(base, tokens), atol=1e-2)
        if kind is torch.float32:
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
        else:
            ours.append(errors(got, wanted))
            theirs.append(errors(logits(load(folder, adapter, kind), tokens), wanted))
            assert ours[-1].median() <= 2 * theirs[-1].median()
    if kind is not torch.float32:
        assert torch.cat(ours).median() <= 1.25 * torch.cat(theirs).median()


@pytest.mark.parametrize("length", [1, 2, 4])
@pytest.mark.parametrize("name", ["gemma3", "phi"])
def test_norms_of_heads_are_replaced_in_steps_of_as_many_tokens_as_heads(
    name: str, length: int, saved: Callable[[str], Path]
) -> None:
    """There are 4 heads and 2 of keys: nothing in a shape tells a head from a token."""
    folder, index = saved(name), 3
    assert configs(BASES[name])[index].modules_to_save
    driver = Driver(folder / "base")
    route = [(driver.load_adapter(read_adapter(driver, folder / str(index))), 1.0)]
    rows = driver.teach([[5, 9, 33, 60][:length]], decode=2, adapters=[route])
    wanted = logits(load(folder, index, torch.float32), driver.sequences[0])
    torch.testing.assert_close(rows[0], wanted, atol=1e-4, rtol=1e-4)


def test_all_linear_is_served_without_what_the_model_never_calls(tmp_path: Path) -> None:
    """LongCat-Flash reads its router's weight: PEFT's LoRA there has no effect and is never trained."""
    model = uncentred(BASES["longcat_flash"].config)
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    trained: dict[bool, Any] = {}
    for classifier in (False, True):
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and ("classifier" in name) == classifier:
                parameter.data.add_(torch.randn_like(parameter) * 0.08)
        adapted.save_pretrained(tmp_path / str(int(classifier)))
        trained[classifier] = logits(adapted.eval(), [5, 9, 33, 60, 7])
    torch.testing.assert_close(trained[False], trained[True])
    driver = Driver(tmp_path / "base")
    report = lower(read(tmp_path / "0", max_bytes=1 << 30), driver.loaded.shape).report
    assert any("not trained" in note and "router.classifier" in note for note in report["lowered"])
    adapter = driver.load_adapter(read_adapter(driver, tmp_path / "0"))
    rows = driver.teach([[5, 9, 33, 60, 7]], decode=1, adapters=[[(adapter, 1.0)]])
    torch.testing.assert_close(rows[0][:5], trained[False], atol=1e-4, rtol=1e-4)
    with pytest.raises(AdapterInvalid, match=r"router.classifier.*not used in the forward pass"):
        read_adapter(driver, tmp_path / "1")
