"""Sets of adapters: PEFT folders of the sizes wanted, each with other bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from bench.serving.adapter_sets import WEIGHTS, AdapterMaker, copy_to_disk, elements, files, number
from bench.shapes import SHAPES

TINY = SHAPES["tiny"]


@pytest.fixture
def maker(tmp_path: Path) -> AdapterMaker:
    return AdapterMaker(TINY, tmp_path / "adapters")


def test_adapters_are_peft_folders_of_the_given_kind(maker: AdapterMaker) -> None:
    plain = maker.make("plain", 8)
    pissa = maker.make("pissa", 4, targets=("q_proj",), dtype=torch.float32, init_lora_weights="pissa")
    assert plain == maker.folder / "plain"
    config = LoraConfig.from_pretrained(pissa)
    assert (config.r, config.target_modules, config.init_lora_weights) == (4, {"q_proj"}, "pissa")
    weights = load_file(pissa / WEIGHTS)
    assert len(weights) == 2 * TINY.layers
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert 2 * elements(plain) == maker.size(8, None)
    assert 2 * elements(pissa) == maker.size(4, ("q_proj",))


def test_no_two_adapters_have_the_same_bytes(maker: AdapterMaker) -> None:
    made = [maker.make(f"a{index}", 4, targets=("v_proj",)) for index in range(300)]
    assert len({(folder / WEIGHTS).read_bytes() for folder in made}) == 300


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_numbers_differ_in_every_dtype(dtype: torch.dtype) -> None:
    seen = set()
    for which in range(0, 1 << 16, 7):
        weights = {"a": torch.zeros(2, dtype=dtype), "b": torch.zeros(3, dtype=dtype)}
        number(weights, which)
        seen.add(tuple(weights["b"].tolist()))
    assert len(seen) == len(range(0, 1 << 16, 7))


def test_large_sets_have_fewer_modules(maker: AdapterMaker) -> None:
    every = maker.size(8, None)
    assert maker.targets_within(10 * every, [8] * 10) is None
    assert maker.targets_within(10 * every - 1, [8] * 10) == ("q_proj", "v_proj")
    assert maker.targets_within(0, [8] * 10) == ("v_proj",)


def test_a_copy_has_all_files(maker: AdapterMaker, tmp_path: Path) -> None:
    maker.make("a", 4)
    maker.make("b", 4)
    copy_to_disk(maker.folder, tmp_path / "copy")
    assert [path.name for path in files(tmp_path / "copy")] == ["adapter_config.json", WEIGHTS] * 2
    assert (tmp_path / "copy" / "b" / WEIGHTS).read_bytes() == (maker.folder / "b" / WEIGHTS).read_bytes()
