"""The native CPU backend: checks types and shapes, packs addresses and sizes, and calls the C++ kernels.

A step makes hundreds of these calls, each a few dozen microseconds long, so a call is one packed struct and one foreign
call (which releases the GIL). C++ checks every index that it follows; Python checks types and shapes, because with a
wrong one C++ would write outside its tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from lora_serve.kernels.composed import ComposedBackward, ComposedOperations, sum_of
from lora_serve.kernels.contract import GraphBuckets, Layers, ReplaySupport
from lora_serve.kernels.cpu.attention import NativeAttention
from lora_serve.kernels.cpu.build import CHECKED
from lora_serve.kernels.cpu.delta import NativeDelta
from lora_serve.kernels.cpu.library import Library
from lora_serve.kernels.cpu.matmul import NativeLinear
from lora_serve.kernels.cpu.pointwise import NativePointwise
from lora_serve.kernels.cpu.recording import Arena, CallRecording
from lora_serve.kernels.packed_weight import PackedExpertWeights, PackedWeight, Scheme

# Bytes that the results of a recorded pass may take. A checked build gives each result an allocation of its own, whose
# ends the sanitizer sees.
ARENA = 0 if CHECKED else 1 << 28


class NativeKernels(ComposedOperations, ComposedBackward):
    """`Kernels` on the CPU, in a library that `build` or `prebuilt` gave.

    Types are fp32, bf16 and fp16; anything else is a TypeError. Shapes, indices or ranges that do not fit are a
    ValueError, before anything is written.
    """

    name = "native"
    replay: ReplaySupport = "recorded_steps"
    graph_buckets: GraphBuckets | None = None
    has_grouped_linear = True

    def __init__(self, library: Path, build: str = "") -> None:
        self.build = build
        self._library = Library(library)
        self._arena, self._replay = Arena(ARENA), self._library.replay()
        self._matmul, self._pointwise = NativeLinear(self._library), NativePointwise(self._library)
        attention = NativeAttention(self._library)
        self.unpack, self.lookup, self.linear = self._matmul.unpack, self._matmul.lookup, self._matmul.linear
        self.grouped_linear, self.outputs_of = self._matmul.grouped_linear, self._matmul.outputs_of
        self.rms_norm, self.gated_activation = self._pointwise.rms_norm, self._pointwise.gated_activation
        self.rope, self.write_kv, self.attention = self._pointwise.rope, attention.write_kv, attention.attention
        self.delta = NativeDelta(self._library).delta

    def pack(
        self, weights: Sequence[Tensor], scheme: Scheme | None = None, importance: Tensor | None = None
    ) -> list[PackedWeight]:
        """Each weight by itself, as `linear` reads them one after the other."""
        return [self._matmul.pack(weight, scheme, importance) for weight in weights]

    def exact_linear(self, x: Tensor, layers: Layers) -> list[Tensor]:
        return [self._matmul.exact(x, packed, bias) for packed, bias in layers]

    def linear_backward(self, grads: Sequence[Tensor], weights: Sequence[PackedWeight]) -> Tensor:
        return sum_of([part for pair in zip(grads, weights, strict=True) for part in self._matmul.backward(*pair)])

    def pack_experts(
        self, weights: Tensor, scheme: Scheme | None = None, importance: Tensor | None = None
    ) -> PackedExpertWeights:
        return PackedExpertWeights.pack(weights, lambda weight: self._matmul.pack(weight, scheme, importance))

    def new_recording(self, *, check_values: bool) -> CallRecording:
        add, record_on = self._pointwise.add, self._library.record_on
        return CallRecording(self._arena, self._replay, add, record_on, check_values=check_values)
