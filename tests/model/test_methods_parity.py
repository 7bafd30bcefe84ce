"""Every method beside LoRA that lowers to deltas, gains or replaced parameters has PEFT's logits in a mixed batch.

Each case is one batch: the base and a few adapters of one method that differ in the options that matter at inference.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from driver import Driver
from parity import check_parity, logits, read_adapter
from support import VOCABULARY, reference, save

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT talks about heads, ties and Conv1D
    pytest.mark.filterwarnings(
        "ignore:The following rank_pattern keys:RuntimeWarning"
    ),  # AdaLoRA's are of another kind
]

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc", "lm_head"]}
LINEAR = {"gpt2": ["lm_head"]}  # what is an nn.Linear, for methods that know no other
FEEDFORWARD = {"gpt2": ["mlp.c_proj", "mlp.c_fc"]}
NORMS = {"gpt2": ["ln_1", "ln_2", "ln_f"]}
LAST_NORM = {"gpt2": ["ln_f"]}
Configs = Callable[[str], Sequence[peft.PeftConfig]]


def adalora(architecture: str) -> list[peft.PeftConfig]:
    targets = TARGETS.get(architecture, ALL)
    name = "transformer.h.1.attn.c_attn" if architecture == "gpt2" else "model.layers.1.self_attn.q_proj"
    gone = name.replace(".1.", ".2.")
    common: dict[str, Any] = {"total_step": 10, "target_modules": targets}
    return [
        peft.AdaLoraConfig(**common, init_r=5, lora_alpha=3),
        peft.AdaLoraConfig(
            **common,
            init_r=4,
            lora_alpha=7,
            rank_pattern={f"{name}.lora_E": [True, False, True, True], f"{gone}.lora_E": [False] * 4},
            use_rslora=True,
        ),
        peft.AdaLoraConfig(
            **common,
            init_r=4,
            lora_alpha=-1,
            rank_pattern={f"{name}.lora_E": [False, False, True, False]},
            bias="all",
            modules_to_save=LAST_NORM.get(architecture, ["norm"]),
        ),
        peft.AdaLoraConfig(**common, init_r=4, trainable_token_indices=[3, 40, 41]),
    ]


def vera(architecture: str) -> list[peft.PeftConfig]:
    targets = TARGETS.get(architecture, ALL)
    return [
        peft.VeraConfig(r=7, target_modules=targets, d_initial=1.0),
        peft.VeraConfig(r=5, target_modules=targets[:2], save_projection=False, projection_prng_key=5, d_initial=1.0),
        peft.VeraConfig(r=130, target_modules=targets, save_projection=False, bias="vera_only"),
        peft.VeraConfig(r=3, target_modules=targets[1:], modules_to_save=LAST_NORM.get(architecture, ["norm"])),
    ]


def loha(architecture: str) -> list[peft.PeftConfig]:
    targets = LINEAR.get(architecture, ALL)
    return [
        peft.LoHaConfig(r=4, alpha=40, target_modules=targets),
        peft.LoHaConfig(
            r=3, alpha=50, target_modules=targets, rank_pattern={targets[0]: 2}, alpha_pattern={"(a|lm_head)": 9}
        ),
        peft.LoHaConfig(
            r=12, alpha=30, target_modules=targets[:5], modules_to_save=LAST_NORM.get(architecture, ["norm"])
        ),
    ]


def lokr(architecture: str) -> list[peft.PeftConfig]:
    targets = LINEAR.get(architecture, ALL)
    return [
        peft.LoKrConfig(r=3, alpha=20, target_modules=targets),
        peft.LoKrConfig(r=2, alpha=9, target_modules=targets, decompose_both=True, decompose_factor=4),
        peft.LoKrConfig(r=64, alpha=64, target_modules=targets, init_weights="lycoris"),
        peft.LoKrConfig(
            r=2, alpha=8, target_modules=targets, decompose_both=True,
            rank_pattern={targets[-1]: 16}, alpha_pattern={targets[0]: 11},
        ),
    ]  # fmt: skip


def vblora(architecture: str) -> list[peft.PeftConfig]:
    targets = TARGETS.get(architecture, ALL)
    common: dict[str, Any] = {"vector_length": 16, "target_modules": targets, "init_vector_bank_bound": 0.5}
    return [
        peft.VBLoRAConfig(**common, r=3, num_vectors=10),
        peft.VBLoRAConfig(**common, r=5, num_vectors=12, topk=3, save_only_topk_weights=True, bias="vblora_only"),
        peft.VBLoRAConfig(**common, r=2, num_vectors=300, topk=1, save_only_topk_weights=True),
        peft.VBLoRAConfig(**common, r=2, num_vectors=9, modules_to_save=LAST_NORM.get(architecture, ["norm"])),
    ]


def randlora(architecture: str) -> list[peft.PeftConfig]:
    targets = TARGETS.get(architecture, ALL)
    common: dict[str, Any] = {"target_modules": targets, "randlora_alpha": 10}
    return [
        peft.RandLoraConfig(**common, r=6, modules_to_save=LAST_NORM.get(architecture, ["norm"])),
        peft.RandLoraConfig(**common, r=16, save_projection=False, projection_prng_key=3),
        peft.RandLoraConfig(**common, r=7, save_projection=False, sparse=True, bias="all"),
        peft.RandLoraConfig(**common, r=100, save_projection=False, very_sparse=True),
    ]


def delora(architecture: str) -> list[peft.PeftConfig]:
    targets = LINEAR.get(architecture, ALL)
    return [
        peft.DeloraConfig(r=4, delora_lambda=3, target_modules=targets, bias="delora_only"),
        peft.DeloraConfig(
            r=4, delora_lambda=2, target_modules=targets, rank_pattern={targets[0]: 7}, lambda_pattern={targets[0]: 5}
        ),
        peft.DeloraConfig(
            r=2, target_modules=targets[:2], modules_to_save=NORMS.get(architecture, ["input_layernorm"])[:1]
        ),
    ]


def miss(architecture: str) -> list[peft.PeftConfig]:
    targets = LINEAR.get(architecture, ALL)
    return [
        peft.MissConfig(r=5, target_modules=targets, modules_to_save=LAST_NORM.get(architecture, ["norm"])),
        peft.MissConfig(r=4, target_modules=targets, init_weights="bat", bias="MiSS_only"),
        peft.MissConfig(r=7, mini_r=4, target_modules=targets, init_weights="mini", bias="all"),
        peft.MissConfig(r=2, mini_r=8, target_modules=targets, init_weights="mini"),
    ]


def ia3(architecture: str) -> list[peft.PeftConfig]:
    targets = TARGETS.get(architecture, ALL)
    feedforward = FEEDFORWARD.get(architecture, ["down_proj", "up_proj"])
    return [
        peft.IA3Config(target_modules=targets, feedforward_modules=[]),
        peft.IA3Config(target_modules=[*targets, *feedforward], feedforward_modules=feedforward),
        peft.IA3Config(target_modules=feedforward, feedforward_modules=feedforward),
        peft.IA3Config(
            target_modules=targets[:1], feedforward_modules=[], modules_to_save=LAST_NORM.get(architecture, ["norm"])
        ),
    ]


def ln_tuning(architecture: str) -> list[peft.PeftConfig]:
    norms = NORMS.get(architecture, ["input_layernorm", "post_attention_layernorm", "norm"])
    return [
        peft.LNTuningConfig(target_modules=norms),
        peft.LNTuningConfig(target_modules=norms[:1], modules_to_save=["lm_head"]),
        peft.LNTuningConfig(target_modules=["mlp"]),
        peft.LNTuningConfig(target_modules=[*norms[1:], *TARGETS.get(architecture, ALL)[:1]]),
        peft.LNTuningConfig(target_modules=["wte" if architecture == "gpt2" else "embed_tokens"]),
    ]


def trainable_tokens(architecture: str) -> list[peft.PeftConfig]:
    configs = [
        peft.TrainableTokensConfig(token_indices=[3, 40, *range(5, 80, 3)]),
        peft.TrainableTokensConfig(token_indices=[50, 3, 60, 77], target_modules=["lm_head"]),
    ]
    if architecture == "gpt2":
        configs.append(peft.TrainableTokensConfig(token_indices=[0, 3, 4], target_modules=["wpe"]))
    else:
        configs.append(
            peft.TrainableTokensConfig(token_indices=[*range(5, 60, 3)], target_modules=["embed_tokens", "q_proj"])
        )
    if architecture == "llama":
        configs.append(
            peft.TrainableTokensConfig(token_indices=[*range(3, 90, 4)], target_modules=["embed_tokens", "lm_head"])
        )
    return configs


METHODS: list[Configs] = [
    adalora, vera, loha, lokr, vblora, randlora, delora, miss, ia3, ln_tuning, trainable_tokens,
]  # fmt: skip


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_a_mixed_batch_of_a_method_equals_peft_row_by_row(method: Configs, architecture: str, tmp_path: Path) -> None:
    check_parity(architecture, tmp_path, method(architecture))


RESIZED: dict[str, tuple[int, Callable[[], peft.PeftConfig]]] = {
    "trainable_tokens": (104, lambda: peft.TrainableTokensConfig(token_indices=[5, 40, 97, 101])),
    "vera": (90, lambda: peft.VeraConfig(r=7, target_modules=["q_proj", "lm_head"], d_initial=1.0)),
    "adalora": (90, lambda: peft.AdaLoraConfig(init_r=4, total_step=9, target_modules=["q_proj", "lm_head"])),
    "miss": (90, lambda: peft.MissConfig(r=2, target_modules=["q_proj", "lm_head"], init_weights="bat")),
}


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("method", RESIZED)
def test_a_resized_vocabulary_combines_with_every_method(method: str, architecture: str, tmp_path: Path) -> None:
    """As far as PEFT saves it: of a head that is targeted, the head alone."""
    size, config = RESIZED[method]
    torch.manual_seed(0)
    base = copy.deepcopy(reference(architecture))
    base.resize_token_embeddings(size, mean_resizing=False)
    model = peft.get_peft_model(base, config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.08)
    model.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    driver = Driver(save(architecture, tmp_path / "base"), max_tokens=7)
    adapter = driver.load_adapter(read_adapter(driver, tmp_path / "a"))
    prompt = [5, 9, min(97, size - 1), 60, 21, min(101, size - 1), 8, 40, 5]
    [got] = driver.teach([prompt], decode=3, adapters=[[(adapter, 1.0)]])
    want = logits(model, driver.sequences[0])
    columns = min(size, VOCABULARY)
    torch.testing.assert_close(got[:, :columns], want[:, :columns], atol=1e-4, rtol=1e-4)
    assert (got[:, want.shape[1] :] == -torch.inf).all()
