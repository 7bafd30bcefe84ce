"""Operations that consist of a backend's other ones, for backends that gain nothing by running them as one."""

from __future__ import annotations

from torch import Tensor

from lora_serve.kernels.contract import Activation, DeltaGroup, Kernels, Layers, Segments


class ComposedOperations:
    """The part of `Kernels` that follows from the rest of it."""

    def add_rms_norm(
        self: Kernels, x: Tensor, y: Tensor, weight: Tensor, eps: float, *, plus_one: bool
    ) -> tuple[Tensor, Tensor]:
        total = x + y  # a recorded step has a kernel for it
        return total, self.rms_norm(total, weight, eps, plus_one=plus_one)

    def rope_and_write_kv(
        self: Kernels,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        keys: Tensor,
        values: Tensor,
        kv_index: Tensor,
    ) -> Tensor:
        queries, rotated = self.rope(q, k, cos, sin)
        self.write_kv(keys, values, rotated[0].transpose(0, 1), v[0].transpose(0, 1), kv_index)
        return queries

    def adapted_linear(self: Kernels, x: Tensor, layers: Layers, group: DeltaGroup, segments: Segments) -> list[Tensor]:
        outputs = self.linear(x, layers)
        self.delta(x, outputs, group, segments)
        return outputs

    def adapted_gated_linear(
        self: Kernels, x: Tensor, layers: Layers, group: DeltaGroup, segments: Segments, activation: Activation
    ) -> Tensor:
        gate, up = self.adapted_linear(x, layers, group, segments)
        return self.gated_activation(gate, up, activation)
