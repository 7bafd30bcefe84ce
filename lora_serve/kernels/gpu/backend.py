"""The GPU backend: Triton for adapters and attention, the vendor's library for the base's matrices, graphs as tapes.

Nothing here waits for the device. Checks are of shapes and types; what is in a tensor (a slot beyond the tables, a
block beyond the pool) cannot be checked without waiting, so whoever calls must be right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from lora_serve.kernels.contract import GraphBuckets
from lora_serve.kernels.gpu import matmul
from lora_serve.kernels.gpu.attention import attention
from lora_serve.kernels.gpu.cuda_graph import CapturedGraph
from lora_serve.kernels.gpu.delta import delta
from lora_serve.kernels.gpu.pointwise import gated_activation, rms_norm, rope, write_kv
from lora_serve.kernels.packed_weight import PackedWeight, Scheme
from lora_serve.kernels.reference import ReferenceKernels

ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
LONGEST = 16  # rows that a tensor core multiplies at once
RANK = 1024  # scratch memory of graphs is made for it; adapters beyond it are served without graphs


class GpuKernels:
    """`Kernels` on a GPU, or anywhere in Triton's interpreter.

    Types are fp32, bf16 and fp16; anything else is a TypeError. Shapes that do not fit are a ValueError.
    """

    name = "triton"
    ladder: GraphBuckets | None = GraphBuckets(ROWS, LONGEST, RANK)

    delta = staticmethod(delta)
    write_kv = staticmethod(write_kv)
    attention = staticmethod(attention)
    rms_norm = staticmethod(rms_norm)
    gated_activation = staticmethod(gated_activation)
    rope = staticmethod(rope)

    def __init__(self) -> None:
        self._plain = ReferenceKernels()  # maps in full precision
        self._tapes: WeakSet[CapturedGraph] = WeakSet()
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        # Sums are in float32, also between the parts that a product is cut into.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

    def pack(self, weight: Tensor, scheme: Scheme | None = None) -> PackedWeight:
        """See `Kernels.pack`."""
        return self._plain.pack(weight) if scheme is None else matmul.pack(weight, scheme)

    def unpack(self, packed: PackedWeight) -> Tensor:
        """See `Kernels.unpack`."""
        return self._plain.unpack(packed) if packed.scheme is None else matmul.unpack(packed)

    def beside(self, layers: Sequence[PackedWeight]) -> list[PackedWeight]:
        """See `Kernels.beside`: one matrix, multiplied at once; each map is some of its rows."""
        first = layers[0]
        if first.scheme is not None:
            return matmul.beside(layers)
        if len(layers) == 1 or any(each.dtype is not first.dtype for each in layers):
            return list(layers)
        whole = torch.cat([each.data for each in layers])
        rows = whole.split_with_sizes([each.shape[0] for each in layers])
        return [replace(each, data=own) for each, own in zip(layers, rows, strict=True)]

    def rows(self, packed: PackedWeight, ids: Tensor) -> Tensor:
        """See `Kernels.rows`."""
        return self._plain.rows(packed, ids)

    def linear(self, x: Tensor, layers: Sequence[tuple[PackedWeight, Tensor | None]]) -> list[Tensor]:
        """See `Kernels.linear`. Maps that were laid out beside each other are one product."""
        if layers[0][0].scheme is not None:
            return matmul.linear(x, layers)
        whole = matmul.neighbours([packed.data for packed, _ in layers], 0)
        if whole is None or len(layers) == 1:
            return self._plain.linear(x, layers)
        outputs = nn.functional.linear(x, whole).split_with_sizes([packed.shape[0] for packed, _ in layers], 1)
        for y, (_, bias) in zip(outputs, layers, strict=True):
            if bias is not None:
                y += bias
        return list(outputs)

    def tape(self, *, check_values: bool = False) -> CapturedGraph | None:
        """See `Kernels.tape`; a capture is always wary."""
        if not torch.cuda.is_available():
            return None
        if not self._tapes:  # a pool whose graphs are all gone cannot be used again
            self._pool = torch.cuda.graph_pool_handle()
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        tape = CapturedGraph(self._pool, self._stream)
        self._tapes.add(tape)
        return tape
