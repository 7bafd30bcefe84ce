"""Lowering of LoRA: PEFT's scaling exactly, every key assigned or refused, no relevant field ignored."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_folders import BASE, HEAD, PREFIX, tensors, write

from lora_serve.adapters.adapter import BaseShape, Lowered, flatten
from lora_serve.adapters.checkpoint import Checkpoint, read
from lora_serve.adapters.formats.dispatch import FORMATS, lower
from lora_serve.errors import AdapterInvalid


def lower_folder(folder: Path, weights: Any = None, **fields: Any) -> Lowered:
    return lower(read(write(folder, weights, **fields), max_bytes=1 << 20), BASE)


def scale(lowered: Lowered, name: str) -> float:
    b = tensors()[f"{PREFIX}{name}.lora_B.weight"]
    return (lowered.deltas[name].b.T / b).mean().item()


def test_scaling_is_alpha_over_rank(tmp_path: Path) -> None:
    lowered = lower_folder(tmp_path, lora_alpha=6)
    assert scale(lowered, "layers.0.q_proj") == pytest.approx(6 / 4)
    assert [*lowered.deltas] == [*BASE.sites]


def test_rslora_divides_by_the_square_root_of_the_rank(tmp_path: Path) -> None:
    assert scale(lower_folder(tmp_path, use_rslora=True), "layers.0.q_proj") == pytest.approx(8 / math.sqrt(4))


@pytest.mark.parametrize(
    ("pattern", "hit", "missed"),
    [
        ("q_proj", "layers.0.q_proj", "layers.0.k_proj"),
        ("layers.0.q_proj", "layers.0.q_proj", "layers.1.q_proj"),
        ("^layers.1.q_proj", "layers.1.q_proj", "layers.0.q_proj"),
        (r"layers\.[01]\.q_proj", "layers.1.q_proj", "layers.0.k_proj"),
        ("_proj", None, "layers.0.q_proj"),
    ],
)
def test_patterns_match_as_peft_matches_them(pattern: str, hit: str | None, missed: str, tmp_path: Path) -> None:
    lowered = lower_folder(tmp_path, alpha_pattern={pattern: 20})
    assert scale(lowered, missed) == pytest.approx(2)
    if hit is not None:
        assert scale(lowered, hit) == pytest.approx(5)


def test_the_first_pattern_that_matches_decides(tmp_path: Path) -> None:
    lowered = lower_folder(tmp_path, alpha_pattern={"layers.0.q_proj": 4, "q_proj": 20})
    assert scale(lowered, "layers.0.q_proj") == pytest.approx(1)
    assert scale(lowered, "layers.1.q_proj") == pytest.approx(5)


def test_a_pattern_with_exponential_backtracking_is_matched_quickly(tmp_path: Path) -> None:
    assert scale(lower_folder(tmp_path, alpha_pattern={"(a|a)*" * 20 + "(.*)*" * 10 + "!": 3}), "layers.0.q_proj") == 2


REFUSED: dict[str, Any] = {
    "layer_replication": [[0, 1]],
    "use_qalora": True,
    "arrow_config": {"top_k": 2},
    "megatron_config": {"x": 1},
    "init_lora_weights": "pissa_niter_16",
    "bias": "some",
    "something_new": 3,
}
WITHOUT_WEIGHTS: dict[str, Any] = {
    "use_dora": True,
    "lora_bias": True,
    "kasa_config": {"x": 1},
    "modules_to_save": ["layers.1.q_proj"],
    "trainable_token_indices": [1],
    "use_bdlora": {"nblocks": 0},
    "alora_invocation_tokens": [-1],
}


@pytest.mark.parametrize("field", REFUSED)
def test_an_unsupported_field_is_refused_by_name(field: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid, match=field):
        lower_folder(tmp_path, **{field: REFUSED[field]})


@pytest.mark.parametrize("field", WITHOUT_WEIGHTS)
def test_a_field_whose_weights_are_missing_is_refused_by_name(field: str, tmp_path: Path) -> None:
    weights = {name: tensor for name, tensor in tensors().items() if ".1." not in name}
    with pytest.raises(AdapterInvalid, match=field):
        lower_folder(tmp_path, weights, **{field: WITHOUT_WEIGHTS[field]})


@pytest.mark.parametrize("tail", ["lora_magnitude_vector", "lora_B.bias", "lora_diag"])
def test_weights_that_the_configuration_does_not_declare_are_refused(tail: str, tmp_path: Path) -> None:
    weights = tensors() | {f"{PREFIX}layers.0.q_proj.{tail}": torch.ones(4 if tail == "lora_diag" else 12)}
    with pytest.raises(AdapterInvalid, match="is off, but there is"):
        lower_folder(tmp_path, weights)


def test_unknown_null_fields_and_training_fields_are_ignored(tmp_path: Path) -> None:
    lower_folder(tmp_path, something_new=None, lora_dropout=0.3, merge_weights=True, task_type="CAUSAL_LM")


def test_a_key_without_a_module_is_refused_with_the_reason(tmp_path: Path) -> None:
    weights = tensors() | {
        f"{PREFIX}norm.lora_A.weight": torch.ones(4, 8),
        f"{PREFIX}ghost.lora_A.weight": torch.ones(4, 8),
    }
    with pytest.raises(AdapterInvalid, match=r"2 tensors.*ghost.*norm.*RMSNorm"):
        lower_folder(tmp_path, weights)


def test_lora_a_without_lora_b_is_refused(tmp_path: Path) -> None:
    weights = tensors()
    del weights[f"{PREFIX}layers.1.q_proj.lora_B.weight"]
    with pytest.raises(AdapterInvalid, match=r"layers\.1\.q_proj"):
        lower_folder(tmp_path, weights)


@pytest.mark.parametrize("shape", [(4, 9), (9, 8)])
def test_a_wrong_shape_is_refused_with_both_shapes(shape: tuple[int, int], tmp_path: Path) -> None:
    weights = tensors() | {f"{PREFIX}layers.0.q_proj.lora_A.weight": torch.ones(shape)}
    with pytest.raises(AdapterInvalid, match=r"layers\.0\.q_proj"):
        lower_folder(tmp_path, weights)


def test_a_rank_other_than_the_configured_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid, match="rank 4 in the weights and 16"):
        lower_folder(tmp_path, r=16)


def test_an_adapter_without_effect_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid, match="changes nothing"):
        lower_folder(tmp_path, {})


def test_zero_weights_are_served_with_a_warning(tmp_path: Path) -> None:
    weights = {name: tensor * 0 if "lora_B" in name else tensor for name, tensor in tensors().items()}
    assert "zero" in lower_folder(tmp_path, weights).report["warnings"][0]


def test_saved_base_weights_are_ignored_if_equal_and_replace_the_base_s_if_changed(tmp_path: Path) -> None:
    key = f"{PREFIX}layers.0.q_proj.base_layer.weight"
    same = lower_folder(tmp_path / "same", tensors() | {key: HEAD.clone()})
    assert not same.overrides
    changed = lower_folder(tmp_path / "changed", tensors() | {key: HEAD + 1})
    delta = same.deltas["layers.0.q_proj"]
    torch.testing.assert_close(
        changed.overrides["layers.0.q_proj"].parameters["weight"], HEAD + 1 + delta.b.T @ delta.a
    )
    assert "layers.0.q_proj" not in changed.deltas
    assert "weights of the base" in changed.report["warnings"][0]


def test_other_methods_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid, match="BOFT"):
        lower_folder(tmp_path, peft_type="BOFT")


def test_a_method_is_added_by_registering_it(tmp_path: Path) -> None:
    def toy(checkpoint: Checkpoint, base: BaseShape) -> Lowered:
        lowered = FORMATS["LORA"](checkpoint, base)
        return Lowered(lowered.deltas, {"method": "toy"})

    checkpoint = read(write(tmp_path, peft_type="LORA"), max_bytes=1 << 20)
    checkpoint.config["peft_type"] = "TOY"
    assert lower(checkpoint, BASE, {"TOY": toy}).report == {"method": "toy"}


def test_the_flat_tensor_contains_exactly_the_matrices_at_aligned_offsets(tmp_path: Path) -> None:
    lowered = lower_folder(tmp_path)
    adapter = flatten("d", lowered, torch.bfloat16)
    for name, site in BASE.sites.items():
        delta = adapter.delta(site)
        assert delta is not None
        torch.testing.assert_close(delta.a, lowered.deltas[name].a.bfloat16(), rtol=0, atol=0)
        torch.testing.assert_close(delta.b, lowered.deltas[name].b.bfloat16(), rtol=0, atol=0)
        assert (delta.a.data_ptr() - adapter.flat.data_ptr()) % 64 == 0
    assert adapter.nbytes == 2 * 3 * (4 * 8 + 4 * 12 + 16)  # B of 48 numbers is padded to 64, nothing else


@pytest.mark.parametrize("matrix", ["lora_A.weight", "lora_B.weight"])
@pytest.mark.parametrize("shape", [(), (4,), (4, 8, 1)])
def test_matrices_that_are_not_two_dimensional_are_refused(matrix: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    weights = tensors() | {f"{PREFIX}layers.0.q_proj.{matrix}": torch.ones(shape)}
    with pytest.raises(AdapterInvalid, match=r"layers\.0\.q_proj"):
        lower_folder(tmp_path, weights)


def test_too_long_an_invocation_sequence_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid, match="alora_invocation_tokens"):
        lower_folder(tmp_path, alora_invocation_tokens=[1] * 5000)
