"""LoRA deltas for mixture-of-experts layers whose experts are stacked in 3-D parameters.

An expert's slice of a stacked parameter is a site like any linear module. A batch without adapter rows runs the base's
own module. Otherwise rows are sorted by expert, each expert's in batch order, so that rows of one adapter stay one
segment, and the usual kernel adds the deltas of all experts at once, whatever computed the base's part:

    h = W_up[e] x + B A x;  h = gate(h);  y = W_down[e] h + B A h;  out += y · routing weight

Covers the modules that transformers marks with `use_experts_implementation` (Mixtral, Qwen-MoE, gpt-oss, ...), and
LongCat-Flash's (`identity_experts.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from lora_serve.kernels.contract import DeltaGroup, ExpertsGroup
from lora_serve.model.expert_rows import DOWN, STACKED, ExpertRows, out_first, run_experts, stacked_linear
from lora_serve.model.forward_context import ForwardContext
from lora_serve.model.packed_experts import PackedExperts


def is_stacked(module: nn.Module) -> bool:
    """Whether a module stacks its experts in a form that `AdaptedExperts` supports."""
    marked = hasattr(module, "is_transposed") and hasattr(module, "has_gate") and hasattr(module, "_apply_gate")
    return marked and not getattr(module, "has_post_expert_norm", False) and DOWN in dict(module.named_parameters())


def stacked_parameters(module: nn.Module) -> dict[str, list[tuple[int, int]]]:
    """(in, out) features of each expert's slice, by parameter."""
    shapes = {}
    for name, parameter in module.named_parameters(recurse=False):
        if name in STACKED and parameter.ndim == 3:
            experts, tall, wide = out_first(module, parameter).shape
            shapes[name] = [(wide, tall)] * experts
    return shapes


def expert_weight(module: nn.Module, parameter: str, expert: int) -> Tensor:
    """One expert's weight [out, in], dequantised if it is quantised."""
    if isinstance(module, PackedExperts):
        return module.expert_weight(parameter, expert)
    return out_first(module, cast(Tensor, getattr(module, parameter)))[expert]


class AdaptedExperts(nn.Module):
    """Replaces the base's module of stacked experts.

    Args:
        base: the module itself, or `PackedExperts`.
        groups: pointer tables of each expert, by parameter.
        all_reduce: adds up what several devices compute, each of which has a part of every expert.
    """

    def __init__(
        self,
        base: nn.Module,
        groups: Mapping[str, Sequence[DeltaGroup]],
        context: ForwardContext,
        all_reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.base: Any = base
        self._groups = {name: ExpertsGroup(each) for name, each in groups.items()}
        self._context = context
        self._all_reduce = all_reduce

    def complete(self, y: Tensor) -> Tensor:
        """The module's output, of what `base` gives for some rows."""
        return y if self._all_reduce is None else self._all_reduce(y)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, hidden], top_k_index and top_k_weights [tokens, k] → [tokens, hidden]."""
        segments = self._context.step.segments
        if segments is None:
            plain: Tensor = self.base(hidden_states, top_k_index, top_k_weights)
            return self.complete(plain)
        base = self.base
        stacked = base.stacked if isinstance(base, PackedExperts) else base
        rows = ExpertRows.sort(top_k_index, stacked.num_experts)
        own = rows.segments(segments, self._groups[DOWN].expert_slots)

        def project(name: str, x: Tensor) -> Tensor:
            if isinstance(base, PackedExperts):
                y = base.project(name, x, rows, {})
            else:
                bias = getattr(base, f"{name}_bias") if base.has_bias else None
                y = stacked_linear(out_first(base, getattr(base, name)), bias, x, rows)
            self._context.kernels.delta(x, [y], self._groups[name], own)
            return y

        return self.complete(run_experts(stacked, rows, hidden_states, top_k_weights, project))
