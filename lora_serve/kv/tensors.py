"""KV cache tensors: one tensor of keys and one of values per layer, divided into blocks."""

from __future__ import annotations

import math
import mmap
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20  # bytes


@dataclass(frozen=True)
class LayerShape:
    """Shape of the keys and values that one attention layer stores per token."""

    kv_heads: int
    key_dim: int
    value_dim: int


class KVTensors:
    """Keys and values of all layers, [blocks + 1, block_size, kv_heads, dim] each (block 0 is scratch)."""

    def __init__(
        self, layers: list[LayerShape], blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._layers, self._block_size = layers, block_size
        self._dtype, self._device = dtype, device
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.resize(blocks)

    def resize(self, blocks: int) -> None:
        """Replace the tensors by new, zeroed ones with another number of blocks."""

        def make(heads: int, dim: int) -> Tensor:
            return _zeros((blocks + 1, self._block_size, heads, dim), self._dtype, self._device)

        self.keys.clear()
        self.values.clear()
        self.keys += [make(layer.kv_heads, layer.key_dim) for layer in self._layers]
        self.values += [make(layer.kv_heads, layer.value_dim) for layer in self._layers]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the CPU in huge pages where the system has them, as a step reads blocks from all over the pool."""
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type == "cpu" and nbytes >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # no memory, which torch says in its own words, or a kernel without huge pages
            memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE)
            return torch.frombuffer(memory, dtype=dtype).view(shape)
    return torch.zeros(shape, dtype=dtype, device=device)


def bytes_per_token(layers: list[LayerShape], dtype: torch.dtype) -> int:
    """KV cache bytes per token, over all layers."""
    return sum(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in layers) * dtype.itemsize
