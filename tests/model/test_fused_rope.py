"""RoPE is fused with the KV write where, and only where, attention alone reads the rotated heads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from driver import Driver
from support import save
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lora_serve.kernels.reference import ReferenceKernels
from lora_serve.kv.tensors import KVTensors, LayerShape
from lora_serve.model.batch import dummy_batch
from lora_serve.model.forward_context import ForwardContext
from lora_serve.model.fused_rope import fuse_ropes
from lora_serve.model.input_buffers import InputBuffers
from lora_serve.model.paged_attention import paged_attention

CPU = torch.device("cpu")
WIDTH, HEADS, KV_HEADS, DIM, TOKENS = 24, 4, 2, 16, 5
LAYERS = [LayerShape(1, 1, 1), LayerShape(KV_HEADS, DIM, DIM)]  # the tests' modules are of the second one


class CountingKernels(ReferenceKernels):
    """Counts rotations and KV writes, and those that were one operation."""

    def __init__(self) -> None:
        self.ropes = self.writes = self.both = 0

    def rope(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        self.ropes += 1
        return super().rope(q, k, cos, sin)

    def write_kv(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, kv_index: Tensor) -> None:
        self.writes += 1
        super().write_kv(keys, values, k, v, kv_index)

    def rope_and_write_kv(self, *args: Any) -> Tensor:
        self.both += 1
        return super().rope_and_write_kv(*args)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "phi3", "mixtral", "gpt2"])
def test_known_bases_rotate_and_write_in_one_operation_a_layer(architecture: str, tmp_path: Path) -> None:
    kernels = CountingKernels()
    driver = Driver(save(architecture, tmp_path / "base"), kernels=kernels)
    layers = driver.loaded.model.config.num_hidden_layers
    kernels.ropes = kernels.writes = kernels.both = 0
    driver.teach([[5, 9, 33]], decode=0)
    turned = 0 if architecture == "gpt2" else layers
    assert (kernels.both, kernels.ropes, kernels.writes) == (turned, turned, layers)


Between = Callable[["Attention", Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def nothing(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q, k, v


class Attention(nn.Module):
    """An attention module like transformers' own, with something between RoPE and attention."""

    layer_idx = 1

    def __init__(self, between: Between = nothing, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.between = between
        self.q_proj = nn.Linear(WIDTH, HEADS * DIM, dtype=dtype)
        self.k_proj, self.v_proj = (nn.Linear(WIDTH, KV_HEADS * DIM, dtype=dtype) for _ in range(2))
        self.o_proj = nn.Linear(HEADS * DIM, WIDTH, dtype=dtype)
        self.gate: Tensor | float = 1.0

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        projections, heads = (self.q_proj, self.k_proj, self.v_proj), (*hidden_states.shape[:2], -1, DIM)
        q, k, v = (each(hidden_states).view(heads).transpose(1, 2) for each in projections)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        q, k, v = self.between(self, q, k, v)
        output = paged_attention(self, q, k, v, attention_mask, **kwargs)[0]
        return self.o_proj(output.flatten(2) * self.gate), None


def context_of(dtype: torch.dtype = torch.float32) -> tuple[ForwardContext, CountingKernels]:
    """A step of one sequence of five tokens, in an empty KV cache."""
    kernels = CountingKernels()
    inputs = InputBuffers.of(dummy_batch([TOKENS], 1), {}, CPU)
    inputs.kv_index.copy_(torch.arange(TOKENS))
    kv = KVTensors(LAYERS, 1, 8, dtype, CPU)
    return ForwardContext(kernels, kv, [None, None], {}, inputs), kernels


def fuse(attention: Attention, context: ForwardContext, kernels: CountingKernels) -> None:
    fuse_ropes(nn.ModuleList([attention]), LAYERS, attention.o_proj.weight.dtype, CPU, context)
    kernels.ropes = kernels.writes = kernels.both = 0  # those of the probes


def run(attention: Attention, context: ForwardContext, dtype: torch.dtype) -> list[Tensor]:
    """The module's output, and what is in the KV cache afterwards."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, TOKENS, WIDTH, generator=generator).to(dtype)
    cos, sin = torch.randn(2, 1, TOKENS, DIM, generator=generator).to(dtype)
    with torch.inference_mode():
        output = attention(x, (cos, sin), None, forward_context=context)[0]
    return [output, context.kv.keys[1], context.kv.values[1]]


def is_deferred(between: Between) -> bool:
    """Whether a module with this between RoPE and attention rotates and writes at once; its results are right."""
    attention = Attention(between)
    wanted = run(attention, context_of()[0], torch.float32)
    context, kernels = context_of()
    fuse(attention, context, kernels)
    for got, right in zip(run(attention, context, torch.float32), wanted, strict=True):
        torch.testing.assert_close(got, right)
    return kernels.both == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_both_at_once_give_the_bits_of_one_after_the_other(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    attention = Attention(dtype=dtype)
    context, kernels = context_of(dtype)
    fuse(attention, context, kernels)
    got = run(attention, context, dtype)
    assert kernels.both == 1
    again, counted = context_of(dtype)
    apart = Attention(lambda attention, q, k, v: (q * 1, k, v), dtype)  # so that each is an operation of its own
    apart.load_state_dict(attention.state_dict())
    fuse(apart, again, counted)
    assert all(map(torch.equal, got, run(apart, again, dtype)))
    assert (counted.both, counted.ropes, counted.writes) == (0, 1, 1)


def scaled(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q * 1.001, k, v


def normed(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q, k / k.norm(dim=-1, keepdim=True), v


def scaled_in_place(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    turn = torch.linspace(1, 2, q.shape[-1])
    q *= turn  # not the same number for the halves that rotation mixes
    return q, k, v


def shared(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q, k, k  # the values are the rotated keys


def swapped(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q, k.flip(1), v


def gated(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    attention.gate = q[0].transpose(0, 1).flatten(1).sigmoid()
    return q, k, v


def turned_twice(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    cos = sin = torch.full((1, q.shape[2], q.shape[3]), 0.6)
    return *attention.forward.__func__.__globals__["apply_rotary_pos_emb"](q, k, cos, sin), v  # type: ignore[attr-defined]


def made_contiguous(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.contiguous(), k.contiguous(), v  # which copies, unless there is one token


UNLIKE = (scaled, normed, scaled_in_place, shared, swapped, gated, turned_twice, made_contiguous)


@pytest.mark.parametrize("between", UNLIKE)
def test_heads_that_something_else_reads_or_changes_are_rotated_before_it(between: Between) -> None:
    assert is_deferred(nothing)
    assert not is_deferred(between)


def test_each_step_whose_shapes_do_not_fit_the_kernel_is_rotated_by_the_model() -> None:
    attention = Attention()
    context, kernels = context_of()
    fuse(attention, context, kernels)
    cos, sin = torch.randn(2, 1, 1, DIM)  # one row for all tokens
    with torch.inference_mode():
        attention(torch.randn(1, TOKENS, WIDTH), (cos, sin), None, forward_context=context)
    assert (kernels.ropes, kernels.writes) == (0, 1)
