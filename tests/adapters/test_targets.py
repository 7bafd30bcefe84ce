"""Which modules a configuration adapts: as PEFT's own function says, for every module of a model."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from peft.tuners.tuners_utils import check_target_module_exists
from peft_folders import BASE, tensors, write

from lora_serve.adapters.adapter import Site
from lora_serve.adapters.checkpoint import read
from lora_serve.adapters.formats.dispatch import lower
from lora_serve.adapters.formats.targets import Targets
from lora_serve.errors import AdapterInvalid

NAMES = [
    *(f"model.layers.{layer}.{block}" for layer in (0, 1, 12) for block in ("attn.q_proj", "attn.k_proj", "mlp.up")),
    *(f"model.h.1.experts.{expert}.up" for expert in (0, 1)),
    "model.layers.1.q_norm", "model.embed_tokens", "lm_head", "q_proj",
]  # fmt: skip
MODEL = replace(
    BASE,
    sites={name: Site(name, 8, 12) for name in NAMES},
    modules={name: {"weight": (12, 8)} for name in NAMES},
    input_embedding="model.embed_tokens",
    head="lm_head",
    body="model",
)
CONFIGS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "up"]},
    {"target_modules": ["attn.q_proj", "model.layers.1.attn.k_proj"]},
    {"target_modules": ["proj", "roj", ""]},
    {"target_modules": ["q_proj", "lm_head", "embed_tokens"], "layers_to_transform": [1, 12]},
    {"target_modules": ["up", "lm_head"], "layers_to_transform": 1},
    {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": "h"},
    {"target_modules": ["up"], "layers_to_transform": [0], "layers_pattern": ["nothing", "experts"]},
    {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": "layers|h"},
    {"target_modules": ["up"], "layers_to_transform": []},
    {"target_modules": ["q_proj", "model.layers.0.attn.q_proj"], "layers_to_transform": [1]},
    {"target_modules": r".*\.(q_proj|up)"},
    {"target_modules": r"model\.layers\.\d\..*proj", "exclude_modules": ["layers.0.attn.q_proj"]},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.1\..*"},
    {"target_modules": ["q_proj", "k_proj", "up"], "modules_to_save": ["attn", "lm_head"]},
    {"target_modules": ["q_proj", "k_proj", "up"], "modules_to_save": ["layers.1"]},
    {"target_modules": [], "target_parameters": ["up.weight"]},
    {"target_modules": None, "target_parameters": ["up.weight"]},
]


@pytest.mark.parametrize("fields", CONFIGS)
@pytest.mark.parametrize("short", [False, True], ids=["with head", "without head"])
def test_the_same_modules_are_named_as_by_peft(fields: dict[str, Any], short: bool) -> None:
    defaults = dict.fromkeys(("exclude_modules", "modules_to_save", "layers_to_transform", "target_parameters"))
    config = SimpleNamespace(**defaults | {"layers_pattern": None} | fields)
    ours, peft_s = Targets({"target_parameters": None} | fields, MODEL, short=short), set()
    for name in NAMES:
        path = name.removeprefix("model.") if short else name
        by_parameter = any(f"{path}.weight".endswith(f".{each}") for each in config.target_parameters or ())
        if check_target_module_exists(config, path) or by_parameter:
            peft_s.add(name)
    assert {name for name in NAMES if ours.names(name)} == peft_s


UNREADABLE: list[dict[str, Any]] = [
    {"target_modules": {"q_proj": 1}},
    {"target_modules": [1]},
    {"exclude_modules": 3},
    {"layers_to_transform": ["1"]},
    {"layers_to_transform": True},
    {"layers_pattern": [2], "layers_to_transform": [1]},
    {"target_parameters": "up.weight"},
    {"target_modules": "q" * 5000},
]


@pytest.mark.parametrize("fields", UNREADABLE)
def test_a_field_that_cannot_be_read_is_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(AdapterInvalid, match=next(iter(fields))):
        Targets({"target_modules": ["q_proj"]} | fields, MODEL)


def test_an_adapter_none_of_whose_modules_are_targeted_is_refused_with_the_reason(tmp_path: Any) -> None:
    folder = write(tmp_path, tensors(), target_modules=["v_proj"])
    with pytest.raises(AdapterInvalid, match=r"changes nothing.*6 tensors are of modules that"):
        lower(read(folder, max_bytes=1 << 20), BASE)


def test_many_names_are_matched_quickly() -> None:
    """A configuration as large as is read, against as many modules."""
    targets = Targets({"target_modules": [f"q{i}" for i in range(100_000)] + ["q_proj"]}, MODEL)
    assert sum(targets.names(f"model.layers.{layer}.attn.q_proj") for layer in range(20_000)) == 20_000
