"""Which inputs matter to int4: measured on the untouched base, the same for the engine and for lowering."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from driver import Driver
from support import ARCHITECTURES, EXPERTS, make_model, uncentred
from torch import Tensor
from transformers import AutoTokenizer

from lora_serve.adapters.lowering_job import LoweringContext
from lora_serve.kernels.packed_weight import dequantize, quantize
from lora_serve.model.importance import (
    LEAST,
    TEXT,
    TOKENS,
    importance_digest,
    measure_importance,
    random_tokens,
    text_tokens,
)
from lora_serve.model.linear import AdaptedLinear

CPU = torch.device("cpu")
MODEL = str(Path(__file__).parents[2] / "demo" / "model")
IDS = [5, 9, 33, 60, 21, 7, 8, 40]


def llama() -> Any:
    model: Any = uncentred(ARCHITECTURES["llama"]).eval()
    model.set_attn_implementation("eager")
    return model


def test_importance_is_the_mean_square_of_each_input_to_a_power_of_four() -> None:
    model, seen = llama(), {}
    groups = (("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"), ("model.layers.1.mlp.down_proj",))
    found = measure_importance(model, groups, IDS, CPU)
    assert set(found) == {name for group in groups for name in group}
    assert found[groups[0][0]] is found[groups[0][1]]

    def keep(module: Any, args: tuple[Tensor, ...]) -> None:
        seen["x"] = args[0]

    for group in groups:
        hook = model.get_submodule(group[0]).register_forward_pre_hook(keep)
        with torch.no_grad():
            model(torch.tensor([IDS]))
        hook.remove()
        squares = seen["x"][0].square().mean(0)
        off = found[group[0]] / (squares / squares.mean()).clamp(min=LEAST)
        assert ((off > 0.499) & (off < 2.001)).all()
        exponents = found[group[0]].log2() / 2
        assert exponents.equal(exponents.round())


def test_the_text_is_in_the_tokens_of_the_checkpoint_and_at_random_without_a_tokenizer(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert text_tokens(MODEL, None, 1 << 20) == tokenizer(TEXT)["input_ids"][:TOKENS]
    assert text_tokens(str(tmp_path), None, 1 << 20) is None
    assert text_tokens(MODEL, None, 10) is None  # the base has fewer tokens than its tokenizer
    random = random_tokens(60)
    assert random == random_tokens(60)
    assert len(set(random)) > 30
    assert max(random) < 60


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_lowering_process_reads_the_weights_that_the_engine_multiplies(dtype: str, tmp_path: Path) -> None:
    uncentred(ARCHITECTURES["llama"]).to(getattr(torch, dtype)).save_pretrained(tmp_path)
    driver = Driver(tmp_path, dtype=dtype, scheme="int4")
    unlike = 0
    for name in driver.loaded.shape.sites:
        module: Any = driver.loaded.model.get_submodule(name)
        assert isinstance(module, AdaptedLinear)
        served = module.base.full_weight  # type: ignore[union-attr]
        assert driver.loaded.shape.weight(name).equal(served)
        own: Tensor = uncentred(ARCHITECTURES["llama"]).to(getattr(torch, dtype)).get_submodule(name).weight  # type: ignore[assignment]
        unlike += not dequantize(*quantize(own, "int4")).equal(served)
    assert unlike > len(driver.loaded.shape.sites) / 2  # importance has an effect


def test_only_int4_measures_and_another_importance_is_another_fingerprint(tmp_path: Path) -> None:
    uncentred(ARCHITECTURES["llama"]).save_pretrained(tmp_path)
    loaded = Driver(tmp_path, scheme="int4").loaded
    assert set(loaded.importance) == set(loaded.shape.sites)
    assert Driver(tmp_path, scheme="int8").loaded.importance == {}
    context = LoweringContext(loaded.shape, "base", torch.float32, 1 << 20, 1 << 20)
    again = {name: each.clone() for name, each in reversed(loaded.importance.items())}
    assert importance_digest(again) == loaded.shape.rounding
    again["lm_head"][3] *= 4
    changed = replace(loaded.shape, rounding=importance_digest(again))
    assert replace(context, base=changed).fingerprint != context.fingerprint
    assert importance_digest({}) == ""


def test_experts_share_what_their_module_reads(tmp_path: Path) -> None:
    make_model(EXPERTS["mixtral"]).save_pretrained(tmp_path)
    loaded = Driver(tmp_path, scheme="int4").loaded
    (name,) = {site.partition("[")[0] for site in loaded.shape.sites if "layers.0.mlp.experts.gate_up_proj[" in site}
    assert loaded.importance[name].shape == (loaded.shape.hidden_size,)
    assert not any(each.endswith("down_proj") for each in loaded.importance)
