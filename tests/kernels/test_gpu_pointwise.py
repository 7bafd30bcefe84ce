"""Norms, gated activations, rotary embeddings and KV writes of the GPU backend, interpreted, equal the reference."""

from __future__ import annotations

import interpreter  # noqa: F401  (before the kernels)
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, assert_near

from lora_serve.kernels.contract import Activation, Rotation
from lora_serve.kernels.gpu.pointwise import (
    add_rms_norm,
    gated_activation,
    rms_norm,
    rope,
    rope_and_write_kv,
    write_kv,
)
from lora_serve.kernels.reference import ReferenceKernels

REFERENCE = ReferenceKernels()
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 150))
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # infinity is intended
few = settings(max_examples=12, deadline=None)


@few
@given(seed=st.integers(0, 2**31), dtype=DTYPES, shape=SHAPES, plus_one=st.booleans())
def test_norms_equal_the_reference(seed: int, dtype: torch.dtype, shape: tuple[int, int, int], plus_one: bool) -> None:
    torch.manual_seed(seed)
    x, weight = (5 * torch.randn(*shape[:2], shape[2] + 3)).to(dtype)[..., :-3], torch.randn(shape[2]).to(dtype)
    got = rms_norm(x, weight, 1e-6, plus_one=plus_one)
    assert got.is_contiguous()
    assert_near(got, REFERENCE.rms_norm(x, weight, 1e-6, plus_one=plus_one))
    assert got[:1].equal(rms_norm(x[:1], weight, 1e-6, plus_one=plus_one))


@pytest.mark.parametrize("width", [2048, 5120, 16384])
def test_wide_norms_round_before_the_weight(width: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, width).bfloat16(), torch.randn(width)  # a weight kept wider than the rows
    got, wanted = (norm(x, weight, 1e-5, plus_one=False) for norm in (rms_norm, REFERENCE.rms_norm))
    assert got.dtype is torch.bfloat16
    assert (got == wanted).float().mean() > 0.999  # the sum's order can tip a rounding, no more
    assert_near(got, wanted)


@few
@given(seed=st.integers(0, 2**31), dtype=DTYPES, shape=SHAPES, plus_one=st.booleans(), dependent=st.booleans())
def test_a_sum_and_its_norm_have_the_bits_of_the_two_operations(
    seed: int, dtype: torch.dtype, shape: tuple[int, int, int], plus_one: bool, dependent: bool
) -> None:
    torch.manual_seed(seed)
    x, y = ((5 * torch.randn(*shape[:2], shape[2] + 3)).to(dtype)[..., :-3] for _ in range(2))
    weight = torch.randn(shape[2]).to(dtype)
    total, normed = add_rms_norm(x, y, weight, 1e-6, plus_one=plus_one, dependent=dependent)
    assert total.equal(x + y)
    assert normed.equal(rms_norm(x + y, weight, 1e-6, plus_one=plus_one))
    assert total.is_contiguous()
    assert normed.is_contiguous()
    wanted, wanted_norm = REFERENCE.add_rms_norm(x, y, weight, 1e-6, plus_one=plus_one)
    assert wanted.equal(total)
    assert_near(normed, wanted_norm)


def test_dependent_launches_give_the_same_bits() -> None:
    torch.manual_seed(0)
    x, gate = torch.randn(3, 40).bfloat16(), torch.randn(3, 80).bfloat16()
    q, k, turn = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16), torch.randn(1, 3, 16)
    pools = [torch.zeros(2, 4, 2, 16) for _ in range(4)]
    results = []
    for dependent, own in ((False, pools[:2]), (True, pools[2:])):
        write_kv(*own, k[0].transpose(0, 1), k[0].transpose(0, 1), torch.tensor([7, 0, 3]), dependent=dependent)
        norm = rms_norm(x, x[0], 1e-6, plus_one=False, dependent=dependent)
        gated = gated_activation(gate, gate, "silu", dependent=dependent)
        results.append([norm, gated, *rope(q, k, turn, turn, dependent=dependent), *own])
    assert all(map(torch.equal, *results))


