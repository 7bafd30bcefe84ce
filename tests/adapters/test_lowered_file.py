"""The lowered file: every part of an adapter comes back bit by bit, and no damage goes unnoticed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora_serve.adapters import lowered_file
from lora_serve.adapters.adapter import Adapter, Lowered, ModuleOverride, Prefix, flatten
from lora_serve.adapters.lowered_file import NAME, PAGE, Summary
from lora_serve.adapters.traits import Traits
from lora_serve.errors import AdapterBroken
from lora_serve.kernels.contract import Delta

DIGEST = "d" * 64


def everything() -> Lowered:
    """An adapter that uses every part of the lowered form."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    override = ModuleOverride(
        parameters={"weight": random(5, 3), "bias": random(5)},
        gain_in=random(3),
        gain_out=random(5),
        shift=random(5),
        lookup=Delta(random(7, 2), random(2, 5)),
        token_ids=(4, 1),
        token_rows=random(2, 5),
    )
    prefix = Prefix(2, random(2, 8), (random(2, 1, 4),), (random(2, 1, 6),))
    return Lowered({"q": Delta(random(3, 8), random(3, 12))}, {}, {"m": override, "n": ModuleOverride()}, prefix)


def write(folder: Path, dtype: torch.dtype) -> tuple[Adapter, Summary]:
    adapter = flatten(DIGEST, everything(), dtype)
    description = lowered_file.describe(
        adapter, "print", modules=3, file_bytes=99, report={"method": "ä"}, traits=Traits(virtual=2)
    )
    folder.mkdir(exist_ok=True)
    lowered_file.write(folder, adapter, description)
    return adapter, description.summary


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_adapter_comes_back_as_it_was_written(dtype: torch.dtype, tmp_path: Path) -> None:
    adapter, summary = write(tmp_path, dtype)
    assert lowered_file.read_summary(tmp_path) == summary
    assert (summary.nbytes, summary.rank) == (adapter.nbytes, 3)
    again = lowered_file.read(tmp_path, DIGEST)
    assert torch.equal(again.flat, adapter.flat)
    assert again.offsets == adapter.offsets
    assert again.prefix is not None
    assert adapter.prefix is not None
    for mine, theirs in ((again.overrides["m"], adapter.overrides["m"]), (again.prefix, adapter.prefix)):
        assert mine.tensors.keys() == theirs.tensors.keys()
        for name, tensor in theirs.tensors.items():
            assert torch.equal(mine.tensors[name], tensor), name
            assert mine.tensors[name].dtype == tensor.dtype
    assert again.overrides["m"].token_ids == (4, 1)
    assert again.overrides["n"] == ModuleOverride()
    views, _ = again.override_views(again.flat.clone())
    assert views["m"].gain_in is not None
    assert torch.equal(views["m"].gain_in, adapter.overrides["m"].gain_in)  # type: ignore[arg-type]


def test_the_tensor_begins_at_a_page(tmp_path: Path) -> None:
    adapter, _ = write(tmp_path, torch.float32)
    assert (tmp_path / NAME).stat().st_size == PAGE + adapter.nbytes


def test_a_flipped_bit_anywhere_is_found(tmp_path: Path) -> None:
    write(tmp_path, torch.float32)
    data = (tmp_path / NAME).read_bytes()
    description = 48 + int.from_bytes(data[8:16], "little")
    for position in [*range(0, description, 97), PAGE, PAGE + 700, len(data) - 1]:
        damaged = bytearray(data)
        damaged[position] ^= 4
        (tmp_path / NAME).write_bytes(damaged)
        with pytest.raises(AdapterBroken):
            lowered_file.read(tmp_path, DIGEST)


@pytest.mark.parametrize("length", [0, 7, 48, 400, PAGE, -1, 1])
def test_a_file_of_another_length_is_found(length: int, tmp_path: Path) -> None:
    write(tmp_path, torch.float32)
    data = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(data + b"x" if length == 1 else data[:length])
    with pytest.raises(AdapterBroken):
        lowered_file.read(tmp_path, DIGEST)


def test_the_file_of_another_version_and_no_file_are_found(tmp_path: Path) -> None:
    with pytest.raises(AdapterBroken):
        lowered_file.read_summary(tmp_path)
    write(tmp_path, torch.float32)
    with pytest.raises(AdapterBroken, match="not those that were written"):
        lowered_file.read(tmp_path, "e" * 64)
