"""Modules of the base whose weights a kernel backend has packed, in full precision or made small."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lora_serve.kernels.contract import Kernels
from lora_serve.kernels.packed_weight import PackedWeight, Scheme, fitting


class PackedLinear(nn.Module):
    """y = x Wᵀ + b in the place of an `nn.Linear` or `Conv1D`, whose own weights are let go.

    Args:
        scheme: how the weights are made small, if the map's size allows it.
    """

    def __init__(self, base: nn.Module, kernels: Kernels, scheme: Scheme | None) -> None:
        super().__init__()
        weight, bias = base.weight, base.bias
        assert isinstance(weight, Tensor)
        assert bias is None or isinstance(bias, nn.Parameter)
        self._transposed = isinstance(base, Conv1D)  # keeps its weights as [in, out]
        rows = weight.T if self._transposed else weight
        self.packed: PackedWeight = kernels.pack(rows, fitting(scheme, rows.shape[1]))
        self.bias = bias
        self._kernels = kernels

    @property
    def rows(self) -> Tensor:
        """W [out, in] as the forward pass uses it; unpacked anew each time."""
        return self._kernels.unpack(self.packed)

    @property
    def weight(self) -> Tensor:
        """The parameter as the base module had it."""
        return self.rows.T if self._transposed else self.rows

    def forward(self, x: Tensor) -> Tensor:
        """x [rows, in] → [rows, out], in x's dtype."""
        return self._kernels.linear(x, [(self.packed, self.bias)])[0]

    def with_parameters(self, x: Tensor, others: Mapping[str, Tensor]) -> Tensor:
        """The same with an adapter's parameters in the place of the module's own."""
        if "weight" not in others:
            return self._kernels.linear(x, [(self.packed, others.get("bias", self.bias))])[0]
        weight = others["weight"].T if self._transposed else others["weight"]
        return functional.linear(x, weight, others.get("bias", self.bias))


class PackedEmbedding(nn.Module):
    """Rows of a map's packed weights by their number: the embedding of a base whose head has the same weights.

    Args:
        packed: in full precision.
    """

    def __init__(self, packed: PackedWeight, kernels: Kernels) -> None:
        super().__init__()
        self._packed, self._kernels = packed, kernels

    @property
    def weight(self) -> Tensor:
        """The table [ids, width]; unpacked anew each time."""
        return self._kernels.unpack(self._packed)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] → [..., width], in the weights' dtype."""
        return self._kernels.rows(self._packed, ids.reshape(-1)).view(*ids.shape, -1)

    def with_parameters(self, ids: Tensor, others: Mapping[str, Tensor]) -> Tensor:
        """The same with an adapter's parameters in the place of the module's own."""
        return functional.embedding(ids, others["weight"])