@few
@given(seed=st.integers(0, 2**31), dtype=DTYPES, shape=SHAPES, activation=st.sampled_from(["silu", "gelu_tanh"]))
def test_gated_activations_equal_the_reference(
    seed: int, dtype: torch.dtype, shape: tuple[int, int, int], activation: Activation
) -> None:
    torch.manual_seed(seed)
    both = (4 * torch.randn(*shape[:2], 2 * shape[2] + 1)).to(dtype)
    gate, up = both[..., : shape[2]], both[..., shape[2] + 1 :]  # halves of one projection
    got = gated_activation(gate, up, activation)
    assert got.is_contiguous()
    assert_near(got, REFERENCE.gated_activation(gate, up, activation))


def test_a_gated_row_may_be_wider_than_a_program() -> None:
    gate, up = torch.linspace(-9, 9, 2 * 5003).view(2, 5003), torch.ones(2, 5003)
    assert_near(gated_activation(gate, up, "silu"), REFERENCE.gated_activation(gate, up, "silu"))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_large_values_do_not_overflow_and_nan_stays_nan(activation: Activation) -> None:
    gate = torch.tensor([[-1e30, -200.0, -90.0, 0.0, 90.0, 1e30, float("nan")]])
    got = gated_activation(gate, torch.ones_like(gate), activation)[0]
    assert got[:3].tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-6)
    assert got[3:6].tolist() == pytest.approx([0.0, 90.0, 1e30])
    assert got[6].isnan()


@few
@given(
    seed=st.integers(0, 2**31),
    dtype=DTYPES,
    turns=DTYPES,
    tokens=st.integers(1, 6),
    heads=st.tuples(st.integers(1, 40), st.integers(1, 9)),
    half=st.sampled_from([1, 24, 40, 64]),
    transposed=st.booleans(),
)
def test_rotary_embeddings_equal_the_reference(
    seed: int, dtype: torch.dtype, turns: torch.dtype, tokens: int, heads: tuple[int, int], half: int, transposed: bool
) -> None:
    torch.manual_seed(seed)
    q, k = (torch.randn(1, n, tokens, 2 * half).to(dtype) for n in heads)
    if transposed:  # as models hand them over: [tokens, heads, dim] in memory
        q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    cos, sin = (torch.randn(1, tokens, 2 * half).to(turns) for _ in range(2))
    got, wanted = rope(q, k, cos, sin), REFERENCE.rope(q, k, cos, sin)
    for mine, right in zip(got, wanted, strict=True):
        assert_near(mine, right)
        assert mine[0].transpose(0, 1).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [2, 3, 40])
def test_keys_and_values_are_written_where_indices_say_and_nowhere_else(dtype: torch.dtype, heads: int) -> None:
    torch.manual_seed(0)
    tokens = 7
    keys, values = torch.randn(8, 3, heads, 24).to(dtype), torch.randn(8, 3, heads, 72).to(dtype)
    k = torch.randn(heads, tokens, 24).to(dtype).transpose(0, 1)
    v = torch.randn(tokens, heads, 80).to(dtype)[..., :72]
    index = torch.randperm(8 * 3)[:tokens]
    wanted_keys, wanted_values = keys.clone(), values.clone()
    REFERENCE.write_kv(wanted_keys, wanted_values, k, v, index)
    write_kv(keys, values, k, v, index)
    assert torch.equal(keys, wanted_keys)
    assert torch.equal(values, wanted_values)


