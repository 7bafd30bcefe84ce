"""The fingerprint of a base follows its content: not its name, folder or files, but every training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import ARCHITECTURES, EXPERTS, make_model, reference, save

from lora_serve.errors import ModelUnsupported
from lora_serve.model.fingerprint import MOST_SAMPLES, base_fingerprint


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save("llama", tmp_path / "base")


def fingerprint(folder: Path) -> str:
    return base_fingerprint(str(folder), None)


def edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def hub_cache(folder: Path, cache: Path, commit: str = "a" * 40) -> None:
    """What downloading `folder` as someone/base leaves in the hub's cache."""
    repository = cache / "models--someone--base"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)


def test_a_moved_or_copied_base_stays_the_same(base: Path, tmp_path: Path) -> None:
    before = fingerprint(base)
    copied = shutil.copytree(base, tmp_path / "other name", copy_function=shutil.copyfile)
    edit_config(copied, _name_or_path="/elsewhere", transformers_version="0.0.0")
    assert fingerprint(copied) == before
    assert fingerprint(base.rename(tmp_path / "moved")) == before


def test_a_base_split_into_other_files_stays_the_same(base: Path, tmp_path: Path) -> None:
    reference("llama").save_pretrained(tmp_path / "split", max_shard_size="20KB")
    assert len([*(tmp_path / "split").glob("*.safetensors")]) > 1
    assert fingerprint(tmp_path / "split") == fingerprint(base)


def test_a_base_in_the_hubs_cache_is_found_by_id(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelUnsupported, match="someone/base"):
        base_fingerprint("someone/base", None)
    hub_cache(base, tmp_path / "cache")
    assert base_fingerprint("someone/base", None) == fingerprint(base)
    assert base_fingerprint("someone/base", "a" * 40) == fingerprint(base)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES | EXPERTS))
def test_training_any_one_tensor_gives_another_base(name: str, tmp_path: Path) -> None:
    base = save(name, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    seen = {fingerprint(base)}
    for key, tensor in tensors.items():
        save_file(tensors | {key: tensor + 1e-3}, base / "model.safetensors", metadata={"format": "pt"})
        seen.add(fingerprint(base))
    assert len(seen) == len(tensors) + 1


def test_training_that_changes_one_number_in_a_hundred_gives_another_base(tmp_path: Path) -> None:
    """As bfloat16 does, where small updates are rounded away."""
    tensor = torch.randn(1024, 1024)
    (tmp_path / "config.json").write_text("{}")
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    before = fingerprint(tmp_path)
    save_file({"w": torch.where(torch.rand(1024, 1024) < 0.01, tensor + 1, tensor)}, tmp_path / "model.safetensors")
    assert fingerprint(tmp_path) != before


def test_other_weights_shapes_dtypes_names_and_configurations_are_other_bases(base: Path, tmp_path: Path) -> None:
    seen = {fingerprint(base)}
    make_model(ARCHITECTURES["llama"], seed=1).save_pretrained(tmp_path / "weights")
    seen.add(fingerprint(tmp_path / "weights"))
    (tmp_path / "config.json").write_text("{}")
    for tensors in (
        {"w": torch.zeros(4, 2)},
        {"w": torch.zeros(2, 4)},
        {"w": torch.zeros(4, 4, dtype=torch.float16)},
        {"v": torch.zeros(4, 2)},
    ):
        save_file(tensors, tmp_path / "model.safetensors")
        seen.add(fingerprint(tmp_path))
    edit_config(base, rope_theta=1.0)
    seen.add(fingerprint(base))
    assert len(seen) == 7


def test_of_very_many_tensors_some_are_sampled(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    tensors = {f"layers.{n}.w": torch.zeros(4) for n in range(2 * MOST_SAMPLES)}
    save_file(tensors, tmp_path / "model.safetensors")
    before = fingerprint(tmp_path)
    trained = {name: tensor + 1 if int(name.split(".")[1]) % 64 == 7 else tensor for name, tensor in tensors.items()}
    save_file(trained, tmp_path / "model.safetensors")
    assert fingerprint(tmp_path) != before


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", None),
        ("config.json", b"{"),
        ("model.safetensors", None),
        ("model.safetensors", b""),
        ("model.safetensors", b"\xff" * 64),
        ("model.safetensors", b"\x02\0\0\0\0\0\0\0[]"),
        ("model.safetensors", b'\x09\0\0\0\0\0\0\0{"a": {}}'),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_sentence(base: Path, file: str, content: bytes | None) -> None:
    if content is None:
        (base / file).unlink()
    else:
        (base / file).write_bytes(content)
    with pytest.raises(ModelUnsupported, match="cannot be identified") as refused:
        fingerprint(base)
    assert "\n" not in refused.value.message
