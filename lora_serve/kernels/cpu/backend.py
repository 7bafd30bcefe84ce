"""The native CPU backend: checks types and shapes, packs addresses and sizes, and calls the C++ kernels.

A step makes hundreds of these calls, each a few dozen microseconds long, so a call is one packed struct and one foreign
call (which releases the GIL). What never changes about a group is packed once. C++ checks every index that it follows;
Python checks types and shapes, because with a wrong one C++ would write outside its tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lora_serve.kernels.checks import check_delta, check_gated, check_norm, check_rope, check_write
from lora_serve.kernels.contract import Activation, AttentionMetadata, DeltaGroup, GraphBuckets, ReplaySupport, Segments
from lora_serve.kernels.cpu.calls import CALLS
from lora_serve.kernels.cpu.library import TYPES, Library, type_number
from lora_serve.kernels.cpu.matmul import NativeLinear
from lora_serve.kernels.cpu.recording import Arena, CallRecording
from lora_serve.kernels.packed_weight import PackedWeight, Scheme

ARENA = 1 << 28  # bytes that the results of a recorded pass may take

_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}  # `Activation` in pointwise.cpp


class _PackedGroup:
    """What C++ reads of a group, at an address that stays."""

    def __init__(self, group: DeltaGroup) -> None:
        modules, slots = group.rank.shape
        packed = CALLS["Group"].pack(
            a=group.a.data_ptr(),
            b=group.b.data_ptr(),
            rank=group.rank.data_ptr(),
            modules=modules,
            slots=slots,
            in_=group.in_features,
            type=type_number(group.dtype),
            out=group.out_features,
        )
        self._memory = ctypes.create_string_buffer(packed, len(packed))
        self.address = ctypes.addressof(self._memory)


class NativeKernels:
    """`Kernels` on the CPU, in a library that `build.library` built.

    Types are fp32, bf16 and fp16; anything else is a TypeError. Shapes, indices or ranges that do not fit are a
    ValueError, before anything is written.
    """

    name = "native"
    replay: ReplaySupport = "recorded_steps"
    graph_buckets: GraphBuckets | None = None

    def __init__(self, library: Path) -> None:
        self._library = Library(library)
        names = ("delta", "write_kv", "attention", "rms_norm", "gated", "rope", "add")
        self._delta, self._write_kv, self._attention, self._rms_norm, self._gated, self._rope, self._add = (
            self._library.call(f"lora_{name}") for name in names
        )
        self._matmul = NativeLinear(self._library)
        self.unpack, self.lookup, self.linear = self._matmul.unpack, self._matmul.lookup, self._matmul.linear
        self._arena, self._replay = Arena(ARENA), self._library.replay()
        self._groups: WeakKeyDictionary[DeltaGroup, _PackedGroup] = WeakKeyDictionary()

    def delta(self, x: Tensor, outputs: list[Tensor], group: DeltaGroup, segments: Segments) -> None:
        count = segments.count
        if count == 0:
            return
        packed = self._groups.get(group)
        if packed is None:
            packed = self._groups[group] = _PackedGroup(group)
        check_delta(x, outputs, group)
        pointers: list[int] = []
        for output in outputs:
            pointers += (output.data_ptr(), output.stride(0))
        start, end, slot, weight = segments.start, segments.end, segments.slot, segments.weight
        if start.dtype is not torch.int32 or slot.dtype is not torch.int32 or weight.dtype is not torch.float32:
            raise TypeError("segments are int32, their weights float32")
        call = CALLS["DeltaCall"].pack(
            group=packed.address,
            x=x.data_ptr(),
            x_stride=x.stride(0),
            tokens=x.shape[0],
            type=type_number(x.dtype),
            threads=torch.get_num_threads(),
            segments=count,
            start=start.data_ptr(),
            end=end.data_ptr(),
            slot=slot.data_ptr(),
            weight=weight.data_ptr(),
            output=pointers,
        )
        wrong = self._delta(call)
        if wrong:
            raise ValueError(f"segment {wrong - 1} lies outside the batch or the slots")

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

    def pack(self, weights: Sequence[Tensor], scheme: Scheme | None = None) -> list[PackedWeight]:
        """Each weight by itself, as `linear` reads them one after the other."""
        return [self._matmul.pack(weight, scheme) for weight in weights]

    def new_recording(self, *, check_values: bool) -> CallRecording:
        add, record_on = self._add_tensors, self._library.record_on
        return CallRecording(self._arena, self._replay, add, record_on, check_values=check_values)

    def _add_tensors(self, x: Tensor, y: Tensor, total: Tensor) -> bool:
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

    def write_kv(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, kv_index: Tensor) -> None:
        blocks, size, heads, _ = keys.shape
        tokens = kv_index.shape[0]
        check_write(keys, values, k, v, kv_index)
        k_token, k_head = _byte_strides(k)
        v_token, v_head = _byte_strides(v)
        call = CALLS["WriteCall"].pack(
            keys=_pool(keys),
            values=_pool(values),
            k=k.data_ptr(),
            k_token=k_token,
            k_head=k_head,
            v=v.data_ptr(),
            v_token=v_token,
            v_head=v_head,
            index=kv_index.contiguous().data_ptr(),
            tokens=tokens,
            kv_heads=heads,
            blocks=blocks,
            block_size=size,
            threads=torch.get_num_threads(),
        )
        wrong = self._write_kv(call)
        if wrong:
            raise ValueError(f"the KV index of token {wrong - 1} is not in the pool")

    def attention(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        metadata: AttentionMetadata,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        tokens, heads, key_dim = q.shape
        blocks, size, kv_heads, value_dim = values.shape
        if keys.shape != (blocks, size, kv_heads, key_dim) or heads % kv_heads:
            raise ValueError(f"q {tuple(q.shape)} does not fit the pool {tuple(keys.shape)}")
        if keys.dtype is not values.dtype:
            raise TypeError("keys and values share a type")
        table = metadata.block_table.contiguous()
        for part in (metadata.query_start, metadata.context, table):
            if part.dtype is not torch.int32:
                raise TypeError("attention metadata is int32")
        if sinks is not None:
            sinks = sinks.to(torch.float32).contiguous()
        out = torch.empty(tokens, heads, value_dim, dtype=q.dtype)
        q_token, q_head = _byte_strides(q)
        call = CALLS["AttentionCall"].pack(
            keys=_pool(keys),
            values=_pool(values),
            q=q.data_ptr(),
            q_token=q_token,
            q_head=q_head,
            q_type=type_number(q.dtype),
            out=out.data_ptr(),
            query_start=metadata.query_start.data_ptr(),
            context=metadata.context.data_ptr(),
            block_table=table.data_ptr(),
            table_width=table.shape[1],
            sequences=metadata.context.shape[0],
            tokens=tokens,
            heads=heads,
            kv_heads=kv_heads,
            blocks=blocks,
            block_size=size,
            window=window or 0,
            threads=torch.get_num_threads(),
            sinks=0 if sinks is None else sinks.data_ptr(),
            scale=scale,
            softcap=softcap or 0.0,
        )
        wrong = self._attention(call)
        if wrong:
            raise ValueError(f"sequence {wrong - 1} does not fit its rows, context or blocks")
        return out


def _pool(pool: Tensor) -> tuple[int | float, ...]:
    """`Pool` in calls.h, of keys or values [blocks, block_size, kv_heads, dim]."""
    block, position, head, unit = pool.stride()
    if unit != 1:
        raise ValueError("heads of the KV pool are contiguous")
    each = pool.element_size()
    return CALLS["Pool"].values(
        data=pool.data_ptr(),
        block=block * each,
        position=position * each,
        head=head * each,
        type=type_number(pool.dtype),
        dim=pool.shape[3],
    )


def _heads(x: Tensor) -> tuple[int | float, ...]:
    """`Heads` in calls.h, of queries or keys [1, heads, tokens, dim]."""
    return CALLS["Heads"].values(data=x.data_ptr(), token=x.stride(2), head=x.stride(1), heads=x.shape[1])


def _byte_strides(rows: Tensor) -> tuple[int, int]:
    """Of a token and of a head, of rows [tokens, heads, dim]."""
    token, head, unit = rows.stride()
    if unit != 1:
        raise ValueError("heads are contiguous")
    each = rows.element_size()
    return token * each, head * each
