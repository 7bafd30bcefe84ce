"""Every row of a mixed batch has the logits that PEFT gives for its adapter alone: prefill, chunks and decode."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from driver import Driver
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import check_parity, load_peft, logits, make_adapter, read_adapter
from support import ARCHITECTURES, reference, save

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT talks about heads and ties

TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc", "lm_head"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"],
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


def lora(architecture: str, **options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**options, fan_in_fan_out=architecture == "gpt2")


@pytest.mark.parametrize("native", [True, False], ids=["native", "reference"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_mixed_batch_equals_peft_row_by_row(architecture: str, native: bool, tmp_path: Path) -> None:
    targets = TARGETS.get(architecture, ALL)
    options: list[dict[str, Any]] = [
        {"r": 1, "lora_alpha": 3, "target_modules": targets[:2]},
        {"r": 8, "lora_alpha": 16, "target_modules": targets, "use_rslora": True},
        {"r": 64, "lora_alpha": 7, "target_modules": targets[1:]},
        {
            "r": 4, "lora_alpha": 8, "target_modules": targets,
            "rank_pattern": {targets[0]: 13}, "alpha_pattern": {targets[1]: 5},
        },
    ]  # fmt: skip
    check_parity(architecture, tmp_path, [lora(architecture, **each) for each in options], native=native)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Any LoraConfig that PEFT takes: its features in combinations that nobody listed."""
    targets = draw(st.lists(st.sampled_from([*ALL, "embed_tokens"]), min_size=1, unique=True))
    inner = all(target.endswith("proj") for target in targets)
    patterned = st.dictionaries(st.sampled_from(targets), st.integers(1, 48), max_size=3)
    found = {
        "lora_alpha": draw(st.integers(1, 8)),  # more would make logits so large that their rounding shows
        "target_modules": targets,
        "use_rslora": draw(st.booleans()),
        "alpha_pattern": draw(st.dictionaries(st.sampled_from(targets), st.integers(1, 8), max_size=3)),
        "layers_to_transform": draw(st.none() | st.just([0]) | st.just([1, 2])) if inner else None,
        "bias": draw(st.sampled_from(["none", "lora_only", "all"])),
        "modules_to_save": draw(st.none() | st.just(["norm"]) | st.just(["post_attention_layernorm"])),
    }
    start = draw(st.sampled_from([True, "gaussian", "orthogonal", "mica", "pissa", "olora"])) if inner else True
    even = start == "orthogonal"
    ranks = st.integers(1, 24).map(lambda rank: 2 * rank if even else rank)
    found |= {"r": draw(ranks), "init_lora_weights": start}
    if not even:
        found["rank_pattern"] = draw(patterned)
    if start != "mica":
        found["use_dora"] = draw(st.booleans())
    if inner and start is True and not found["use_dora"]:
        found["lora_bias"] = draw(st.booleans())
    if "embed_tokens" not in targets and "lm_head" not in targets and found["modules_to_save"] is None:
        found["trainable_token_indices"] = draw(st.none() | st.lists(st.integers(0, 95), min_size=1, unique=True))
    if start in ("pissa", "olora", "mica"):  # no more components than a map has
        found["r"] = min(found["r"], 30)
        found["rank_pattern"] = {key: min(rank, 30) for key, rank in found["rank_pattern"].items()}
    return found


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # PEFT talks about patterns that match nothing
@settings(max_examples=20, deadline=None)
@given(architecture=st.sampled_from(["llama", "qwen2", "gemma2"]), adapters=st.lists(configs(), min_size=1, max_size=3))
def test_any_lora_config_equals_peft(
    architecture: str, adapters: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    check_parity(architecture, tmp_path_factory.mktemp("any"), [lora(architecture, **each) for each in adapters])


def test_bf16_is_as_close_to_exact_as_peft_in_bf16(tmp_path: Path) -> None:
    driver = Driver(save("llama", tmp_path / "base"), dtype="bfloat16")
    exact = make_adapter("llama", tmp_path / "a", 0, lora("llama", r=16, lora_alpha=32, target_modules=ALL))
    digest_ = driver.load_adapter(read_adapter(driver, tmp_path / "a"))
    rows = driver.teach([[5, 9, 33, 60, 21, 7, 8, 40]] * 2, decode=3, adapters=[[(digest_, 1.0)], []])[0].float()
    truth = logits(exact, driver.sequences[0])
    theirs = logits(load_peft("llama", tmp_path / "a", torch.bfloat16), driver.sequences[0]).float()
    assert (rows - truth).norm() <= 1.25 * (theirs - truth).norm()


def test_a_composition_adds_weighted_deltas(tmp_path: Path) -> None:
    driver = Driver(save("llama", tmp_path / "base"))
    digests = []
    for seed in range(2):
        make_adapter("llama", tmp_path / str(seed), seed, lora("llama", r=4 + seed, lora_alpha=8, target_modules=ALL))
        digests.append(driver.load_adapter(read_adapter(driver, tmp_path / str(seed))))
    weights = (0.7, -0.3)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(reference("llama")), tmp_path / "0", adapter_name="a")
    model.load_adapter(tmp_path / "1", adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "mix", combination_type="cat")
    model.set_adapter("mix")
    routes = [list(zip(digests, (0.7, 0.3), strict=True)), [], [(digests[1], weights[1])]]
    rows = driver.teach([[5, 9, 33, 60]] * 3, decode=2, adapters=routes)
    torch.testing.assert_close(rows[0], logits(model.eval(), driver.sequences[0]), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(rows[1], rows[2][: len(rows[1])], atol=1e-3)
