"""Fused norm and MLP: RMS norms and gated MLPs computed by one kernel call each.

A dozen operators on a few rows cost more than their maths. Which modules can be replaced is not read from names: a
module is replaced if a float32 copy of it, with random weights, computes the kernel's formula on rows of many means and
scales, and if the kernel rounds no worse than the module in the model's own dtype. All others are left as they are.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lora_serve.kernels.contract import Activation, Kernels
from lora_serve.model.linear import gated_output

FORMULA_TOLERANCE = 1e-5  # relative error, in float32, of what is the same formula
ROUNDING_FACTOR = 1.5  # error of a kernel in the model's dtype over that of the module
ROUNDING_FLOOR = 1e-6  # added to that
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh")
PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
# Mean and standard deviation of the probe's rows. The first ones are so small that an epsilon under the root decides,
# the last ones so large that limits on activations show.
ROWS = (
    *((0.0, 1e-4), (1e-4, 1e-4), (0.0, 1e-3), (-3e-3, 1e-3), (0.0, 1e-2), (0.3, 1e-2), (-0.1, 0.1)),
    *((0.0, 0.5), (0.0, 1.0), (0.5, 1.0), (-2.0, 1.0), (10.0, 1.0), (0.0, 3.0), (0.0, 20.0), (-30.0, 20.0)),
    *((300.0, 20.0), (0.0, 300.0)),
)

Outputs = Tensor | tuple[Tensor, ...]


class FusedRMSNorm(nn.Module):
    """An RMS norm in one kernel call, with the addition before it if `add` made its input; see `Kernels.rms_norm`."""

    def __init__(self, weight: nn.Parameter, eps: float, *, plus_one: bool, kernels: Kernels) -> None:
        super().__init__()
        self.weight = weight
        self._eps, self._plus_one, self._kernels = eps, plus_one, kernels
        self._sum: Tensor | None = None
        self._normed: Tensor | None = None  # of the sum, until it is asked for

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y, and with it the sum's norm, which `forward` of the sum returns."""
        self._sum, self._normed = self._kernels.add_rms_norm(x, y, self.weight, self._eps, plus_one=self._plus_one)
        return self._sum

    def forward(self, x: Tensor) -> Tensor:
        if x is self._sum and self._normed is not None:
            normed = self._normed
            self._sum = self._normed = None
            return normed
        return self._kernels.rms_norm(x, self.weight, self._eps, plus_one=self._plus_one)


class FusedGatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)), the middle in one kernel call; the linear modules keep their names."""

    def __init__(self, mlp: nn.Module, activation: Activation, kernels: Kernels) -> None:
        super().__init__()
        for name in PARTS:
            setattr(self, name, getattr(mlp, name))
        self._activation, self._kernels = activation, kernels

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (self.get_submodule(name) for name in ("gate_proj", "up_proj", "down_proj"))
        inner = gated_output(gate, up, x, self._activation)
        if inner is None:
            inner = self._kernels.gated_activation(gate(x), up(x), self._activation)
        y: Tensor = down(inner)
        return y


def fuse(model: nn.Module, dtype: torch.dtype, device: torch.device, kernels: Kernels) -> None:
    """Fuse all norms and MLPs that match a kernel, in place; module and parameter paths are unchanged.

    Args:
        device: of the kernels and the norms; weights of linear modules may be elsewhere.
    """
    for path, module in list(model.named_modules()):
        fused = _fused_norm(module, dtype, device, kernels) or _fused_mlp(module, dtype, device, kernels)
        if fused is not None:
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, fused)


@torch.inference_mode()
def _fused_norm(module: nn.Module, dtype: torch.dtype, device: torch.device, kernels: Kernels) -> FusedRMSNorm | None:
    own = dict(module.named_parameters())
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = own.get("weight")
    if weight is None or len(own) > 1 or weight.ndim != 1 or weight.dtype is not dtype or not isinstance(eps, float):
        return None
    if not _takes_one_input(module):
        return None
    x = probe_rows(weight.shape[0])
    # Not the module's own weights: these may all be one or zero, which hides whether one is added to them.
    inputs = [each.to(device, dtype) for each in (x, 0.6 + 0.5 * torch.randn(x.shape[-1], generator=probe_generator()))]

    def original(x: Tensor, weight: Tensor) -> Tensor:
        twin = copy.deepcopy(module)
        twin.weight = nn.Parameter(weight, requires_grad=False)
        y: Tensor = twin.to(x.dtype)(x)
        return y

    for plus_one in (False, True):
        if agree(partial(kernels.rms_norm, eps=eps, plus_one=plus_one), original, inputs):
            return FusedRMSNorm(weight, eps, plus_one=plus_one, kernels=kernels)
    return None


@torch.inference_mode()
def _fused_mlp(module: nn.Module, dtype: torch.dtype, device: torch.device, kernels: Kernels) -> FusedGatedMLP | None:
    if dict(module.named_children()).keys() != PARTS or dict(module.named_parameters(recurse=False)):
        return None
    gate, up = module.gate_proj, module.up_proj
    if not isinstance(gate, nn.Linear) or not isinstance(up, nn.Linear) or not _takes_one_input(module):
        return None
    width, inner, generator = 32, 48, probe_generator()
    weights = [torch.randn(inner, width, generator=generator) / width**0.5 for _ in range(2)]
    weights.append(torch.randn(width, inner, generator=generator) / inner**0.5)
    inputs = [each.to(device, dtype) for each in (probe_rows(width), *weights)]

    def small(weights: Sequence[Tensor]) -> nn.Module:
        """The module with small linear modules: its own are large, and perhaps in a form that has no float32."""
        twin = copy.copy(module)
        twin._modules = {"act_fn": copy.deepcopy(module.get_submodule("act_fn")).to(weights[0].dtype)}
        for name, weight in zip(("gate_proj", "up_proj", "down_proj"), weights, strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            twin._modules[name] = linear
        return twin

    def original(x: Tensor, *weights: Tensor) -> Tensor:
        y: Tensor = small(weights)(x)
        return y

    for activation in ACTIVATIONS:

        def fused(x: Tensor, *weights: Tensor, activation: Activation = activation) -> Tensor:
            return FusedGatedMLP(small(weights), activation, kernels).forward(x)

        if agree(fused, original, inputs):
            return FusedGatedMLP(module, activation, kernels)
    return None


def probe_generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def probe_rows(width: int) -> Tensor:
    """The probe's rows, float32 [1, len(ROWS), width]."""
    moments = torch.tensor(ROWS)[..., None]  # [rows, 2, 1]
    return (moments[:, 0] + moments[:, 1] * torch.randn(len(ROWS), width, generator=probe_generator()))[None]


def _takes_one_input(module: nn.Module) -> bool:
    """Whether rows are all that the module can be given: a substitute would drop the rest."""
    return len(inspect.signature(module.forward).parameters) == 1


def agree(kernel: Callable[..., Outputs], original: Callable[..., Outputs], inputs: Sequence[Tensor]) -> bool:
    """Whether a kernel computes the original's formula, and in the inputs' dtype with no larger error."""
    try:
        wide = [each.float() for each in inputs]
        exact = _tensors(original(*wide))
        if not all(
            _error(got, wanted) <= FORMULA_TOLERANCE for got, wanted in zip(_tensors(kernel(*wide)), exact, strict=True)
        ):
            return False
        if inputs[0].dtype is torch.float32:
            return True
        ours, theirs = (_tensors(each(*inputs)) for each in (kernel, original))
        return all(
            got.dtype is own.dtype
            and _error(got, wanted, own) <= ROUNDING_FACTOR * _error(own, wanted, own) + ROUNDING_FLOOR
            for got, own, wanted in zip(ours, theirs, exact, strict=True)
        )
    except Exception:  # it takes or gives something else, or does not run in float32: so it is left alone
        return False


def _tensors(outputs: Outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def _error(got: Tensor, wanted: Tensor, where: Tensor | None = None) -> float:
    """Root mean square over all rows of each one's relative error; infinite if there is none to compare.

    Args:
        where: only rows are compared in which this is finite.
    """
    if got.shape != wanted.shape:
        return torch.inf
    errors = (got.float() - wanted.float()).norm(dim=-1) / wanted.float().norm(dim=-1)
    if where is not None:
        errors = errors[where.isfinite().all(-1)]
    return float(errors.square().mean().sqrt()) if errors.numel() else torch.inf
