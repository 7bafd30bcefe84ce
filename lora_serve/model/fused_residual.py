"""Residual additions fused with the norm that reads their sum, in decoder layers of the pre-norm kind.

    x = x + attention(norm(x));  x = x + mlp(norm(x))

Each sum is read by a norm next: the layer's second one, the next layer's first, the model's last. So one kernel call
adds and norms (`Kernels.add_rms_norm`), to the same bits. As in `fused.py`, names decide nothing: a layer's code is
replaced if it gives, with its parts replaced by random linear maps, the same bits as the formula, and hands the same
arguments to the same parts in the same order. Post-norms, parallel residuals, scaled or clamped ones are left alone.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations, product
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lora_serve.model.fused import FusedRMSNorm, probe_generator, probe_rows

WIDTH = 24  # of the probe's rows


@dataclass(frozen=True)
class LayerParts:
    """Names of a pre-norm layer's children, and what its forward passes on to attention unless given otherwise."""

    attention: str
    mlp: str
    first_norm: str
    second_norm: str
    defaults: dict[str, Any]


def fuse_residuals(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Fuse the residual additions of all layers that match, in place; module paths are unchanged."""
    for parent in list(model.modules()):
        for name, layers in parent.named_children():
            if isinstance(layers, nn.ModuleList):
                beside = [child for other, child in parent.named_children() if other != name]
                _fuse_list(layers, beside, dtype, device)


def _fuse_list(layers: nn.ModuleList, beside: list[nn.Module], dtype: torch.dtype, device: torch.device) -> None:
    """Fuse consecutive layers.

    Args:
        beside: the list's siblings. If one norm is among them, it is taken to follow the last layer: if it does not,
            a norm is computed that nobody reads, and nothing else.
    """
    found = [_layer_parts(layer, dtype, device) for layer in layers]
    last = [each for each in beside if isinstance(each, FusedRMSNorm)]
    for index, (layer, parts) in enumerate(zip(layers, found, strict=True)):
        if parts is None:
            continue
        following = found[index + 1] if index + 1 < len(found) else None
        after = layers[index + 1].get_submodule(following.first_norm) if following is not None else None
        if index + 1 == len(found) and len(last) == 1:
            after = last[0]
        layer.forward = MethodType(_forward_of(parts, after), layer)


def _forward_of(parts: LayerParts, after: Any) -> Any:
    """The forward of a layer with these parts; `after` is the norm that reads its output, if known."""

    def forward(layer: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        children = layer._modules
        normed = children[parts.first_norm](hidden_states)
        attended = children[parts.attention](hidden_states=normed, **(parts.defaults | kwargs))[0]
        second = children[parts.second_norm]
        between = add(second, hidden_states, attended)
        return add(after, between, children[parts.mlp](second(between)))

    return forward


def add(norm: Any, x: Tensor, y: Tensor) -> Tensor:
    """x + y, which `norm` reads next, if there is one that can add."""
    return norm.add(x, y) if isinstance(norm, FusedRMSNorm) else x + y


def _layer_parts(layer: nn.Module, dtype: torch.dtype, device: torch.device) -> LayerParts | None:
    """The parts of a layer of the pre-norm kind; None for any other."""
    children = [name for name, child in layer.named_children() if not isinstance(child, nn.Dropout)]
    norms = [name for name in children if isinstance(layer.get_submodule(name), FusedRMSNorm)]
    others = [name for name in children if name not in norms]
    own = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]  # a scale that happens to be one, perhaps
    if len(norms) != 2 or len(others) != 2 or layer.training or own:
        return None
    signature = inspect.signature(layer.forward).parameters.values()
    named = [each for each in signature if each.kind is each.POSITIONAL_OR_KEYWORD]
    if not named or named[0].name != "hidden_states":
        return None
    defaults = {each.name: each.default for each in named[1:] if each.default is not each.empty}
    sentinels = {each.name: object() for each in named[1:]}
    needed = {name: value for name, value in sentinels.items() if name not in defaults}
    if any(each.kind is each.VAR_KEYWORD for each in signature):
        sentinels["another"] = object()
    for (attention, mlp), (first, second) in product(permutations(others), permutations(norms)):
        parts = LayerParts(attention, mlp, first, second, defaults)
        if all(_agrees(layer, parts, given, kind, device) for given in (sentinels, needed) for kind in _kinds(dtype)):
            return parts
    return None


def _kinds(dtype: torch.dtype) -> set[torch.dtype]:
    return {dtype, torch.float32}


@torch.inference_mode()
def _agrees(
    layer: nn.Module, parts: LayerParts, given: Mapping[str, object], dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether a layer with linear maps for parts computes the formula, and calls its parts alike."""
    x = probe_rows(WIDTH).to(device, dtype)
    results = []
    for fused in (False, True):
        twin = copy.copy(layer)
        calls: list[_Call] = []
        twin._modules = dict(layer._modules)
        for seed, name in enumerate((parts.attention, parts.mlp, parts.first_norm, parts.second_norm)):
            twin._modules[name] = _LinearMap(name, seed, calls, gives_tuple=name == parts.attention)
        if fused:
            twin.forward = MethodType(_forward_of(parts, None), twin)
        try:
            results.append((twin(x, **given), calls))
        except Exception:  # it wants arguments of a kind, or gives something else, and so is left alone
            return False
    (theirs, their_calls), (ours, our_calls) = results
    if not isinstance(theirs, Tensor) or theirs.dtype is not ours.dtype or not torch.equal(theirs, ours):
        return False
    return len(their_calls) == len(our_calls) and all(map(_Call.equals, their_calls, our_calls))


@dataclass(frozen=True)
class _Call:
    """One call of a part: its own input, and what else it was given."""

    name: str
    x: Tensor
    by_name: bool
    others: Mapping[str, object]

    def equals(self, other: _Call) -> bool:
        same = (self.name, self.by_name, self.others.keys()) == (other.name, other.by_name, other.others.keys())
        return same and torch.equal(self.x, other.x) and all(v is other.others[k] for k, v in self.others.items())


class _LinearMap(nn.Module):
    """A random linear map of rows that stands for a part of a layer, and records its calls."""

    def __init__(self, name: str, seed: int, calls: list[_Call], *, gives_tuple: bool) -> None:
        super().__init__()
        self._name, self._seed, self._calls, self._gives_tuple = name, seed, calls, gives_tuple

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        others = dict(kwargs)
        (x,) = args or (others.pop("hidden_states"),)
        self._calls.append(_Call(self._name, x, not args, others))
        weight = torch.randn(WIDTH, WIDTH, generator=probe_generator(self._seed)) / WIDTH**0.5
        y = x @ weight.to(x.device, x.dtype)
        return (y, None) if self._gives_tuple else y
