"""The kernel contract: the base's layers, linear ones over packed weights and pointwise ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from torch import Tensor

from lora_serve.kernels.packed_weight import PackedExpertWeights, PackedWeight, Scheme

Activation = Literal["silu", "gelu_tanh"]
Layers = Sequence[tuple[PackedWeight, Tensor | None]]  # weights and biases of layers that read the same input


class LayerOperations(Protocol):
    """Packing, linear layers, a mixture's experts, norms and gated activations.

    Attributes:
        has_grouped_linear: whether there are `pack_experts` and `grouped_linear`.
    """

    has_grouped_linear: bool

    def pack(
        self, weights: Sequence[Tensor], scheme: Scheme | None = None, importance: Tensor | None = None
    ) -> list[PackedWeight]:
        """Lay out the weights [out, in] (fp32, bf16 or fp16) of layers that read the same input, for `linear`.

        Raises NotImplementedError for a scheme that the backend has not: fp8 is for GPUs (`select.refuse_scheme`).

        Args:
            importance: of the inputs, [in]; see `packed_weight.quantize`.
        """
        ...

    def unpack(self, packed: PackedWeight) -> Tensor:
        """The weights [out, in] that a packed weight stands for: in their own dtype, float32 if quantised."""
        ...

    def lookup(self, packed: PackedWeight, ids: Tensor) -> Tensor:
        """unpack(packed)[ids] of a weight in full precision, without unpacking the rest: ids int64 [n] → [n, in]."""
        ...

    def linear(self, x: Tensor, layers: Layers) -> list[Tensor]:
        """Up to eight layers that read the same input: y = x @ unpack(packed).T + bias, accumulated in float32.

        The layers share dtype and scheme.

        Shapes: x [rows, in] with unit stride in the last dimension, bias [out] in x's dtype; returns [rows, out] in x's
        dtype, with unit stride in the last dimension. Where the weights are quantised, rows are rounded too: x is
        `packed_weight.round_rows(x, scheme)`. No row depends on another one.
        """
        ...

    def pack_experts(
        self, weights: Tensor, scheme: Scheme | None = None, importance: Tensor | None = None
    ) -> PackedExpertWeights:
        """Lay out one layer of a mixture's experts, weights [experts, out, in], for `grouped_linear`."""
        ...

    def grouped_linear(self, x: Tensor, weights: PackedExpertWeights, bias: Tensor | None, end: Tensor) -> Tensor:
        """Each expert's layer over its own rows of x, which are sorted by expert.

        Semantics: `y[end[e - 1] : end[e]]` (from 0 for the first) is `linear` of the same rows of x, `weights[e]` and
        `bias[e]`; rows from the last end on are zero.
        Shapes: x [rows, in] with unit stride in the last dimension, bias [experts, out] in x's dtype, end int64
        [experts], ascending; returns [rows, out] in x's dtype, contiguous.
        """
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, plus_one: bool) -> Tensor:
        """Root mean square norm of rows x [..., width], in x's dtype, computed in float32.

        n = x / sqrt(mean(x²) + eps); y = n * (1 + weight) with `plus_one`, else n rounded to x's dtype, times weight.
        """
        ...

    def add_rms_norm(
        self, x: Tensor, y: Tensor, weight: Tensor, eps: float, *, plus_one: bool
    ) -> tuple[Tensor, Tensor]:
        """x + y, rounded to their dtype, and the `rms_norm` of that: to the bits of the two operations by themselves.

        Shapes: x and y [..., width] of one dtype; both results as x, contiguous.
        """
        ...

    def gated_activation(self, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        """activation(gate) * up, both [..., width] of one dtype; the activation in float32, then rounded to it."""
        ...
