"""The GPU backend: Triton kernels for adapters, attention and quantised layers, cuBLAS for full precision, CUDA graphs.

Nothing here waits for the device. Shapes and types are checked; values (a slot beyond the tables, a block beyond the
pool) cannot be checked without waiting, so the caller must pass valid ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from lora_serve.kernels.composed import ComposedBackward
from lora_serve.kernels.contract import Activation, DeltaGroup, GraphBuckets, Layers, ReplaySupport, Segments
from lora_serve.kernels.gpu import matmul, pointwise
from lora_serve.kernels.gpu.attention import attention
from lora_serve.kernels.gpu.cuda_graph import CapturedGraph
from lora_serve.kernels.gpu.delta import DeltaCall, adds_nothing, delta
from lora_serve.kernels.gpu.delta_backward import delta_backward
from lora_serve.kernels.gpu.graph_sizes import GRAPH_SIZES
from lora_serve.kernels.gpu.plan_table import PlanTable, current
from lora_serve.kernels.gpu.stream_fork import StreamFork
from lora_serve.kernels.packed_weight import PackedExpertWeights, PackedWeight, Scheme
from lora_serve.kernels.reference import ReferenceKernels


class GpuKernels(ComposedBackward):
    """`Kernels` on a GPU, or on any device in Triton's interpreter.

    Types are fp32, bf16 and fp16; anything else is a TypeError. Shapes that do not fit are a ValueError.

    Args:
        plans: how kernels are launched; None: as measured on the current device, if it was.
        fork: for kernels beside others in a CUDA graph.
    """

    name, build = "triton", ""
    graph_buckets: GraphBuckets | None = GRAPH_SIZES
    has_grouped_linear = False

    def __init__(self, plans: PlanTable | None = None, fork: StreamFork | None = None) -> None:
        self._plans = current() if plans is None else plans
        self._fork = StreamFork() if fork is None else fork
        self.attention = partial(attention, table=self._plans)
        dependent = self._plans.dependent_pointwise
        self.rms_norm = partial(pointwise.rms_norm, dependent=dependent)
        self.add_rms_norm = partial(pointwise.add_rms_norm, dependent=dependent)
        self.gated_activation = partial(pointwise.gated_activation, dependent=dependent)
        self.rope = partial(pointwise.rope, dependent=dependent)
        self.write_kv = partial(pointwise.write_kv, dependent=dependent)
        self.rope_and_write_kv = partial(pointwise.rope_and_write_kv, dependent=dependent)
        self.replay: ReplaySupport = "cuda_graphs" if torch.cuda.is_available() else "none"
        self._plain = ReferenceKernels()  # linear layers in full precision
        self._graphs: WeakSet[CapturedGraph] = WeakSet()
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        # Sums are in float32, also between the parts that a product is cut into.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

    def pack(
        self, weights: Sequence[Tensor], scheme: Scheme | None = None, importance: Tensor | None = None
    ) -> list[PackedWeight]:
        """Weights of one type are laid out as one matrix, so that `linear` is one product."""
        if scheme is not None:
            return matmul.merge([matmul.pack(weight, scheme, importance) for weight in weights])
        if len(weights) == 1 or any(each.dtype is not weights[0].dtype for each in weights):
            return self._plain.pack(weights)
        merged = torch.cat(tuple(weights)).split_with_sizes([each.shape[0] for each in weights])
        return self._plain.pack(merged)

    def unpack(self, packed: PackedWeight) -> Tensor:
        return self._plain.unpack(packed) if packed.scheme is None else matmul.unpack(packed)

    def outputs_of(self, packed: PackedWeight, outputs: slice) -> PackedWeight:
        plain = packed.scheme is None
        return self._plain.outputs_of(packed, outputs) if plain else matmul.outputs_of(packed, outputs)

    def lookup(self, packed: PackedWeight, ids: Tensor) -> Tensor:
        return self._plain.lookup(packed, ids)

    def linear(self, x: Tensor, layers: Layers) -> list[Tensor]:
        """One product for layers that were packed together."""
        if layers[0][0].scheme is not None:
            return matmul.linear(x, layers, self._plans)
        whole = matmul.neighbours([packed.data for packed, _ in layers], 0)
        if whole is None or len(layers) == 1:
            return self._plain.linear(x, layers)
        outputs = nn.functional.linear(x, whole).split_with_sizes([packed.shape[0] for packed, _ in layers], 1)
        for y, (_, bias) in zip(outputs, layers, strict=True):
            if bias is not None:
                y += bias
        return list(outputs)

    def delta(self, x: Tensor, outputs: Sequence[Tensor], group: DeltaGroup, segments: Segments) -> None:
        delta(x, outputs, group, segments, self._plans)

    def delta_backward(
        self,
        x: Tensor,
        grads: Sequence[Tensor],
        dx: Tensor,
        group: DeltaGroup,
        segments: Segments,
        gradients: DeltaGroup,
    ) -> None:
        delta_backward(x, grads, dx, group, segments, gradients, self._plans)

    def adapted_linear(
        self,
        x: Tensor,
        layers: Layers,
        group: DeltaGroup,
        segments: Segments,
    ) -> list[Tensor]:
        """In a CUDA graph, the delta's first kernel may run beside the base's product, which does not read its result.

        Memory for that result is allocated before the fork.
        """
        if adds_nothing(x, segments):
            return self.linear(x, layers)
        call = DeltaCall(x, group, segments, self._plans)
        outputs = self._linear_and_shrink(x, layers, call)
        call.expand(outputs)
        return outputs

    def adapted_gated_linear(
        self,
        x: Tensor,
        layers: Layers,
        group: DeltaGroup,
        segments: Segments,
        activation: Activation,
    ) -> Tensor:
        """As planned, by two kernels for the delta and one to gate, or by two for both."""
        if adds_nothing(x, segments):
            gate, up = self.linear(x, layers)
            return self.gated_activation(gate, up, activation)
        call = DeltaCall(x, group, segments, self._plans)
        outputs = self._linear_and_shrink(x, layers, call)
        if call.gated:
            return call.expand_gated(outputs, activation)
        call.expand(outputs)
        gate, up = outputs
        return self.gated_activation(gate, up, activation)

    def _linear_and_shrink(self, x: Tensor, layers: Layers, call: DeltaCall) -> list[Tensor]:
        if call.beside and self._fork.ready:
            with self._fork.beside(call.shrink):
                return self.linear(x, layers)
        outputs = self.linear(x, layers)
        call.shrink()
        return outputs

    def pack_experts(
        self, weights: Tensor, scheme: Scheme | None = None, importance: Tensor | None = None
    ) -> PackedExpertWeights:
        """Not supported: `has_grouped_linear` is false."""
        raise NotImplementedError

    def grouped_linear(self, x: Tensor, weights: PackedExpertWeights, bias: Tensor | None, end: Tensor) -> Tensor:
        """Not supported: `has_grouped_linear` is false."""
        raise NotImplementedError

    def new_recording(self, *, check_values: bool) -> CapturedGraph:
        """A CUDA graph, whose capture always checks values."""
        if not self._graphs:  # a memory pool whose graphs are all gone cannot be used again
            self._pool = torch.cuda.graph_pool_handle()
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._fork.prepare()
        graph = CapturedGraph(self._pool, self._stream)
        self._graphs.add(graph)
        return graph
