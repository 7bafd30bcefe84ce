"""Unsupported methods and options are refused by name, with the reason and with advice that works."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft_folders import BASE, write
from support import reference
from torch import Tensor

from lora_serve.adapters.checkpoint import read
from lora_serve.adapters.formats.dispatch import FORMATS, lower
from lora_serve.adapters.formats.refusals import (
    FIELDS,
    INITIALISATIONS,
    METHODS,
    SERVED_INITIALISATIONS,
    Refusal,
    refuse_fields,
    refuse_initialisation,
)
from lora_serve.errors import AdapterInvalid


@pytest.fixture(autouse=True)
def _ignore_peft_warnings() -> Iterator[None]:
    """PEFT warns about properties that these small models have on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("peft_type", [kind.value for kind in PeftType])
def test_every_method_of_peft_is_served_or_refused_with_reason_and_advice(peft_type: str, tmp_path: Path) -> None:
    assert (peft_type in FORMATS) != (peft_type in METHODS)
    if peft_type in FORMATS:
        return
    refusal = METHODS[peft_type]
    with pytest.raises(AdapterInvalid) as caught:
        lower(read(write(tmp_path, peft_type=peft_type), max_bytes=1 << 20), BASE)
    for part in (refusal.name, peft_type, refusal.reason, refusal.advice):
        assert part in caught.value.message
    assert len(caught.value.message) < 500


def test_an_unknown_method_is_refused_listing_the_supported_ones(tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid, match=r"peft_type NOPE is no method that is known here; served are: .*LORA"):
        lower(read(write(tmp_path, peft_type="NOPE"), max_bytes=1 << 20), BASE)


# --- the advice works ------------------------------------------------------------------------------------------------

IDS = torch.arange(1, 9)[None]
TARGETS = ["q_proj", "o_proj"]
# What a small model of each method needs beside its targets. AdaMSS cannot be made without scikit-learn.
OPTIONS: dict[str, dict[str, Any]] = {
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2, "task_type": "CAUSAL_LM", "target_modules": "self_attn"},
    "BOFT": {"boft_block_size": 8},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 50},
    "FROD": {"progressbar": False},
    "GRALORA": {"r": 8, "gralora_k": 2, "hybrid_r": 2},
    "LILY": {"stride_A": 2, "num_B": 2},
    "OFT": {"oft_block_size": 8},
    "OSF": {"effective_rank": 60},
    "POLY": {"n_tasks": 2, "n_skills": 2, "n_splits": 1},
    "PSOFT": {"r": 4},
    "ROAD": {"variant": "road_4"},
    "SHADOW": {"target_modules": None},
    "TINYLORA": {"u": 4},
    "UNILORA": {"r": 4},
    "WAVEFT": {"n_frequency": 50},
}
MERGED = [name for name, refusal in METHODS.items() if "merge_and_unload" in refusal.advice and name != "BEFT"]
CONVERTED = [name for name, refusal in METHODS.items() if "save_as_lora" in refusal.advice]


def make_model(config: peft.PeftConfig) -> Any:
    """A model with an adapter whose weights differ from their initialisation."""
    return add_noise(get_peft_model(copy.deepcopy(reference("llama")), config))


def add_noise(model: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def config_of(peft_type: str) -> Any:
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(peft_type)](
        **({"target_modules": TARGETS} | OPTIONS.get(peft_type, {}))
    )


def logits(model: Any, **more: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, **more).logits
    return found


def load_peft(folder: str | Path) -> Any:
    return PeftModel.from_pretrained(copy.deepcopy(reference("llama")), str(folder)).eval()


@pytest.mark.parametrize("peft_type", sorted({*MERGED, *CONVERTED} - {"ADAMSS"}))
def test_peft_can_merge_and_convert_as_the_advice_says(peft_type: str, tmp_path: Path) -> None:
    model = make_model(config_of(peft_type))
    before = logits(model)
    assert model.supports_lora_conversion() == (peft_type in CONVERTED)
    if found := re.search(r"rank=([\w *+]+)\)", METHODS[peft_type].advice):
        rank = eval(found[1], {}, vars(model.peft_config["default"]))
        peft.save_as_lora(tmp_path, model, rank=rank)
        written = read(tmp_path, max_bytes=1 << 30)
        assert written.config["peft_type"] == "LORA"
        torch.testing.assert_close(logits(load_peft(tmp_path)), before, rtol=0, atol=1e-4)
    if peft_type in MERGED:
        torch.testing.assert_close(logits(model.merge_and_unload()), before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("peft_type", ["ADAPTION_PROMPT", "LILY", "SHADOW", "POLY"])
def test_peft_cannot_merge_where_the_advice_says_so(peft_type: str) -> None:
    model = make_model(config_of(peft_type))
    with pytest.raises((NotImplementedError, AttributeError)):
        model.merge_and_unload()


# --- LoRA's own options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["corda", "loftq", "lora_ga", "pissa_niter_16", "PISSA_NITER_4"])
def test_an_unrepeatable_initialisation_is_refused_with_the_call_that_converts_it(value: str) -> None:
    with pytest.raises(AdapterInvalid) as caught:
        refuse_initialisation(value)
    assert value in caught.value.message
    assert re.search(
        r"save_pretrained\(\s*\"lora\", path_initial_model_for_weight_conversion=\"init\"", caught.value.message
    )


@pytest.mark.parametrize("value", SERVED_INITIALISATIONS)
def test_supported_initialisations_are_accepted(value: Any) -> None:
    refuse_initialisation(value)


@pytest.mark.parametrize("value", ["brand_new", 7, ["pissa"], "pissa_n"])
def test_an_unknown_initialisation_is_refused(value: Any) -> None:
    with pytest.raises(AdapterInvalid, match=r"init_lora_weights = .* is no initialisation that is known here"):
        refuse_initialisation(value)


def test_the_advised_conversion_gives_an_equivalent_plain_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa_niter_4")
    model = get_peft_model(copy.deepcopy(reference("llama")), config)
    model.save_pretrained("init")
    add_noise(model)
    model.save_pretrained("lora", path_initial_model_for_weight_conversion="init")
    converted = json.loads(Path("lora/adapter_config.json").read_text())
    assert (converted["r"], converted["init_lora_weights"]) == (8, True)
    torch.testing.assert_close(logits(load_peft("lora")), logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer_replication", [[0, 2], [1, 3]]),
        ("arrow_config", {"top_k": 3}),
        ("megatron_config", {"hidden_size": 8}),
        ("use_qalora", True),
    ],
)
def test_an_unsupported_option_is_refused_with_reason_and_advice(field: str, value: Any) -> None:
    refusal = FIELDS[field]
    with pytest.raises(AdapterInvalid) as caught:
        refuse_fields({field: value})
    for part in (field, refusal.name, refusal.reason, refusal.advice):
        assert part in caught.value.message


def test_options_that_are_off_are_accepted() -> None:
    refuse_fields({"layer_replication": [], "arrow_config": None, "use_qalora": False, "r": 8})


def test_every_refusal_has_a_name_a_reason_and_advice() -> None:
    for refusal in (*METHODS.values(), *INITIALISATIONS.values(), *FIELDS.values()):
        assert isinstance(refusal, Refusal)
        assert all(len(text) > 2 and text == text.strip(" .") for text in vars(refusal).values())
