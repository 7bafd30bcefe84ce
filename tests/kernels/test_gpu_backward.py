"""Gradients of low-rank deltas in the GPU backend, in Triton's interpreter, equal the reference's."""

from __future__ import annotations

from dataclasses import replace

import interpreter  # noqa: F401  (before the kernels)
import pytest
import torch
from hypothesis import given, settings
from kernel_cases import MIXED, DeltaCase, assert_near, composed_cases, delta_gradients

from lora_serve.kernels.gpu.backend import GpuKernels
from lora_serve.kernels.gpu.delta_backward import delta_backward
from lora_serve.kernels.reference import ReferenceKernels

# Five modules are two launches; slot 1 has three segments, one of them longer than a tile, and slot 2 a single row.
REPEATED = replace(
    MIXED,
    in_features=40,
    out_features=(72, 33, 8, 16, 24),
    ranks=[[16, 5], [3, 0], [1, 20], [2, 2], [4, 4]],
    tokens=150,
    segments=[(0, 3, 1, 0.5), (3, 4, 2, -2.0), (5, 140, 1, 1.0), (141, 150, 1, 1.0)],
)


def assert_equals_the_reference(case: DeltaCase) -> None:
    wanted, found = (delta_gradients(kernels, case) for kernels in (ReferenceKernels(), GpuKernels()))
    for got, want in zip(found, wanted, strict=True):
        assert_near(got, want)


@settings(max_examples=4, deadline=None)
@given(composed_cases())
def test_they_equal_the_reference_s(case: DeltaCase) -> None:
    assert_equals_the_reference(case)


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_a_slot_s_segments_add_up(weights: torch.dtype) -> None:
    assert_equals_the_reference(replace(REPEATED, weights=weights))


def test_gradients_that_do_not_fit_are_refused() -> None:
    case = replace(REPEATED, tokens=8, segments=[(0, 8, 1, 1.0)])
    group, segments = case.group(), case.bounded()
    x, grads = case.rows()
    with pytest.raises(TypeError, match="float32"):
        delta_backward(x, grads, x.clone(), group, segments, group)
    with pytest.raises(ValueError, match="dx"):
        delta_backward(x, grads, x[:4], group, segments, group)
