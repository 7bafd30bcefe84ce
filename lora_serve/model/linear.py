"""Where a LoRA delta is applied: `AdaptedLinear` adds each row's own low-rank delta to the base layer's output.

`AdaptedLinear` replaces a linear module of the HF model. The base layer may be in full precision, packed, quantised at
load, or externally quantised. Modules that read the same input (q, k and v) are computed in one kernel call when the
first of them is called; the others return their stored output. A batch without adapter rows adds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from lora_serve.kernels.contract import Activation, DeltaGroup, Kernels, Segments
from lora_serve.model.forward_context import ForwardContext
from lora_serve.model.packed_linear import PackedLinear


class SharedInput:
    """Base layers that read the same input: their pointer tables, and outputs that were computed together.

    Args:
        complete: makes an output, in place, of what layers and deltas give, which is a part of a sum in row-parallel
            layers (`adapters/sharding.py`); None: that is the output.
    """

    def __init__(
        self,
        bases: Sequence[nn.Module],
        group: DeltaGroup,
        kernels: Kernels,
        complete: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.complete = complete
        self._bases = bases
        self._layers = [(base.packed, base.bias) for base in bases if isinstance(base, PackedLinear)]
        self._group = group
        self._kernels = kernels
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}  # computed and not yet returned

    def output(self, module: int, x: Tensor, segments: Segments | None) -> Tensor:
        """Output [..., out] of one of the modules for x [..., in], with deltas added."""
        if x is not self._input or module not in self._outputs:
            rows = x.reshape(-1, self._group.in_features)
            outputs = self._compute(rows, segments)
            if self.complete is not None:
                outputs = [self.complete(y) for y in outputs]
            self._outputs = {index: y.view(*x.shape[:-1], y.shape[-1]) for index, y in enumerate(outputs)}
            self._input = x
        y = self._outputs.pop(module)
        if not self._outputs:
            self._input = None
        return y

    def gated(self, x: Tensor, segments: Segments | None, activation: Activation) -> Tensor | None:
        """activation(first(x)) * second(x) of two modules with deltas, by one call; None where there is none."""
        if segments is None or self.complete is not None or len(self._layers) != 2 or len(self._bases) != 2:
            return None
        rows = x.reshape(-1, self._group.in_features)
        y = self._kernels.adapted_gated_linear(rows, self._layers, self._group, segments, activation)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _compute(self, rows: Tensor, segments: Segments | None) -> list[Tensor]:
        """Outputs [rows, out] of all modules, with deltas added."""
        if len(self._layers) == len(self._bases):
            if segments is None:
                return self._kernels.linear(rows, self._layers)
            return self._kernels.adapted_linear(rows, self._layers, self._group, segments)
        outputs = [base(rows) for base in self._bases]
        if segments is not None:
            self._kernels.delta(rows, outputs, self._group, segments)
        return outputs


def gated_output(gate: nn.Module, up: nn.Module, x: Tensor, activation: Activation) -> Tensor | None:
    """activation(gate(x)) * up(x) by one call; None where it takes several.

    That is where the two do not read one input as its only modules, in this order; where a hook corrects an output of
    theirs; and in batches without adapter rows.
    """
    if not isinstance(gate, AdaptedLinear) or not isinstance(up, AdaptedLinear):
        return None
    return None if gate._forward_hooks or up._forward_hooks else gate.gated_with(up, x, activation)


class AdaptedLinear(nn.Module):
    """A linear module of the base that adds every row's own LoRA delta.

    Args:
        module: its index in `shared`.
        logits_rows_only: whether it gets only the rows whose logits are wanted (an LM head).
    """

    def __init__(
        self,
        base: nn.Module,
        shared: SharedInput,
        module: int,
        context: ForwardContext,
        *,
        logits_rows_only: bool,
    ) -> None:
        super().__init__()
        self.base = base
        self._shared = shared
        self._module = module
        self._context = context
        self._logits_rows_only = logits_rows_only

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, for modelling code that reads its dtype or device."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def complete(self, y: Tensor) -> Tensor:
        """The module's output, of what `base` gives for some rows."""
        return y if self._shared.complete is None else self._shared.complete(y)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]."""
        step = self._context.step
        return self._shared.output(self._module, x, step.logits_segments if self._logits_rows_only else step.segments)

    def gated_with(self, up: AdaptedLinear, x: Tensor, activation: Activation) -> Tensor | None:
        """activation(self(x)) * up(x) by one call, if these two share an input with no other; else None."""
        if up._shared is not self._shared or (self._module, up._module) != (0, 1):
            return None
        return self._shared.gated(x, self._context.step.segments, activation)
