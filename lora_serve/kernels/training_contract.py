"""The kernel contract: what training needs besides `delta`, exact products and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from lora_serve.kernels.delta_contract import DeltaGroup, Segments
from lora_serve.kernels.layer_contract import Layers
from lora_serve.kernels.packed_weight import PackedWeight

PART_OUTPUTS = 32  # of which parts of a weight have a multiple


class TrainingOperations(Protocol):
    """Linear layers without rounding, also with parts of a weight, and backward passes."""

    def outputs_of(self, packed: PackedWeight, outputs: slice) -> PackedWeight:
        """The weight of some outputs, in the same memory, for `exact_linear`, `linear_backward` and `unpack`.

        The first is a multiple of `PART_OUTPUTS`, and so is the end, unless it is that of the weight.
        """
        ...

    def exact_linear(self, x: Tensor, layers: Layers) -> list[Tensor]:
        """`linear` of weights that are quantised without rounding the rows: y = x @ unpack(packed).T + bias.

        Quantised weights are rounded to x's dtype. Shapes as there; the layers may differ in dtype and scheme.
        """
        ...

    def linear_backward(self, grads: Sequence[Tensor], weights: Sequence[PackedWeight]) -> Tensor:
        """Gradient of the input that layers share: dx = Σ grads[m] @ unpack(weights[m]), of `exact_linear`.

        Shapes: grads[m] [rows, out_m] with unit stride in the last dimension; returns [rows, in] in their dtype,
        contiguous, memory that nothing else reads. No weight is unpacked longer than it is needed.
        """
        ...

    def delta_backward(
        self,
        x: Tensor,
        grads: Sequence[Tensor],
        dx: Tensor,
        group: DeltaGroup,
        segments: Segments,
        gradients: DeltaGroup,
    ) -> None:
        """Add the gradients of `delta`: of its input to dx, and of each slot's A and B to those of `gradients`.

        Semantics, for every segment s and module m with rank[m, slot[s]] > 0, accumulated in float32:

            rows = slice(start[s], end[s]);  a, b = A and B of (m, slot[s])
            g = weight[s] * grads[m][rows]
            h, dh = x[rows] @ a.T, g @ b.T                          # [rows, rank]
            B of gradients += h.T @ g;  A of gradients += dh.T @ x[rows]
            dx[rows] += dh @ a

        Shapes: x and dx [tokens, in], grads[m] [tokens, out_m]; all share a dtype. `gradients` has the group's shapes
        and ranks, and float32 tensors. Segments of one slot may follow each other; none cover the same rows.
        """
        ...
