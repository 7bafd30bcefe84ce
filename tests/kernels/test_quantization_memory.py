"""Quantising a layer takes little memory beside its weights: on a card that holds no more than the quantised base."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_serve.kernels.packed_weight import Scheme, quantize


class TrackedMemory(TorchDispatchMode):
    """Counts the bytes of tensors that operations in this context make; `peak` is the most at a time."""

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self._known = {given.untyped_storage()._cdata}
        self._bytes = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(result) if isinstance(x, Tensor)):
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self._bytes += storage.nbytes()
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self._bytes)
        return result

    def _forget(self, storage: int, nbytes: int) -> None:
        self._known.discard(storage)
        self._bytes -= nbytes


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
def test_a_layer_is_quantized_in_little_more_memory_than_it_had(scheme: Scheme) -> None:
    weight = torch.randn(4096, 2048).bfloat16()
    with TrackedMemory(weight) as memory:
        quantize(weight, scheme)
    assert memory.peak < 1.35 * weight.nbytes  # the integers twice, and some rows in float32


def test_outputs_are_quantized_to_int8_as_if_each_were_alone() -> None:
    torch.manual_seed(0)
    weight = torch.randn(900, 1000)  # more than is quantised at a time
    q, scale, _ = quantize(weight, "int8")
    for row in (0, 261, 262, 263, 899):
        alone, step, _ = quantize(weight[row : row + 1], "int8")
        assert torch.equal(q[row], alone[0])
        assert torch.equal(scale[row], step[0])
        assert torch.equal(scale[row], weight[row].abs().max() / 127)
