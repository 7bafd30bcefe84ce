"""Norms, gated activations and rotary embeddings of the native CPU backend equal the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, assert_near

from lora_serve.kernels.contract import Activation
from lora_serve.kernels.cpu.backend import NativeKernels
from lora_serve.kernels.reference import ReferenceKernels

REFERENCE = ReferenceKernels()
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 150))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), dtype=DTYPES, shape=SHAPES, plus_one=st.booleans())
def test_norms_equal_the_reference(
    native: NativeKernels, seed: int, dtype: torch.dtype, shape: tuple[int, int, int], plus_one: bool
) -> None:
    torch.manual_seed(seed)
    x, weight = (5 * torch.randn(shape)).to(dtype), torch.randn(shape[-1]).to(dtype)
    got = native.rms_norm(x, weight, 1e-6, plus_one=plus_one)
    assert_near(got, REFERENCE.rms_norm(x, weight, 1e-6, plus_one=plus_one))
    assert got[:1].equal(native.rms_norm(x[:1], weight, 1e-6, plus_one=plus_one))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), dtype=DTYPES, shape=SHAPES, activation=st.sampled_from(["silu", "gelu_tanh"]))
def test_gated_activations_equal_the_reference(
    native: NativeKernels, seed: int, dtype: torch.dtype, shape: tuple[int, int, int], activation: Activation
) -> None:
    torch.manual_seed(seed)
    gate, up = ((4 * torch.randn(shape)).to(dtype) for _ in range(2))
    assert_near(native.gated_activation(gate, up, activation), REFERENCE.gated_activation(gate, up, activation))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), dtype=DTYPES, shape=SHAPES, heads=st.integers(1, 4))
def test_rotary_embeddings_equal_the_reference(
    native: NativeKernels, seed: int, dtype: torch.dtype, shape: tuple[int, int, int], heads: int
) -> None:
    torch.manual_seed(seed)
    tokens, shares, half = shape
    q, k = (torch.randn(tokens, n, 2 * half).to(dtype).transpose(0, 1)[None] for n in (heads * shares, heads))
    cos, sin = (torch.randn(1, tokens, 2 * half).to(dtype) for _ in range(2))
    got, wanted = native.rope(q, k, cos, sin), REFERENCE.rope(q, k, cos, sin)
    for mine, right in zip(got, wanted, strict=True):
        assert_near(mine, right)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_large_values_do_not_overflow_and_nan_stays_nan(native: NativeKernels, activation: Activation) -> None:
    gate = torch.tensor([[-1e30, -200.0, -90.0, 0.0, 90.0, 1e30, float("nan")]])
    got = native.gated_activation(gate, torch.ones_like(gate), activation)[0]
    assert got[:3].tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-6)
    assert got[3:6].tolist() == pytest.approx([0.0, 90.0, 1e30])
    assert got[6].isnan()


def test_shapes_that_do_not_fit_are_refused(native: NativeKernels) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        native.rms_norm(torch.zeros(2, 8), torch.zeros(9), 1e-6, plus_one=False)
    with pytest.raises(ValueError, match="do not fit"):
        native.gated_activation(torch.zeros(2, 8), torch.zeros(2, 9), "silu")
