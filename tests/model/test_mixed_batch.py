"""Every row of a mixed batch has the logits that PEFT gives for its adapter alone: prefill, chunks and decode."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from driver import Driver
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ARCHITECTURES, reference, save
from torch import Tensor

from lora_serve.adapters.adapter import Adapter, flatten
from lora_serve.adapters.checkpoint import read
from lora_serve.adapters.digest import digest
from lora_serve.adapters.formats.registry import lower

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT talks about heads and ties

TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc", "lm_head"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"],
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


def make(architecture: str, folder: Path, seed: int, options: Mapping[str, Any]) -> Any:
    """A PEFT model with random non-zero A and B, its adapter saved to `folder`."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(**options, fan_in_fan_out=architecture == "gpt2")
    model = peft.get_peft_model(copy.deepcopy(reference(architecture)), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.08)
    model.save_pretrained(folder)
    return model


def bring(driver: Driver, folder: Path) -> Adapter:
    """Read, lower and flatten an adapter as the registry does."""
    lowered = lower(read(folder, max_bytes=1 << 30), driver.loaded.shape)
    return flatten(digest(lowered), lowered, driver.loaded.dtype)


def logits(model: Any, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return found


def check(architecture: str, folder: Path, adapters: list[Mapping[str, Any]], *, native: bool = True) -> None:
    """Serve all adapters and the base in one batch, two sequences each, and hold every row to PEFT."""
    driver = Driver(save(architecture, folder / "base"), native=native, max_tokens=23)
    models = [reference(architecture)]
    routes: list[list[tuple[str, float]]] = [[]]
    for index, options in enumerate(adapters):
        models.append(make(architecture, folder / str(index), index, options))
        routes.append([(driver.seat(bring(driver, folder / str(index))), 1.0)])
    generator = torch.Generator().manual_seed(9)
    prompts = [torch.randint(3, 90, (int(n),), generator=generator).tolist() for n in (3, 9, 14, 6, 20, 1, 7, 11)]
    count = 2 * len(models)
    prompts = (prompts * count)[:count]
    rows = driver.teach(prompts, decode=4, adapters=[routes[i % len(models)] for i in range(count)])
    for index, (tokens, got) in enumerate(zip(driver.sequences, rows, strict=True)):
        torch.testing.assert_close(got, logits(models[index % len(models)], tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("native", [True, False], ids=["native", "reference"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_mixed_batch_equals_peft_row_by_row(architecture: str, native: bool, tmp_path: Path) -> None:
    targets = TARGETS.get(architecture, ALL)
    check(
        architecture,
        tmp_path,
        [
            {"r": 1, "lora_alpha": 3, "target_modules": targets[:2]},
            {"r": 8, "lora_alpha": 16, "target_modules": targets, "use_rslora": True},
            {"r": 64, "lora_alpha": 7, "target_modules": targets[1:]},
            {
                "r": 4, "lora_alpha": 8, "target_modules": targets,
                "rank_pattern": {targets[0]: 13}, "alpha_pattern": {targets[1]: 5},
            },
        ],
        native=native,
    )  # fmt: skip


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    targets = draw(st.lists(st.sampled_from(ALL), min_size=1, unique=True))
    patterned = st.dictionaries(st.sampled_from(targets), st.integers(1, 48), max_size=3)
    return {
        "r": draw(st.integers(1, 64)),
        "lora_alpha": draw(st.integers(1, 64)),
        "target_modules": targets,
        "use_rslora": draw(st.booleans()),
        "rank_pattern": draw(patterned),
        "alpha_pattern": draw(patterned),
        "layers_to_transform": draw(st.none() | st.just([0]) | st.just([1, 2])) if "lm_head" not in targets else None,
    }


@settings(max_examples=12, deadline=None)
@given(adapters=st.lists(configs(), min_size=1, max_size=3))
def test_any_lora_config_equals_peft(adapters: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> None:
    check("llama", tmp_path_factory.mktemp("any"), list(adapters))


def test_bf16_is_as_close_to_exact_as_peft_in_bf16(tmp_path: Path) -> None:
    driver = Driver(save("llama", tmp_path / "base"), dtype="bfloat16")
    exact = make("llama", tmp_path / "a", 0, {"r": 16, "lora_alpha": 32, "target_modules": ALL})
    digest_ = driver.seat(bring(driver, tmp_path / "a"))
    rows = driver.teach([[5, 9, 33, 60, 21, 7, 8, 40]] * 2, decode=3, adapters=[[(digest_, 1.0)], []])[0].float()
    truth = logits(exact, driver.sequences[0])
    base = copy.deepcopy(reference("llama")).to(torch.bfloat16)
    half = peft.PeftModel.from_pretrained(base, tmp_path / "a").eval()
    theirs = logits(half, driver.sequences[0]).float()
    assert (rows - truth).norm() <= 1.25 * (theirs - truth).norm()


def test_a_composition_adds_weighted_deltas(tmp_path: Path) -> None:
    driver = Driver(save("llama", tmp_path / "base"))
    digests = []
    for seed in range(2):
        make("llama", tmp_path / str(seed), seed, {"r": 4 + seed, "lora_alpha": 8, "target_modules": ALL})
        digests.append(driver.seat(bring(driver, tmp_path / str(seed))))
    weights = (0.7, -0.3)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(reference("llama")), tmp_path / "0", adapter_name="a")
    model.load_adapter(tmp_path / "1", adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "mix", combination_type="cat")
    model.set_adapter("mix")
    routes = [list(zip(digests, (0.7, 0.3), strict=True)), [], [(digests[1], weights[1])]]
    rows = driver.teach([[5, 9, 33, 60]] * 3, decode=2, adapters=routes)
    torch.testing.assert_close(rows[0], logits(model.eval(), driver.sequences[0]), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(rows[1], rows[2][: len(rows[1])], atol=1e-3)
