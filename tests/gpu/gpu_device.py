"""Where the tests of this folder run: LORA_SERVE_TEST_DEVICE=cuda says a GPU.

LORA_SERVE_TEST_DEVICE=cpu runs the same bodies in Triton's interpreter at the smallest sizes, which shows that the
tests themselves are right; what only a GPU has is left out then.
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
gpu_only = pytest.mark.skipif(not ON_GPU, reason="only a GPU has this")


def sized(real: list[object], small: list[object]) -> list[object]:
    """A table of real sizes, or what of it the interpreter can do in a moment."""
    return real if ON_GPU else small
