"""Adapter slots on the device: the pointer tables that the delta kernels read, and the adapters that they point to.

A slot is one column of the tables; a resident adapter is one flat tensor of exactly its own size. There is no padding
and no maximum rank. On a CPU the host tensor is used without a copy; on a GPU it is copied beside running steps
(`device_copy.py`). Who gets a slot is decided in `residency.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lora_serve.adapters.adapter import Adapter, BaseShape, MatrixOffsets, ModuleOverride, Prefix, Site
from lora_serve.adapters.device_copy import DeviceCopier, PendingCopy
from lora_serve.adapters.sharding import Sharding
from lora_serve.kernels.contract import Delta, DeltaGroup, pointer_tables


class ResidentAdapter(NamedTuple):
    """A resident adapter: its device tensor, the offsets in it by site, and its copy while that may be running."""

    flat: Tensor
    offsets: dict[str, MatrixOffsets]
    copy: PendingCopy | None


class SlotGroup(DeltaGroup):
    """Pointer tables that device slots fill; a delta's tensors are views that are made when they are asked for."""

    def __init__(
        self,
        sites: Sequence[Site],
        slots: int,
        dtype: torch.dtype,
        tables: tuple[Tensor, Tensor, Tensor],
        delta: Callable[[Site, int], Delta | None],
    ) -> None:
        outputs = tuple(site.out_features for site in sites)
        super().__init__(sites[0].in_features, outputs, slots, dtype, tables[0].device, tables)
        self._sites, self._delta = sites, delta

    def get(self, module: int, slot: int) -> Delta | None:
        return self._delta(self._sites[module], slot)


class DeviceSlots:
    """The adapter slots of a device; slot 0 is the base.

    Attributes:
        groups: pointer tables by group of sites.
        overrides, prefixes: module overrides and virtual tokens by slot, of the resident adapters that have any.
        ranks: the highest rank of each resident adapter's deltas, by slot.
        copier: copies adapters to the device.

    Args:
        base: the whole resident base, with its sites and groups.
        slots: maximum number of resident adapters.
        sharding: what part of the base, and of every adapter, this device has; None: all of it.
    """

    def __init__(
        self,
        base: BaseShape,
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
        sharding: Sharding | None = None,
    ) -> None:
        self._whole, self._sharding = base, sharding
        base = base if sharding is None else sharding.shape(base)
        self.slots = slots
        self.copier = DeviceCopier(device)
        self.groups: dict[tuple[str, ...], DeltaGroup] = {}
        self.overrides: dict[int, dict[str, ModuleOverride]] = {}
        self.prefixes: dict[int, Prefix] = {}
        self.ranks: dict[int, int] = {}
        self._tables = pointer_tables(sum(map(len, base.groups)), slots + 1, device)
        self._rows: dict[str, int] = {}  # of the tables, by site
        row = 0
        for names in base.groups:
            a, b, rank = (table[row : row + len(names)] for table in self._tables)
            sites = [base.sites[name] for name in names]
            self.groups[names] = SlotGroup(sites, slots + 1, dtype, (a, b, rank), self._delta)
            self._rows |= {name: row + module for module, name in enumerate(names)}
            row += len(names)
        self._device = device
        self._free = list(range(slots, 0, -1))
        self._resident: dict[int, ResidentAdapter] = {}  # by slot

    def __repr__(self) -> str:
        return f"<DeviceSlots {len(self._resident)} of {self.slots} slots, {self.bytes} bytes>"

    def __contains__(self, slot: object) -> bool:
        """Whether there is an adapter in a slot."""
        return slot in self._resident

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
        if self._sharding is not None:
            adapter = self._sharding.adapter(adapter, self._whole)
            self.copier.pin_memory(adapter.flat)
        flat, copy = self.copier.copy(adapter.flat)
        slot = self._free.pop()
        self._resident[slot] = ResidentAdapter(flat, adapter.offsets, copy)
        rows = [self._rows[name] for name in adapter.offsets]
        places = np.array(list(adapter.offsets.values()), np.int64).reshape(-1, 3)  # of A and of B, and ranks
        start, step, pin_memory = flat.data_ptr(), flat.element_size(), self._device.type == "cuda"
        for table, values in zip(self._tables, (*(start + step * places.T[:2]), places.T[2]), strict=True):
            column = torch.zeros(table.shape[0], dtype=table.dtype, pin_memory=pin_memory)
            column.numpy()[rows] = values
            table[:, slot].copy_(column, non_blocking=True)  # one copy per table, not per module
        self.ranks[slot] = int(places[:, 2].max(initial=0))
        overrides, prefix = adapter.override_views(flat)
        if overrides:
            self.overrides[slot] = overrides
        if prefix is not None:
            self.prefixes[slot] = prefix
        return slot

    def evict(self, slot: int) -> None:
        """Zero a slot and free the device memory of its adapter."""
        del self._resident[slot]
        for table in self._tables:
            table[:, slot] = 0
        self.overrides.pop(slot, None)
        self.prefixes.pop(slot, None)
        self.ranks.pop(slot, None)
        self._free.append(slot)

    def _delta(self, site: Site, slot: int) -> Delta | None:
        """The delta of the resident adapter of a slot, if there is one."""
        resident = self._resident.get(slot)
        offsets = None if resident is None else resident.offsets.get(site.name)
        return None if resident is None or offsets is None else offsets.views(site, resident.flat)
