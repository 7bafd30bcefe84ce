"""The generated models and adapters are what transformers and PEFT load and save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from bench.make_model import main, make_adapter, make_model
from bench.shapes import SHAPES, shape_of

# PEFT asks for it by the name that transformers is leaving behind.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
TINY = SHAPES["tiny"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "model"
    make_model(TINY, folder)
    return folder


def tensors(file: Path) -> dict[str, tuple[list[int], str]]:
    with safe_open(file, "pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, not a mapping
        return {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}


def test_the_model_loads_with_every_weight_and_runs(model_folder: Path) -> None:
    model, loading = AutoModelForCausalLM.from_pretrained(model_folder, dtype="auto", output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    logits = model(torch.tensor([[1, 2, 3]])).logits
    assert logits.shape == (1, 3, TINY.vocabulary)
    assert logits.isfinite().all()


def test_every_id_decodes_and_text_survives_the_round_trip(model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert len(tokenizer) == TINY.vocabulary
    assert all(tokenizer.decode([token]) for token in range(TINY.vocabulary))
    text = "The quick brown fox, naïve 日本 🙂\n"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode())


def test_the_chat_template_marks_turns_with_single_tokens(model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    messages = [{"role": "user", "content": "hello"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert ids[0] == TINY.vocabulary - 2
    assert tokenizer.eos_token_id == TINY.vocabulary - 1


@pytest.mark.parametrize("targets", [None, ["q_proj", "down_proj"]])
def test_an_adapter_is_what_peft_itself_would_save(
    model_folder: Path, tmp_path: Path, targets: list[str] | None
) -> None:
    make_adapter(TINY, tmp_path / "ours", rank=4, seed=1, targets=targets)
    config: Any = LoraConfig(
        r=4, lora_alpha=8, target_modules=targets or "all-linear", task_type="CAUSAL_LM", inference_mode=True
    )
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype="auto")
    peft = get_peft_model(base, config)
    peft.to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    name = "adapter_model.safetensors"
    assert tensors(tmp_path / "ours" / name) == tensors(tmp_path / "theirs" / name)
    ours, theirs = (LoraConfig.from_pretrained(tmp_path / which).to_dict() for which in ("ours", "theirs"))
    for config_dict in (ours, theirs):
        config_dict["target_modules"] = set(config_dict["target_modules"])
        config_dict.pop("base_model_name_or_path")
        config_dict.pop("peft_version", None)
    assert ours == theirs


def test_peft_loads_an_adapter_and_it_changes_the_answer(model_folder: Path, tmp_path: Path) -> None:
    make_adapter(TINY, tmp_path / "a", rank=4, seed=1)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype="auto")
    prompt = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        plain = base(prompt).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "a")(prompt).logits
    assert adapted.isfinite().all()
    assert not torch.allclose(plain, adapted, atol=0.05)


def test_the_command_deals_ranks_in_turn_and_remakes_only_what_is_asked_differently(tmp_path: Path) -> None:
    def run(*more: str) -> None:
        main(["--shape", "tiny", "--out", str(tmp_path), *more])

    def rank(number: int) -> int:
        shapes = tensors(tmp_path / "adapters" / f"a{number:04}" / "adapter_model.safetensors")
        return shapes["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"][0][0]

    def made(name: str) -> int:
        return (tmp_path / name).stat().st_mtime_ns

    run("--adapters", "3", "--rank", "2,4")
    assert [rank(number) for number in range(3)] == [2, 4, 2]
    model, first = made("model"), made("adapters/a0000")
    run("--adapters", "4", "--rank", "2,4")
    assert rank(3) == 4
    assert made("adapters/a0000") == first
    run("--adapters", "1", "--rank", "8")
    assert rank(0) == 8
    assert not (tmp_path / "adapters" / "a0001").exists()
    assert made("model") == model


def test_unknown_targets_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="targets are among"):
        make_adapter(TINY, tmp_path / "a", rank=4, seed=1, targets=["qproj"])
    assert list(tmp_path.iterdir()) == []


def test_the_reference_shape_has_the_parameters_of_its_namesake() -> None:
    def parameters(name: str) -> int:
        shape = SHAPES[name]
        tensors = [*shape.ends(), *(each for layer in range(shape.layers) for each in shape.tensors(layer))]
        return sum(torch.Size(size).numel() for _, size in tensors)

    assert parameters("qwen2.5-0.5b") == 494_032_768
    assert parameters("qwen2.5-1.5b") == 1_543_714_304
    assert parameters("llama-3.1-8b") == 8_030_261_248


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_read_from_the_config_that_it_writes(name: str) -> None:
    assert shape_of(SHAPES[name].config(eos=1)) == SHAPES[name]


def test_a_shape_is_read_from_a_config_of_transformers() -> None:
    config = LlamaConfig(hidden_size=96, num_attention_heads=6, num_key_value_heads=2, intermediate_size=160)
    shape = shape_of(config.to_dict())
    assert shape.linears()["self_attn.k_proj"] == (96, 32)
    assert shape.rope_theta == 10_000
    with pytest.raises(ValueError, match="the model is a opt"):
        shape_of({"model_type": "opt"})
    with pytest.raises(ValueError, match="not as wide"):
        shape_of(config.to_dict() | {"head_dim": 32})
