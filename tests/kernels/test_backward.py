"""Backward operations of the kernels: gradients of deltas and of linear layers, in every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from kernel_cases import (
    CPU,
    DTYPES,
    DeltaCase,
    assert_near,
    composed_cases,
    delta_gradients,
    pack_one,
    segments_of,
    zeros_like,
)
from torch import Tensor

from lora_serve.kernels.contract import Delta, DeltaGroup, Segments
from lora_serve.kernels.cpu.backend import NativeKernels
from lora_serve.kernels.gpu.backend import GpuKernels
from lora_serve.kernels.packed_weight import Scheme
from lora_serve.kernels.reference import ReferenceKernels
from lora_serve.kernels.training_contract import PART_OUTPUTS

REFERENCE = ReferenceKernels()


class ContractDelta(torch.autograd.Function):
    """`Kernels.delta` on zeros as a function of x and of every A and B, with `delta_backward` as its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, segments: Segments, places: list[tuple[int, int]], *matrices: Tensor) -> Any:
        slots = 1 + max(slot for _, slot in places)
        outs = {module: b.shape[1] for (module, _), b in zip(places, matrices[1::2], strict=True)}
        group = DeltaGroup(x.shape[1], tuple(outs[module] for module in sorted(outs)), slots, x.dtype, CPU)
        for place, a, b in zip(places, matrices[::2], matrices[1::2], strict=True):
            group.set(*place, Delta(a, b))
        outputs = [x.new_zeros(x.shape[0], out) for out in group.out_features]
        REFERENCE.delta(x, outputs, group, segments)
        ctx.x, ctx.group, ctx.segments, ctx.places = x, group, segments, places
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        gradients, dx = zeros_like(ctx.group), torch.zeros_like(ctx.x)
        REFERENCE.delta_backward(ctx.x, grads, dx, ctx.group, ctx.segments, gradients)
        found = [gradients.get(*place) for place in ctx.places]
        return dx, None, None, *(matrix for own in found if own is not None for matrix in (own.a, own.b))


def test_the_contract_s_gradients_are_the_numerical_ones() -> None:
    """In float64, over mixed segments: ranks differ, a module has no delta, rows have none, a weight is not one."""
    torch.manual_seed(0)
    places = [(0, 1), (0, 2), (1, 1)]
    matrices = [
        torch.randn(size, dtype=torch.float64, requires_grad=True)
        for rank, out in ((2, 4), (3, 4), (1, 3))
        for size in ((rank, 5), (rank, out))
    ]
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    segments = segments_of([(0, 2, 1, 1.0), (3, 5, 2, -0.5), (5, 7, 1, 2.0)])
    torch.autograd.gradcheck(lambda *args: ContractDelta.apply(args[0], segments, places, *args[1:]), (x, *matrices))


@given(case=composed_cases())
@settings(max_examples=30, deadline=None)
def test_native_delta_gradients_are_the_reference_s(native: NativeKernels, case: DeltaCase) -> None:
    wanted, found = (delta_gradients(kernels, case) for kernels in (REFERENCE, native))
    for got, want in zip(found, wanted, strict=True):
        assert_near(got, want)


@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
@given(dtype=DTYPES)
@settings(max_examples=4, deadline=None)
def test_native_linear_layers_and_their_gradients_are_exact(
    native: NativeKernels, scheme: Scheme | None, dtype: torch.dtype
) -> None:
    """Rows are not rounded, whatever the weights are: torch's product with what the weights stand for."""
    torch.manual_seed(0)
    weights = [torch.randn(out, 96).to(dtype) / 10 for out in (200, 33)]
    bias = torch.randn(200).to(dtype)
    x, grads = torch.randn(7, 96).to(dtype), [torch.randn(7, out).to(dtype) for out in (200, 33)]
    packed = [pack_one(native, weight, scheme) for weight in weights]
    dense = [native.unpack(each).to(dtype).double() for each in packed]
    for got, weight, own in zip(
        native.exact_linear(x, [(packed[0], bias), (packed[1], None)]), dense, (bias.double(), 0), strict=True
    ):
        assert_near(got, (x.double() @ weight.T + own).to(dtype), "linear")
    wanted = sum(grad.double() @ weight for grad, weight in zip(grads, dense, strict=True))
    assert isinstance(wanted, Tensor)
    assert_near(native.linear_backward(grads, packed), wanted.to(dtype), "gradient")


@pytest.mark.parametrize("scheme", [None, "int8"])
def test_a_large_weight_is_unpacked_in_parts(native: NativeKernels, scheme: Scheme | None) -> None:
    """An LM head's, say: as the same rows of it by themselves."""
    torch.manual_seed(0)
    weight, grad = torch.randn(70001, 128), torch.randn(3, 70001)
    packed = pack_one(native, weight, scheme)
    dense = native.unpack(packed)
    assert_near(native.linear_backward([grad], [packed]), grad @ dense, "gradient")
    if scheme is not None:
        x = torch.randn(3, 128)
        assert_near(native.exact_linear(x, [(packed, None)])[0], x @ dense.T, "linear")


@pytest.mark.parametrize("scheme", [None, "int8", "int4", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_some_outputs_of_a_weight_are_a_weight(
    native: NativeKernels, scheme: Scheme | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(5 * PART_OUTPUTS + 7, 64).to(dtype)
    for kernels in (REFERENCE, GpuKernels(), *([] if scheme == "fp8" else [native])):  # CPUs have no fp8
        packed = pack_one(kernels, weight, scheme)
        whole = kernels.unpack(packed)
        for outputs in (slice(0, 64), slice(64, 96), slice(96, weight.shape[0]), slice(0, weight.shape[0])):
            own = kernels.outputs_of(packed, outputs)
            assert own.shape == (outputs.stop - outputs.start, 64)
            assert kernels.unpack(own).equal(whole[outputs])
            x, grad = torch.randn(3, 64).to(dtype), torch.randn(3, own.shape[0]).to(dtype)
            (y,) = kernels.exact_linear(x, [(own, None)])
            assert_near(y, (x.double() @ whole[outputs].to(dtype).double().T).to(dtype), "linear")
            dx = kernels.linear_backward([grad], [own])
            assert_near(dx, (grad.double() @ whole[outputs].to(dtype).double()).to(dtype), "gradient")
    if scheme != "fp8":
        with pytest.raises(ValueError, match="whole panels"):
            native.outputs_of(pack_one(native, weight, scheme), slice(0, 40))
