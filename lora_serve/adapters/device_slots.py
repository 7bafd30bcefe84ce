"""Adapters on the device: a slot is a row of pointers, an adapter one flat tensor of exactly its own size.

Seating an adapter writes one column of the bank's tables, of which every group has some rows; nothing is copied into a
stack and nothing padded. On a CPU the device's memory is the host's, so the flat tensor itself is used, without a copy;
elsewhere it is on its way for a while (`upload.py`), in which steps go on without it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

import torch
from torch import Tensor

from lora_serve.adapters.adapter import Adapter, BaseShape, ModuleOverride, Prefix
from lora_serve.adapters.device_copy import PendingCopy, Upload
from lora_serve.kernels.contract import DeltaGroup, pointer_tables


def slots_to_free(
    sizes: Mapping[str, int], needed: int, slots: int, capacity: int | None, keep: Set[str]
) -> list[str] | None:
    """Who gives up its seat for an adapter of `needed` bytes: the first of `sizes` that are not in `keep`.

    None if even all of those would not make room.

    Args:
        sizes: bytes by seated adapter, least recently used first.
        slots, capacity: how many adapters, and bytes of them, there may be at once.
    """
    bytes_over = 0 if capacity is None else sum(sizes.values()) + needed - capacity
    slots_over = len(sizes) + 1 - slots
    gone = []
    for digest, size in sizes.items():
        if bytes_over <= 0 and slots_over <= 0:
            break
        if digest not in keep:
            gone.append(digest)
            bytes_over, slots_over = bytes_over - size, slots_over - 1
    return None if bytes_over > 0 or slots_over > 0 else gone


class Seat(NamedTuple):
    """What an adapter has on the device: slot, tensor, the sites it is in; its arrival, if that may lie ahead."""

    slot: int
    flat: Tensor
    sites: list[str]
    arrival: PendingCopy | None


class DeviceSlots:
    """Slots of the device; slot 0 is the base.

    Attributes:
        groups: pointer tables by group of sites.
        changes, prefixes: what else the seated adapters do, by slot; only those that do.
        ranks: the highest rank of each seated adapter's deltas, by slot.
        upload: how adapters come to the device.

    Args:
        base: sites and groups of the resident base.
        slots: adapters at once.
        capacity: bytes that they may take together; None: slots alone limit them.
    """

    def __init__(
        self, base: BaseShape, slots: int, dtype: torch.dtype, device: torch.device, capacity: int | None = None
    ) -> None:
        self.slots = slots
        self.capacity = capacity
        self.upload = Upload(device)
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
        self._resident: OrderedDict[str, Seat] = OrderedDict()  # least recently used first
        self.evictions = 0

    def __repr__(self) -> str:
        return f"<DeviceSlots {len(self._resident)} of {self.slots} slots, {self.bytes} bytes>"

    @property
    def resident(self) -> list[str]:
        """Digests on the device, least recently used first."""
        return list(self._resident)

    def room(self, needed: int, keep: Set[str]) -> bool:
        """Make room for an adapter of `needed` bytes; False, and nobody leaves, if those in `keep` leave none."""
        sizes = {digest: seat.flat.nbytes for digest, seat in self._resident.items()}
        gone = slots_to_free(sizes, needed, self.slots, self.capacity, keep)
        for digest in gone or []:
            self.evict(digest)
        return gone is not None

    @property
    def bytes(self) -> int:
        return sum(seat.flat.nbytes for seat in self._resident.values())

    def holds(self, digest: str) -> bool:
        return digest in self._resident

    def slot(self, digest: str) -> int | None:
        """The adapter's slot, if it has one; it is now the most recently used."""
        seat = self._resident.get(digest)
        if seat is None:
            return None
        self._resident.move_to_end(digest)
        return seat.slot

    def copied(self, digest: str) -> bool:
        """Whether a step may use a seated adapter without waiting for it."""
        arrival = self._resident[digest].arrival
        return arrival is None or arrival.there

    def wait_for_copies(self, digests: Sequence[str]) -> None:
        """Have the next step wait for these."""
        for digest in digests:
            arrival = self._resident[digest].arrival
            if arrival is not None:
                arrival.wait_for_copies()

    def load(self, adapter: Adapter) -> int:
        """Give an adapter a free slot (it must fit); returns it. OutOfMemoryError leaves all as it was."""
        flat, arrival = self.upload.send(adapter.flat)
        slot = self._free.pop()
        self._resident[adapter.digest] = Seat(slot, flat, list(adapter.offsets), arrival)
        start, step = flat.data_ptr(), flat.element_size()
        pinned = self._device.type == "cuda"
        columns = [torch.zeros(table.shape[0], dtype=table.dtype, pin_memory=pinned) for table in self._tables]
        entries = [column.numpy() for column in columns]  # sharing memory: setting single numbers of a tensor is slow
        for name, place in adapter.offsets.items():
            row, group, module = self._rows[name]
            group.deltas[module][slot] = adapter.delta(self._base.sites[name], flat)
            for entry, value in zip(entries, (start + step * place.a, start + step * place.b, place.rank), strict=True):
                entry[row] = value
        for table, column in zip(self._tables, columns, strict=True):
            table[:, slot].copy_(column, non_blocking=True)  # one copy a table, not one a module
        self.ranks[slot] = max((place.rank for place in adapter.offsets.values()), default=0)
        overrides, prefix = adapter.moved(flat)
        if overrides:
            self.overrides[slot] = overrides
        if prefix is not None:
            self.prefixes[slot] = prefix
        return slot

    def evict(self, digest: str) -> None:
        """Take an adapter off the device, if it is there; its memory returns."""
        seat = self._resident.pop(digest, None)
        if seat is None:
            return
        slot, _, names, _ = seat
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
