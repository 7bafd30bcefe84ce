"""The backend under test, built once for all of these tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lora_serve.kernels.build import BuildError, library
from lora_serve.kernels.native import NativeKernels


@pytest.fixture(scope="session")
def native() -> NativeKernels:
    try:
        return NativeKernels(library())
    except BuildError as error:
        pytest.skip(f"no native kernels here: {error}")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
