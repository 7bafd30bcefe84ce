"""Differentiable linear modules over the resident base: the products of `AdaptedLinear`, forwards and backwards.

    y = g ⊙ (W x + B(A x)) + b            g = 1, or DoRA's gain of each row's adapter
    dx = (g ⊙ dy) W + gradient of the delta's input;  dA, dB and DoRA's dm are added where the adapters have them

Weights are read where they are resident, whatever form they have, and are unpacked a part at a time. As in serving,
modules that read the same input are one kernel call for all adapters.

The input is saved by an operation of its own, before the product. When a layer is computed again for its backward
pass, torch stops once the last saved tensor is there (`torch.utils.checkpoint`): the product of the layer's last
module, whose result nobody needs, is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_serve.kernels.contract import Delta, DeltaGroup, Kernels
from lora_serve.kernels.packed_weight import PackedWeight
from lora_serve.model.dropped_delta import add_dropped_delta, add_dropped_gradients
from lora_serve.model.external_linear import ExternalLinear
from lora_serve.model.packed_linear import PackedLinear
from lora_serve.model.trained_gain import apply_gains
from lora_serve.model.training_step import AdapterSpan, Magnitude, TrainingStep


@dataclass
class HeadReading:
    """One call of the LM head.

    Attributes:
        part: of the outputs; None: all.
        normed, given: what it read, and where gradients end; see `HeadCall`.
    """

    part: slice | None
    normed: Tensor | None = None
    given: Tensor | None = None


@dataclass
class TrainingContext:
    """Shared by all modules of a trainable base; `step` changes with every quantum, `head` is set while it runs."""

    kernels: Kernels
    step: TrainingStep | None = None
    head: HeadReading | None = None


@dataclass(frozen=True)
class TrainableSites:
    """Linear modules that read the same input.

    Attributes:
        names: of the modules.
        deltas, gradients: the adapters' matrices and their gradients, by slot.
        base: the resident module of a name.
    """

    names: tuple[str, ...]
    deltas: DeltaGroup
    gradients: DeltaGroup
    base: Callable[[str], nn.Module]


@dataclass
class _GroupCall:
    """One call of modules that read the same input; what its backward pass needs besides the input.

    Attributes:
        part: outputs of the only module that are computed; None: all.
        gained: per module (span, its magnitude, the span's rows before the gain).
        grads: of the outputs, between the two operations of the backward pass.
    """

    sites: TrainableSites
    kernels: Kernels
    step: TrainingStep
    part: slice | None = None
    gained: list[list[tuple[AdapterSpan, Magnitude, Tensor]]] = field(default_factory=list)
    grads: Sequence[Tensor] = ()

    def layers(self) -> list[tuple[PackedWeight, Tensor | None]]:
        """The resident weights and biases."""
        layers = [resident_layer(self.sites.base(name), self.kernels) for name in self.sites.names]
        if self.part is None:
            return layers
        ((packed, bias),) = layers
        return [(self.kernels.outputs_of(packed, self.part), None if bias is None else bias[self.part])]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Outputs of all modules, for x [rows, in]."""
        layers = self.layers()
        magnitudes = [
            [(span, span.magnitudes[name]) for span in self.step.spans if name in span.magnitudes]
            for name in self.sites.names
        ]
        inner = [
            (packed, None if own else bias) for (packed, bias), own in zip(layers, magnitudes, strict=True)
        ]  # a bias is added after the gain
        outputs = self.kernels.exact_linear(x, inner)
        if self.part is None:
            self.kernels.delta(x, outputs, self.sites.deltas, self.step.segments)
        for span, module, delta in self._alone():
            rows, name = slice(span.start, span.end), self.sites.names[module]
            add_dropped_delta(outputs[module][rows], x[rows], self._own(delta), span.dropout, name)
        for module, own in enumerate(magnitudes):
            self.gained.append([])
            for span, magnitude in own:
                if magnitude.norm is None:
                    magnitude.norm = self._norm(module, span.slot)
                own_magnitude = magnitude if self.part is None else magnitude.of(self.part)
                assert own_magnitude.norm is not None
                gained = outputs[module][span.start : span.end]
                self.gained[module].append((span, own_magnitude, gained.clone()))
                gained.copy_(gained.float() * (own_magnitude.values / own_magnitude.norm))
            bias = layers[module][1]
            if own and bias is not None:
                outputs[module] += bias
        return outputs

    def backward(self, grads: Sequence[Tensor]) -> Tensor:
        """The input's gradient as far as it comes through the base."""
        grads = [grad.contiguous() for grad in grads]
        for module, own in enumerate(self.gained):
            if own:
                grads[module] = grads[module].clone()
            for span, magnitude, before in own:
                assert magnitude.norm is not None
                rows = grads[module][span.start : span.end]
                magnitude.gradient += (rows.float() * before.float()).sum(0) / magnitude.norm
                rows.copy_(rows.float() * (magnitude.values / magnitude.norm))
        self.grads = grads
        return self.kernels.linear_backward(grads, [packed for packed, _ in self.layers()])

    def delta_backward(self, x: Tensor, dx: Tensor) -> None:
        """Add the input's gradient through the deltas to dx, and those of the deltas to the adapters'."""
        sites = self.sites
        if self.part is None:
            self.kernels.delta_backward(x, self.grads, dx, sites.deltas, self.step.segments, sites.gradients)
        for span, module, delta in self._alone():
            gradient = sites.gradients.get(module, span.slot)
            if gradient is not None:
                rows, name, grad = slice(span.start, span.end), sites.names[module], self.grads[module]
                pair = self._own(delta), self._own(gradient)
                add_dropped_gradients(x[rows], grad[rows], dx[rows], *pair, span.dropout, name)
        self.grads = ()

    def _alone(self) -> Iterator[tuple[AdapterSpan, int, Delta]]:
        """Spans, modules and their deltas, of deltas that the kernels do not compute: with dropout, or of a part."""
        for span in self.step.spans:
            if span.dropout is None and self.part is None:
                continue
            for module in range(len(self.sites.names)):
                delta = self.sites.deltas.get(module, span.slot)
                if delta is not None:
                    yield span, module, delta

    def _own(self, delta: Delta) -> Delta:
        """The part of a delta that is computed; a view."""
        return delta if self.part is None else Delta(delta.a, delta.b[:, self.part])

    def _norm(self, module: int, slot: int) -> Tensor:
        """‖W + BA‖ of each output, float32."""
        packed, _ = resident_layer(self.sites.base(self.sites.names[module]), self.kernels)
        return output_norm(self.kernels.unpack(packed), self.sites.deltas.get(module, slot))


class SavedInput(torch.autograd.Function):
    """Identity that saves its tensor, and runs the deltas' backward pass over it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _GroupCall) -> Tensor:
        ctx.save_for_backward(x)
        ctx.call = call
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        ctx.call.delta_backward(x, dx)  # dx is `AdaptedProduct.backward`'s, and nobody else's
        return dx, None


class AdaptedProduct(torch.autograd.Function):
    """Outputs of modules that read the same input; saves no tensor of the batch, except with DoRA."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _GroupCall) -> tuple[Tensor, ...]:
        outputs = call.forward(x)
        ctx.save_for_backward(*(before for own in call.gained for _, _, before in own))
        call.gained = [[(span, magnitude, magnitude.values) for span, magnitude, _ in own] for own in call.gained]
        ctx.call = call
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        call = ctx.call
        saved = iter(ctx.saved_tensors)
        call.gained = [[(span, magnitude, next(saved)) for span, magnitude, _ in own] for own in call.gained]
        return call.backward(grads), None


class TrainableGroup:
    """Computes the outputs of modules that read the same input together, when the first of them is called."""

    def __init__(self, sites: TrainableSites, context: TrainingContext) -> None:
        self.sites, self._context = sites, context
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}  # computed and not yet returned

    @property
    def spans(self) -> Sequence[AdapterSpan]:
        """Of the batch that is running."""
        return () if self._context.step is None else self._context.step.spans

    @property
    def head(self) -> HeadReading | None:
        """The call of the LM head that is running."""
        return self._context.head

    def output(self, module: int, x: Tensor) -> Tensor:
        """Output [..., out] of one of the modules for x [..., in]."""
        if x is not self._input or module not in self._outputs:
            self._outputs = dict(enumerate(self.compute(x)))
            self._input = x
        y = self._outputs.pop(module)
        if not self._outputs:
            self._input = None
        return y

    def compute(self, x: Tensor, part: slice | None = None) -> list[Tensor]:
        """Outputs of all modules, or a part of those of the only one."""
        assert self._context.step is not None
        call = _GroupCall(self.sites, self._context.kernels, self._context.step, part)
        rows = x.reshape(-1, x.shape[-1])
        saved: Tensor = SavedInput.apply(rows, call)  # type: ignore[no-untyped-call]
        outputs: tuple[Tensor, ...] = AdaptedProduct.apply(saved, call)  # type: ignore[no-untyped-call]
        return [y.view(*x.shape[:-1], y.shape[-1]) for y in outputs]


