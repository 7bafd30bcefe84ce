"""Quantised linear layers of the GPU backend, in Triton's interpreter, equal the reference."""

from __future__ import annotations

from collections.abc import Iterator

import interpreter  # noqa: F401  (before the kernels)
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, assert_near, pack_one
from torch import Tensor

from lora_serve.kernels.gpu.matmul import (
    MOST_FP8_TILE,
    linear,
    merge,
    merged_layer,
    pack,
    quantize_rows,
    tiling,
    unpack,
)
from lora_serve.kernels.packed_weight import FP8, GROUP, RUN, PackedWeight, Scheme, dequantize, quantize, round_rows
from lora_serve.kernels.reference import ReferenceKernels

REFERENCE = ReferenceKernels()
SCHEMES: list[Scheme] = ["int8", "int4", "fp8"]
Layers = list[tuple[PackedWeight, Tensor | None]]
few = settings(max_examples=8, deadline=None)
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)


@pytest.fixture(autouse=True)
def ignore_nan_warnings() -> Iterator[None]:
    """NumPy warns of NaN, which these tests use on purpose."""
    with np.errstate(invalid="ignore"):
        yield


def random_weights(outs: list[int], wide: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(out, wide, generator=generator) / wide**0.5).to(dtype) for out in outs]


def padded_width(wide: int, scheme: Scheme) -> int:
    """The next number of inputs from `wide` on that the scheme can quantise."""
    return -(-wide // GROUP) * GROUP if scheme == "int4" else wide


def assert_equals_reference(x: Tensor, each: list[Tensor], biases: list[Tensor | None], scheme: Scheme) -> None:
    """With the layers packed one by one, and merged."""
    theirs: Layers = [(pack_one(REFERENCE, weight, scheme), bias) for weight, bias in zip(each, biases, strict=True)]
    apart = [pack(weight, scheme) for weight in each]
    for layers in (apart, merge(apart)):
        for mine, (other, _) in zip(layers, theirs, strict=True):
            assert unpack(mine).equal(REFERENCE.unpack(other))
        ours: Layers = list(zip(layers, biases, strict=True))
        for got, wanted in zip(linear(x, ours), REFERENCE.linear(x, theirs), strict=True):
            assert got.stride(1) == 1
            assert_near(got, wanted)


@few
@given(
    seed=st.integers(0, 2**31),
    dtype=DTYPES,
    scheme=st.sampled_from(SCHEMES),
    outs=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    wide=st.integers(1, 130) | st.sampled_from([608, 1024]),
    rows=st.sampled_from([1, 2, 17, 40]),
    biased=st.lists(st.booleans(), min_size=3, max_size=3),
)
@example(0, torch.float32, "int4", [1, 1], 1, 1, [False] * 3)  # layers of one output that were merged
def test_it_equals_the_reference(
    seed: int, dtype: torch.dtype, scheme: Scheme, outs: list[int], wide: int, rows: int, biased: list[bool]
) -> None:
    wide = padded_width(wide, scheme)
    torch.manual_seed(seed)
    x = torch.randn(rows, wide + 3).to(dtype)[:, :wide]
    biases = [torch.randn(out).to(dtype) if has else None for out, has in zip(outs, biased, strict=False)]
    assert_equals_reference(x, random_weights(outs, wide, dtype, seed), biases, scheme)


@each_scheme
@pytest.mark.parametrize("rows", [130, 300])
def test_many_rows_in_larger_tiles_equal_the_reference(scheme: Scheme, rows: int) -> None:
    torch.manual_seed(rows)
    assert_equals_reference(
        torch.randn(rows, 160).bfloat16(), random_weights([140], 160), [torch.randn(140).bfloat16()], scheme
    )


@each_scheme
def test_a_split_input_gives_the_same_bits_twice(scheme: Scheme) -> None:
    wide = 16 * RUN + GROUP
    assert tiling(3, 50, 17, RUN, 4).splits > 1
    x, each = torch.randn(3, wide), random_weights([50, 20], wide)
    assert_equals_reference(x, each, [torch.randn(50), None], scheme)
    layers: Layers = [(pack(weight, scheme), None) for weight in each]
    assert all(first.equal(second) for first, second in zip(linear(x, layers), linear(x, layers), strict=True))


@few
@given(
    seed=st.integers(0, 2**31),
    dtype=DTYPES,
    scheme=st.sampled_from(SCHEMES),
    rows=st.integers(1, 5),
    wide=st.integers(1, 2200),
)
def test_rows_are_rounded_bit_for_bit_as_specified(
    seed: int, dtype: torch.dtype, scheme: Scheme, rows: int, wide: int
) -> None:
    wide = padded_width(wide, scheme)
    torch.manual_seed(seed)
    x = (torch.randn(rows, wide) * 10 ** torch.randint(-3, 4, (rows, wide))).to(dtype)
    whole, step, total = quantize_rows(x, scheme)
    amounts = (whole.float() * step[..., None]).transpose(0, 1).flatten(1)
    assert amounts[:, :wide].equal(round_rows(x, scheme))
    assert not amounts[:, wide:].any()
    assert (total is None) == (scheme != "int4")
    assert total is None or total.equal(whole.sum(2, dtype=torch.int32))


def test_every_float_of_eight_bits_is_what_torch_rounds_to() -> None:
    """All of them, what lies in the middle of two, and what lies beside that."""
    floats = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    middle = (floats[1:] + floats[:-1]) / 2
    x = torch.cat([floats, middle, middle.nextafter(torch.zeros(())), middle.nextafter(torch.full((), 448.0))])
    x = torch.cat([x, -x])[None]
    codes, step, _ = quantize_rows(x, "fp8")  # of a step of 1, as the largest is 448
    assert step.item() == 1
    assert codes.float().flatten()[: x.shape[1]].equal(x.to(FP8).float()[0])


def test_a_row_of_more_floats_than_a_program_holds_is_rounded_by_its_largest() -> None:
    x = torch.randn(2, MOST_FP8_TILE + 70)
    x[0, 5], x[1, -1] = 300, 500
    codes, step, _ = quantize_rows(x, "fp8")
    assert (codes.float() * step[:, None]).transpose(0, 1).flatten(1)[:, : x.shape[1]].equal(round_rows(x, "fp8"))


@each_scheme
@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_affects_no_other(scheme: Scheme, fault: float) -> None:
    packed = pack(random_weights([40], 96)[0], scheme)
    x = torch.randn(3, 96)
    sound = linear(x, [(packed, None)])[0]
    x[1, 70] = fault
    (y,) = linear(x, [(packed, None)])
    assert y[1].isnan().all()
    assert y[[0, 2]].equal(sound[[0, 2]])


@each_scheme
@pytest.mark.parametrize("extreme", [1e-38, 1e30])
def test_tiny_and_huge_weights_are_quantized_as_specified(scheme: Scheme, extreme: float) -> None:
    weight = random_weights([40], 96)[0] * torch.logspace(0, 1, 96)
    weight[3], weight[4, 32:64], weight[5] = 0, 0, weight[5] * extreme
    packed = pack(weight, scheme)
    assert unpack(packed).equal(dequantize(*quantize(weight, scheme)))
    x = torch.randn(2, 96)
    assert_near(linear(x, [(packed, None)])[0], REFERENCE.linear(x, [(pack_one(REFERENCE, weight, scheme), None)])[0])


@each_scheme
def test_transposed_weights_are_packed_correctly(scheme: Scheme) -> None:
    weight = random_weights([96], 64)[0].T  # as Conv1D keeps them
    assert unpack(pack(weight, scheme)).equal(dequantize(*quantize(weight, scheme)))


def test_packed_weights_take_no_more_memory_than_integers_and_scales() -> None:
    (weight,) = random_weights([128], 256, torch.bfloat16)
    half, quarter, floats = (pack(weight, scheme) for scheme in SCHEMES)
    assert half.nbytes == floats.nbytes == 128 * 256 + 128 * 4
    assert quarter.data.nbytes == 128 * 256 // 2
    assert quarter.nbytes == 128 * 256 // 2 + 128 * 256 // GROUP * 2 + 128 * 4
    laid = merge([quarter, quarter])
    assert [packed.nbytes for packed in laid] == 2 * [quarter.nbytes]
    assert laid[0].data.untyped_storage().nbytes() == 2 * quarter.data.nbytes


@each_scheme
def test_only_neighbours_in_memory_are_one_product(scheme: Scheme) -> None:
    apart = [pack(weight, scheme) for weight in random_weights([24, 40, 8], 192)]
    laid = merge(apart)
    everything = merged_layer([(packed, None) for packed in laid])
    assert everything is not None
    assert everything[0].shape == (72, 192)
    assert unpack(everything[0]).equal(torch.cat([unpack(packed) for packed in apart]))
    for some in (apart, laid[::-1], [laid[0], laid[2]], [laid[0], apart[1]]):
        assert merged_layer([(packed, None) for packed in some]) is None


def test_programs_fill_the_device_and_cover_every_run() -> None:
    for rows in (1, 16, 17, 64, 65, 256, 300, 4096):
        for out in (1, 1024, 4096, 28672, 150000):
            for runs in (1, 3, 64, 224):
                for wide in (RUN, RUN // 2):
                    p = tiling(rows, out, runs, wide, 132)
                    assert (p.splits - 1) * p.span < runs <= p.splits * p.span
                    assert p.splits == 1 or p.span >= 4
    assert tiling(1, 6144, 64, RUN, 132).splits == 5  # 96 tiles of 132 * 4 programs
    assert tiling(2048, 1024, 64, RUN, 132).splits == 1
    assert [tiling(rows, 4096, 64, RUN, 132).block_m for rows in (1, 17, 33, 256, 257)] == [16, 32, 64, 64, 128]


@each_scheme
def test_no_rows_give_an_empty_result(scheme: Scheme) -> None:
    assert linear(torch.zeros(0, 64), [(pack(torch.zeros(32, 64), scheme), None)])[0].shape == (0, 32)


def test_layers_that_do_not_fit_are_refused() -> None:
    x, small, smaller = torch.zeros(1, 64), pack(torch.zeros(32, 64), "int8"), pack(torch.zeros(32, 64), "int4")
    with pytest.raises(ValueError, match="64 inputs"):
        linear(x[:, :32], [(small, None)])
    with pytest.raises(ValueError, match="scheme int4"):
        linear(x, [(small, None), (smaller, None)])
    with pytest.raises(ValueError, match="contiguous"):
        linear(torch.zeros(64, 2).T, [(small, None)])
    with pytest.raises(TypeError, match="bias"):
        linear(x, [(small, torch.zeros(32).half())])
    with pytest.raises(TypeError, match="float64"):
        linear(x.double(), [(small, None)])
    with pytest.raises(TypeError, match="float64"):
        pack(torch.zeros(4, 4, dtype=torch.float64), "int8")
    with pytest.raises(ValueError, match="48 inputs"):
        pack(torch.zeros(4, 48), "int4")
