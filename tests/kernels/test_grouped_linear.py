"""The layers of a mixture's experts, each over its own rows, equal one linear layer after the other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import CPU, DTYPES, assert_near, experts_delta
from torch import Tensor

from lora_serve.kernels.contract import DeltaGroup, ExpertsGroup
from lora_serve.kernels.cpu.backend import NativeKernels
from lora_serve.kernels.packed_weight import GROUP, Scheme, dequantize, quantize, round_rows
from lora_serve.kernels.reference import ReferenceKernels

REFERENCE = ReferenceKernels()
SCHEMES: list[Scheme | None] = [None, "int8", "int4"]


def stacked(experts: int, out: int, wide: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Weights whose mean is not zero, and each expert's of another size."""
    torch.manual_seed(seed)
    size = torch.logspace(-1, 1, experts)[:, None, None]
    return ((torch.randn(experts, out, wide) + 0.3) * size / wide**0.5).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    dtype=DTYPES,
    scheme=st.sampled_from(SCHEMES),
    counts=st.lists(st.sampled_from([0, 0, 1, 1, 2, 9, 30]), min_size=1, max_size=6),
    beyond=st.integers(0, 2),
    out=st.integers(1, 150),
    wide=st.integers(1, 70) | st.sampled_from([1024, 2080]),
    biased=st.booleans(),
    turned=st.booleans(),
)
def test_native_equals_one_linear_layer_after_the_other(
    native: NativeKernels,
    seed: int,
    dtype: torch.dtype,
    scheme: Scheme | None,
    counts: list[int],
    beyond: int,
    out: int,
    wide: int,
    biased: bool,
    turned: bool,
) -> None:
    wide = -(-wide // GROUP) * GROUP if scheme == "int4" else wide
    weights = stacked(len(counts), out, wide, dtype, seed)
    given_weights = weights.transpose(1, 2).contiguous().transpose(1, 2) if turned else weights
    bias = torch.randn(len(counts), out).to(dtype) if biased else None
    x = torch.randn(sum(counts) + beyond, wide).to(dtype)
    end = torch.tensor(counts).cumsum(0)
    wanted = torch.zeros(len(x), out, dtype=dtype)
    for expert, (count, last) in enumerate(zip(counts, end.tolist(), strict=True)):
        weight, rows = weights[expert].float(), x[last - count : last].float()
        if scheme is not None:
            weight, rows = dequantize(*quantize(weight, scheme)), round_rows(rows, scheme)
        own = 0 if bias is None else bias[expert].float()
        wanted[last - count : last] = (rows @ weight.T + own).to(dtype)
    for kernels in (native, REFERENCE):
        packed = kernels.pack_experts(given_weights, scheme)
        assert len(packed) == len(counts)
        assert_near(kernels.grouped_linear(x, packed, bias, end), wanted, kernels.name)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_row_has_the_same_bits_whatever_rows_its_expert_has_besides(native: NativeKernels, scheme: Scheme) -> None:
    packed = native.pack_experts(stacked(3, 96, 256, torch.bfloat16), scheme)
    x = torch.randn(40, 256).bfloat16()
    together = native.grouped_linear(x, packed, None, torch.tensor([11, 11, 40]))
    assert together[:11].equal(native.linear(x[:11], [(packed[0], None)])[0])
    alone = native.grouped_linear(x[20:21], packed, None, torch.tensor([0, 0, 1]))
    assert alone.equal(together[20:21])


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_packed_experts_take_no_more_memory_than_one_by_one(native: NativeKernels, scheme: Scheme) -> None:
    weights = stacked(4, 128, 256, torch.bfloat16)
    packed = native.pack_experts(weights, scheme)
    assert packed.nbytes == sum(native.pack([weight], scheme)[0].nbytes for weight in weights)
    assert native.unpack(packed[2]).equal(dequantize(*quantize(weights[2], scheme)))


def test_rows_and_experts_that_do_not_fit_are_refused(native: NativeKernels) -> None:
    packed = native.pack_experts(stacked(2, 32, 64, torch.float32), "int8")
    x = torch.zeros(5, 64)
    for end, wrong in (([3, 2], 1), ([-1, 2], 0), ([0, 6], 1)):
        with pytest.raises(ValueError, match=f"expert {wrong} end before they begin, or beyond"):
            native.grouped_linear(x, packed, None, torch.tensor(end))
    with pytest.raises(ValueError, match="2 experts of 64 inputs"):
        native.grouped_linear(torch.zeros(5, 32), packed, None, torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="2 experts of 64 inputs"):
        native.grouped_linear(x, packed, None, torch.tensor([5]))
    with pytest.raises(TypeError, match="int64"):
        native.grouped_linear(x, packed, None, torch.tensor([0, 5], dtype=torch.int32))
    with pytest.raises(ValueError, match="32 outputs"):
        native.grouped_linear(x, packed, torch.zeros(2, 31), torch.tensor([0, 5]))


def test_deltas_of_all_experts_are_added_by_one_call(native: NativeKernels) -> None:
    group, x, segments, wanted = experts_delta()
    for kernels in (native, REFERENCE):
        y = torch.zeros(wanted.shape)
        kernels.delta(x, [y], group, segments)
        assert_near(y, wanted, kernels.name)


def test_tables_that_do_not_follow_each_other_make_no_group() -> None:
    with pytest.raises(ValueError, match="expert 1"):
        ExpertsGroup([DeltaGroup(32, (48,), 3, torch.float32, CPU) for _ in range(2)])