class TrainableLinear(nn.Module):
    """Takes a linear module's place in the training pass; has no weight of its own."""

    def __init__(self, group: TrainableGroup, module: int, weight: Callable[[], Tensor]) -> None:
        super().__init__()
        self._group, self._module, self._weight = group, module, weight
        self._name = group.sites.names[module]

    @property
    def weight(self) -> Tensor:
        """The resident module's weight, for modelling code that reads its dtype or device; unpacked on every access."""
        return self._weight()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]."""
        spans = self._group.spans
        x = apply_gains(x, spans, self._name, on_input=True)
        return apply_gains(self._group.output(self._module, x), spans, self._name, on_input=False)


class TrainableHead(TrainableLinear):
    """Takes the LM head's place: computes the part of its outputs that is asked for, and ends the gradients there."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., width of the part]."""
        reading = self._group.head
        assert reading is not None, "the head is only called by `TrainableBase.head`"
        reading.normed = x.reshape(-1, x.shape[-1])
        reading.given = reading.normed.detach().requires_grad_(torch.is_grad_enabled())
        spans, part = self._group.spans, reading.part
        given = apply_gains(reading.given.view(x.shape), spans, self._name, on_input=True)
        (y,) = self._group.compute(given, part)
        return apply_gains(y, spans, self._name, on_input=False, part=part)


