"""Adapter slots on the device: the pointer tables that the delta kernels read, and the adapters that they point to.

A slot is one column of the tables; a resident adapter is one flat tensor of exactly its own size. There is no padding
and no maximum rank. On a CPU the host tensor is used without a copy; on a GPU it is copied beside running steps
(`device_copy.py`). Who gets a slot is decided in `residency.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lora_serve.adapters.adapter import Adapter, BaseShape, ModuleOverride, Prefix
from lora_serve.adapters.device_copy import DeviceCopier, PendingCopy
from lora_serve.kernels.contract import DeltaGroup, pointer_tables


class ResidentAdapter(NamedTuple):
    """A resident adapter: its device tensor and sites, and its copy while that may be running."""

    flat: Tensor
    sites: list[str]
    copy: PendingCopy | None


class DeviceSlots:
    """The adapter slots of a device; slot 0 is the base.

    Attributes:
        groups: pointer tables by group of sites.
        overrides, prefixes: module overrides and virtual tokens by slot, of the resident adapters that have any.
        ranks: the highest rank of each resident adapter's deltas, by slot.
        copier: copies adapters to the device.

    Args:
        base: sites and groups of the resident base.
        slots: maximum number of resident adapters.
    """

    def __init__(self, base: BaseShape, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self.slots = slots
        self.copier = DeviceCopier(device)
        self.groups: dict[tuple[str, ...], DeltaGroup] = {}
        self.overrides: dict[int, dict[str, ModuleOverride]] = {}
        self.prefixes: dict[int, Prefix] = {}
        self.ranks: dict[int, int] = {}
        self._tables = pointer_tables(sum(map(len, base.groups)), slots + 1, device)
        self._rows: dict[str, tuple[int, DeltaGroup, int]] = {}  # site → row of the tables, group, module of the group
        row = 0
        for names in base.groups:
            a, b, rank = (table[row : row + len(names)] for table in self._tables)
            group = self.groups[names] = DeltaGroup(
                base.sites[names[0]].in_features,
                tuple(base.sites[name].out_features for name in names),
                slots + 1,
                dtype,
                device,
                tables=(a, b, rank),
            )
            self._rows |= {name: (row + module, group, module) for module, name in enumerate(names)}
            row += len(names)
        self._base = base
        self._device = device
        self._free = list(range(slots, 0, -1))
        self._resident: dict[int, ResidentAdapter] = {}  # by slot

    def __repr__(self) -> str:
        return f"<DeviceSlots {len(self._resident)} of {self.slots} slots, {self.bytes} bytes>"

    @property
    def bytes(self) -> int:
        return sum(resident.flat.nbytes for resident in self._resident.values())

    def copied(self, slot: int) -> bool:
        """Whether the host-to-device copy of a slot's adapter is complete."""
        copy = self._resident[slot].copy
        return copy is None or copy.complete

    def wait_for_copies(self, slots: Iterable[int]) -> None:
        """Make the next step wait for the copies of these slots' adapters."""
        for slot in slots:
            copy = self._resident[slot].copy
            if copy is not None:
                copy.make_stream_wait()

    def load(self, adapter: Adapter) -> int:
        """Assign a free slot to an adapter (there must be one) and start its copy; returns the slot.

        Raises torch.OutOfMemoryError, without effect.
        """
        flat, copy = self.copier.copy(adapter.flat)
        slot = self._free.pop()
        self._resident[slot] = ResidentAdapter(flat, list(adapter.offsets), copy)
        start, step = flat.data_ptr(), flat.element_size()
        pin_memory = self._device.type == "cuda"
        columns = [torch.zeros(table.shape[0], dtype=table.dtype, pin_memory=pin_memory) for table in self._tables]
        entries = [column.numpy() for column in columns]  # a shared view: setting single elements of a tensor is slow
        for name, offsets in adapter.offsets.items():
            row, group, module = self._rows[name]
            group.deltas[module][slot] = adapter.delta(self._base.sites[name], flat)
            for entry, value in zip(
                entries, (start + step * offsets.a, start + step * offsets.b, offsets.rank), strict=True
            ):
                entry[row] = value
        for table, column in zip(self._tables, columns, strict=True):
            table[:, slot].copy_(column, non_blocking=True)  # one copy per table, not per module
        self.ranks[slot] = max((offsets.rank for offsets in adapter.offsets.values()), default=0)
        overrides, prefix = adapter.override_views(flat)
        if overrides:
            self.overrides[slot] = overrides
        if prefix is not None:
            self.prefixes[slot] = prefix
        return slot

    def evict(self, slot: int) -> None:
        """Zero a slot and free the device memory of its adapter."""
        resident = self._resident.pop(slot)
        for table in self._tables:
            table[:, slot] = 0
        for name in resident.sites:
            _, group, module = self._rows[name]
            group.deltas[module][slot] = None
        self.overrides.pop(slot, None)
        self.prefixes.pop(slot, None)
        self.ranks.pop(slot, None)
        self._free.append(slot)
