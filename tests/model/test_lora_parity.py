"""Every LoRA feature that PEFT can save gives PEFT's logits, in one batch with other adapters and the base."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from driver import Driver
from parity import check_parity, load_peft, logits, make_adapter, read_adapter
from peft import LoraConfig
from safetensors.torch import save_file
from support import ARCHITECTURES, EXPERTS, VOCABULARY, reference, save

pytestmark = [  # PEFT talks about heads, ties, sizes and patterns
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LINEAR = {"gpt2": ["c_attn", "c_proj", "c_fc"], "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}
EMBEDDING = {"gpt2": "wte"}
NORM = {"gpt2": "ln_1"}


def config(architecture: str, **options: Any) -> LoraConfig:
    targets = LINEAR.get(architecture, LLAMA)
    known: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": targets,
        "fan_in_fan_out": architecture == "gpt2",
    }
    return LoraConfig(**known | options)


def targets(architecture: str) -> list[str]:
    return LINEAR.get(architecture, LLAMA)


FEATURES: dict[str, Callable[[str], dict[str, Any]]] = {
    "lora_bias": lambda a: {"lora_bias": True},
    "bias lora_only": lambda a: {"bias": "lora_only"},
    "bias all": lambda a: {"bias": "all"},
    "dora": lambda a: {"use_dora": True},
    "dora with biases and patterns": lambda a: {
        "use_dora": True, "bias": "all", "use_rslora": True, "rank_pattern": {targets(a)[0]: 7},
    },
    "embedding": lambda a: {"target_modules": [EMBEDDING.get(a, "embed_tokens"), targets(a)[0]]},
    "dora on an embedding": lambda a: {
        "target_modules": [EMBEDDING.get(a, "embed_tokens"), targets(a)[0]], "use_dora": True,
    },
    "lm_head": lambda a: {"target_modules": ["lm_head"]},
    "embedding and head": lambda a: {"target_modules": [EMBEDDING.get(a, "embed_tokens"), "lm_head"]},
    "saved head": lambda a: {"modules_to_save": ["lm_head"]},
    "saved embedding": lambda a: {"modules_to_save": [EMBEDDING.get(a, "embed_tokens")]},
    "saved embedding and head": lambda a: {"modules_to_save": [EMBEDDING.get(a, "embed_tokens"), "lm_head"]},
    "saved norms": lambda a: {"modules_to_save": [NORM.get(a, "input_layernorm")]},
    "saved subtree": lambda a: {"modules_to_save": ["mlp"], "target_modules": targets(a)[:1]},
    "token rows": lambda a: {"trainable_token_indices": [5, 40, 41, 95]},
    "pissa": lambda a: {"init_lora_weights": "pissa"},
    "pissa with dora": lambda a: {"init_lora_weights": "pissa", "use_dora": True},
}  # fmt: skip
LINEAR_ONLY: dict[str, Callable[[str], dict[str, Any]]] = {  # PEFT has them for nn.Linear
    "olora": lambda a: {"init_lora_weights": "olora"},
    "mica": lambda a: {"init_lora_weights": "mica"},
    "eva weights": lambda a: {"init_lora_weights": "orthogonal"},
    "kasa": lambda a: {"kasa_config": peft.KasaConfig()},
    "bdlora": lambda a: {
        "use_bdlora": peft.tuners.lora.BdLoraConfig(
            target_modules_bd_a=targets(a)[-1:], target_modules_bd_b=targets(a)[:1], nblocks=2, match_strict=False
        )
    },
    "velora": lambda a: {"velora_config": peft.tuners.lora.VeloraConfig(num_groups=4)},
    "monteclora": lambda a: {"monteclora_config": peft.tuners.lora.MontecloraConfig()},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_feature_equals_peft(architecture: str, tmp_path: Path) -> None:
    """A dozen adapters with a feature each in one batch, on each architecture."""
    features = FEATURES if architecture == "gpt2" else FEATURES | LINEAR_ONLY
    configs = [config(architecture, **make_adapter(architecture)) for make_adapter in features.values()]
    for first in range(0, len(configs), 12):
        check_parity(architecture, tmp_path / str(first), configs[first : first + 12])


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2"])
def test_tied_weights_stay_tied_where_peft_ties_them(architecture: str, tmp_path: Path) -> None:
    features: list[dict[str, Any]] = [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["embed_tokens", "lm_head"], "use_rslora": True},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": [4, 90]},
        {"trainable_token_indices": {"embed_tokens": [7], "lm_head": [7]}},
    ]
    check_parity(architecture, tmp_path, [config(architecture, ensure_weight_tying=True, **each) for each in features])


def test_a_tied_head_s_delta_is_added_to_replaced_rows(tmp_path: Path) -> None:
    check_parity(
        "qwen2", tmp_path, [config("qwen2", trainable_token_indices=[4, 90], target_modules=["lm_head", "q_proj"])]
    )


EXPERT_PARAMETERS: list[dict[str, Any]] = [
    {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]},
    {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"], "use_rslora": True},
    {
        "target_modules": ["q_proj", "o_proj"],
        "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.gate.weight"],
        "alpha_pattern": {"experts.down_proj": 11},
    },
    {"target_modules": ["k_proj"], "target_parameters": ["embed_tokens.weight", "v_proj.weight"]},
    {"target_modules": ["k_proj"], "modules_to_save": ["gate", "experts"]},
]


@pytest.mark.parametrize("native", [True, False], ids=["native", "reference"])
@pytest.mark.parametrize("architecture", EXPERTS)
def test_experts_and_routers_equal_peft(architecture: str, native: bool, tmp_path: Path) -> None:
    configs = [config(architecture, **each) for each in EXPERT_PARAMETERS]
    check_parity(
        architecture, tmp_path, [*configs, config(architecture, target_modules=["q_proj", "v_proj"])], native=native
    )


@pytest.mark.parametrize("architecture", EXPERTS)
def test_a_one_row_batch_uses_the_adapter_s_router(architecture: str, tmp_path: Path) -> None:
    """A step of one token: nothing in its shapes tells a row of the batch from a number of the row."""
    model = make_adapter(
        architecture, tmp_path / "a", 0, config(architecture, target_modules=[], target_parameters=["gate.weight"])
    )
    driver = Driver(save(architecture, tmp_path / "base"))
    rows = driver.teach(
        [[5, 9, 33]], decode=3, adapters=[[(driver.load_adapter(read_adapter(driver, tmp_path / "a")), 1.0)]]
    )
    torch.testing.assert_close(rows[0], logits(model, driver.sequences[0]), atol=1e-4, rtol=1e-4)


OLD_NAMES = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2", range(3)),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj", (1, 2)),
}


@pytest.mark.parametrize("architecture", EXPERTS)
def test_adapters_from_before_experts_were_stacked_equal_peft(architecture: str, tmp_path: Path) -> None:
    """A folder as PEFT saved it when each expert had modules of its own, loaded by PEFT and served here."""
    block, gate, up, down, layers = OLD_NAMES[architecture]
    shape = EXPERTS[architecture]
    hidden, inner = 64, getattr(shape, "moe_intermediate_size", 96)
    count = getattr(shape, "num_experts", None) or shape.num_local_experts
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for layer in layers:
        maps = {"gate": (hidden, count)}
        for expert in range(count):
            maps |= {f"experts.{expert}.{leaf}": (hidden, inner) for leaf in (gate, up)}
            maps |= {f"experts.{expert}.{down}": (inner, hidden)}
        for leaf, (wide, tall) in maps.items():
            name = f"base_model.model.model.layers.{layer}.{block}.{leaf}"
            weights[f"{name}.lora_A.weight"] = torch.randn(4, wide, generator=generator) * 0.1
            weights[f"{name}.lora_B.weight"] = torch.randn(tall, 4, generator=generator) * 0.1
    folder = tmp_path / "old"
    folder.mkdir()
    saved = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6}
    (folder / "adapter_config.json").write_text(json.dumps(saved | {"target_modules": ["gate", gate, up, down]}))
    save_file(weights, folder / "adapter_model.safetensors")
    driver = Driver(save(architecture, tmp_path / "base"), max_tokens=7)
    adapter = driver.load_adapter(read_adapter(driver, folder))
    rows = driver.teach([[5, 9, 33, 60, 21, 7, 8, 40, 41]] * 2, decode=3, adapters=[[(adapter, 1.0)], []])
    for got, model in zip(rows, (load_peft(architecture, folder), reference(architecture)), strict=True):
        tokens = driver.sequences[0 if model is not reference(architecture) else 1]
        torch.testing.assert_close(got, logits(model, tokens), atol=1e-4, rtol=1e-4)


RESIZED: list[dict[str, Any]] = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
]


@pytest.mark.parametrize("size", [104, 90])
@pytest.mark.parametrize("options", RESIZED, ids=["linear", "targeted", "saved"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2"])
def test_a_resized_vocabulary_applies_to_its_adapter_only(
    architecture: str, options: dict[str, Any], size: int, tmp_path: Path
) -> None:
    """More or fewer tokens than the base has, for that adapter's rows only."""
    torch.manual_seed(0)
    resized = copy.deepcopy(reference(architecture))
    resized.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        resized.get_input_embeddings().weight.add_(torch.randn(size, 64) * 0.05)
    model = peft.get_peft_model(resized, config(architecture, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.08)
    model.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    driver = Driver(save(architecture, tmp_path / "base"), max_tokens=7)
    adapter = driver.load_adapter(read_adapter(driver, tmp_path / "a"))
    prompt = [5, 9, 33, 60, 21, 7, 8, 40, min(size - 1, 101)]
    rows = driver.teach([prompt, prompt[:-1]], decode=3, adapters=[[(adapter, 1.0)], []])
    expected = [
        logits(each, tokens) for each, tokens in zip((model, reference(architecture)), driver.sequences, strict=True)
    ]
    for got, want in zip(rows, expected, strict=True):
        torch.testing.assert_close(got[:, : want.shape[1]], want, atol=1e-4, rtol=1e-4)
        assert (got[:, want.shape[1] :] == -torch.inf).all()
    assert rows[0].shape[1] == max(size, VOCABULARY)


def test_saved_copies_of_the_base_s_weights_are_dropped(tmp_path: Path) -> None:
    """PEFT saves the head beside its LoRA; that is no reason to hold a second one."""
    driver = Driver(save("llama", tmp_path / "base"))
    make_adapter("llama", tmp_path / "a", 0, config("llama", target_modules=["lm_head", "q_proj"]))
    assert read_adapter(driver, tmp_path / "a").overrides == {}


def test_shifts_and_embedding_deltas_compose_like_deltas(tmp_path: Path) -> None:
    """What only adds can be weighed and summed, whatever module it adds to."""
    options: list[dict[str, Any]] = [{"lora_bias": True}, {"target_modules": ["embed_tokens", "q_proj"]}]
    driver = Driver(save("llama", tmp_path / "base"))
    digests = []
    for seed, each in enumerate(options):
        make_adapter("llama", tmp_path / str(seed), seed, config("llama", **each))
        digests.append(driver.load_adapter(read_adapter(driver, tmp_path / str(seed))))
    model = peft.PeftModel.from_pretrained(copy.deepcopy(reference("llama")), tmp_path / "0", adapter_name="0")
    model.load_adapter(tmp_path / "1", adapter_name="1")
    model.base_model.set_adapter(["0", "1"])
    weights = (0.5, -1.5)
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            for name, weight in zip("01", weights, strict=True):
                module.set_scale(name, weight)
    rows = driver.teach(
        [[5, 9, 33, 60, 7]] * 2, decode=3, adapters=[list(zip(digests, weights, strict=True)), [(digests[0], 1.0)]]
    )
    torch.testing.assert_close(rows[0], logits(model.eval(), driver.sequences[0]), atol=1e-4, rtol=1e-4)
