"""The native CPU backend: packs addresses and sizes, and lets `delta.cpp` and `attention.cpp` do the work.

A step makes hundreds of these calls, each a few dozen microseconds long, so a call is one packed struct and one foreign
call (which releases the GIL). What never changes about a group is packed once. The C++ side checks every index that it
follows; this side checks types and shapes, because a wrong one would write where it must not.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from struct import Struct
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lora_serve.kernels.checks import check_delta, check_gated, check_norm, check_rope, check_write
from lora_serve.kernels.contract import Activation, AttentionMetadata, DeltaGroup, GraphBuckets, Segments
from lora_serve.kernels.cpu.build import CHECKED
from lora_serve.kernels.cpu.library import TYPES, Library, type_number
from lora_serve.kernels.cpu.matmul import NativeLinear
from lora_serve.kernels.cpu.recording import Arena, CallRecording
from lora_serve.kernels.packed_weight import PackedWeight

# Bytes that the results of a noted pass may take. A checked build gives each result memory of its own, between whose
# ends the sanitizer sees.
ARENA = 0 if CHECKED else 1 << 28

_WRITE = Struct("6q6q 3q3q q5q")
_ATTENTION = Struct("6q6q 4q q3q 9q q2d")
_NORM = Struct("3q 7q d")
_GATED = Struct("3q 7q")
_ROPE = Struct("4q4q 5q 5q")
_ADD = Struct("6q")
_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}


class _PackedGroup:
    """What C++ reads of a group, and how a call with that many outputs is packed."""

    def __init__(self, group: DeltaGroup) -> None:
        modules, slots = group.rank.shape
        self.in_features = group.in_features
        self.out_features = group.out_features
        fields = (
            group.a.data_ptr(),
            group.b.data_ptr(),
            group.rank.data_ptr(),
            modules,
            slots,
            group.in_features,
            type_number(group.dtype),
            *group.out_features,
        )
        self._memory = (ctypes.c_int64 * len(fields))(*fields)
        self.address = ctypes.addressof(self._memory)
        self.call = Struct(f"{11 + 2 * modules}q")


class NativeKernels:
    """`Kernels` on the CPU, from a library that `build.library` built.

    Types are fp32, bf16 and fp16; anything else is a TypeError. Shapes, places or ranges that do not fit are a
    ValueError, before anything is written.
    """

    name = "native"
    ladder: GraphBuckets | None = None

    def __init__(self, library: Path) -> None:
        self._library = Library(library)
        names = ("delta", "write_kv", "attention", "rms_norm", "gated", "rope", "add")
        self._delta, self._write_kv, self._attention, self._rms_norm, self._gated, self._rope, self._add = (
            self._library.call(f"lora_{name}") for name in names
        )
        layers = NativeLinear(self._library)
        self.pack, self.unpack, self.rows, self.linear = layers.pack, layers.unpack, layers.rows, layers.linear
        self._arena, self._play = Arena(ARENA), self._library.play()
        self._groups: WeakKeyDictionary[DeltaGroup, _PackedGroup] = WeakKeyDictionary()

    def delta(self, x: Tensor, outputs: list[Tensor], group: DeltaGroup, segments: Segments) -> None:
        """See `Kernels.delta`."""
        count = segments.count
        if count == 0:
            return
        packed = self._groups.get(group)
        if packed is None:
            packed = self._groups[group] = _PackedGroup(group)
        check_delta(x, outputs, group)
        places: list[int] = []
        for output in outputs:
            places += (output.data_ptr(), output.stride(0))
        start, end, slot, weight = segments.start, segments.end, segments.slot, segments.weight
        if not start.dtype is end.dtype is slot.dtype is torch.int32 or weight.dtype is not torch.float32:
            raise TypeError("segments are int32, their weights float32")
        if not all(part.shape == (count,) and part.is_contiguous() for part in (start, end, slot, weight)):
            raise ValueError("a segment has a start, an end, a slot and a weight")
        call = packed.call.pack(
            packed.address,
            x.data_ptr(),
            x.stride(0),
            x.shape[0],
            type_number(x.dtype),
            torch.get_num_threads(),
            count,
            start.data_ptr(),
            end.data_ptr(),
            slot.data_ptr(),
            weight.data_ptr(),
            *places,
        )
        wrong = self._delta(call)
        if wrong:
            raise ValueError(f"segment {wrong - 1} lies outside the batch or the slots")

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, plus_one: bool) -> Tensor:
        """See `Kernels.rms_norm`."""
        width = x.shape[-1]
        rows = x.reshape(-1, width)
        check_norm(rows, weight)
        y = torch.empty(x.shape, dtype=x.dtype)
        self._rms_norm(
            _NORM.pack(
                rows.data_ptr(),
                weight.data_ptr(),
                y.data_ptr(),
                rows.shape[0],
                width,
                rows.stride(0),
                type_number(x.dtype),
                type_number(weight.dtype),
                plus_one,
                torch.get_num_threads(),
                eps,
            )
        )
        return y

    def gated_activation(self, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        """See `Kernels.gated`."""
        check_gated(gate, up)
        width = gate.shape[-1]
        left, right = gate.reshape(-1, width), up.reshape(-1, width)
        y = torch.empty(gate.shape, dtype=gate.dtype)
        self._gated(
            _GATED.pack(
                left.data_ptr(),
                right.data_ptr(),
                y.data_ptr(),
                left.shape[0],
                width,
                left.stride(0),
                right.stride(0),
                type_number(gate.dtype),
                _ACTIVATIONS[activation],
                torch.get_num_threads(),
            )
        )
        return y

    def rope(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """See `Kernels.rope`."""
        check_rope(q, k, cos, sin)
        _, heads, tokens, dim = q.shape
        kv_heads = k.shape[1]
        cos, sin = cos.contiguous(), sin.contiguous()
        q_out = torch.empty(tokens, heads, dim, dtype=q.dtype)
        k_out = torch.empty(tokens, kv_heads, dim, dtype=k.dtype)
        self._rope(
            _ROPE.pack(
                *(q.data_ptr(), q.stride(2), q.stride(1), heads),
                *(k.data_ptr(), k.stride(2), k.stride(1), kv_heads),
                q_out.data_ptr(),
                k_out.data_ptr(),
                cos.data_ptr(),
                sin.data_ptr(),
                dim,
                tokens,
                dim,
                type_number(q.dtype),
                type_number(cos.dtype),
                torch.get_num_threads(),
            )
        )
        return q_out.transpose(0, 1)[None], k_out.transpose(0, 1)[None]

    def beside(self, layers: Sequence[PackedWeight]) -> list[PackedWeight]:
        """See `Kernels.beside`: they are read one after the other."""
        return list(layers)

    def tape(self, *, check_values: bool = False) -> CallRecording:
        """See `Kernels.tape`."""
        return CallRecording(self._arena, self._play, self._sum, self._library.listen, check_values=check_values)

    def _sum(self, x: Tensor, y: Tensor, total: Tensor) -> bool:
        """total = x + y of contiguous tensors of one shape and type, rounded as torch does; False for other types."""
        if x.dtype not in TYPES:
            return False
        places = (x.data_ptr(), y.data_ptr(), total.data_ptr())
        self._add(_ADD.pack(*places, x.numel(), type_number(x.dtype), torch.get_num_threads()))
        return True

    def write_kv(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, kv_index: Tensor) -> None:
        """See `Kernels.write_kv`."""
        blocks, size, heads, _ = keys.shape
        tokens = kv_index.shape[0]
        check_write(keys, values, k, v, kv_index)
        call = _WRITE.pack(
            *_pool(keys),
            *_pool(values),
            *_rows(k),
            *_rows(v),
            kv_index.contiguous().data_ptr(),
            tokens,
            heads,
            blocks,
            size,
            torch.get_num_threads(),
        )
        wrong = self._write_kv(call)
        if wrong:
            raise ValueError(f"the place of token {wrong - 1} is not in the pool")

    def attention(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        spans: AttentionMetadata,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """See `Kernels.attention`."""
        tokens, heads, key_dim = q.shape
        blocks, size, kv_heads, value_dim = values.shape
        if keys.shape != (blocks, size, kv_heads, key_dim) or heads % kv_heads:
            raise ValueError(f"q {tuple(q.shape)} does not fit the pool {tuple(keys.shape)}")
        if keys.dtype is not values.dtype:
            raise TypeError("keys and values share a type")
        table = spans.block_table.contiguous()
        for part in (spans.query_start, spans.context, table):
            if part.dtype is not torch.int32:
                raise TypeError("spans are int32")
        sequences = spans.context.shape[0]
        if spans.query_start.shape[0] != sequences + 1 or table.shape[0] != sequences:
            raise ValueError(f"spans of {sequences} sequences have as many rows of blocks, and an end for each")
        if sinks is not None and sinks.shape != (heads,):
            raise ValueError(f"sinks {tuple(sinks.shape)} do not fit {heads} heads")
        if sinks is not None:
            sinks = sinks.to(torch.float32).contiguous()
        out = torch.empty(tokens, heads, value_dim, dtype=q.dtype)
        call = _ATTENTION.pack(
            *_pool(keys),
            *_pool(values),
            *_rows(q),
            type_number(q.dtype),
            out.data_ptr(),
            spans.query_start.data_ptr(),
            spans.context.data_ptr(),
            table.data_ptr(),
            table.shape[1],
            spans.context.shape[0],
            tokens,
            heads,
            kv_heads,
            blocks,
            size,
            window or 0,
            torch.get_num_threads(),
            0 if sinks is None else sinks.data_ptr(),
            scale,
            softcap or 0.0,
        )
        wrong = self._attention(call)
        if wrong:
            raise ValueError(f"sequence {wrong - 1} does not fit its rows, context or blocks")
        return out


def _pool(pool: Tensor) -> tuple[int, int, int, int, int, int]:
    """Address, byte strides of block, position and head, type, head size."""
    block, position, head, unit = pool.stride()
    if unit != 1:
        raise ValueError("heads of the KV pool are contiguous")
    each = pool.element_size()
    return pool.data_ptr(), block * each, position * each, head * each, type_number(pool.dtype), pool.shape[3]


def _rows(rows: Tensor) -> tuple[int, int, int]:
    """Address and byte strides of token and head."""
    token, head, unit = rows.stride()
    if unit != 1:
        raise ValueError("heads are contiguous")
    each = rows.element_size()
    return rows.data_ptr(), token * each, head * each
