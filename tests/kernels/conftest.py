"""The native CPU backend, built once for these tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
import torch

from lora_serve.kernels.cpu.backend import NativeKernels
from lora_serve.kernels.cpu.build import COMPILERS, library


@pytest.fixture(scope="session")
def native() -> NativeKernels:
    if not os.environ.get("CXX") and not any(shutil.which(name) for name in COMPILERS):
        pytest.skip("no C++ compiler")
    return NativeKernels(library())


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
