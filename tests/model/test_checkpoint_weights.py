"""Weights that are read from the checkpoint are those of the loaded base, in every architecture and dtype."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from driver import CPU
from support import ARCHITECTURES, EXPERTS, save

from lora_serve.model.load import load


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *EXPERTS])
def test_they_are_the_loaded_model_s(architecture: str, dtype: str, tmp_path: Path) -> None:
    folder = str(save(architecture, tmp_path))
    loaded = load(folder, revision=None, dtype=dtype, device=CPU, progress=lambda stage, done: None)
    shape = pickle.loads(pickle.dumps(loaded.shape))  # as a compiler process gets it
    for module, parameters in loaded.shape.modules.items():
        for name in parameters:
            theirs = getattr(loaded.model.get_submodule(module), name)
            mine = shape.parameter(f"{module}.{name}")
            assert mine.dtype == theirs.dtype, (module, name)
            assert torch.equal(mine, theirs), (module, name)
    for site in loaded.shape.sites.values():
        assert shape.weight(site.name).shape == (site.out_features, site.in_features)
