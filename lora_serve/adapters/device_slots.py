"""Adapter slots on the device: pointer tables, slot assignment and eviction (least recently used first, LRU).

A slot is one column of the pointer tables that the delta kernels read; a resident adapter is one flat tensor of exactly
its own size. There is no padding and no maximum rank. On a CPU the host tensor is used without a copy; on a GPU it is
copied beside running steps (`device_copy.py`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

import torch
from torch import Tensor

from lora_serve.adapters.adapter import Adapter, BaseShape, ModuleOverride, Prefix
from lora_serve.adapters.device_copy import DeviceCopier, PendingCopy
from lora_serve.kernels.contract import DeltaGroup, pointer_tables


def residents_to_evict(
    sizes: Mapping[str, int], needed: int, slots: int, capacity: int | None, keep: Set[str]
) -> list[str] | None:
    """Resident adapters to evict so that one of `needed` bytes gets a slot: least recently used first, none of `keep`.

    None if evicting all of the others would not be enough.

    Args:
        sizes: bytes by resident adapter, least recently used first.
        slots, capacity: maximum number and bytes of resident adapters.
    """
    bytes_over = 0 if capacity is None else sum(sizes.values()) + needed - capacity
    slots_over = len(sizes) + 1 - slots
    evicted = []
    for digest, size in sizes.items():
        if bytes_over <= 0 and slots_over <= 0:
            break
        if digest not in keep:
            evicted.append(digest)
            bytes_over, slots_over = bytes_over - size, slots_over - 1
    return None if bytes_over > 0 or slots_over > 0 else evicted


class ResidentAdapter(NamedTuple):
    """A resident adapter: its slot, device tensor and sites, and its copy while that may be running."""

    slot: int
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
        capacity: maximum bytes of resident adapters; None: no limit.
    """

    def __init__(
        self, base: BaseShape, slots: int, dtype: torch.dtype, device: torch.device, capacity: int | None = None
    ) -> None:
        self.slots = slots
        self.capacity = capacity
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
        self._resident: OrderedDict[str, ResidentAdapter] = OrderedDict()  # least recently used first
        self.evictions = 0

    def __repr__(self) -> str:
        return f"<DeviceSlots {len(self._resident)} of {self.slots} slots, {self.bytes} bytes>"

    @property
    def resident(self) -> list[str]:
        """Digests on the device, least recently used first."""
        return list(self._resident)

    def evict_to_fit(self, needed: int, keep: Set[str]) -> bool:
        """Evict least recently used adapters to free a slot and `needed` bytes; False, evicting none, if that fails."""
        sizes = {digest: resident.flat.nbytes for digest, resident in self._resident.items()}
        evicted = residents_to_evict(sizes, needed, self.slots, self.capacity, keep)
        for digest in evicted or []:
            self.evict(digest)
        return evicted is not None

    @property
    def bytes(self) -> int:
        return sum(resident.flat.nbytes for resident in self._resident.values())

    def holds(self, digest: str) -> bool:
        return digest in self._resident

    def slot(self, digest: str) -> int | None:
        """The adapter's slot, if it has one; marks it as most recently used."""
        resident = self._resident.get(digest)
        if resident is None:
            return None
        self._resident.move_to_end(digest)
        return resident.slot

    def copied(self, digest: str) -> bool:
        """Whether the adapter's host-to-device copy is complete."""
        copy = self._resident[digest].copy
        return copy is None or copy.complete

    def wait_for_copies(self, digests: Sequence[str]) -> None:
        """Make the next step wait for the copies of these adapters."""
        for digest in digests:
            copy = self._resident[digest].copy
            if copy is not None:
                copy.make_stream_wait()

    def load(self, adapter: Adapter) -> int:
        """Assign a free slot to an adapter (it must fit) and start its copy; returns the slot.

        Raises torch.OutOfMemoryError, without effect.
        """
        flat, copy = self.copier.copy(adapter.flat)
        slot = self._free.pop()
        self._resident[adapter.digest] = ResidentAdapter(slot, flat, list(adapter.offsets), copy)
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

    def evict(self, digest: str) -> None:
        """Zero an adapter's slot and free its device memory; does nothing if it is not resident."""
        resident = self._resident.pop(digest, None)
        if resident is None:
            return
        slot, _, names, _ = resident
        for table in self._tables:
            table[:, slot] = 0
        for name in names:
            _, group, module = self._rows[name]
            group.deltas[module][slot] = None
        self.overrides.pop(slot, None)
        self.prefixes.pop(slot, None)
        self.ranks.pop(slot, None)
        self._free.append(slot)
        self.evictions += 1
