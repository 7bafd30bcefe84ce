"""Differentiable experts over the resident base: gradients pass through them, and their own weights are not trained.

Experts in full precision are run by the modelling code. Those that were quantised are multiplied expert by expert, over
rows sorted by expert (`expert_rows.py`), with the weights that they stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lora_serve.kernels.contract import Kernels
from lora_serve.kernels.packed_weight import PackedExpertWeights
from lora_serve.model.expert_rows import ExpertRows, run_experts
from lora_serve.model.packed_experts import PackedExperts


class FrozenExperts(nn.Module):
    """Takes the place of a module of stacked experts in the training pass.

    Args:
        resident: the base's own module, or `PackedExperts`.
    """

    def __init__(self, resident: Callable[[], nn.Module], kernels: Kernels) -> None:
        super().__init__()
        self._resident, self._kernels = resident, kernels

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, hidden], top_k_index and top_k_weights [tokens, k] → [tokens, hidden]."""
        resident = self._resident()
        if not isinstance(resident, PackedExperts):
            plain: Tensor = resident(hidden_states, top_k_index, top_k_weights)
            return plain
        rows = ExpertRows.sort(top_k_index, resident.stacked.num_experts)

        def project(name: str, x: Tensor) -> Tensor:
            bias = getattr(resident.stacked, f"{name}_bias", None)
            packed, ends = resident.packed[name], rows.end.tolist()
            y: Tensor = ExpertsProduct.apply(x, packed, bias, ends, self._kernels)  # type: ignore[no-untyped-call]
            return y

        return run_experts(resident.stacked, rows, hidden_states, top_k_weights, project)


class ExpertsProduct(torch.autograd.Function):
    """One layer of all experts over rows [rows, in] sorted by expert, whose rows end at `ends`; saves no tensor."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: PackedExpertWeights, bias: Tensor | None, ends: list[int], kernels: Kernels
    ) -> Tensor:
        ctx.weights, ctx.ends, ctx.kernels = weights, ends, kernels
        y = x.new_zeros(x.shape[0], weights.shape[0])
        for expert, rows in _runs(ends):
            own = None if bias is None else bias[expert]
            (y[rows],) = kernels.exact_linear(x[rows], [(weights[expert], own)])
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.contiguous()
        dx = grad.new_zeros(grad.shape[0], ctx.weights.shape[1])
        for expert, rows in _runs(ctx.ends):
            dx[rows] = ctx.kernels.linear_backward([grad[rows]], [ctx.weights[expert]])
        return dx, None, None, None, None


def _runs(ends: list[int]) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and these."""
    first = 0
    for expert, last in enumerate(ends):
        if first < last:
            yield expert, slice(first, last)
        first = last
