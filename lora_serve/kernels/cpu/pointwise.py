"""Norms, gated activations, RoPE and sums on the CPU: argument packing for `pointwise.cpp`."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_serve.kernels.checks import check_gated, check_norm, check_rope
from lora_serve.kernels.contract import Activation
from lora_serve.kernels.cpu.calls import CALLS
from lora_serve.kernels.cpu.library import TYPES, Library, type_number

_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}  # `Activation` in pointwise.cpp


class NativePointwise:
    """`Kernels.rms_norm`, `gated_activation` and `rope`."""

    def __init__(self, library: Library) -> None:
        self._rms_norm, self._gated, self._rope, self._add = (
            library.call(f"lora_{name}") for name in ("rms_norm", "gated", "rope", "add")
        )

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, plus_one: bool) -> Tensor:
        width = x.shape[-1]
        rows = x.reshape(-1, width)
        check_norm(rows, weight)
        y = torch.empty(x.shape, dtype=x.dtype)
        self._rms_norm(
            CALLS["NormCall"].pack(
                x=rows.data_ptr(),
                weight=weight.data_ptr(),
                y=y.data_ptr(),
                rows=rows.shape[0],
                width=width,
                x_stride=rows.stride(0),
                type=type_number(x.dtype),
                weight_type=type_number(weight.dtype),
                plus_one=plus_one,
                threads=torch.get_num_threads(),
                eps=eps,
            )
        )
        return y

    def gated_activation(self, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        check_gated(gate, up)
        width = gate.shape[-1]
        left, right = gate.reshape(-1, width), up.reshape(-1, width)
        y = torch.empty(gate.shape, dtype=gate.dtype)
        self._gated(
            CALLS["GatedCall"].pack(
                gate=left.data_ptr(),
                up=right.data_ptr(),
                y=y.data_ptr(),
                rows=left.shape[0],
                width=width,
                gate_stride=left.stride(0),
                up_stride=right.stride(0),
                type=type_number(gate.dtype),
                activation=_ACTIVATIONS[activation],
                threads=torch.get_num_threads(),
            )
        )
        return y

    def rope(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        check_rope(q, k, cos, sin)
        _, heads, tokens, dim = q.shape
        kv_heads = k.shape[1]
        cos, sin = cos.contiguous(), sin.contiguous()
        q_out = torch.empty(tokens, heads, dim, dtype=q.dtype)
        k_out = torch.empty(tokens, kv_heads, dim, dtype=k.dtype)
        self._rope(
            CALLS["RopeCall"].pack(
                q=_heads(q),
                k=_heads(k),
                q_out=q_out.data_ptr(),
                k_out=k_out.data_ptr(),
                cosine=cos.data_ptr(),
                sine=sin.data_ptr(),
                table_stride=dim,
                tokens=tokens,
                dim=dim,
                type=type_number(q.dtype),
                table_type=type_number(cos.dtype),
                threads=torch.get_num_threads(),
            )
        )
        return q_out.transpose(0, 1)[None], k_out.transpose(0, 1)[None]

    def add(self, x: Tensor, y: Tensor, total: Tensor) -> bool:
        """total = x + y of contiguous tensors of one shape and type, rounded as torch does; False for other types."""
        if x.dtype not in TYPES:
            return False
        self._add(
            CALLS["AddCall"].pack(
                x=x.data_ptr(),
                y=y.data_ptr(),
                sum=total.data_ptr(),
                count=x.numel(),
                type=type_number(x.dtype),
                threads=torch.get_num_threads(),
            )
        )
        return True


def _heads(x: Tensor) -> tuple[int | float, ...]:
    """`Heads` in calls.h, of queries or keys [1, heads, tokens, dim]."""
    return CALLS["Heads"].values(data=x.data_ptr(), token=x.stride(2), head=x.stride(1), heads=x.shape[1])
