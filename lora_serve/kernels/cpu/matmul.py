"""Linear layers of the native CPU backend: packs weights for `matmul.cpp` and calls it.

bf16 weights are multiplied in one of two ways from the same packed layout: widened to float32 in registers, or by the
CPU's own dot product of bf16 pairs. Which is faster depends on the CPU; it is measured once and then used for every
number of rows, so that a row's result never depends on the other rows of its batch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lora_serve.kernels.contract import Layers
from lora_serve.kernels.cpu.calls import CALLS
from lora_serve.kernels.cpu.library import Library, type_number
from lora_serve.kernels.packed_weight import GROUP, PackedExpertWeights, PackedWeight, Scheme, quantize

TILE = 1 << 23  # weights that are unpacked at a time, for products in full precision
_INT8, _INT4, _DOT = 3, 4, 5  # `Kind` in panels.h, which goes on from the numbers of types


class NativeLinear:
    """`Kernels.pack` (of one weight), `unpack`, `lookup`, `linear` and `grouped_linear`."""

    def __init__(self, library: Library) -> None:
        names = ("linear", "grouped_linear", "packed_bytes", "pack", "pack_turned", "unpack", "rows")
        self._linear, self._grouped_linear, self._bytes, self._pack, self._pack_turned, self._unpack, self._rows = (
            library.call(f"lora_{name}") for name in names
        )
        self._columns = library.number("lora_columns")
        self._bf16 = type_number(torch.bfloat16)
        if library.number("lora_has_dot") and self._seconds(_DOT) < self._seconds(self._bf16):
            self._bf16 = _DOT

    def pack(self, weight: Tensor, scheme: Scheme | None = None, importance: Tensor | None = None) -> PackedWeight:
        shape = (weight.shape[0], weight.shape[1])
        if scheme == "fp8":
            raise NotImplementedError("fp8 is for GPUs")
        if scheme == "int4" and shape[1] % GROUP:
            raise ValueError(f"{shape[1]} inputs are not a multiple of int4's groups of {GROUP}")
        source = weight.detach().contiguous()  # kept alive until the call is over
        empty = PackedWeight(shape, weight.dtype, scheme, torch.empty(0, dtype=torch.uint8))
        data = torch.empty(self._bytes(self._call(source, empty)), dtype=torch.uint8)
        scale = None if scheme is None else torch.zeros(-(-shape[0] // self._columns) * self._columns)
        packed = replace(empty, data=data, scale=scale)
        levels = None
        if scheme == "int4":
            source, scales, levels = quantize(source, scheme, importance)
            assert scale is not None
            scale[: shape[0]] = scales
        self._pack(self._call(source, packed, levels))
        return packed

    def unpack(self, packed: PackedWeight) -> Tensor:
        weight = torch.empty(packed.shape, dtype=packed.dtype if packed.scheme is None else torch.float32)
        self._unpack(self._call(weight, packed))
        return weight

    def lookup(self, packed: PackedWeight, ids: Tensor) -> Tensor:
        if packed.scheme is not None or ids.dtype is not torch.int64 or ids.ndim != 1:
            raise TypeError("rows are looked up in full precision, by int64 ids [n]")
        ids = ids.contiguous()
        found = torch.empty(ids.shape[0], packed.shape[1], dtype=packed.dtype)
        call = CALLS["RowsCall"].pack(
            packed=packed.data.data_ptr(),
            out=packed.shape[0],
            in_=packed.shape[1],
            kind=self._kind(packed.dtype, None),
            size=packed.dtype.itemsize,
            ids=ids.data_ptr(),
            count=ids.shape[0],
            rows=found.data_ptr(),
            threads=torch.get_num_threads(),
        )
        wrong = self._rows(call)
        if wrong:
            raise ValueError(f"id {wrong - 1} of the list is not a row of the weight")
        return found

    def linear(self, x: Tensor, layers: Layers) -> list[Tensor]:
        rows, width = x.shape
        first = layers[0][0]
        kind = self._kind(first.dtype, first.scheme)
        if x.stride(1) != 1:
            x = x.contiguous()
        pointers: list[int | float] = []
        outputs = []
        for packed, bias in layers:
            if packed.shape[1] != width or packed.dtype is not first.dtype or packed.scheme != first.scheme:
                raise ValueError(f"a layer of {packed.shape[1]} inputs, scheme {packed.scheme} does not fit its call")
            y = torch.empty(rows, packed.shape[0], dtype=x.dtype)
            if bias is not None and bias.dtype is not x.dtype:
                raise TypeError("a bias has the rows' type")
            if bias is not None and (bias.shape != packed.shape[:1] or not bias.is_contiguous()):
                raise ValueError(f"bias {tuple(bias.shape)} does not fit {packed.shape[0]} outputs")
            pointers += CALLS["LinearOutput"].values(
                weight=packed.data.data_ptr(),
                scale=0 if packed.scale is None else packed.scale.data_ptr(),
                bias=0 if bias is None else bias.data_ptr(),
                y=y.data_ptr(),
                stride=y.shape[1],
                out=packed.shape[0],
            )
            outputs.append(y)
        call = CALLS["LinearCall"].pack(
            x=x.data_ptr(),
            stride=x.stride(0),
            rows=rows,
            in_=width,
            type=type_number(x.dtype),
            threads=torch.get_num_threads(),
            kind=kind,
            outputs=len(outputs),
            output=pointers,
        )
        self._linear(call)
        return outputs

    def exact(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        """`Kernels.exact_linear` of one layer: x [rows, in] → [rows, out]."""
        if packed.scheme is None and packed.dtype is x.dtype:
            return self.linear(x, [(packed, bias)])[0]
        y = torch.empty(x.shape[0], packed.shape[0], dtype=x.dtype)
        for first, tile in self._tiles(packed):
            own = None if bias is None else bias[first : first + tile.shape[0]]
            weight = self.unpack(tile).to(x.dtype)
            if x.dtype is torch.float32:
                (part,) = self.linear(x, [(self.pack(weight), own)])
            else:
                part = torch.nn.functional.linear(x, weight, own)
            y[:, first : first + tile.shape[0]] = part
        return y

    def backward(self, grad: Tensor, packed: PackedWeight) -> Iterator[Tensor]:
        """Terms [rows, in] of grad @ unpack(packed), for grad [rows, out]."""
        for first, tile in self._tiles(packed):
            weight, own = self.unpack(tile).to(grad.dtype), grad[:, first : first + tile.shape[0]]
            if grad.dtype is torch.float32:  # torch's product of half precision is as fast as this, of float32 slower
                yield self.linear(own, [(self._turned(weight), None)])[0]
            else:
                yield own @ weight

    def _turned(self, weight: Tensor) -> PackedWeight:
        """The transpose of a float32 weight [in, out], packed."""
        shape = (weight.shape[1], weight.shape[0])
        empty = PackedWeight(shape, weight.dtype, None, torch.empty(0, dtype=torch.uint8))
        packed = replace(empty, data=torch.empty(self._bytes(self._call(weight, empty)), dtype=torch.uint8))
        self._pack_turned(self._call(weight, packed))
        return packed

    def _tiles(self, packed: PackedWeight) -> Iterator[tuple[int, PackedWeight]]:
        """Runs of outputs of a weight, of at most `TILE` weights each: the first output, and the run's own weight."""
        out, width = packed.shape
        step = max(1, TILE // (max(1, width) * self._columns)) * self._columns
        for first in range(0, out, step):
            yield first, self.outputs_of(packed, slice(first, min(out, first + step)))

    def outputs_of(self, packed: PackedWeight, outputs: slice) -> PackedWeight:
        out, width = packed.shape
        first, last = outputs.start // self._columns, -(-outputs.stop // self._columns)  # panels
        if outputs.start % self._columns or (outputs.stop != out and outputs.stop % self._columns):
            raise ValueError(f"outputs {outputs.start} to {outputs.stop} of {out} are not whole panels")
        panel = packed.data.numel() // max(1, -(-out // self._columns))  # bytes
        return replace(
            packed,
            shape=(outputs.stop - outputs.start, width),
            data=packed.data[first * panel : last * panel],
            scale=None if packed.scale is None else packed.scale[first * self._columns : last * self._columns],
        )

    def grouped_linear(self, x: Tensor, weights: PackedExpertWeights, bias: Tensor | None, end: Tensor) -> Tensor:
        (rows, width), (out, wide), experts = x.shape, weights.shape, len(weights)
        if wide != width or end.shape != (experts,):
            raise ValueError(
                f"{experts} experts of {wide} inputs do not fit x {tuple(x.shape)}, end {tuple(end.shape)}"
            )
        if end.dtype is not torch.int64 or (bias is not None and bias.dtype is not x.dtype):
            raise TypeError("ends are int64, a bias has the rows' type")
        if bias is not None and (bias.shape != (experts, out) or not bias.is_contiguous()):
            raise ValueError(f"bias {tuple(bias.shape)} does not fit {experts} experts of {out} outputs")
        if x.stride(1) != 1:
            x = x.contiguous()
        end = end.contiguous()
        y = torch.empty(rows, out, dtype=x.dtype)
        call = CALLS["GroupedLinearCall"].pack(
            x=x.data_ptr(),
            stride=x.stride(0),
            rows=rows,
            in_=width,
            out=out,
            type=type_number(x.dtype),
            threads=torch.get_num_threads(),
            kind=self._kind(weights.dtype, weights.scheme),
            experts=experts,
            weight=weights.data.data_ptr(),
            weight_stride=weights.data.stride(0),
            scale=0 if weights.scale is None else weights.scale.data_ptr(),
            bias=0 if bias is None else bias.data_ptr(),
            y=y.data_ptr(),
            end=end.data_ptr(),
        )
        wrong = self._grouped_linear(call)
        if wrong:
            raise ValueError(f"the rows of expert {wrong - 1} end before they begin, or beyond the batch")
        return y

    def _kind(self, dtype: torch.dtype, scheme: Scheme | None) -> int:
        if scheme is not None:
            return _INT8 if scheme == "int8" else _INT4
        return self._bf16 if dtype is torch.bfloat16 else type_number(dtype)

    def _call(self, weight: Tensor, packed: PackedWeight, levels: Tensor | None = None) -> bytes:
        return CALLS["PackCall"].pack(
            weight=weight.data_ptr(),
            out=packed.shape[0],
            in_=packed.shape[1],
            type=type_number(packed.dtype),
            kind=self._kind(packed.dtype, packed.scheme),
            packed=packed.data.data_ptr(),
            scale=0 if packed.scale is None else packed.scale.data_ptr(),
            levels=0 if levels is None else levels.data_ptr(),
            threads=torch.get_num_threads(),
        )

    def _seconds(self, kind: int) -> float:
        """How long a product takes with this kind of bf16 multiplication."""
        self._bf16 = kind
        packed, x = self.pack(torch.zeros(512, 1024, dtype=torch.bfloat16)), torch.zeros(64, 1024, dtype=torch.bfloat16)
        taken = []
        for _ in range(7):
            begin = time.perf_counter()
            self.linear(x, [(packed, None)])
            taken.append(time.perf_counter() - begin)
        return statistics.median(taken)
