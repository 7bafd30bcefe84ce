"""The inspection report: method, adapted modules, size, and warnings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_folders import BASE, PREFIX, tensors, write
from registry_harness import RegistryHarness

from lora_serve.adapters.adapter import BaseShape, Lowered, ModuleOverride, Prefix, Site
from lora_serve.adapters.checkpoint import Checkpoint, read
from lora_serve.adapters.formats.dispatch import lower
from lora_serve.adapters.formats.report import complete, display_name, model_name, report
from lora_serve.errors import AdapterInvalid
from lora_serve.kernels.contract import Delta
from lora_serve.messages import Inspect, Inspection

Q, K = "layers.0.q_proj", "layers.0.k_proj"
SERVED = replace(BASE, names=("Qwen/Qwen2.5-0.5B",), model_type="qwen2")
RICH = replace(
    BASE,
    sites=BASE.sites | {"head": Site("head", 8, 20), "experts.up[0]": Site("experts.up[0]", 8, 12)},
    modules={"head": {"weight": (20, 8)}, "embed": {"weight": (20, 8)}, "norm": {"weight": (8,)}, Q: {"bias": (12,)}},
    embeddings={"embed": 1.0},
    input_embedding="embed",
    head="head",
)


def inspected(folder: Path, base: BaseShape = SERVED, weights: Any = None, **fields: Any) -> dict[str, Any]:
    checkpoint = read(write(folder, weights, **fields), max_bytes=1 << 20)
    return complete(lower(checkpoint, base), checkpoint, base)


def delta(value: float = 1.0) -> Delta:
    return Delta(torch.ones(4, 8), torch.full((4, 12), value))


def test_the_complete_report_of_a_lora(tmp_path: Path) -> None:
    names = (Q, K)
    found = inspected(tmp_path, weights=tensors(names=names), use_rslora=True, base_model_name_or_path="qwen2.5-0.5b")
    size = (tmp_path / "adapter_config.json").stat().st_size + (tmp_path / "adapter_model.safetensors").stat().st_size
    assert found == {
        "method": "LoRA",
        "features": ["use_rslora"],
        "ranks": [4],
        "modules": "2 of 3",
        "touched": {"linear": "2 of 3"},
        "lowered": ["2 low-rank updates"],
        "base_model_name_or_path": "qwen2.5-0.5b",
        "size": {"elements": 2 * 4 * 20, "file_bytes": size, "file_elements": 2 * 4 * 20},
        "composable": True,
        "warnings": [
            "1 of 3 modules that adapter_config.json targets have no tensors, and are the base's: layers.1.q_proj"
        ],
    }
    assert json.loads(json.dumps(found)) == found


def test_modules_are_counted_by_kind() -> None:
    overrides = {"embed": ModuleOverride(lookup=delta()), "norm": ModuleOverride(parameters={"weight": torch.ones(8)})}
    made = report(
        {}, RICH, method="LoRA", deltas={Q: delta(), "head": delta(), "experts.up[0]": delta()}, overrides=overrides
    )
    assert made["touched"] == {
        "linear": "1 of 3",
        "head": "1 of 1",
        "expert": "1 of 1",
        "embedding": "1 of 1",
        "other": "1 of 1",
    }
    assert made["modules"] == "3 of 5"


def test_the_report_describes_the_lowered_adapter_and_whether_it_can_be_composed() -> None:
    overrides = {
        Q: ModuleOverride(gain_out=torch.full((12,), 2.0), shift=torch.ones(12)),
        "embed": ModuleOverride(lookup=delta()),
        "head": ModuleOverride(token_ids=(1,), token_rows=torch.ones(1, 8)),
        "norm": ModuleOverride(parameters={"weight": torch.ones(8)}),
    }
    lowered = Lowered({Q: delta()}, {"lowered": ["DoRA: …"]}, overrides, Prefix(5, torch.ones(5, 8)), invocation=(3, 4))
    found = complete(lowered, Checkpoint({}, {"x": torch.ones(7)}, 100), RICH)
    assert found["lowered"] == [
        "1 low-rank updates",
        "1 modules with parameters of their own",
        "1 modules with gains",
        "1 modules with a constant added",
        "1 embeddings with low-rank updates",
        "1 tables with replaced token rows",
        "5 virtual tokens before every prompt",
        "DoRA: …",
    ]
    assert found["composable"] is False
    assert found["not_composable"] == lowered.not_additive
    assert (found["virtual_tokens"], found["invocation_tokens"]) == (5, [3, 4])
    assert found["size"] == {"elements": 80 + 24 + 80 + 8 + 8 + 40, "file_bytes": 100, "file_elements": 7}


# --- warnings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "warned"),
    [
        ("Qwen/Qwen2.5-0.5B", False),
        ("qwen/qwen2.5-0.5b", False),
        ("unsloth/Qwen2.5-0.5B", False),
        ("/home/someone/models/Qwen2.5-0.5B/", False),
        ("C:\\models\\Qwen2.5-0.5B", False),
        ("/cache/hub/models--Qwen--Qwen2.5-0.5B/snapshots/060db6499f32faf8b98477b0a26969ef7d8b9987", False),
        ("./Qwen2.5-0.5B/checkpoint-200", False),
        ("", False),
        (None, False),
        ("/tmp/pytest-of-me/base", False),
        ("/data/tmpab12cd", True),
        ("base_model", False),
        ("../output/merged", False),
        (["a list"], False),
        ("Qwen/Qwen2.5-1.5B", True),
        ("/home/someone/llama", True),
    ],
)
def test_a_base_of_another_name_causes_a_warning(name: Any, warned: bool, tmp_path: Path) -> None:
    warnings = inspected(tmp_path, base_model_name_or_path=name)["warnings"]
    assert bool(warnings) == warned
    if warned:
        assert warnings == [f"it was trained on {display_name(name)}, this base is Qwen/Qwen2.5-0.5B (qwen2)"]


@pytest.mark.parametrize("names", [(), ("/models/base",), ("/tmp/x",)])
def test_a_base_without_a_meaningful_name_causes_no_warning(names: tuple[str, ...], tmp_path: Path) -> None:
    base = replace(BASE, names=names)
    assert inspected(tmp_path, base, base_model_name_or_path="meta-llama/Llama-3.1-8B")["warnings"] == []


def test_any_name_of_the_base_may_match(tmp_path: Path) -> None:
    base = replace(BASE, names=("/srv/weights/v7", "company/writer"))
    assert inspected(tmp_path, base, base_model_name_or_path="writer")["warnings"] == []


def test_warnings_do_not_reveal_folders_of_the_server() -> None:
    assert display_name("/srv/secret/customer/llama") == "llama"
    assert display_name("../secret/llama/checkpoint-7") == "llama"
    assert display_name("/tmp/x") == "an unnamed folder"
    assert display_name("meta-llama/Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"
    assert len(display_name("x" * 1000)) == 100
    assert model_name("x/final/step_100") == "x"


def test_another_vocabulary_causes_a_warning_if_both_are_known(tmp_path: Path) -> None:
    words = {"model": {"vocab": {"a": 0, "b": 1}}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(words))
    own = read(write(tmp_path), max_bytes=1 << 20).vocabulary
    assert inspected(tmp_path, replace(SERVED, vocabulary=own))["warnings"] == []
    assert inspected(tmp_path, SERVED)["warnings"] == []
    (warning,) = inspected(tmp_path, replace(SERVED, vocabulary="another"))["warnings"]
    assert "tokenizer.json has another vocabulary" in warning
    (tmp_path / "tokenizer.json").write_text("not read, never used")
    assert inspected(tmp_path, replace(SERVED, vocabulary="another"))["warnings"] == []


ZERO = torch.zeros(12)


@pytest.mark.parametrize(
    ("deltas", "overrides", "warned"),
    [
        ({Q: delta(0)}, {}, True),
        ({Q: delta(0), K: delta()}, {}, False),
        ({}, {Q: ModuleOverride(gain_out=ZERO + 1, shift=ZERO)}, True),
        ({}, {Q: ModuleOverride(gain_out=ZERO)}, False),
        ({Q: delta(0)}, {Q: ModuleOverride(shift=ZERO + 1)}, False),
        ({}, {"embed": ModuleOverride(lookup=delta(0))}, True),
        ({Q: delta(0)}, {"norm": ModuleOverride(parameters={"weight": torch.zeros(8)})}, False),
    ],
)
def test_an_adapter_without_effect_causes_a_warning(deltas: Any, overrides: Any, warned: bool) -> None:
    warnings = report({}, RICH, method="any", deltas=deltas, overrides=overrides)["warnings"]
    assert warnings == (["all of its weights are zero: the adapter changes nothing"] if warned else [])


def test_replaced_base_weights_cause_a_warning() -> None:
    overrides = {"norm": ModuleOverride(parameters={"weight": torch.zeros(8)})}
    features = ["replaced base weights"]
    made = report(
        {}, RICH, method="LoRA", deltas={Q: delta()}, overrides=overrides, features=features, warnings=["first"]
    )
    first, second = made["warnings"]
    assert first == "first"
    assert "differ from this base's" in second
    assert "norm" in second


# --- another base by shape -------------------------------------------------------------------------------------------


def misfit(folder: Path, base: BaseShape, name: str | None, weights: Any) -> str:
    with pytest.raises(AdapterInvalid) as caught:
        inspected(folder, base, weights, base_model_name_or_path=name)
    return caught.value.message


@pytest.mark.parametrize("what", ["shape", "module"])
def test_an_error_about_shapes_names_both_bases(what: str, tmp_path: Path) -> None:
    weights = tensors()
    if what == "shape":
        weights[f"{PREFIX}{Q}.lora_A.weight"] = torch.ones(4, 16)
    else:
        weights[f"{PREFIX}layers.7.q_proj.lora_A.weight"] = torch.ones(4, 8)
    said = misfit(tmp_path, SERVED, "meta-llama/Llama-3.1-8B", weights)
    assert said.endswith(
        "It seems to be made for another base: it was trained on meta-llama/Llama-3.1-8B, "
        "this is Qwen/Qwen2.5-0.5B (qwen2)"
    )
    assert "does not say on which" in misfit(tmp_path, SERVED, None, weights)
    assert "this is a llama model" in misfit(tmp_path, replace(BASE, model_type="llama"), "x/y", weights)
    assert "another base" not in misfit(tmp_path, SERVED, "Qwen/Qwen2.5-0.5B", weights)


def test_an_error_about_a_field_does_not_mention_bases(tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid) as caught:
        inspected(tmp_path, base_model_name_or_path="meta-llama/Llama-3.1-8B", layer_replication=[[0, 2]])
    assert "another base" not in caught.value.message


# --- in the registry -------------------------------------------------------------------------------------------------


def inspect(harness: RegistryHarness, folder: Path) -> Inspection:
    found: Inspection = harness.run(lambda done: harness.operations.inspect(Inspect(str(folder)), done))
    return found


def test_inspecting_describes_what_publishing_would_create_and_stores_nothing(harness: RegistryHarness) -> None:
    staged = write(harness.folder / "store" / "staging" / "x", RegistryHarness.tensors(1))
    found = inspect(harness, staged)
    assert not staged.exists()
    assert harness.operations.describe_some("") == []
    assert list((harness.folder / "store" / "versions").iterdir()) == []
    (version,) = harness.publish("x", 1).versions
    assert found == Inspection(
        digest=version.digest,
        rank=version.rank,
        modules=version.modules,
        file_bytes=version.file_bytes,
        memory_bytes=version.memory_bytes,
        report=version.report,
    )


def test_inspecting_a_folder_outside_staging_leaves_it_unchanged(harness: RegistryHarness) -> None:
    folder = write(harness.folder / "mine")
    inspect(harness, folder)
    assert len(list(folder.iterdir())) == 2


def test_inspecting_an_unsupported_adapter_is_refused(harness: RegistryHarness) -> None:
    staged = write(harness.folder / "store" / "staging" / "x", peft_type="OFT")
    with pytest.raises(AdapterInvalid, match="OFT"):
        inspect(harness, staged)
    assert not staged.exists()


def test_a_report_is_unchanged_after_a_restart(tmp_path: Path) -> None:
    harness = RegistryHarness(tmp_path)
    before = harness.publish("x").versions[0].report
    assert before["size"]["elements"]
    harness.registry.close()
    again = RegistryHarness(tmp_path)
    assert again.operations.describe("x").versions[0].report == before
    again.registry.close()
