"""Fused RoPE: queries and keys rotated by one kernel call, which writes the KV cache too where attention comes next.

An attention module's own code is run with another function under the name that it looks up for RoPE, if that one's
results are a kernel's. Where the rotated heads go to the attention function and nowhere else, the function only notes
what is to be rotated (`ForwardContext.rotation`), and paged attention does it (`Kernels.rope_and_write_kv`). As in
`fused_residual.py` names decide nothing: a module is run on random rows in both ways, and must give the same bits.
Heads that are scaled, normed, joined or repeated after RoPE, as in MLA and partial RoPE, are rotated by themselves.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Set
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_serve.kernels.contract import Rotation
from lora_serve.kernels.reference import ReferenceKernels
from lora_serve.kv.tensors import KVTensors, LayerShape
from lora_serve.model.batch import dummy_batch
from lora_serve.model.external_linear import parameter_shapes
from lora_serve.model.forward_context import ForwardContext
from lora_serve.model.fused import ROWS, agree, probe_generator, probe_rows
from lora_serve.model.input_buffers import InputBuffers
from lora_serve.model.observe import is_linear

ROPE = "apply_rotary_pos_emb"  # what attention modules call for it
WIDTH = 8  # of the probe's rows
PROBES = (1, 3)  # tokens: strides of one token's heads are arbitrary

Rope = Callable[..., tuple[Tensor, Tensor]]
Kinds = Set[tuple[torch.dtype, torch.dtype]]  # dtypes of heads and of cosines


def fuse_ropes(
    model: nn.Module, layers: list[LayerShape], dtype: torch.dtype, device: torch.device, context: ForwardContext
) -> None:
    """Fuse all RoPE that matches a kernel, in place, with the KV write where that can be; only modules are touched."""
    for module in model.modules():
        forward = type(module).forward
        if not isinstance(forward, FunctionType) or ROPE not in forward.__code__.co_names:
            continue
        own = forward.__globals__.get(ROPE)
        if own is None or hasattr(forward, "__wrapped__"):
            continue
        if kinds := _kinds(own, dtype, device, context):
            deferred = _only_attention_reads(module, own, kinds, layers, dtype, device)
            module.forward = _forward_with(module, _rope(own, kinds, context, deferred=deferred))


@torch.inference_mode()
def _kinds(own: Rope, dtype: torch.dtype, device: torch.device, context: ForwardContext) -> Kinds:
    """Dtypes in which the model's function does what the kernel does; in float32 the self-check runs the model."""
    dim = 64
    heads = [probe_rows(dim * count).view(1, -1, count, dim).transpose(1, 2).to(device, dtype) for count in (4, 2)]
    angles = torch.randn(2, 1, len(ROWS), dim, generator=probe_generator()).to(
        device, dtype
    )  # cosines and sines, so to speak
    return {
        (kind, turned)
        for kind, turned in {(dtype, dtype), (dtype, torch.float32), (torch.float32, torch.float32)}
        if agree(context.kernels.rope, own, [*(each.to(kind) for each in heads), *(each.to(turned) for each in angles)])
    }


def _rope(own: Rope, kinds: Kinds, context: ForwardContext, *, deferred: bool) -> Rope:
    """What a module calls instead of its `own` function; `deferred`: leave the work to paged attention."""

    def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        fits = cos.shape == (1, q.shape[2], q.shape[3]) and q.shape[0] == 1 and (q.dtype, cos.dtype) in kinds
        if args or kwargs or not fits:
            return own(q, k, cos, sin, *args, **kwargs)
        if not deferred:
            return context.kernels.rope(q, k, cos, sin)
        context.rotation = Rotation(q, k, cos, sin)
        return q, k

    return rope


def _forward_with(module: nn.Module, rope: Rope) -> MethodType:
    """The forward of the module's class, with this function for RoPE."""
    forward = type(module).forward
    renamed = FunctionType(
        forward.__code__,
        forward.__globals__ | {ROPE: rope},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    renamed.__kwdefaults__ = forward.__kwdefaults__
    return MethodType(renamed, module)


@torch.inference_mode()
def _only_attention_reads(
    module: Any, own: Rope, kinds: Kinds, layers: list[LayerShape], dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether the module gives and writes the same bits if paged attention rotates the heads."""
    turned = next((turned for kind, turned in kinds if kind is dtype), None)
    if turned is None:
        return False
    twin = copy.copy(module)
    twin._modules = {
        name: _SmallLinear(child, seed, dtype, device) if is_linear(child) else child
        for seed, (name, child) in enumerate(module.named_children())
    }
    try:
        for tokens in PROBES:
            results = []
            for deferred in (False, True):
                kernels = _CountingKernels()
                layer = layers[module.layer_idx]
                context = _probe_context(kernels, layer, module.layer_idx, tokens, dtype, device)
                forward = _forward_with(twin, _rope(own, kinds, context, deferred=deferred))
                angles = torch.randn(2, 1, tokens, layer.key_dim, generator=probe_generator()).to(device, turned)
                output = forward(**_arguments(forward, tokens, angles, dtype, device), forward_context=context)[0]
                results.append((output, context.kv.keys[-1], context.kv.values[-1]))
                if kernels.calls != deferred or context.rotation is not None:
                    return False
            if not all(map(torch.equal, *results)):
                return False
    except Exception:  # it wants arguments of another kind, or changes what attention is to rotate
        return False
    return True


def _probe_context(
    kernels: ReferenceKernels, layer: LayerShape, index: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> ForwardContext:
    """A step of one sequence in a KV cache of the layers up to this one, the others' one number wide."""
    batch = dummy_batch([tokens], 1)
    kv = KVTensors([*[LayerShape(1, 1, 1)] * index, layer], 1, tokens, dtype, device)
    inputs = InputBuffers.of(batch, {}, device)
    inputs.kv_index.copy_(torch.arange(tokens))
    return ForwardContext(kernels, kv, [None] * (index + 1), {}, inputs)


def _arguments(
    forward: Callable[..., Any], tokens: int, angles: Tensor, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Random rows and these cosines and sines for a module, and None for what else it must be given."""
    needed = {
        name: None
        for name, each in inspect.signature(forward).parameters.items()
        if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD
    }
    x = torch.randn(1, tokens, WIDTH, generator=probe_generator(1)).to(device, dtype)
    return {**needed, "hidden_states": x, "position_embeddings": (angles[0], angles[1])}


class _CountingKernels(ReferenceKernels):
    """Counts the calls that rotate and write."""

    def __init__(self) -> None:
        self.calls = 0

    def rope_and_write_kv(self, *args: Any) -> Tensor:
        self.calls += 1
        return super().rope_and_write_kv(*args)


class _SmallLinear(nn.Module):
    """A random linear map of rows of any width that stands for a linear module, as wide as its outputs."""

    def __init__(self, linear: nn.Module, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        out = parameter_shapes(linear)["weight"][0]
        self._weight = torch.randn(WIDTH, out, generator=probe_generator(seed)).to(device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        wide = functional.pad(x, (0, -x.shape[-1] % WIDTH))
        y: Tensor = wide.view(*x.shape[:-1], -1, WIDTH).sum(-2) @ self._weight
        return y
