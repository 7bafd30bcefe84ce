"""Wrapper of externally quantised linear modules: the library computes the output, deltas are added to it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_serve.model.external_quantization import dequantized_weight, is_externally_quantized


class ExternalLinear(nn.Module):
    """y = x Wᵀ + b, computed by an externally quantised module.

    Args:
        base: a module for which `is_externally_quantized` is true.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    @property
    def full_weight(self) -> Tensor:
        """W [out, in] as the forward pass uses it; dequantised on every access."""
        with torch.inference_mode():
            return dequantized_weight(self.base)

    @property
    def weight(self) -> Tensor:
        """The same as `full_weight`: the parameter of a module in full precision."""
        return self.full_weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [rows, in] → [rows, out], contiguous, in x's dtype."""
        y: Tensor = self.base(x[None])[0]  # some libraries expect a batch dimension
        return y.to(x.dtype).contiguous()

    def with_parameters(self, x: Tensor, others: Mapping[str, Tensor]) -> Tensor:
        """`forward` with an adapter's parameters instead of the module's own."""
        if "weight" in others:
            return functional.linear(x, others["weight"], others.get("bias", self.bias))
        y: Tensor = self(x)
        if "bias" not in others:
            return y
        return (y.float() + (others["bias"].float() - (0 if self.bias is None else self.bias.float()))).to(x.dtype)


def parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a module's own parameters, as they are in full precision."""
    own = {name: tuple(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}
    if not is_externally_quantized(module):
        return own
    assert isinstance(module, nn.Linear)
    return {"weight": (module.out_features, module.in_features)} | ({"bias": own["bias"]} if "bias" in own else {})
