"""Where two rewrites of the base meet in one adapter, PEFT's logits are served; each of these was once served wrong."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from driver import Driver
from parity import load_peft, log_probs
from peft import LoraConfig
from random_adapters import edit_config, edit_weights, resized, save_adapter
from support import VOCABULARY, reference, save

from lora_serve.adapters.adapter import Lowered
from lora_serve.adapters.checkpoint import read
from lora_serve.adapters.formats.dispatch import lower
from lora_serve.errors import AdapterInvalid

pytestmark = [  # PEFT talks about heads, ties and missing keys
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

FLOAT32, BFLOAT16 = (torch.float32,), (torch.bfloat16,)
PROMPT = [5, 9, 33, 60, 21, 7, 8, 40, 41]


class Case:
    """An adapter that PEFT saved for one architecture, lowered and served beside the base."""

    def __init__(self, architecture: str, folder: Path, config: peft.PeftConfig, **options: Any) -> None:
        self.architecture, self.folder = architecture, folder / "a"
        self.size = options.get("size", VOCABULARY)
        save_adapter(architecture, self.folder, config, random.Random(4), **{"dtypes": FLOAT32} | options)
        self.driver = Driver(save(architecture, folder / "base"), max_tokens=7)

    def lower(self) -> Lowered:
        return lower(read(self.folder, max_bytes=1 << 30), self.driver.loaded.shape)

    def difference(self, prompt: list[int] = PROMPT) -> float:
        """The largest difference of log-probabilities between what is served and PEFT, over all rows and tokens."""
        digest = self.driver.load_lowered(self.lower())
        rows = self.driver.teach([prompt, PROMPT], decode=3, adapters=[[(digest, 1.0)], []])
        base = resized(self.architecture, self.size)
        models = (peft.PeftModel.from_pretrained(base, self.folder).eval(), reference(self.architecture))
        found = 0.0
        for got, tokens, model in zip(rows, self.driver.sequences, models, strict=True):
            expected = log_probs(model, tokens)
            found = max(found, float((got.log_softmax(-1)[:, : expected.shape[1]] - expected).abs().max()))
        return found


@pytest.mark.parametrize("trained", [False, True], ids=["untrained", "trained"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"], ids=["untied", "tied"])
@pytest.mark.parametrize("initialisation", ["pissa", "olora", "kasa"])
def test_a_head_s_reduced_weight_that_was_saved_is_not_reduced_again(
    initialisation: str, architecture: str, trained: bool, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"init_lora_weights": initialisation}
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["lm_head"],
        **({"kasa_config": peft.KasaConfig()} if initialisation == "kasa" else options),
    )
    assert Case(architecture, tmp_path, config, trained=trained).difference() < 2e-5


@pytest.mark.parametrize("initialisation", ["pissa", "olora"])
def test_a_reduced_tied_head_that_was_not_saved_changes_the_embedding_too(initialisation: str, tmp_path: Path) -> None:
    case = Case("qwen2", tmp_path, LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=initialisation))
    edit_weights(case.folder, lambda weights: {k: v for k, v in weights.items() if "base_layer" not in k})
    assert case.difference() < 2e-4  # PEFT's W' has an error of 4e-6: it decomposes in float32
    report = case.lower().report
    assert not report["warnings"]
    assert any("what its initialisation takes out of the base's own weights" in note for note in report["lowered"])


def test_a_linear_module_s_bias_is_replaced_once(tmp_path: Path) -> None:
    saved = ["model.layers.2.self_attn.v_proj"]
    config = LoraConfig(r=4, target_modules=["v_proj"], bias="all", modules_to_save=saved)
    assert Case("qwen2", tmp_path, config).difference() < 2e-5


@pytest.mark.parametrize("initialisation", ["pissa", "olora"])
def test_a_router_s_initialisation_takes_a_part_out_of_it(initialisation: str, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=[], target_parameters=["gate.weight"], init_lora_weights=initialisation)
    assert Case("qwen3_moe", tmp_path, config).difference() < 2e-5


@pytest.mark.parametrize("initialisation", ["pissa", "olora"])
def test_a_reduced_base_is_computed_exactly_for_adapters_in_bfloat16(initialisation: str, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=initialisation)
    assert Case("llama", tmp_path, config, dtypes=BFLOAT16).difference() < 2e-5


@pytest.mark.parametrize("initialisation", ["pissa", "olora"])
def test_an_untrained_reduced_base_is_the_base_in_bfloat16(initialisation: str, tmp_path: Path) -> None:
    """What was taken out and what was put back cancel before they are rounded to the serving dtype."""
    base = copy.deepcopy(reference("llama")).bfloat16().float()
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=initialisation)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "a")
    driver = Driver(tmp_path / "base", dtype="bfloat16")
    digest = driver.load_lowered(lower(read(tmp_path / "a", max_bytes=1 << 30), driver.loaded.shape))
    adapted, plain = driver.teach([PROMPT, PROMPT], decode=3, adapters=[[(digest, 1.0)], []])
    torch.testing.assert_close(adapted, plain, rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2", "llama"])
def test_a_head_that_was_saved_with_rounding_is_the_tied_embedding_as_well(architecture: str, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["lm_head"])
    assert Case(architecture, tmp_path, config, dtypes=BFLOAT16).difference() < 2e-5


@pytest.mark.parametrize(
    "contradiction",
    [
        {"layers_to_transform": [0]},
        {"target_modules": ["q_proj"]},
        {"exclude_modules": ["v_proj"]},
        {"target_modules": r".*\.[02]\.self_attn\.q_proj"},
        {"target_modules": "all-linear", "exclude_modules": r".*\.1\..*"},
    ],
)
def test_tensors_of_modules_that_are_not_targeted_are_not_used(contradiction: dict[str, Any], tmp_path: Path) -> None:
    case = Case("llama", tmp_path, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    edit_config(case.folder, **contradiction)
    assert case.difference() < 2e-5
    assert any("does not target, and are not used" in warning for warning in case.lower().report["warnings"])


def test_modules_without_tensors_are_counted(tmp_path: Path) -> None:
    case = Case("llama", tmp_path, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    edit_weights(case.folder, lambda weights: {k: v for k, v in weights.items() if "layers.1.self_attn.q_proj" in k})
    assert case.difference() < 2e-5
    assert "5 of 6 modules that adapter_config.json targets have no tensors" in case.lower().report["warnings"][0]


def test_an_expression_that_takes_more_than_linear_time_is_not_evaluated(tmp_path: Path) -> None:
    case = Case("llama", tmp_path, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    edit_config(case.folder, target_modules=r"^(?!.*gate).*(q_proj|v_proj)$")
    assert case.difference() < 2e-5
    assert "is not evaluated here" in case.lower().report["warnings"][0]


@pytest.mark.parametrize("option", ["init_lora_weights", "kasa_config"])
def test_modules_without_tensors_are_refused_where_they_would_not_be_the_base_s(option: str, tmp_path: Path) -> None:
    value: Any = False if option == "init_lora_weights" else peft.KasaConfig()
    case = Case("llama", tmp_path, LoraConfig(r=4, target_modules=["q_proj"], **{option: value}))
    edit_weights(case.folder, lambda weights: {k: v for k, v in weights.items() if "layers.1" in k})
    with pytest.raises(AdapterInvalid, match=option):
        case.lower()


TOKEN_ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "of an untied head": ("llama", {"trainable_token_indices": {"lm_head": [6, 40]}}),
    "of a tied head alone": ("qwen2", {"trainable_token_indices": {"lm_head": [6, 40]}}),
    "of both, others": ("qwen2", {"trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [6, 40]}}),
    "new": ("llama", {"trainable_token_indices": [*range(96, 100)], "size": 100}),
    "new and tied": ("qwen2", {"trainable_token_indices": [*range(96, 100)], "size": 100}),
    "new, tied and adapted": (
        "gemma2", {"trainable_token_indices": [*range(96, 100)], "size": 100, "target_modules": ["lm_head", "q_proj"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", TOKEN_ROWS)
def test_token_rows_of_any_head_and_of_a_resized_vocabulary_are_replaced(what: str, tmp_path: Path) -> None:
    architecture, options = TOKEN_ROWS[what]
    size = options.get("size", VOCABULARY)
    given = {"target_modules": ["q_proj"]} | {key: value for key, value in options.items() if key != "size"}
    case = Case(architecture, tmp_path, LoraConfig(r=4, **given), size=size)
    assert case.difference([*PROMPT, size - 1, size - 3]) < 2e-5


@pytest.mark.parametrize("length", [1, 2, 4, 9])
def test_norms_behind_the_heads_are_replaced(length: int, tmp_path: Path) -> None:
    """Of as many tokens as there are heads too: 4 for queries, 2 for keys."""
    config = LoraConfig(r=4, target_modules=["o_proj"], modules_to_save=["q_norm", "k_norm"])
    assert Case("gemma3", tmp_path, config).difference(PROMPT[:length]) < 2e-5


def test_float64_adapters_are_served(tmp_path: Path) -> None:
    case = Case("llama", tmp_path, LoraConfig(r=4, target_modules=["q_proj"]), dtypes=(torch.float64,))
    assert case.difference() < 2e-5


def test_an_old_configuration_that_merges_weights_is_served(tmp_path: Path) -> None:
    case = Case("llama", tmp_path, LoraConfig(r=4, target_modules=["q_proj"]))
    edit_config(case.folder, merge_weights=True, enable_lora=None)
    assert case.difference() < 2e-5
    assert load_peft("llama", case.folder) is not None
