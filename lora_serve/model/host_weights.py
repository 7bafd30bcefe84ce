"""Weights that stay on the host until they are quantised, so that the device never holds the base in full precision.

A base that fits a GPU once it is quantised may not fit it before. Its linear modules' weights, and experts if these are
quantised too, stay where transformers has mapped them from the checkpoint, while everything else goes to the device.
There the untouched model is traced, run as the oracle, and checked with adapters installed: each operation that reads
such a weight gets a copy for itself. Then packing copies the weights of one group of modules at a time (`install.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lora_serve.model.expert_rows import STACKED
from lora_serve.model.experts import is_stacked
from lora_serve.model.observe import is_linear


def move_unquantized(model: nn.Module, device: torch.device, *, quantizes_experts: bool) -> None:
    """Move a model to the device in place, except the weights that packing will quantise; tied parameters stay tied."""
    moved: dict[int, nn.Parameter] = {}  # by the identity of the parameter on the host
    for module in model.modules():
        stay: tuple[str, ...] = ("weight",) if is_linear(module) else ()
        if quantizes_experts and is_stacked(module):
            stay = STACKED
        for name, parameter in module._parameters.items():
            if parameter is not None and name not in stay and parameter.device.type != device.type:
                moved.setdefault(id(parameter), nn.Parameter(parameter.detach().to(device), requires_grad=False))
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = moved.get(id(parameter), parameter)


def reading_host_weights(model: nn.Module, device: torch.device) -> AbstractContextManager[object]:
    """A context in which a model runs on the device although some of its weights are on the host.

    Enter it after other dispatch modes: it copies weights as they are, and these see the copies.
    """
    elsewhere = any(parameter.device.type != device.type for parameter in model.parameters())
    return _CopiedWeights(device) if elsewhere else nullcontext()


class _CopiedWeights(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode in which an operation on tensors of the device and of the host gets copies of the latter."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given: tuple[Any, dict[str, Any]] = (args, kwargs or {})
        places = {each.device.type for each in tree_leaves(given) if isinstance(each, Tensor)}
        if len(places) > 1 and func is not torch.ops.aten.copy_.default:
            given = tree_map(lambda value: value.to(self._device) if isinstance(value, Tensor) else value, given)
        return func(*given[0], **given[1])
