"""A mixture's forward pass over rows sorted by expert: each chosen expert's rows are one run of consecutive rows.

    y = W_up[e] x;  y = gate(y);  y = W_down[e] y;  out = Σ y · routing weight

Shapes depend on the batch's only, never on which experts are chosen, so that a step can be replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_serve.kernels.contract import Segments

UP, UP_WITHOUT_GATE, DOWN = "gate_up_proj", "up_proj", "down_proj"  # what transformers calls the stacked parameters
STACKED = (UP, UP_WITHOUT_GATE, DOWN)


def out_first(experts: Any, weight: Tensor) -> Tensor:
    """A stacked parameter of a module as [experts, out, in]; the same turns such a weight back."""
    return weight.transpose(1, 2) if experts.is_transposed else weight


class ExpertRows(NamedTuple):
    """A batch's rows, each repeated for every expert that it chose, sorted by expert and then by token.

    Attributes:
        key: int64 [rows], ascending: expert * tokens + token.
        choice: int64 [rows], index in the flattened choices [tokens * k].
        token: int64 [rows].
        end: int64 [experts], where each expert's rows end.
        tokens: of the batch.
    """

    key: Tensor
    choice: Tensor
    token: Tensor
    end: Tensor
    tokens: int

    @classmethod
    def sort(cls, top_k_index: Tensor, experts: int) -> ExpertRows:
        """Sort choices [tokens, k]; a choice beyond the experts (an empty place of the router) comes last."""
        tokens, k = top_k_index.shape
        device = top_k_index.device
        token = torch.arange(tokens, device=device)[:, None]
        key, choice = (top_k_index * tokens + token).flatten().sort()
        end = torch.searchsorted(key, torch.arange(1, experts + 1, device=device) * tokens)
        return cls(key, choice, choice // k, end, tokens)

    def segments(self, segments: Segments, expert_slots: int) -> Segments:
        """The segments' parts in each expert's rows, with slots as in `ExpertsGroup`, expert by expert."""
        expert = torch.arange(len(self.end), device=self.key.device)[:, None]

        def position(edge: Tensor) -> Tensor:
            return torch.searchsorted(self.key, expert * self.tokens + edge).flatten().to(torch.int32)

        return replace(
            segments,
            start=position(segments.start),
            end=position(segments.end),
            slot=(expert * expert_slots + segments.slot).flatten().to(torch.int32),
            weight=segments.weight.repeat(len(self.end)),
        )


def run_experts(
    experts: Any, rows: ExpertRows, hidden: Tensor, top_k_weights: Tensor, project: Callable[[str, Tensor], Tensor]
) -> Tensor:
    """The mixture's output [tokens, hidden].

    Args:
        experts: the base's module of stacked experts, for its activation.
        hidden: [tokens, hidden].
        top_k_weights: [tokens, k].
        project: one layer of all experts, by the name of its parameter: [rows, in] → [rows, out].
    """
    x = hidden.index_select(0, rows.token)
    y = project(UP if experts.has_gate else UP_WITHOUT_GATE, x)
    y = experts._apply_gate(y) if experts.has_gate else experts.act_fn(y)
    y = project(DOWN, y)
    if getattr(experts, "has_identity", False):  # choices beyond the stored experts return the token
        y = torch.where(rows.key[:, None] < experts.num_experts * rows.tokens, y, x)
    y = y * top_k_weights.flatten()[rows.choice, None]
    by_choice = torch.empty_like(y).index_copy_(0, rows.choice, y)
    return by_choice.view(*top_k_weights.shape, -1).sum(1).to(hidden.dtype)


def stacked_linear(weight: Tensor, bias: Tensor | None, x: Tensor, rows: ExpertRows) -> Tensor:
    """One layer of all experts in full precision, expert by expert.

    Args:
        weight: [experts, out, in].
        bias: [experts, out].
        x: [rows, in].
    """
    y = x.new_zeros(x.shape[0], weight.shape[1])
    start = torch.cat([rows.end.new_zeros(1), rows.end[:-1]])
    runs = torch.stack([torch.arange(len(rows.end), device=x.device), start, rows.end], 1)
    for expert, first, last in runs[start < rows.end].tolist():  # a selection by values: recording refuses the step
        y[first:last] = nn.functional.linear(x[first:last], weight[expert], None if bias is None else bias[expert])
    return y