@few
@given(
    seed=st.integers(0, 2**31),
    dtype=DTYPES,
    turns=DTYPES,
    heads=st.tuples(st.integers(1, 40), st.integers(1, 9)),
    half=st.sampled_from([1, 24, 64]),
    value_dim=st.sampled_from([8, 72, 128]),
    dependent=st.booleans(),
)
def test_rotating_and_writing_at_once_has_the_bits_of_the_two_operations(
    seed: int,
    dtype: torch.dtype,
    turns: torch.dtype,
    heads: tuple[int, int],
    half: int,
    value_dim: int,
    dependent: bool,
) -> None:
    torch.manual_seed(seed)
    tokens, (heads_q, heads_kv), dim = 5, heads, 2 * half
    wide = torch.randn(1, tokens, heads_q * dim + heads_kv * (dim + value_dim)).to(dtype)  # one product's outputs
    parts = wide.split([heads_q * dim, heads_kv * dim, heads_kv * value_dim], -1)
    widths = (dim, dim, value_dim)
    q, k, v = (x.view(1, tokens, -1, width).transpose(1, 2) for x, width in zip(parts, widths, strict=True))
    cos, sin = (torch.randn(1, tokens, dim).to(turns) for _ in range(2))
    pools = [torch.randn(4, 3, heads_kv, width).to(dtype) for width in (dim, value_dim)]
    ours, pair, right = ([pool.clone() for pool in pools] for _ in range(3))
    index = torch.randperm(4 * 3)[:tokens]
    before = wide.clone()
    got = rope_and_write_kv(Rotation(q, k, cos, sin), v, *ours, index, dependent=dependent)
    turned, rotated = rope(q, k, cos, sin)
    write_kv(*pair, rotated[0].transpose(0, 1), v[0].transpose(0, 1), index)
    assert got.equal(turned)
    assert got[0].transpose(0, 1).is_contiguous()
    assert all(map(torch.equal, ours, pair))
    assert wide.equal(before)
    assert_near(got, REFERENCE.rope_and_write_kv(Rotation(q, k, cos, sin), v, *right, index))
    for mine, wanted in zip(ours, right, strict=True):
        assert_near(mine, wanted)


def test_empty_inputs_give_empty_results() -> None:
    nothing = torch.zeros(0, 8)
    assert rms_norm(nothing, torch.ones(8), 1e-6, plus_one=True).shape == (0, 8)
    assert gated_activation(nothing, nothing, "silu").shape == (0, 8)
    q, k = rope(torch.zeros(1, 2, 0, 8), torch.zeros(1, 1, 0, 8), torch.zeros(1, 0, 8), torch.zeros(1, 0, 8))
    assert (q.shape, k.shape) == ((1, 2, 0, 8), (1, 1, 0, 8))
    pool = torch.zeros(1, 1, 1, 8)
    none = torch.zeros(0, dtype=torch.int64)
    write_kv(pool, pool, torch.zeros(0, 1, 8), torch.zeros(0, 1, 8), none)
    assert rope_and_write_kv(Rotation(q, k, *[torch.zeros(1, 0, 8)] * 2), k, pool, pool, none).shape == (1, 2, 0, 8)


def test_shapes_and_types_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        rms_norm(torch.zeros(2, 8), torch.zeros(9), 1e-6, plus_one=False)
    with pytest.raises(ValueError, match="do not fit"):
        add_rms_norm(torch.zeros(2, 8), torch.zeros(2, 8).half(), torch.zeros(8), 1e-6, plus_one=False)
    with pytest.raises(ValueError, match="do not fit"):
        gated_activation(torch.zeros(2, 8), torch.zeros(2, 9), "silu")
    with pytest.raises(ValueError, match="do not fit"):
        rope(torch.zeros(1, 2, 3, 8), torch.zeros(1, 1, 3, 6), torch.zeros(1, 3, 8), torch.zeros(1, 3, 8))
    pool, k, index = torch.zeros(2, 4, 1, 8), torch.ones(2, 1, 8), torch.tensor([0, 1])
    with pytest.raises(TypeError, match="pool's type"):
        write_kv(pool, pool, k.half(), k.half(), index)
    with pytest.raises(ValueError, match="do not fit the pool"):
        write_kv(pool, pool, k[:, :, :4], k, index)
    q, v, turn = torch.zeros(1, 2, 2, 8), torch.zeros(1, 1, 2, 8), torch.zeros(1, 2, 8)
    with pytest.raises(ValueError, match="do not fit"):
        rope_and_write_kv(Rotation(q, v, turn, turn), v[:, :, :1], pool, pool, index)
    with pytest.raises(ValueError, match="do not fit the pool"):
        rope_and_write_kv(Rotation(q, v, turn, turn), v, pool[..., :4], pool, index)
    with pytest.raises(TypeError, match="pool's type"):
        rope_and_write_kv(Rotation(q, v, turn, turn), v, pool, pool.half(), index)
