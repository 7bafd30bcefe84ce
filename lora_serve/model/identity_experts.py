"""LongCat-Flash's experts, described as transformers describes other models' stacked experts.

Beside the stored experts its router chooses identity experts, which return the token unchanged. transformers computes
them in a module of its own, without the marks of `use_experts_implementation` that `experts.py` reads.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts


class MarkedExperts(LongcatFlashExperts):
    """The experts with the marks; what they compute is unchanged."""

    is_transposed = has_bias = has_post_expert_norm = False
    has_gate = has_identity = True

    @property
    def num_experts(self) -> int:
        """Number of stored experts; those from there on are identities."""
        return int(self.num_routed_experts)

    def _apply_gate(self, rows: Tensor) -> Tensor:
        gate, up = rows.chunk(2, dim=-1)
        return self.act_fn(gate) * up  # type: ignore[no-any-return]


def mark_experts(model: nn.Module) -> None:
    """Mark the experts of a loaded model, in place."""
    for module in model.modules():
        if type(module) is LongcatFlashExperts:
            module.__class__ = MarkedExperts
