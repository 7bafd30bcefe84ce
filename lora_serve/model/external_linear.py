"""A linear module that another library quantised, kept as it is: it computes its own output, deltas are added to it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_serve.model.external_quantization import dequantized, is_externally_quantized


class ExternalLinear(nn.Module):
    """y = x Wᵀ + b by a module that quantises W in its own way.

    Args:
        base: a module for which `quantized.is_externally_quantized` holds.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    @property
    def full_weight(self) -> Tensor:
        """W [out, in] as the forward pass uses it; dequantised anew each time."""
        with torch.inference_mode():
            return dequantized(self.base)

    @property
    def weight(self) -> Tensor:
        """The same: what a module in full precision would have as its parameter."""
        return self.full_weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [rows, in] → [rows, out], contiguous, in x's dtype."""
        y: Tensor = self.base(x[None])[0]  # some tell rows of a batch from anything else by the number of dimensions
        return y.to(x.dtype).contiguous()

    def with_parameters(self, x: Tensor, others: Mapping[str, Tensor]) -> Tensor:
        """The same with an adapter's parameters in the place of the module's own."""
        if "weight" in others:
            return functional.linear(x, others["weight"], others.get("bias", self.bias))
        y: Tensor = self(x)
        if "bias" not in others:
            return y
        return (y.float() + (others["bias"].float() - (0 if self.bias is None else self.bias.float()))).to(x.dtype)


def parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a module's own parameters, in full precision."""
    own = {name: tuple(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}
    if not is_externally_quantized(module):
        return own
    assert isinstance(module, nn.Linear)
    return {"weight": (module.out_features, module.in_features)} | ({"bias": own["bias"]} if "bias" in own else {})
