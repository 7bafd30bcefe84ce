"""A base whose linear weights are made small at load: int8 by output channel, or int4 by group of inputs.

    int8:  W[o, i] ≈ scale[o] · q[o, i],            q in -127..127
    int4:  W[o, i] ≈ scale[o, i // group] · q[o, i],  q in -7..7, two in a byte

Symmetric, rounded to nearest; activations stay as they are. Deltas, gains and norms are untouched: they are added to
what the quantised layer gives, as QLoRA does. Formats that need the base's weights get the dequantised ones.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

GROUP = 32  # inputs that share a scale in int4

Scheme = Literal["int8", "int4"]


class QuantizedLinear(nn.Module):
    """y = x Wᵀ + b with a quantised W.

    Args:
        base: the full-precision map; its input features must divide by `GROUP` for int4.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, base: nn.Linear, scheme: Scheme) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.scheme = scheme
        self._dtype = base.weight.dtype
        self.bias = base.bias
        group = self.in_features if scheme == "int8" else GROUP
        most = 127 if scheme == "int8" else 7
        grouped = base.weight.detach().float().view(self.out_features, -1, group)
        scale = (grouped.abs().amax(-1, keepdim=True) / most).clamp(min=1e-12).to(self._dtype)
        whole = (grouped / scale.float()).round().clamp(-most, most).to(torch.int8).view(self.out_features, -1)
        self.register_buffer("weight", whole if scheme == "int8" else _packed(whole))
        self.register_buffer("scale", scale.squeeze(-1))  # [out, groups]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weights that it stands for: [out, in]."""
        return self.out_features, self.in_features

    def dequantized(self) -> Tensor:
        """The weights [out, in] that the forward pass amounts to, in the base's precision."""
        whole = self.weight if self.scheme == "int8" else _unpacked(self.weight)
        grouped = whole.view(self.out_features, self.scale.shape[1], -1).to(self._dtype)
        return (grouped * self.scale[..., None]).view(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """x [rows, in] → [rows, out], in x's dtype."""
        own = self.weight.is_floating_point()  # an adapter's, put in place of the base's for its rows
        return nn.functional.linear(x, self.weight if own else self.dequantized(), self.bias)


def quantize(model: nn.Module, scheme: Scheme) -> int:
    """Replace the linear maps of a model, all but the head, in place; how many were replaced."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and module.in_features % GROUP == 0
    ]
    for name, module in found:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, QuantizedLinear(module, scheme))
    return len(found)


def _packed(whole: Tensor) -> Tensor:
    """Two numbers -8..7 in a byte: even columns low, odd ones high."""
    shifted = (whole + 8).to(torch.uint8)
    return shifted[:, ::2] | (shifted[:, 1::2] << 4)


def _unpacked(packed: Tensor) -> Tensor:
    pairs = torch.stack([packed & 15, packed >> 4], dim=-1)  # [out, in / 2, 2]
    return pairs.flatten(1).to(torch.int8) - 8
