"""A base quantised at load: adapters are lowered against, and served over, its dequantised weights."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from driver import Driver
from parity import logits, read_adapter, save_noisy_adapter
from support import ARCHITECTURES, COMMON, EXPERTS, make_model, reference, save, uncentred
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from lora_serve.adapters.checkpoint import read
from lora_serve.adapters.formats.dispatch import lower
from lora_serve.adapters.formats.report import complete
from lora_serve.kernels.packed_weight import Scheme
from lora_serve.kernels.reference import ReferenceKernels

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


def serve(folder: Path, scheme: Scheme, dtype: str = "float32", native: bool = True) -> tuple[Driver, Any]:
    """A quantised base without centred weights, and transformers' in float32 whose weights are the dequantised ones."""
    kind = getattr(torch, dtype)
    uncentred(ARCHITECTURES["llama"]).to(kind).save_pretrained(folder)
    driver = Driver(folder, dtype=dtype, max_tokens=23, scheme=scheme, native=native)
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for name in driver.loaded.shape.sites:
            theirs.get_submodule(name).weight.copy_(driver.loaded.shape.weight(name))
    return driver, theirs


@pytest.mark.parametrize(
    ("scheme", "dtype", "native"),
    [
        *product(("int8", "int4"), ("float32", "bfloat16", "float16"), (True,)),
        *product(("int8", "int4", "fp8"), ("float32",), (False,)),
    ],
)
def test_adapters_over_a_quantised_base_equal_peft_over_the_dequantised_one(
    scheme: Scheme, dtype: str, native: bool, tmp_path: Path
) -> None:
    driver, theirs = serve(tmp_path / "base", scheme, dtype, native)
    models, routes = [theirs], [[]]
    for index, (name, options) in enumerate(ADAPTERS.items()):
        config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": LINEAR} | options)
        save_noisy_adapter(theirs, tmp_path / name, index, config, noise=0.08)
        models.append(peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path / name).eval())
        routes.append([(driver.load_adapter(read_adapter(driver, tmp_path / name)), 1.0)])
    rows = driver.teach([[5, 9, 33, 60, 21, 7, 8, 40, 41, 50]] * len(models), decode=3, adapters=routes)
    for tokens, got, model in zip(driver.sequences, rows, models, strict=True):
        got = got.float()
        wanted = logits(model, tokens)
        # Inputs are rounded at every linear map, which no other adapter's numbers could hide behind.
        apart = [(got - logits(other, tokens)).norm().item() for other in models]
        assert apart[models.index(model)] < (0.1 if scheme == "fp8" else 0.05) * wanted.norm()
        assert apart[models.index(model)] == min(apart)
    checkpoint = read(tmp_path / "dora", max_bytes=1 << 20)
    report = complete(lower(checkpoint, driver.loaded.shape), checkpoint, driver.loaded.shape)
    assert any(f"dequantised from {scheme}" in note for note in report["lowered"])


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_composition_adds_weighted_deltas_to_what_quantised_modules_compute(scheme: Scheme, tmp_path: Path) -> None:
    driver, theirs = serve(tmp_path / "base", scheme)
    weights, names = [0.7, -0.5], ["a", "b"]
    model: Any = theirs
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=3 + seed, target_modules=LINEAR[seed:])
        model = peft.get_peft_model(model, config, name) if seed == 0 else model
        if seed:
            model.add_adapter(name, config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_" in path:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path)
    model.add_weighted_adapter(names, weights, "mix", combination_type="cat")
    model.set_adapter("mix")
    digests = [driver.load_adapter(read_adapter(driver, tmp_path / name)) for name in names]
    uses = list(zip(digests, weights, strict=True))
    prompt = [5, 9, 33, 60, 21, 7, 8, 40, 41, 50]
    got, alone = driver.teach([prompt] * 2, decode=3, adapters=[uses, uses[:1]])
    wanted = logits(model.eval(), driver.sequences[0])
    assert (got - wanted).norm() < 0.05 * wanted.norm()
    assert (got - wanted).norm() < 0.3 * (alone - wanted).norm()


@pytest.mark.parametrize("feature", ["plain", "dora", "pissa", "bias"])
def test_a_bf16_base_is_as_close_to_exact_as_peft_in_bf16(feature: str, tmp_path: Path) -> None:
    driver = Driver(save("llama", tmp_path / "base"), dtype="bfloat16")
    config = peft.LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": LINEAR} | ADAPTERS[feature])
    rounded = copy.deepcopy(reference("llama")).to(torch.bfloat16)
    exact = save_noisy_adapter(copy.deepcopy(rounded).float(), tmp_path / "a", 0, config, noise=0.05)
    route = [(driver.load_adapter(read_adapter(driver, tmp_path / "a")), 1.0)]
    rows = driver.teach([[5, 9, 33, 60, 21, 7, 8, 40]] * 2, decode=3, adapters=[route, []])[0].float()
    truth = logits(exact, driver.sequences[0])
    theirs = logits(peft.PeftModel.from_pretrained(rounded, tmp_path / "a").eval(), driver.sequences[0]).float()
    assert (rows - truth).norm() <= 1.25 * (theirs - truth).norm()


def note(config: PretrainedConfig, scheme: Scheme, folder: Path, **options: Any) -> str:
    make_model(config).save_pretrained(folder)
    driver = Driver(folder, scheme=scheme, **options)
    (found,) = driver.base.notes
    return found


NARROW = LlamaConfig(**{**COMMON, "hidden_size": 80, "head_dim": 20, "intermediate_size": 112})


@pytest.mark.parametrize(
    ("config", "scheme", "wanted"),
    [
        (
            ARCHITECTURES["llama"],
            "int8",
            "--quantize int8: 94 % of the base's parameters are int8; "
            "float32 stay embeddings (5.9 %), norms, biases and routers (0.4 %)",
        ),
        (
            ARCHITECTURES["qwen2"],
            "int4",
            "--quantize int4: 93 % of the base's parameters are int4; float32 stay embeddings (6.2 %), norms, biases "
            "and routers (0.8 %); the LM head has a quantised copy of the embeddings",
        ),
        (
            NARROW,
            "int4",
            "0 % of the base's parameters are int4 and 95 % int8 (inputs that are no multiple of 32); float32 stay",
        ),
        (
            EXPERTS["mixtral"],
            "int8",
            "--quantize int8: 97 % of the base's parameters are int8; float32 stay embeddings",
        ),
        (
            EXPERTS["qwen3_moe"],
            "int4",
            "75 % of the base's parameters are int4 and 21 % int8 (inputs that are no multiple of 32); float32 stay",
        ),
    ],
    ids=["llama", "tied", "narrow", "mixtral", "qwen3_moe"],
)
def test_a_note_says_how_much_is_quantised_and_what_is_not(
    config: PretrainedConfig, scheme: Scheme, wanted: str, tmp_path: Path
) -> None:
    found = note(config, scheme, tmp_path)
    assert wanted in found
    assert "warning" not in found


def test_without_quantisation_there_is_no_note(tmp_path: Path) -> None:
    assert Driver(save("llama", tmp_path)).base.notes == []


class KernelsWithoutExperts(ReferenceKernels):
    has_grouped_linear = False


def test_experts_that_the_kernels_cannot_quantise_are_a_warning_and_are_served(tmp_path: Path) -> None:
    found = note(EXPERTS["mixtral"], "int8", tmp_path, kernels=KernelsWithoutExperts())
    assert found.startswith("warning: most weights are not quantised. --quantize int8: 16 %")
    assert "float32 stay experts, as the reference kernels have no quantised ones (81 %)" in found
