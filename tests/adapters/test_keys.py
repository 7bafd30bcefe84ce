"""Keys that wrappers around the model, or other tools, have written: read where they fit exactly, or explained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_folders import BASE, PREFIX, tensors, write
from safetensors.torch import save_file
from torch import Tensor

from lora_serve.adapters.adapter import Lowered, Site
from lora_serve.adapters.checkpoint import read
from lora_serve.adapters.formats.dispatch import lower
from lora_serve.adapters.formats.keys import MOST_PARTS, split_key
from lora_serve.errors import AdapterInvalid

NESTED = {f"model.{name}": Site(f"model.{name}", 8, 12) for name in BASE.sites}
BODY = replace(
    BASE, sites=NESTED, groups=(), modules={name: {"weight": (12, 8)} for name in NESTED}, body="model", head="lm_head"
)
PLAIN = {key.replace(PREFIX, f"{PREFIX}model."): tensor for key, tensor in tensors().items()}


def lowered(folder: Path, weights: dict[str, Tensor], **fields: Any) -> Lowered:
    return lower(read(write(folder, weights, **fields), max_bytes=1 << 20), BODY)


def renamed(before: str, after: str) -> dict[str, Tensor]:
    return {key.replace(before, after, 1): tensor for key, tensor in PLAIN.items()}


@pytest.mark.parametrize(
    ("weights", "note"),
    [
        (renamed(PREFIX, f"{PREFIX}_orig_mod."), "_orig_mod. was left out of its keys: it is from torch.compile"),
        (renamed(PREFIX, f"_orig_mod.{PREFIX}"), "_orig_mod. was left out of its keys: it is from torch.compile"),
        (renamed(".layers.0.", ".layers.0._orig_mod."), "_orig_mod. was left out of its keys"),
        (renamed(PREFIX, f"module.{PREFIX}"), "module. was left out of its keys: it is from DistributedDataParallel"),
        (renamed(PREFIX, f"{PREFIX}module."), "module. was left out of its keys"),
        (renamed(PREFIX, f"{PREFIX}_fsdp_wrapped_module."), "it is from FSDP"),
        (renamed(PREFIX, PREFIX * 2), "base_model.model. was left out of its keys: it is from a second PEFT model"),
        (renamed(PREFIX, f"{PREFIX}language_model."), "it is from a model of images and text"),
        (renamed("model.layers", "model.language_model.layers"), "language_model. was left out of its keys"),
        (renamed(PREFIX, f"module._orig_mod.{PREFIX}language_model."), "module. was left out of its keys"),
    ],
)
def test_keys_of_a_wrapped_model_are_read_as_the_model_s_own(
    tmp_path: Path, weights: dict[str, Tensor], note: str
) -> None:
    plain, wrapped = lowered(tmp_path / "a", PLAIN), lowered(tmp_path / "b", weights)
    assert plain.tensors.keys() == wrapped.tensors.keys()
    assert all(torch.equal(tensor, wrapped.tensors[name]) for name, tensor in plain.tensors.items())
    assert any(note in sentence for sentence in wrapped.report["lowered"])
    assert not any("left out" in sentence for sentence in plain.report["lowered"])


def test_wrapped_keys_are_read_whole_or_not_at_all(tmp_path: Path) -> None:
    stray = {f"{PREFIX}_orig_mod.vision.q_proj.lora_A.weight": torch.ones(4, 8)}
    with pytest.raises(AdapterInvalid, match=r"1 tensors .* have no place in this base: base_model\.model\.vision"):
        lowered(tmp_path / "a", renamed(PREFIX, f"{PREFIX}_orig_mod.") | stray)
    both = renamed(PREFIX, f"{PREFIX}_orig_mod.") | {key: tensor.clone() for key, tensor in PLAIN.items()}
    with pytest.raises(AdapterInvalid, match="tensors of the adapter have no place in this base"):
        lowered(tmp_path / "b", both)  # they would coincide


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (
            "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
            "kohya's sd-scripts: a LoRA of an image model",
        ),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha", "kohya's sd-scripts: a LoRA of an image model"),
        (f"{PREFIX}model.layers.0.q_proj.lora_down.weight", "rename them to PEFT's"),
        ("unet.down_blocks.0.attentions.0.to_q.lora_A.weight", "diffusers: a LoRA of an image model"),
        ("transformer.transformer_blocks.0.attn.to_k.lora_B.weight", "diffusers: a LoRA of an image model"),
    ],
)
def test_keys_of_other_tools_are_refused_saying_whose_they_are(tmp_path: Path, key: str, said: str) -> None:
    with pytest.raises(AdapterInvalid, match=said):
        lowered(tmp_path, {key: torch.ones(4, 8)})


def test_more_tensors_than_the_base_has_modules_for_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid, match="the adapter has 200 tensors; this base has modules for 128 at most"):
        lowered(tmp_path, {f"x{number}": torch.ones(1) for number in range(200)})


def test_a_key_of_thousands_of_parts_takes_no_time() -> None:
    key = PREFIX + "a." * 1_000_000 + "lora_A.weight"
    assert split_key(key, BODY) == ("", key)
    assert MOST_PARTS < 100


@pytest.mark.parametrize("peft_type", ["SHIRA", "FROD", "SUPERTUNING"])
def test_a_method_is_refused_before_its_weights_are_looked_at(tmp_path: Path, peft_type: str) -> None:
    """Their files hold integers, which no method that is served does."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": peft_type}))
    save_file({f"{PREFIX}q.shira_indices": torch.ones(2, dtype=torch.int64)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterInvalid, match=rf"\(peft_type {peft_type}\) is not served.*Instead: merge it"):
        read(tmp_path, max_bytes=1 << 20)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_git_lfs_pointer_is_recognised(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n")
    with pytest.raises(AdapterInvalid, match=rf"{name} is a pointer that Git LFS left .*: run git lfs pull"):
        read(tmp_path, max_bytes=1 << 20)
