"""Native linear layers over packed weights equal the reference; a row's bits do not depend on the other rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, TOLERANCE, pack_one
from torch import Tensor

from lora_serve.kernels.cpu.backend import NativeKernels
from lora_serve.kernels.packed_weight import GROUP, PackedWeight, Scheme, dequantize, quantize, round_rows
from lora_serve.kernels.reference import ReferenceKernels

REFERENCE = ReferenceKernels()
SCHEMES: list[Scheme | None] = [None, "int8", "int4"]
Layers = list[tuple[PackedWeight, Tensor | None]]


def weights(outs: list[int], wide: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(out, wide, generator=generator) / wide**0.5).to(dtype) for out in outs]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    dtype=DTYPES,
    scheme=st.sampled_from(SCHEMES),
    outs=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    wide=st.integers(1, 70) | st.sampled_from([1024, 1100, 2080]),
    rows=st.integers(1, 40),
    biased=st.booleans(),
)
def test_native_equals_the_reference(
    native: NativeKernels,
    seed: int,
    dtype: torch.dtype,
    scheme: Scheme | None,
    outs: list[int],
    wide: int,
    rows: int,
    biased: bool,
) -> None:
    wide = -(-wide // GROUP) * GROUP if scheme == "int4" else wide
    each = weights(outs, wide, dtype, seed)
    torch.manual_seed(seed)
    x = torch.randn(rows, wide).to(dtype)
    constants = [torch.randn(out).to(dtype) if biased else None for out in outs]
    ours: Layers = [(pack_one(native, weight, scheme), bias) for weight, bias in zip(each, constants, strict=True)]
    theirs: Layers = [(pack_one(REFERENCE, weight, scheme), bias) for weight, bias in zip(each, constants, strict=True)]
    for (mine, _), (other, _) in zip(ours, theirs, strict=True):
        assert native.unpack(mine).equal(REFERENCE.unpack(other))
    for got, wanted in zip(native.linear(x, ours), REFERENCE.linear(x, theirs), strict=True):
        assert got.dtype is dtype
        largest = max(1.0, wanted.abs().max().item())  # a lone sum of numbers of this size may come close to zero
        torch.testing.assert_close(got.float(), wanted.float(), rtol=0, atol=TOLERANCE[dtype] * largest)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_rows_bits_do_not_depend_on_other_rows_or_threads(
    native: NativeKernels, dtype: torch.dtype, scheme: Scheme | None
) -> None:
    layers: Layers = [(pack_one(native, weight, scheme), None) for weight in weights([200, 33], 2528, dtype)]
    x = torch.randn(70, 2528).to(dtype)
    together = native.linear(x, layers)
    for first, count in ((0, 1), (1, 2), (3, 5), (8, 8), (16, 9), (25, 40)):
        some = native.linear(x[first : first + count], layers)
        assert all(part.equal(whole[first : first + count]) for part, whole in zip(some, together, strict=True))
    torch.set_num_threads(1)
    assert all(part.equal(whole) for part, whole in zip(native.linear(x, layers), together, strict=True))


def test_int8_weights_are_off_by_at_most_half_a_step() -> None:
    (weight,) = weights([24], 64, torch.float32)
    apart = (dequantize(*quantize(weight, "int8")) - weight).abs()
    assert (apart <= 0.5 / 127 * weight.abs().amax(-1, keepdim=True) * 1.001).all()


def test_fp8_weights_are_off_by_at_most_half_of_the_last_bit_of_their_mantissa() -> None:
    (weight,) = weights([24], 64, torch.float32)
    largest = weight.abs().amax(-1, keepdim=True)
    apart = (dequantize(*quantize(weight, "fp8")) - weight).abs()
    subnormal = largest / 448 / 512  # half of their step
    assert (apart <= torch.maximum(weight.abs() / 16, subnormal) * 1.001).all()


def test_a_cpu_has_no_fp8_weights(native: NativeKernels) -> None:
    with pytest.raises(NotImplementedError, match="fp8 is for GPUs"):
        native.pack([torch.zeros(8, 32)], "fp8")


@pytest.mark.parametrize("shift", [-3.0, 0.0, 0.5, 3.0])
def test_int4_weights_are_closer_than_the_range_of_their_group_cut_into_even_steps(shift: float) -> None:
    weight = weights([64], 256, torch.float32)[0] * 4 + shift / 4
    grouped = weight.view(-1, GROUP)
    least, most = grouped.amin(-1, keepdim=True).clamp(max=0), grouped.amax(-1, keepdim=True).clamp(min=0)
    step = (most - least) / 15
    even = (((grouped - least) / step).round() * step + least).view(weight.shape)
    assert (dequantize(*quantize(weight, "int4")) - weight).norm() < 0.95 * (even - weight).norm()


def test_weights_of_an_important_input_are_nearly_exact_in_int4_at_little_cost_to_the_others() -> None:
    (weight,) = weights([200], 256, torch.float32)
    importance = torch.ones(256)
    importance[70] = 1000
    plain, fitted = ((dequantize(*quantize(weight, "int4", each)) - weight) ** 2 for each in (None, importance))
    assert fitted[:, 70].mean() < 0.1 * plain[:, 70].mean()
    assert fitted.mean() < 1.2 * plain.mean()


def test_weights_on_a_grid_of_sixteen_levels_stay_there_in_int4() -> None:
    torch.manual_seed(0)
    levels = torch.randint(0, 16, (40, 2, GROUP))
    levels[..., 0], levels[..., 1] = 0, 15
    grid = (levels - torch.randint(0, 128, (40, 2, 1)) / 8) * torch.tensor([1.0, 0.75])[:, None]
    weight = grid.view(40, -1) / 32
    assert (dequantize(*quantize(weight, "int4")) - weight).norm() < 0.01 * weight.norm()


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("extreme", [1e-38, 1e30])
def test_tiny_and_huge_weights_are_quantized_as_specified(
    native: NativeKernels, scheme: Scheme, extreme: float
) -> None:
    weight = weights([40], 96, torch.float32)[0] * torch.logspace(0, 1, 96)
    weight[3], weight[4, 32:64], weight[5] = 0, 0, weight[5] * extreme
    wanted = dequantize(*quantize(weight, scheme))
    assert native.unpack(pack_one(native, weight, scheme)).equal(wanted)
    assert wanted.isfinite().all()


def test_rows_are_rounded_in_steps_of_the_largest_value_that_shares_the_step() -> None:
    x = torch.tensor([[127.0, 0.4, -0.6, 3.0], [0.0, 0.0, 0.0, 0.0]])
    assert round_rows(x, "int8").tolist() == [[127.0, 0.0, -1.0, 3.0], [0.0, 0.0, 0.0, 0.0]]
    rows = torch.tensor([[448.0, 17.0, -18.9, 0.001], [0.0, 0.0, 0.0, 0.0]])  # 16 and 18 are neighbours
    assert round_rows(rows, "fp8").tolist() == [[448.0, 16.0, -18.0, 1 / 512], [0.0, 0.0, 0.0, 0.0]]
    groups = torch.zeros(1, 2 * GROUP)
    groups[0, 0], groups[0, 1], groups[0, GROUP], groups[0, GROUP + 1] = 127, 0.4, 1.27, 0.4
    assert round_rows(groups, "int4")[0, [0, 1, GROUP, GROUP + 1]].tolist() == pytest.approx([127, 0, 1.27, 0.4])


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_affects_no_other(native: NativeKernels, scheme: Scheme, fault: float) -> None:
    packed = pack_one(native, weights([40], 96, torch.float32)[0], scheme)
    x = torch.randn(3, 96)
    sound = native.linear(x, [(packed, None)])[0]
    x[1, 70] = fault
    (y,) = native.linear(x, [(packed, None)])
    assert not y[1].isfinite().any()
    assert y[[0, 2]].equal(sound[[0, 2]])


def test_packed_weights_take_no_more_memory_than_integers_and_scales(native: NativeKernels) -> None:
    (weight,) = weights([128], 256, torch.bfloat16)
    full, half, quarter = (pack_one(native, weight, scheme).nbytes for scheme in SCHEMES)
    assert full == weight.nbytes
    assert half == weight.nbytes // 2 + 128 * 4
    assert quarter == weight.nbytes // 4 + 128 * 256 // GROUP * 2 + 128 * 4


def test_layers_that_do_not_fit_are_refused(native: NativeKernels) -> None:
    packed = pack_one(native, weights([32], 64, torch.bfloat16)[0])
    with pytest.raises(ValueError, match="64 inputs"):
        native.linear(torch.zeros(1, 32, dtype=torch.bfloat16), [(packed, None)])
    with pytest.raises(TypeError, match="bias"):
        native.linear(torch.zeros(1, 64, dtype=torch.bfloat16), [(packed, torch.zeros(32))])
    zeros = torch.zeros(64, dtype=torch.bfloat16)
    for bias in (zeros[:31], zeros[::2], zeros[None, :32]):
        with pytest.raises(ValueError, match="32 outputs"):
            native.linear(zeros[None], [(packed, bias)])
    with pytest.raises(TypeError, match="float64"):
        pack_one(native, torch.zeros(4, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="48 inputs"):
        pack_one(native, torch.zeros(4, 48), "int4")


def test_no_rows_give_an_empty_result(native: NativeKernels) -> None:
    packed = pack_one(native, weights([32], 64, torch.float32)[0])
    assert native.linear(torch.zeros(0, 64), [(packed, None)])[0].shape == (0, 32)


@settings(max_examples=30, deadline=None)
@given(dtype=DTYPES, out=st.integers(1, 150), wide=st.integers(1, 70), data=st.data())
def test_looked_up_rows_equal_the_weights_rows(
    native: NativeKernels, dtype: torch.dtype, out: int, wide: int, data: st.DataObject
) -> None:
    weight = weights([out], wide, dtype)[0]
    ids = torch.tensor(data.draw(st.lists(st.integers(0, out - 1), max_size=40)), dtype=torch.int64)
    assert native.lookup(pack_one(native, weight), ids).equal(weight[ids])


def test_transposed_weights_are_packed_correctly(native: NativeKernels) -> None:
    for seed in range(20):
        weight = weights([96], 64, torch.float32, seed)[0].T
        assert native.unpack(pack_one(native, weight)).equal(weight)


def test_ids_outside_the_weight_are_refused(native: NativeKernels) -> None:
    packed = pack_one(native, torch.zeros(5, 8))
    for id in (-1, 5):
        with pytest.raises(ValueError, match="id 1 of the list"):
            native.lookup(packed, torch.tensor([0, id]))
    with pytest.raises(TypeError, match="full precision"):
        native.lookup(pack_one(native, torch.zeros(5, 64), "int8"), torch.tensor([0]))
