"""Operations that consist of a backend's other ones, for backends that gain nothing by running them as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lora_serve.kernels.contract import Activation, DeltaGroup, Kernels, Layers, Rotation, Segments
from lora_serve.kernels.packed_weight import PackedWeight


class ComposedOperations:
    """The part of `Kernels` that follows from the rest of it."""

    def add_rms_norm(
        self: Kernels, x: Tensor, y: Tensor, weight: Tensor, eps: float, *, plus_one: bool
    ) -> tuple[Tensor, Tensor]:
        total = x + y  # a recorded step has a kernel for it
        return total, self.rms_norm(total, weight, eps, plus_one=plus_one)

    def rope_and_write_kv(
        self: Kernels, rotation: Rotation, v: Tensor, keys: Tensor, values: Tensor, kv_index: Tensor
    ) -> Tensor:
        queries, rotated = self.rope(rotation.q, rotation.k, rotation.cos, rotation.sin)
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


class ComposedBackward:
    """The part of `Kernels` that training needs, in torch's products."""

    def exact_linear(self: Kernels, x: Tensor, layers: Layers) -> list[Tensor]:
        return [nn.functional.linear(x, self.unpack(packed).to(x.dtype), bias) for packed, bias in layers]

    def linear_backward(self: Kernels, grads: Sequence[Tensor], weights: Sequence[PackedWeight]) -> Tensor:
        return sum_of([grad @ self.unpack(packed).to(grad.dtype) for grad, packed in zip(grads, weights, strict=True)])

    def delta_backward(
        self,
        x: Tensor,
        grads: Sequence[Tensor],
        dx: Tensor,
        group: DeltaGroup,
        segments: Segments,
        gradients: DeltaGroup,
    ) -> None:
        wide = torch.promote_types(x.dtype, torch.float32)
        runs = (segments.start.tolist(), segments.end.tolist(), segments.slot.tolist(), segments.weight.tolist())
        for start, end, slot, weight in zip(*runs, strict=True):
            deltas = [group.get(module, slot) for module in range(len(grads))]
            if start == end or not any(deltas):
                continue
            rows = x[start:end].to(wide)
            own = torch.zeros_like(rows)
            for module, delta in enumerate(deltas):
                gradient = gradients.get(module, slot)
                if delta is None or gradient is None:
                    continue
                a, b, g = delta.a.to(wide), delta.b.to(wide), grads[module][start:end].to(wide)
                g = g if weight == 1 else g * weight
                inner = g @ b.T  # [rows, rank]
                gradient.b.addmm_((rows @ a.T).T, g)
                gradient.a.addmm_(inner.T, rows)
                own.addmm_(inner, a)
            dx[start:end] += own.to(dx.dtype)


def sum_of(parts: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one dtype, added in at least float32; a single one is returned as it is."""
    if len(parts) == 1:
        return parts[0]
    total = parts[0].to(torch.promote_types(parts[0].dtype, torch.float32))
    for part in parts[1:]:
        total = total + part if total is parts[0] else total.add_(part)
    return total.to(parts[0].dtype)
