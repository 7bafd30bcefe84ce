"""Where the two streets meet: a base layer's output, plus each row's own delta.

`AdaptedLinear` stands in the place of a linear module of the HF model. It does not look into the base layer, be it
full-precision or quantised: the kernels compute its output and add the deltas. Modules that read one input (q, k and v)
are computed together when the first of them is called, so that the kernels get them in one call; the others find their
result ready. A batch without adapter rows has no deltas to add.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lora_serve.kernels.contract import DeltaGroup, Kernels, Segments
from lora_serve.model.packed_linear import PackedLinear


@dataclass
class Routing:
    """Which rows of the running batch belong to which slot; one object for all modules, set before each forward."""

    kernels: Kernels
    tokens: Segments | None = None
    logits: Segments | None = None


class SharedInput:
    """The base layers that read one input, their pointer tables, and results computed ahead of being asked for."""

    def __init__(self, bases: Sequence[nn.Module], group: DeltaGroup, kernels: Kernels) -> None:
        self._bases = bases
        self._layers = [(base.packed, base.bias) for base in bases if isinstance(base, PackedLinear)]
        self._group = group
        self._kernels = kernels
        self._input: Tensor | None = None
        self._ready: dict[int, Tensor] = {}

    def output(self, module: int, x: Tensor, segments: Segments | None) -> Tensor:
        """Output of one of the modules for x [..., in], deltas added."""
        if x is not self._input or module not in self._ready:
            rows = x.reshape(-1, self._group.in_features)
            if len(self._layers) == len(self._bases):
                outputs = self._kernels.linear(rows, self._layers)
            else:
                outputs = [base(rows) for base in self._bases]
            if segments is not None:
                self._kernels.delta(rows, outputs, self._group, segments)
            self._ready = {index: y.view(*x.shape[:-1], y.shape[-1]) for index, y in enumerate(outputs)}
            self._input = x
        y = self._ready.pop(module)
        if not self._ready:
            self._input = None
        return y


class AdaptedLinear(nn.Module):
    """A linear module of the base with every adapter's delta within reach."""

    def __init__(self, base: nn.Module, shared: SharedInput, module: int, routing: Routing, *, head: bool) -> None:
        super().__init__()
        self.base = base
        self._shared = shared
        self._module = module
        self._routing = routing
        self._head = head

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, for modelling code that looks at its dtype or device."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        segments = self._routing.logits if self._head else self._routing.tokens
        return self._shared.output(self._module, x, segments)
