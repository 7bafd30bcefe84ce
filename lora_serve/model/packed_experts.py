"""A mixture's stacked experts on weights that the kernel backend packed and quantised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_serve.kernels.contract import Kernels
from lora_serve.kernels.packed_weight import PackedExpertWeights, Scheme, scheme_for
from lora_serve.model.expert_rows import STACKED, ExpertRows, out_first, run_experts, stacked_linear


class PackedExperts(nn.Module):
    """Replaces the base's module of stacked experts, whose weights are freed.

    Attributes:
        stacked: that module, with its activation and biases and without its weights.
        packed: the weights, by the name of their parameter.

    Args:
        scheme: how to quantise them, if their size allows it.
        importance: of the inputs, by parameter, for that.
        device: where to pack them; weights that are on the host are copied, and the copies dropped.
    """

    def __init__(
        self,
        stacked: nn.Module,
        kernels: Kernels,
        scheme: Scheme,
        importance: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        super().__init__()
        self.stacked: Any = stacked
        self.packed: dict[str, PackedExpertWeights] = {}
        self._kernels = kernels
        for name in STACKED:
            weight = stacked._parameters.pop(name, None)
            if weight is not None:
                own = scheme_for(scheme, out_first(stacked, weight).shape[2])
                self.packed[name] = kernels.pack_experts(
                    out_first(stacked, weight.to(device)), own, importance.get(name)
                )

    def expert_weight(self, parameter: str, expert: int) -> Tensor:
        """One expert's weight [out, in], float32; unpacked on every call."""
        return self._kernels.unpack(self.packed[parameter][expert])

    def parameter(self, name: str) -> Tensor:
        """A parameter in the original module's layout, dequantised if it is packed."""
        if name not in self.packed:
            own: Tensor = self.stacked.get_parameter(name)
            return own
        weights = [self.expert_weight(name, expert) for expert in range(len(self.packed[name]))]
        return out_first(self.stacked, torch.stack(weights))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, hidden], top_k_index and top_k_weights [tokens, k] → [tokens, hidden]."""
        return self.with_parameters(hidden_states, top_k_index, top_k_weights, {})

    def with_parameters(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, others: Mapping[str, Tensor]
    ) -> Tensor:
        """`forward` with an adapter's parameters instead of the module's own."""
        rows = ExpertRows.sort(top_k_index, self.stacked.num_experts)

        def project(name: str, x: Tensor) -> Tensor:
            return self.project(name, x, rows, others)

        return run_experts(self.stacked, rows, hidden_states, top_k_weights, project)

    def project(self, name: str, x: Tensor, rows: ExpertRows, others: Mapping[str, Tensor]) -> Tensor:
        """One layer of all experts: x [rows, in] → [rows, out]."""
        bias = others.get(f"{name}_bias", getattr(self.stacked, f"{name}_bias", None))
        if name in others:
            return stacked_linear(out_first(self.stacked, others[name]), bias, x, rows)
        packed, end = self.packed[name], rows.end
        if len(packed) > len(end):  # LongCat-Flash's identity experts have weights, which are not used
            end = torch.cat([end, end[-1:].expand(len(packed) - len(end))])
        return self._kernels.grouped_linear(x, packed, bias, end)
