"""Small parts of the base for which the kernels have one call: norms, gated MLPs, rotary embeddings.

A dozen operators on a few rows cost more than their maths. Which modules can be replaced is not read from names: a
module of the right parts is replaced if the kernels' result for random rows is the module's own, but for rounding.
"""

from __future__ import annotations

from types import FunctionType, MethodType

import torch
from torch import Tensor, nn

from lora_serve.kernels.contract import Activation, Kernels

ROUNDING = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of what is about one
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh")
ROPE = "apply_rotary_pos_emb"  # what attention modules call for it
PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class FusedRMSNorm(nn.Module):
    """An RMS norm by one call."""

    def __init__(self, weight: nn.Parameter, eps: float, *, plus_one: bool, kernels: Kernels) -> None:
        super().__init__()
        self.weight = weight
        self._eps, self._plus_one, self._kernels = eps, plus_one, kernels

    def forward(self, x: Tensor) -> Tensor:
        return self._kernels.rms_norm(x, self.weight, self._eps, plus_one=self._plus_one)


class FusedGatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)), the middle by one call; the linear modules keep their names."""

    def __init__(self, mlp: nn.Module, activation: Activation, kernels: Kernels) -> None:
        super().__init__()
        for name in PARTS:
            setattr(self, name, getattr(mlp, name))
        self._activation, self._kernels = activation, kernels

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (self.get_submodule(name) for name in ("gate_proj", "up_proj", "down_proj"))
        y: Tensor = down(self._kernels.gated_activation(gate(x), up(x), self._activation))
        return y


def fuse(model: nn.Module, dtype: torch.dtype, kernels: Kernels) -> None:
    """Replace what can be replaced, in place; modules keep their paths and parameters theirs."""
    for path, module in list(model.named_modules()):
        _turn(module, dtype, kernels)
        fresh = _norm(module, dtype, kernels) or _mlp(module, dtype, kernels)
        if fresh is not None:
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, fresh)


@torch.inference_mode()
def _norm(module: nn.Module, dtype: torch.dtype, kernels: Kernels) -> nn.Module | None:
    own = dict(module.named_parameters())
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = own.get("weight")
    if weight is None or len(own) > 1 or weight.ndim != 1 or weight.dtype is not dtype or not isinstance(eps, float):
        return None
    x = _rows(weight.shape[0], dtype, weight.device)
    try:
        wanted = module(x)
    except (TypeError, RuntimeError):  # it takes something else
        return None
    for plus_one in (False, True):
        if _same(kernels.rms_norm(x, weight, eps, plus_one=plus_one), wanted):
            return FusedRMSNorm(weight, eps, plus_one=plus_one, kernels=kernels)
    return None


@torch.inference_mode()
def _mlp(module: nn.Module, dtype: torch.dtype, kernels: Kernels) -> nn.Module | None:
    if dict(module.named_children()).keys() != PARTS or dict(module.named_parameters(recurse=False)):
        return None
    gate, up = module.gate_proj, module.up_proj
    if not isinstance(gate, nn.Linear) or not isinstance(up, nn.Linear):
        return None
    x = _rows(gate.in_features, dtype, next(gate.parameters()).device)
    wanted = module(x)
    for activation in ACTIVATIONS:
        candidate = FusedGatedMLP(module, activation, kernels)
        if _same(candidate(x), wanted):
            return candidate
    return None


@torch.inference_mode()
def _turn(module: nn.Module, dtype: torch.dtype, kernels: Kernels) -> None:
    """Let an attention module turn queries and keys by one call, if what its own code calls for that does the same.

    Only this module is touched: its code is run with another function under the name that it looks up.
    """
    forward = type(module).forward
    if not isinstance(forward, FunctionType) or ROPE not in forward.__code__.co_names:
        return
    own = forward.__globals__.get(ROPE)
    if own is None or hasattr(forward, "__wrapped__"):
        return

    def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        fits = cos.shape == (1, q.shape[2], q.shape[3]) and q.shape[0] == 1
        if args or kwargs or not fits:
            turned: tuple[Tensor, Tensor] = own(q, k, cos, sin, *args, **kwargs)
            return turned
        return kernels.rope(q, k, cos, sin)

    device = next(module.parameters()).device
    q, k, turns = (_rows(64 * heads, dtype, device).view(1, 3, heads, 64).transpose(1, 2) for heads in (4, 2, 2))
    cos, sin = (0.5 * turns[:, head] for head in (0, 1))
    try:
        wanted = own(q, k, cos, sin)
    except (TypeError, RuntimeError):  # it takes something else
        return
    if all(_same(got, right) for got, right in zip(rope(q, k, cos, sin), wanted, strict=True)):
        renamed = FunctionType(
            forward.__code__,
            forward.__globals__ | {ROPE: rope},
            forward.__name__,
            forward.__defaults__,
            forward.__closure__,
        )
        renamed.__kwdefaults__ = forward.__kwdefaults__
        module.forward = MethodType(renamed, module)


def _rows(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (2 * torch.randn(1, 3, width, generator=generator)).to(device, dtype)


def _same(got: Tensor, wanted: Tensor) -> bool:
    if got.shape != wanted.shape or got.dtype is not wanted.dtype:
        return False
    apart = (got.float() - wanted.float()).abs().max() / wanted.float().abs().max().clamp(min=1e-6)
    return bool(apart <= ROUNDING.get(wanted.dtype, 0))