class ResidentEmbedding(nn.Module):
    """Takes the input embedding's place in the training pass: a lookup in the resident one, and virtual tokens."""

    def __init__(self, resident: Callable[[], nn.Module], context: TrainingContext) -> None:
        super().__init__()
        self._resident, self._context = resident, context

    @property
    def weight(self) -> Tensor:
        """The table; unpacked on every access if it is packed."""
        weight = self._resident().weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] → [..., hidden]."""
        with torch.no_grad():
            found: Tensor = self._resident()(ids)
        found.requires_grad_(torch.is_grad_enabled())  # of modules between it and the first layer
        step = self._context.step
        for each in () if step is None else step.virtual_tokens:
            table = each.table.to(found.dtype).expand(each.rows.shape[0], -1, -1).flatten(0, 1)
            found = found.index_put((torch.zeros_like(each.rows).flatten(), each.rows.flatten()), table)
        return found


def output_norm(weight: Tensor, delta: Delta | None) -> Tensor:
    """‖W + BA‖ of each output, float32 [out]: ‖W‖² + 2 · W·BA + ‖BA‖², without W + BA itself."""
    square = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
    if delta is not None:
        a, b = delta.a.float(), delta.b.float()
        both = 2 * (weight.float() @ a.T).T + (a @ a.T) @ b  # [rank, out]
        square += (b * both).sum(0)
    norm: Tensor = square.clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    return norm


def resident_layer(module: Any, kernels: Kernels) -> tuple[PackedWeight, Tensor | None]:
    """The weight and the bias of a resident linear module; one that is not packed is packed for this call."""
    if isinstance(module, PackedLinear):
        return module.packed, module.bias
    if isinstance(module, ExternalLinear):
        return kernels.pack([module.full_weight.clone()])[0], module.bias
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    return kernels.pack([weight])[0], module.bias
