"""Lowering of methods other than LoRA: the lowered form and its rank. Parity tests compare outputs with PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from method_cases import ADALORA, DELORA, IA3, LOKR, PARAMETERS, TALL, TOKENS, WIDE, X, lower_tensors, normal
from safetensors.torch import save_file
from torch import Tensor

from lora_serve.adapters.adapter import Lowered
from lora_serve.adapters.checkpoint import read
from lora_serve.errors import AdapterInvalid


def product(lowered: Lowered) -> Tensor:
    """ΔW [out, in] of the one module."""
    delta = lowered.deltas["q"]
    assert delta.a.is_contiguous()
    assert delta.b.is_contiguous()
    return delta.b.T @ delta.a


def test_adalora_scaling_does_not_depend_on_pruned_ranks() -> None:
    pattern = {"q.lora_E": [True, False, True, False, True]}
    lowered = lower_tensors("ADALORA", ADALORA, init_r=5, lora_alpha=2, rank_pattern=pattern)
    whole = ADALORA["q.lora_B"] @ (ADALORA["q.lora_A"] * ADALORA["q.lora_E"])
    torch.testing.assert_close(product(lowered), whole * 2 / 5.00001)


def test_adalora_modules_of_rank_0_are_accepted_and_unchanged(tmp_path: Path) -> None:
    empty = {"head.lora_A": torch.empty(0, WIDE), "head.lora_B": torch.empty(20, 0), "head.lora_E": torch.empty(0, 1)}
    save_file({X + key: tensor for key, tensor in (ADALORA | empty).items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    tensors = read(tmp_path, max_bytes=1 << 20).tensors
    lowered = lower_tensors("ADALORA", tensors, init_r=3, rank_pattern={"head.lora_E": [False] * 3})
    assert [*lowered.deltas] == ["q"]
    assert lowered.report["lowered"] == ["1 modules were left no rank and are the base's"]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_only_vblora_indices_may_be_integers(dtype: torch.dtype, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    for key in ("q.vblora_logits_A_topk_indices", "q.vblora_logits_A"):
        save_file({key: torch.ones(2, 2, 1, dtype=dtype)}, tmp_path / "adapter_model.safetensors")
        if key.endswith("indices"):
            assert read(tmp_path, max_bytes=1 << 20).tensors[key].dtype == dtype
        else:
            with pytest.raises(AdapterInvalid, match="float32, float16 and bfloat16 are served"):
                read(tmp_path, max_bytes=1 << 20)


@pytest.mark.parametrize("rank", [2, 3])
def test_loha_has_the_squared_rank_or_the_module_s_full_rank(rank: int) -> None:
    tensors = {f"q.hada_w{i}_{m}": normal(*s) for i in (1, 2) for m, s in (("a", (TALL, rank)), ("b", (rank, WIDE)))}
    lowered = lower_tensors("LOHA", tensors, r=rank, alpha=5)
    half = [tensors[f"q.hada_w{i}_a"] @ tensors[f"q.hada_w{i}_b"] for i in (1, 2)]
    torch.testing.assert_close(product(lowered), half[0] * half[1] * 5 / rank)
    assert lowered.report["ranks"] == [min(rank**2, WIDE)]


@pytest.mark.parametrize(("halves", "rank"), [(True, 2), (False, 8)])
def test_lokr_has_the_product_of_its_factors_ranks(halves: bool, rank: int) -> None:
    tensors = LOKR if halves else {"q.lokr_w1": normal(3, 2), "q.lokr_w2": normal(4, 4)}
    w2 = LOKR["q.lokr_w2_a"] @ LOKR["q.lokr_w2_b"] if halves else tensors["q.lokr_w2"]
    lowered = lower_tensors("LOKR", tensors, r=1, alpha=3)
    torch.testing.assert_close(product(lowered), 3 * torch.kron(tensors["q.lokr_w1"], w2))
    assert lowered.report["ranks"] == [rank]
    assert any("full rank" in sentence for sentence in lowered.report["lowered"]) == (not halves)


def test_vera_with_a_rank_above_the_module_s_is_stored_at_full_rank() -> None:
    tensors = {
        "q.vera_lambda_d": normal(30), "q.vera_lambda_b": normal(TALL),
        "base_model.vera_A": normal(30, 9), "base_model.vera_B": normal(13, 30),
    }  # fmt: skip
    lowered = lower_tensors("VERA", tensors, r=30)
    a, b = tensors["base_model.vera_A"][:, :WIDE], tensors["base_model.vera_B"][:TALL]
    whole = tensors["q.vera_lambda_b"][:, None] * (b @ (tensors["q.vera_lambda_d"][:, None] * a))
    torch.testing.assert_close(product(lowered), whole)
    assert lowered.report["ranks"] == [WIDE]


def test_miss_mini_has_the_smaller_of_its_two_ranks() -> None:
    for rank, repeated in ((4, 3), (3, 4)):
        block = normal(rank, repeated)
        lowered = lower_tensors("MISS", {"q.miss_block": block}, r=rank, mini_r=repeated, init_weights="mini")
        assert lowered.report["ranks"] == [3]
        columns = torch.arange(WIDE) % rank
        torch.testing.assert_close(product(lowered), block.T.repeat(TALL // repeated, 1)[:, columns])


def test_the_report_says_when_base_weights_were_dequantised() -> None:
    blocks = {"q.miss_block": normal(3, 4, 4)}
    for lowered in (lower_tensors("MISS", blocks, r=4, init_weights="bat"), lower_tensors("DELORA", DELORA, r=2)):
        assert any("int8 ones were dequantised" in sentence for sentence in lowered.report["lowered"])
    saved = DELORA | {"q.delora_w_norm": PARAMETERS["q.weight"].norm(dim=0)}
    lowered = lower_tensors("DELORA", saved, r=2)
    assert lowered.report["lowered"] == []
    torch.testing.assert_close(product(lowered), product(lower_tensors("DELORA", DELORA, r=2)))


def test_an_ia3_adapter_scales_outputs_or_inputs_by_its_shape() -> None:
    override = lower_tensors("IA3", IA3).overrides["q"]
    assert override.gain_in is None
    torch.testing.assert_close(override.gain_out, IA3["q.ia3_l"][:, 0])
    override = lower_tensors("IA3", {"q.ia3_l": normal(1, WIDE)}).overrides["q"]
    assert override.gain_out is None
    torch.testing.assert_close(override.gain_in, normal(1, WIDE)[0])


def test_gains_of_one_are_served_with_a_warning() -> None:
    assert "changes nothing" in lower_tensors("IA3", {"q.ia3_l": torch.ones(TALL, 1)}).report["warnings"][0]


def test_trained_tokens_replace_rows_of_a_tied_head_and_remove_a_linear_module_s_bias() -> None:
    rows = normal(2, WIDE)
    tensors = TOKENS | {"head.trainable_tokens_delta": rows, "q.trainable_tokens_delta": rows}
    lowered = lower_tensors("TRAINABLE_TOKENS", tensors, token_indices=[3, 7])
    for module in ("embed", "head"):
        assert lowered.overrides[module].token_ids == (3, 7)
        torch.testing.assert_close(lowered.overrides[module].token_rows, rows)
    torch.testing.assert_close((PARAMETERS["q.weight"] + product(lowered))[[3, 7]], rows)
    torch.testing.assert_close(lowered.overrides["q"].shift, -PARAMETERS["q.bias"])


def test_a_delta_of_the_head_is_added_to_its_replaced_rows() -> None:
    tokens = {"embed.token_adapter.trainable_tokens_delta": normal(2, WIDE)}
    head = {key.replace("q.", "head."): tensor for key, tensor in ADALORA.items()} | {"head.lora_B": normal(20, 3)}
    fields = {"init_r": 3, "trainable_token_indices": [3, 7]}
    lowered = lower_tensors("ADALORA", tokens | head, **fields)
    delta = lowered.deltas["head"]
    rows = lowered.overrides["head"].token_rows
    assert rows is not None
    torch.testing.assert_close(rows, normal(2, WIDE) + (delta.b.T @ delta.a)[[3, 7]])
    assert lowered.overrides["embed"].token_rows is not None
    resized = lower_tensors(
        "ADALORA", head | {"head.lora_B": normal(18, 3), "head.base_layer.weight": normal(18, WIDE)}, init_r=3
    )
    assert not resized.deltas
    assert resized.overrides["head"].parameters["weight"].shape == (18, WIDE)
