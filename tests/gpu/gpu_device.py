"""The device of the tests in this folder: LORA_SERVE_TEST_DEVICE=cuda or cpu.

On cpu the same tests run in Triton's interpreter at the smallest sizes, which checks the tests themselves; those that
need a GPU are skipped.
"""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = torch.device(os.environ.get("LORA_SERVE_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"

if not ON_GPU:
    import kernels.interpreter  # noqa: F401  (before the kernels)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

here = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="there is no GPU here"),
    pytest.mark.skipif(ON_GPU and INTERPRETED, reason="Triton interprets in this process: run tests/gpu by itself"),
]
gpu_only = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")


def sized(real: list[object], small: list[object]) -> list[object]:
    """Real sizes on a GPU, small ones in the interpreter."""
    return real if ON_GPU else small
