"""Training on the resident base is PEFT's training with torch's AdamW: losses and weights, on every architecture.

Two adapters of different kinds and ranks are trained in the same flat batches here, and alone in PEFT.
`TRAINING_STEPS=50` trains longer.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import BASES
from support import ARCHITECTURES, EXPERTS, HEADS_FIRST, reference, save, uncentred
from training_driver import CPU, STEPS, TrainingDriver, check_parity, load_small
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lora_serve.engine.training.training_settings import LoraSettings
from lora_serve.errors import ModelUnsupported
from lora_serve.kernels.packed_weight import Scheme
from lora_serve.kernels.select import select
from lora_serve.model.trainable_base import TrainableBase

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

KINDS = {
    "lora": LoraSettings(r=4, lora_alpha=6),
    "rslora dora": LoraSettings(r=3, lora_alpha=5, use_dora=True, use_rslora=True, seed=1),
}
# In a mixture PEFT takes the names of a dense layer's MLP for those of the experts.
ATTENTION = {
    name: replace(settings, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]) for name, settings in KINDS.items()
}
PATTERNS: dict[str, Any] = {"rank_pattern": {"o_proj": 7}, "alpha_pattern": {"q_proj": 11}}


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "phi3", "gpt2", "mistral", "qwen3_moe", "gemma3"])
def test_training_equals_peft(architecture: str, tmp_path: Path) -> None:
    assert architecture in ARCHITECTURES | EXPERTS | HEADS_FIRST
    driver = TrainingDriver(save(architecture, tmp_path / "base"))
    check_parity(driver, reference(architecture), tmp_path, ATTENTION if architecture in EXPERTS else KINDS)


@pytest.mark.parametrize("name", BASES)
def test_every_kind_of_base_trains_as_in_peft(name: str, tmp_path: Path) -> None:
    """Modules outside the layers too: those of OPT between embeddings, layers and head."""
    base = BASES[name]
    model = uncentred(base.config)
    model.save_pretrained(tmp_path / "base")
    kinds = {name: replace(settings, target_modules=base.alone) for name, settings in KINDS.items()}
    check_parity(TrainingDriver(tmp_path / "base"), model, tmp_path, kinds, steps=min(STEPS, 4))


def test_what_cannot_be_trained_is_refused_by_name(tmp_path: Path) -> None:
    driver = TrainingDriver(save("llama", tmp_path))
    with pytest.raises(ModelUnsupported, match="a llama base without an LM head cannot be trained"):
        TrainableBase(replace(driver.loaded, headless=True), select(CPU), 1)
    oracle = replace(driver.loaded.oracle, logits=driver.loaded.oracle.logits.flip(2))
    wrong = TrainableBase(replace(load_small(tmp_path), oracle=oracle), select(CPU), 1)
    with pytest.raises(ModelUnsupported, match="llama cannot be trained: layer by layer its logits differ"):
        wrong.check()


def test_patterns_and_an_adapted_head_equal_peft_with_plain_kernels(tmp_path: Path) -> None:
    driver = TrainingDriver(save("llama", tmp_path / "base"), native=False)
    kinds = {
        "patterns": LoraSettings(r=4, lora_alpha=6, target_modules=["q_proj", "o_proj", "down_proj"], **PATTERNS),
        "head": LoraSettings(r=4, lora_alpha=6, target_modules=["lm_head", "v_proj"], seed=2),
    }
    check_parity(driver, reference("llama"), tmp_path, kinds)


@pytest.mark.parametrize(
    ("architecture", "scheme"), [("llama", "int8"), ("gpt2", "int4"), ("qwen3_moe", "int8"), ("qwen2", "fp8")]
)
def test_a_quantised_base_trains_as_peft_over_the_same_weights(
    architecture: str, scheme: Scheme, tmp_path: Path
) -> None:
    driver = TrainingDriver(save(architecture, tmp_path / "base"), scheme=scheme, native=scheme != "fp8")
    base = driver.with_resident_weights(reference(architecture))
    check_parity(driver, base, tmp_path, ATTENTION if architecture in EXPERTS else KINDS)


def test_an_nf4_base_trains_as_peft_over_the_same_weights(tmp_path: Path) -> None:
    """QLoRA, over what bitsandbytes stored."""
    pytest.importorskip("bitsandbytes")
    save("llama", tmp_path / "full")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(
        tmp_path / "full", quantization_config=config, dtype=torch.float32
    ).save_pretrained(tmp_path / "base")
    driver = TrainingDriver(tmp_path / "base")
    check_parity(driver, driver.with_resident_weights(reference("llama")), tmp_path, KINDS)
