"""Paged attention and KV writes of the reference and the native CPU backend."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from kernel_cases import AttentionCase, assert_near, attention_cases, int32
from torch.nn.functional import scaled_dot_product_attention

from lora_serve.kernels.contract import AttentionMetadata, Kernels
from lora_serve.kernels.cpu.backend import NativeKernels
from lora_serve.kernels.reference import ReferenceKernels

reference = ReferenceKernels()
many = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

CASE = AttentionCase(
    seed=5,
    dtype=torch.bfloat16,
    kv_heads=2,
    share=7,
    key_dim=64,
    value_dim=64,
    block_size=16,
    sequences=[(40, 90), (1, 200), (0, 1), (7, 7)],
    window=None,
    softcap=None,
    sinks=False,
)


@settings(max_examples=40, deadline=None)
@given(attention_cases())
def test_the_reference_equals_torchs_attention(case: AttentionCase) -> None:
    case = dataclasses.replace(case, dtype=torch.float32, softcap=None, sinks=False)
    q, keys, values, metadata = case.tensors()
    got = reference.attention(q, keys, values, metadata, *case.options)
    row = 0
    for i, (rows, context) in enumerate(case.sequences):
        j = torch.arange(context)
        index = metadata.block_table[i, j // case.block_size] * case.block_size + j % case.block_size
        key, value = keys.flatten(0, 1)[index], values.flatten(0, 1)[index]
        at = torch.arange(context - rows, context)[:, None]
        seen = (j <= at) & (j > at - (case.window or context))
        wanted = scaled_dot_product_attention(
            q[row : row + rows].transpose(0, 1),
            key.transpose(0, 1).repeat_interleave(case.share, 0),
            value.transpose(0, 1).repeat_interleave(case.share, 0),
            attn_mask=seen,
            scale=case.key_dim**-0.5,
        )
        assert_near(got[row : row + rows], wanted.transpose(0, 1))
        row += rows


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_softcap_and_sinks_equal_a_computation_by_hand(native: NativeKernels, backend: str) -> None:
    kernels: Kernels = native if backend == "native" else reference
    keys = torch.zeros(1, 2, 1, 8)
    keys[0, :, 0, 0] = torch.tensor([3.0, -1.0])
    values = torch.zeros(1, 2, 1, 8)
    values[0, :, 0, 0] = torch.tensor([1.0, 10.0])
    q = torch.zeros(1, 1, 8)
    q[0, 0, 0] = 2.0
    metadata = AttentionMetadata(int32(0, 1), int32(2), int32(0).view(1, 1), 1, 2)
    out = kernels.attention(q, keys, values, metadata, scale=0.5, softcap=2.0, sinks=torch.tensor([0.25]))
    first, second, sink = (math.exp(s) for s in (2 * math.tanh(3 / 2), 2 * math.tanh(-1 / 2), 0.25))
    assert out[0, 0, 0].item() == pytest.approx((first + 10 * second) / (first + second + sink), rel=1e-5)
    assert not out[0, 0, 1:].any()


@many
@given(attention_cases())
def test_native_equals_the_reference(native: NativeKernels, case: AttentionCase) -> None:
    q, keys, values, metadata = case.tensors()
    got = native.attention(q, keys, values, metadata, *case.options)
    assert got.is_contiguous()
    assert_near(got, reference.attention(q, keys, values, metadata, *case.options))


@pytest.mark.parametrize("window", [None, 20])
def test_a_rows_bits_do_not_depend_on_chunks_neighbours_or_threads(native: NativeKernels, window: int | None) -> None:
    q, keys, values, metadata = CASE.tensors()
    whole = native.attention(q, keys, values, metadata, 0.125, window)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(native.attention(q, keys, values, metadata, 0.125, window), whole)
    start = 0
    for i, (rows, context) in enumerate(CASE.sequences):
        for row in range(rows):
            at = context - rows + row + 1
            alone = AttentionMetadata(int32(0, 1), int32(at), metadata.block_table[i : i + 1], 1, at)
            got = native.attention(q[start + row : start + row + 1], keys, values, alone, 0.125, window)
            assert torch.equal(got[0], whole[start + row])
        start += rows


def test_a_sequence_sees_nothing_but_its_own_context(native: NativeKernels) -> None:
    q, keys, values, metadata = CASE.tensors()
    wanted = native.attention(q, keys, values, metadata, 0.125)
    mine = metadata.block_table[3, :1].long()  # seven tokens in one block of sixteen
    for pool in (keys, values):
        kept = pool[mine, :7].clone()
        pool[:] = float("nan")
        pool[mine, :7] = kept
    got = native.attention(q, keys, values, metadata, 0.125)
    assert torch.equal(got[41:], wanted[41:])
    assert got[:41].isnan().all()


def test_a_query_with_nan_affects_only_its_own_row(native: NativeKernels) -> None:
    q, keys, values, metadata = CASE.tensors()
    wanted = native.attention(q, keys, values, metadata, 0.125)
    q = q.clone()
    q[5] = float("nan")
    got = native.attention(q, keys, values, metadata, 0.125)
    assert got[5].isnan().all()
    assert torch.equal(torch.cat([got[:5], got[6:]]), torch.cat([wanted[:5], wanted[6:]]))


@pytest.mark.parametrize("size", [0.0, 1.0, 1e4, 1e30])
def test_probabilities_sum_to_one_whatever_the_size_of_the_scores(native: NativeKernels, size: float) -> None:
    q, keys, values, metadata = dataclasses.replace(CASE, dtype=torch.float32).tensors()
    got = native.attention(q * size, keys, torch.ones_like(values), metadata, 0.125)
    torch.testing.assert_close(got, torch.ones_like(got))


def test_an_invalid_block_table_or_context_is_refused(native: NativeKernels) -> None:
    q, keys, values, metadata = CASE.tensors()
    broken = metadata.block_table.clone()
    broken[1, 4] = keys.shape[0]
    with pytest.raises(ValueError, match="sequence 1"):
        native.attention(q, keys, values, dataclasses.replace(metadata, block_table=broken), 0.125)
    with pytest.raises(ValueError, match="sequence 0"):
        native.attention(q, keys, values, dataclasses.replace(metadata, context=int32(10, 200, 1, 7)), 0.125)
    with pytest.raises(ValueError, match="does not fit the pool"):
        native.attention(q[..., :32], keys, values, metadata, 0.125)
    for part in ("query_start", "context", "block_table"):
        fewer = dataclasses.replace(metadata, **{part: getattr(metadata, part)[:-1]})
        with pytest.raises(ValueError, match="sequences"):
            native.attention(q, keys, values, fewer, 0.125)
    with pytest.raises(ValueError, match="sinks"):
        native.attention(q, keys, values, metadata, 0.125, sinks=torch.zeros(q.shape[1] - 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 5, 90])
def test_keys_and_values_are_written_where_indices_say_and_nowhere_else(
    native: NativeKernels, dtype: torch.dtype, tokens: int
) -> None:
    torch.manual_seed(0)
    keys, values = torch.randn(8, 16, 2, 24).to(dtype), torch.randn(8, 16, 2, 40).to(dtype)
    k = torch.randn(2, tokens, 24).to(dtype).transpose(0, 1)
    v = torch.randn(tokens, 2, 48).to(dtype)[..., :40]
    index = torch.randperm(8 * 16)[:tokens]
    wanted_keys, wanted_values = keys.clone(), values.clone()
    wanted_keys.view(-1, 2, 24)[index] = k
    wanted_values.view(-1, 2, 40)[index] = v
    for kernels in (native, reference):
        kernels.write_kv(keys, values, k, v, index)
        assert torch.equal(keys, wanted_keys)
        assert torch.equal(values, wanted_values)
        keys.view(-1, 2, 24)[index] = 0


def test_an_index_outside_the_pool_is_refused_and_nothing_is_written(native: NativeKernels) -> None:
    keys, values = torch.zeros(2, 4, 1, 8), torch.zeros(2, 4, 1, 8)
    k = torch.ones(2, 1, 8)
    for index in (8, -1):
        with pytest.raises(ValueError, match="token 1"):
            native.write_kv(keys, values, k, k, torch.tensor([0, index]))
    assert not keys.any()
    with pytest.raises(TypeError, match="pool's type"):
        native.write_kv(keys, values, k.half(), k.half(), torch.tensor([0, 1]))


LONG = dataclasses.replace(CASE, kv_heads=1, share=3, sequences=[(3, 3001), (1, 1025), (40, 1040), (1, 1024), (1, 60)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "with_sinks"), [(None, False), (1500, True), (40, True)])
def test_a_long_context_is_split_over_threads_with_the_same_bits(
    native: NativeKernels, dtype: torch.dtype, window: int | None, with_sinks: bool
) -> None:
    q, keys, values, metadata = dataclasses.replace(LONG, dtype=dtype).tensors()
    sinks = torch.randn(q.shape[1]) if with_sinks else None
    torch.set_num_threads(1)
    whole = native.attention(q, keys, values, metadata, 0.125, window, None, sinks)
    assert_near(whole, reference.attention(q, keys, values, metadata, 0.125, window, None, sinks))
    for threads in (2, 16):  # of 16, more than there are sequences and heads
        torch.set_num_threads(threads)
        assert torch.equal(native.attention(q, keys, values, metadata, 0.125, window, None, sinks), whole)
    start = 0
    for i, (rows, context) in enumerate(LONG.sequences):
        for row in range(rows):
            at = context - rows + row + 1
            alone = AttentionMetadata(int32(0, 1), int32(at), metadata.block_table[i : i + 1], 1, at)
            got = native.attention(q[start + row : start + row + 1], keys, values, alone, 0.125, window, None, sinks)
            assert torch.equal(got[0], whole[start + row])
        start += rows
