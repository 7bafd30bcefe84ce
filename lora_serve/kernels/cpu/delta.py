"""LoRA deltas of a mixed batch on the CPU (shrink and expand): argument packing for `delta.cpp`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lora_serve.kernels.checks import check_delta
from lora_serve.kernels.contract import DeltaGroup, Segments
from lora_serve.kernels.cpu.calls import CALLS
from lora_serve.kernels.cpu.library import Library, type_number


class _PackedGroup:
    """What C++ reads of a group, at an address that stays."""

    def __init__(self, group: DeltaGroup) -> None:
        modules, slots = group.rank.shape
        packed = CALLS["Group"].pack(
            a=group.a.data_ptr(),
            b=group.b.data_ptr(),
            rank=group.rank.data_ptr(),
            modules=modules,
            slots=slots,
            in_=group.in_features,
            type=type_number(group.dtype),
            out=group.out_features,
        )
        self._memory = ctypes.create_string_buffer(packed, len(packed))
        self.address = ctypes.addressof(self._memory)


class NativeDelta:
    """`Kernels.delta`. What never changes about a group is packed once."""

    def __init__(self, library: Library) -> None:
        self._delta = library.call("lora_delta")
        self._groups: WeakKeyDictionary[DeltaGroup, _PackedGroup] = WeakKeyDictionary()

    def delta(self, x: Tensor, outputs: Sequence[Tensor], group: DeltaGroup, segments: Segments) -> None:
        count = segments.count
        if count == 0:
            return
        packed = self._groups.get(group)
        if packed is None:
            packed = self._groups[group] = _PackedGroup(group)
        check_delta(x, outputs, group)
        pointers: list[int] = []
        for output in outputs:
            pointers += (output.data_ptr(), output.stride(0))
        start, end, slot, weight = segments.start, segments.end, segments.slot, segments.weight
        if not start.dtype is end.dtype is slot.dtype is torch.int32 or weight.dtype is not torch.float32:
            raise TypeError("segments are int32, their weights float32")
        if not all(part.shape == (count,) and part.is_contiguous() for part in (start, end, slot, weight)):
            raise ValueError("a segment has a start, an end, a slot and a weight")
        call = CALLS["DeltaCall"].pack(
            group=packed.address,
            x=x.data_ptr(),
            x_stride=x.stride(0),
            tokens=x.shape[0],
            type=type_number(x.dtype),
            threads=torch.get_num_threads(),
            segments=count,
            start=start.data_ptr(),
            end=end.data_ptr(),
            slot=slot.data_ptr(),
            weight=weight.data_ptr(),
            output=pointers,
        )
        wrong = self._delta(call)
        if wrong:
            raise ValueError(f"segment {wrong - 1} lies outside the batch or the slots")
