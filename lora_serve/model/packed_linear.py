"""Linear and embedding modules on weights packed by the kernel backend, in full precision or quantised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lora_serve.kernels.contract import Kernels
from lora_serve.kernels.packed_weight import PackedWeight, Scheme, scheme_for


class PackedLinear(nn.Module):
    """y = x Wᵀ + b; replaces an `nn.Linear` or `Conv1D`, whose weights are freed.

    Args:
        bias: [out].
        transposed: whether the original module has its weight as [in, out].
    """

    def __init__(self, packed: PackedWeight, bias: nn.Parameter | None, kernels: Kernels, *, transposed: bool) -> None:
        super().__init__()
        self.packed = packed
        self.bias = bias
        self._kernels = kernels
        self._transposed = transposed

    @classmethod
    def pack(
        cls,
        modules: Sequence[Any],
        kernels: Kernels,
        device: torch.device,
        scheme: Scheme | None = None,
        importance: Tensor | None = None,
    ) -> list[PackedLinear]:
        """Pack linear modules that read the same input.

        Args:
            device: where to pack them; weights that are on the host are copied, and the copies dropped.
            scheme: how to quantise the weights, if their size allows it.
            importance: of the inputs, for that.
        """
        transposed = [isinstance(module, Conv1D) for module in modules]
        copies = [module.weight.to(device) for module in modules]
        weights = [weight.T if turned else weight for weight, turned in zip(copies, transposed, strict=True)]
        packed = kernels.pack(weights, scheme_for(scheme, weights[0].shape[1]), importance)
        return [
            cls(own, module.bias, kernels, transposed=turned)
            for own, module, turned in zip(packed, modules, transposed, strict=True)
        ]

    @property
    def full_weight(self) -> Tensor:
        """W [out, in] as the forward pass uses it; unpacked on every access."""
        return self._kernels.unpack(self.packed)

    @property
    def weight(self) -> Tensor:
        """The weight in the original module's layout."""
        return self.full_weight.T if self._transposed else self.full_weight

    def forward(self, x: Tensor) -> Tensor:
        """x [rows, in] → [rows, out], in x's dtype."""
        return self._kernels.linear(x, [(self.packed, self.bias)])[0]

    def with_parameters(self, x: Tensor, others: Mapping[str, Tensor]) -> Tensor:
        """`forward` with an adapter's parameters instead of the module's own."""
        if "weight" not in others:
            return self._kernels.linear(x, [(self.packed, others.get("bias", self.bias))])[0]
        weight = others["weight"].T if self._transposed else others["weight"]
        return functional.linear(x, weight, others.get("bias", self.bias))


class PackedEmbedding(nn.Module):
    """An embedding tied to the LM head, whose packed weight it reads.

    Args:
        packed: the head's weight, in full precision.
    """

    def __init__(self, packed: PackedWeight, kernels: Kernels) -> None:
        super().__init__()
        self._packed, self._kernels = packed, kernels

    @property
    def weight(self) -> Tensor:
        """The table [vocab, hidden]; unpacked on every access."""
        return self._kernels.unpack(self._packed)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] → [..., hidden], in the weight's dtype."""
        return self._kernels.lookup(self._packed, ids.reshape(-1)).view(*ids.shape, -1)

    def with_parameters(self, ids: Tensor, others: Mapping[str, Tensor]) -> Tensor:
        """`forward` with an adapter's parameters instead of the module's own."""
        return functional.embedding(ids, others["weight"])
