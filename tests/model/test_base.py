"""Flat batches with paged KV and chunked prefill equal transformers on each sequence alone; what cannot is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from driver import Driver
from support import ARCHITECTURES, COMMON, make_model, reference, save
from torch import Tensor
from transformers import LlamaConfig, Phi3Config, Qwen3NextConfig, StableLmConfig

from lora_serve.errors import ModelUnsupported
from lora_serve.model.load import load

CPU = torch.device("cpu")


def alone(architecture: str, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = reference(architecture)(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize("native", [True, False], ids=["native", "reference"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ragged_chunks_and_decode_match_transformers(architecture: str, native: bool, tmp_path: Path) -> None:
    driver = Driver(save(architecture, tmp_path), native=native, max_tokens=11)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 90, (n,), generator=generator).tolist() for n in (5, 17, 1, 30)]
    logits = driver.teach(prompts, decode=6)
    for tokens, rows in zip(driver.sequences, logits, strict=True):
        torch.testing.assert_close(rows, alone(architecture, tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_bf16_stays_within_its_own_rounding(architecture: str, tmp_path: Path) -> None:
    driver = Driver(save(architecture, tmp_path), dtype="bfloat16", max_tokens=16)
    rows = driver.teach([[5, 6, 7, 8, 9, 10, 11, 12]], decode=2)[0]
    exact = alone(architecture, driver.sequences[0])
    import copy

    half = copy.deepcopy(reference(architecture)).to(torch.bfloat16)
    with torch.inference_mode():
        theirs = half(input_ids=torch.tensor([driver.sequences[0]]), use_cache=False).logits[0].float()
    assert (rows.float() - exact).norm() <= 1.5 * (theirs - exact).norm() + 1e-3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_modules_that_read_the_same_input_are_grouped(architecture: str, tmp_path: Path) -> None:
    shape = load(
        str(save(architecture, tmp_path)), revision=None, dtype="auto", device=CPU, progress=lambda stage, done: None
    ).shape
    leaves = {tuple(name.rpartition(".")[2] for name in group) for group in shape.groups}
    expected = {
        "gpt2": {("c_attn",), ("c_proj",), ("c_fc",), ("lm_head",)},
        "phi3": {("qkv_proj",), ("o_proj",), ("gate_up_proj",), ("down_proj",), ("lm_head",)},
    }.get(
        architecture,
        {("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",), ("lm_head",)},
    )
    assert leaves == expected
    assert set(shape.sites) == {name for group in shape.groups for name in group}


def refusal(config: object, folder: Path) -> str:
    make_model(config).save_pretrained(folder)  # type: ignore[arg-type]
    with pytest.raises(ModelUnsupported) as caught:
        Driver(folder)
    return str(caught.value)


def test_linear_attention_is_refused_by_name(tmp_path: Path) -> None:
    config = Qwen3NextConfig(
        **COMMON, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16, head_dim=16,
        layer_types=["linear_attention", "full_attention", "full_attention"],
    )  # fmt: skip
    assert "linear_attention" in refusal(config, tmp_path)


def test_a_model_that_drops_keyword_arguments_is_refused(tmp_path: Path) -> None:
    assert "stablelm does not hand keyword arguments on" in refusal(StableLmConfig(**COMMON), tmp_path)


def test_a_rope_that_depends_on_the_whole_batch_limits_the_context(tmp_path: Path) -> None:
    config = LlamaConfig(
        **{**COMMON, "max_position_embeddings": 128},
        rope_parameters={
            "rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64
        },
    )  # fmt: skip
    make_model(config).save_pretrained(tmp_path)
    loaded = load(str(tmp_path), revision=None, dtype="auto", device=CPU, progress=lambda stage, done: None)
    assert loaded.max_model_len == 64
    assert "dynamic rope" in loaded.notes[0]


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_such_a_rope_equals_the_original_below_the_limit(kind: str, tmp_path: Path) -> None:
    factors = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [3.0] * 8} if kind == "longrope" else {}
    config = (Phi3Config if kind == "longrope" else LlamaConfig)(
        **{**COMMON, "max_position_embeddings": 128, "original_max_position_embeddings": 64},
        rope_parameters={
            "rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64, **factors
        },
    )  # fmt: skip
    model = make_model(config)
    model.save_pretrained(tmp_path)
    driver = Driver(tmp_path)
    kinds = [module.rope_type for module in driver.loaded.model.modules() if hasattr(module, "rope_type")]
    assert (kinds, driver.base._steps.disabled) == (["default"], None)
    rows = driver.teach([list(range(3, 40))], decode=12)[0]
    with torch.inference_mode():
        wanted = model(torch.tensor(driver.sequences), use_cache=False).logits[0]
    torch.testing.assert_close(rows, wanted, atol=1e-4, rtol=1e-4)


def test_a_folder_without_a_model_is_refused_with_a_clear_message(tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupported, match="cannot be read"):
        load(str(tmp_path), revision=None, dtype="auto", device=CPU, progress=lambda stage, done: None)


def test_a_sharded_checkpoint_is_the_same_model(tmp_path: Path) -> None:
    reference("llama").save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    driver = Driver(tmp_path)
    rows = driver.teach([[5, 6, 7]], decode=1)[0]
    torch.testing.assert_close(rows, alone("llama", driver.sequences[0]), atol=1e-4, rtol=1e-4)
