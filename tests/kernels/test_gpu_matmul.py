"""The GPU's maps in int8 and int4, in Triton's interpreter: the reference's numbers, each row by itself."""

from __future__ import annotations

from collections.abc import Iterator

import interpreter  # noqa: F401  (before the kernels)
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, assert_near, pack_one
from torch import Tensor

from lora_serve.kernels.gpu.matmul import joined, linear, merge, pack, rounded, tiling, unpack
from lora_serve.kernels.packed_weight import GROUP, RUN, PackedWeight, Scheme, dequantized, quantized
from lora_serve.kernels.packed_weight import rounded as seen
from lora_serve.kernels.reference import ReferenceKernels

REFERENCE = ReferenceKernels()
SCHEMES: list[Scheme] = ["int8", "int4"]
Layers = list[tuple[PackedWeight, Tensor | None]]
few = settings(max_examples=8, deadline=None)
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """NumPy says that NaN is invalid; it is what is meant."""
    with np.errstate(invalid="ignore"):
        yield


def weights(outs: list[int], wide: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(out, wide, generator=generator) / wide**0.5).to(dtype) for out in outs]


def fitted(wide: int, scheme: Scheme) -> int:
    """Inputs that the scheme can have, no fewer than `wide`."""
    return -(-wide // GROUP) * GROUP if scheme == "int4" else wide


def assert_the_references(x: Tensor, each: list[Tensor], biases: list[Tensor | None], scheme: Scheme) -> None:
    """Whether the layers are laid out apart or merged."""
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
def test_it_gives_the_references_numbers(
    seed: int, dtype: torch.dtype, scheme: Scheme, outs: list[int], wide: int, rows: int, biased: list[bool]
) -> None:
    wide = fitted(wide, scheme)
    torch.manual_seed(seed)
    x = torch.randn(rows, wide + 3).to(dtype)[:, :wide]
    biases = [torch.randn(out).to(dtype) if has else None for out, has in zip(outs, biased, strict=False)]
    assert_the_references(x, weights(outs, wide, dtype, seed), biases, scheme)


@each_scheme
@pytest.mark.parametrize("rows", [130, 300])
def test_many_rows_take_larger_tiles(scheme: Scheme, rows: int) -> None:
    torch.manual_seed(rows)
    assert_the_references(torch.randn(rows, 160).bfloat16(), weights([140], 160), [torch.randn(140).bfloat16()], scheme)


@each_scheme
def test_an_input_that_is_cut_gives_the_same_bits_twice(scheme: Scheme) -> None:
    wide = 16 * RUN + GROUP
    assert tiling(3, 50, 17, RUN, 4).splits > 1
    x, each = torch.randn(3, wide), weights([50, 20], wide)
    assert_the_references(x, each, [torch.randn(50), None], scheme)
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
def test_rows_are_rounded_as_stated_to_the_last_bit(
    seed: int, dtype: torch.dtype, scheme: Scheme, rows: int, wide: int
) -> None:
    wide = fitted(wide, scheme)
    torch.manual_seed(seed)
    x = (torch.randn(rows, wide) * 10 ** torch.randint(-3, 4, (rows, wide))).to(dtype)
    whole, step, excess = rounded(x, scheme)
    amounts = (whole * step[..., None]).transpose(0, 1).flatten(1)
    assert amounts[:, :wide].equal(seen(x, scheme))
    assert not amounts[:, wide:].any()
    assert (excess is None) == (scheme == "int8")
    assert excess is None or excess.equal(8 * whole.sum(2, dtype=torch.int32))


@each_scheme
@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_a_row_that_is_no_number_stays_none_and_harms_no_other(scheme: Scheme, fault: float) -> None:
    packed = pack(weights([40], 96)[0], scheme)
    x = torch.randn(3, 96)
    sound = linear(x, [(packed, None)])[0]
    x[1, 70] = fault
    (y,) = linear(x, [(packed, None)])
    assert y[1].isnan().all()
    assert y[[0, 2]].equal(sound[[0, 2]])


@each_scheme
@pytest.mark.parametrize("extreme", [1e-38, 1e30])
def test_weights_of_any_size_stay_what_they_are_stated_to_be(scheme: Scheme, extreme: float) -> None:
    weight = weights([40], 96)[0] * torch.logspace(0, 1, 96)
    weight[3], weight[4, 32:64], weight[5] = 0, 0, weight[5] * extreme
    packed = pack(weight, scheme)
    assert unpack(packed).equal(dequantized(*quantized(weight, scheme)))
    x = torch.randn(2, 96)
    assert_near(linear(x, [(packed, None)])[0], REFERENCE.linear(x, [(pack_one(REFERENCE, weight, scheme), None)])[0])


@each_scheme
def test_transposed_weights_are_packed_as_they_are(scheme: Scheme) -> None:
    weight = weights([96], 64)[0].T  # as Conv1D keeps them
    assert unpack(pack(weight, scheme)).equal(dequantized(*quantized(weight, scheme)))


def test_packed_weights_take_what_their_numbers_and_scales_take() -> None:
    (weight,) = weights([128], 256, torch.bfloat16)
    half, quarter = (pack(weight, scheme) for scheme in SCHEMES)
    assert half.nbytes == 128 * 256 + 128 * 4
    assert quarter.data.nbytes == 128 * 256 // 2
    assert quarter.nbytes == 128 * 256 // 2 + 128 * 256 // GROUP * 2
    laid = merge([quarter, quarter])
    assert [packed.nbytes for packed in laid] == 2 * [quarter.nbytes]
    assert laid[0].data.untyped_storage().nbytes() == 2 * quarter.data.nbytes


@each_scheme
def test_only_neighbours_are_one_product(scheme: Scheme) -> None:
    apart = [pack(weight, scheme) for weight in weights([24, 40, 8], 192)]
    laid = merge(apart)
    everything = joined([(packed, None) for packed in laid])
    assert everything is not None
    assert everything[0].shape == (72, 192)
    assert unpack(everything[0]).equal(torch.cat([unpack(packed) for packed in apart]))
    for some in (apart, laid[::-1], [laid[0], laid[2]], [laid[0], apart[1]]):
        assert joined([(packed, None) for packed in some]) is None


def test_programs_fill_the_device_and_leave_no_run_out() -> None:
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
def test_no_rows_is_no_work(scheme: Scheme) -> None:
    assert linear(torch.zeros(0, 64), [(pack(torch.zeros(32, 64), scheme), None)])[0].shape == (0, 32)


def test_maps_that_do_not_fit_are_refused() -> None:
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
