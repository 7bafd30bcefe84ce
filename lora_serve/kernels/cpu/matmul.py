"""The native CPU backend's linear maps: packs weights for `linear.cpp` and calls it.

bf16 has two ways through the same packed weights: widened to float32 in registers, or by the CPU's own dot product of
bf16 pairs. Which one is faster depends on the CPU; it is measured once, and then serves whatever number of rows comes,
so that a row's bits never depend on its company.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from struct import Struct

import torch
from torch import Tensor

from lora_serve.kernels.cpu.library import Library, type_number
from lora_serve.kernels.packed_weight import GROUP, PackedWeight, Scheme

_INT8, _INT4, _DOT = 3, 4, 5
_PACK = Struct("8q")
_ROWS = Struct("9q")
_CALLS = {count: Struct(f"{8 + 6 * count}q") for count in range(1, 9)}


class NativeLinear:
    """`Kernels.pack`, `unpack` and `linear`.

    Args:
        library: built from `linear.cpp`; its panels have `lora_columns()` outputs.
    """

    def __init__(self, library: Library) -> None:
        names = ("linear", "packed_bytes", "pack", "unpack", "rows")
        self._linear, self._bytes, self._pack, self._unpack, self._rows = (
            library.call(f"lora_{name}") for name in names
        )
        self._columns = library.number("lora_columns")
        self._bf16 = type_number(torch.bfloat16)
        if library.number("lora_has_dot") and self._seconds(_DOT) < self._seconds(self._bf16):
            self._bf16 = _DOT

    def pack(self, weight: Tensor, scheme: Scheme | None = None) -> PackedWeight:
        """See `Kernels.pack`."""
        shape = (weight.shape[0], weight.shape[1])
        if scheme == "int4" and shape[1] % GROUP:
            raise ValueError(f"{shape[1]} inputs are no whole number of int4's groups")
        source = weight.detach().contiguous()  # has to live until the call is over
        empty = PackedWeight(shape, weight.dtype, scheme, torch.empty(0, dtype=torch.uint8))
        data = torch.empty(self._bytes(self._call(source, empty)), dtype=torch.uint8)
        scale = torch.zeros(-(-shape[0] // self._columns) * self._columns) if scheme == "int8" else None
        packed = replace(empty, data=data, scale=scale)
        self._pack(self._call(source, packed))
        return packed

    def unpack(self, packed: PackedWeight) -> Tensor:
        """See `Kernels.unpack`."""
        whole = torch.empty(packed.shape, dtype=packed.dtype if packed.scheme is None else torch.float32)
        self._unpack(self._call(whole, packed))
        return whole

    def rows(self, packed: PackedWeight, ids: Tensor) -> Tensor:
        """See `Kernels.rows`."""
        if packed.scheme is not None or ids.dtype is not torch.int64 or ids.ndim != 1:
            raise TypeError("rows are looked up in full precision, by a list of int64")
        ids = ids.contiguous()
        found = torch.empty(ids.shape[0], packed.shape[1], dtype=packed.dtype)
        kind = self._kind(packed.dtype, None)
        head = (packed.data.data_ptr(), *packed.shape, kind, packed.dtype.itemsize, ids.data_ptr(), ids.shape[0])
        wrong = self._rows(_ROWS.pack(*head, found.data_ptr(), torch.get_num_threads()))
        if wrong:
            raise ValueError(f"there is no row for id {wrong - 1} of the list")
        return found

    def linear(self, x: Tensor, layers: Sequence[tuple[PackedWeight, Tensor | None]]) -> list[Tensor]:
        """See `Kernels.linear`."""
        rows, width = x.shape
        first = layers[0][0]
        kind = self._kind(first.dtype, first.scheme)
        if x.stride(1) != 1:
            x = x.contiguous()
        places: list[int] = []
        outputs = []
        for packed, bias in layers:
            if packed.shape[1] != width or packed.dtype is not first.dtype or packed.scheme != first.scheme:
                raise ValueError(f"a map of {packed.shape[1]} inputs and scheme {packed.scheme} does not fit its call")
            y = torch.empty(rows, packed.shape[0], dtype=x.dtype)
            if bias is not None and bias.dtype is not x.dtype:
                raise TypeError("a bias has the rows' type")
            if bias is not None and (bias.shape != packed.shape[:1] or not bias.is_contiguous()):
                raise ValueError(f"bias {tuple(bias.shape)} does not fit {packed.shape[0]} outputs")
            scale = 0 if packed.scale is None else packed.scale.data_ptr()
            constant = 0 if bias is None else bias.data_ptr()
            places += (packed.data.data_ptr(), scale, constant, y.data_ptr(), y.shape[1], packed.shape[0])
            outputs.append(y)
        threads = torch.get_num_threads()
        head = (x.data_ptr(), x.stride(0), rows, width, type_number(x.dtype), threads, kind, len(outputs))
        self._linear(_CALLS[len(outputs)].pack(*head, *places))
        return outputs

    def _kind(self, dtype: torch.dtype, scheme: Scheme | None) -> int:
        if scheme is not None:
            return _INT8 if scheme == "int8" else _INT4
        return self._bf16 if dtype is torch.bfloat16 else type_number(dtype)

    def _call(self, weight: Tensor, packed: PackedWeight) -> bytes:
        return _PACK.pack(
            weight.data_ptr(),
            *packed.shape,
            type_number(packed.dtype),
            self._kind(packed.dtype, packed.scheme),
            packed.data.data_ptr(),
            0 if packed.scale is None else packed.scale.data_ptr(),
            torch.get_num_threads(),
        )

    def _seconds(self, kind: int) -> float:
        """How long a product of some rows takes by this kind of bf16."""
        self._bf16 = kind
        packed, x = self.pack(torch.zeros(512, 1024, dtype=torch.bfloat16)), torch.zeros(64, 1024, dtype=torch.bfloat16)
        taken = []
        for _ in range(7):
            begin = time.perf_counter()
            self.linear(x, [(packed, None)])
            taken.append(time.perf_counter() - begin)
        return statistics.median(taken)
