"""LoRA deltas for mixture-of-experts layers whose experts are stacked in 3-D parameters.

An expert's slice of a stacked parameter is a site like any linear module. A batch without adapter rows runs the base's
own module. Otherwise each chosen expert computes its tokens in batch order, so that rows of one adapter stay one
segment, and the usual kernel adds their deltas:

    h = W_up[e] x + B A x;  h = gate(h);  y = W_down[e] h + B A h;  out += y · routing weight

Covers the modules that transformers marks with `use_experts_implementation` (Mixtral, Qwen-MoE, gpt-oss, ...).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_serve.kernels.contract import DeltaGroup, Segments
from lora_serve.model.forward_context import ForwardContext

UP = ("gate_up_proj", "up_proj")
DOWN = "down_proj"


def is_stacked(module: nn.Module) -> bool:
    """Whether a module stacks its experts in a form that `AdaptedExperts` supports."""
    marked = hasattr(module, "is_transposed") and hasattr(module, "has_gate") and hasattr(module, "_apply_gate")
    return marked and not getattr(module, "has_post_expert_norm", False) and DOWN in dict(module.named_parameters())


def stacked_parameters(module: nn.Module) -> dict[str, list[tuple[int, int]]]:
    """(in, out) features of each expert's slice, by parameter."""
    shapes = {}
    for name, parameter in module.named_parameters(recurse=False):
        if name in (*UP, DOWN) and parameter.ndim == 3:
            experts, rows, columns = parameter.shape
            shapes[name] = [(rows, columns) if module.is_transposed else (columns, rows)] * experts
    return shapes


def expert_weight(module: nn.Module, parameter: str, expert: int) -> Tensor:
    """One expert's weight [out, in]."""
    weight = cast(Tensor, getattr(module, parameter))[expert]
    return weight.T if module.is_transposed else weight


class AdaptedExperts(nn.Module):
    """Replaces the base's module of stacked experts.

    Args:
        groups: pointer tables of each expert, by parameter.
    """

    def __init__(self, base: nn.Module, groups: Mapping[str, list[DeltaGroup]], context: ForwardContext) -> None:
        super().__init__()
        self.base: Any = base
        self._groups = groups
        self._context = context
        self._up = next(name for name in UP if name in groups)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, hidden], top_k_index and top_k_weights [tokens, k] → [tokens, hidden]."""
        segments = self._context.step.segments
        if segments is None:
            plain: Tensor = self.base(hidden_states, top_k_index, top_k_weights)
            return plain
        out = torch.zeros_like(hidden_states)
        for expert in torch.unique(top_k_index).tolist():
            if expert >= self.base.num_experts:
                continue  # an empty place of the router
            tokens, choice = torch.where(top_k_index == expert)  # ascending: a token chooses an expert once
            expert_segments = _select_rows(segments, tokens)
            rows = self._project(self._up, expert, hidden_states[tokens], expert_segments)
            rows = self.base._apply_gate(rows) if self.base.has_gate else self.base.act_fn(rows)
            rows = self._project(DOWN, expert, rows, expert_segments)
            out.index_add_(0, tokens, (rows * top_k_weights[tokens, choice, None]).to(out.dtype))
        return out

    def _project(self, name: str, expert: int, x: Tensor, segments: Segments) -> Tensor:
        bias = getattr(self.base, f"{name}_bias")[expert] if self.base.has_bias else None
        y = nn.functional.linear(x, expert_weight(self.base, name, expert), bias)
        self._context.kernels.delta(x.contiguous(), [y], self._groups[name][expert], segments)
        return y


def _select_rows(segments: Segments, tokens: Tensor) -> Segments:
    """Segments over a selection of the batch's rows; `tokens` is ascending."""

    def position(edge: Tensor) -> Tensor:
        return torch.searchsorted(tokens, edge.to(tokens.dtype)).to(torch.int32)

    return replace(segments, start=position(segments.start), end=position(segments.end))
