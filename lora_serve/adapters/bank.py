"""Adapters on the device: a slot is a row of pointers, an adapter one flat tensor of exactly its own size.

Seating an adapter writes one column of the bank's tables, of which every group has some rows; nothing is copied into a
stack and nothing padded. On a CPU the device's memory is the host's, so the flat tensor itself is used, without a copy.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Set

import torch
from torch import Tensor

from lora_serve.adapters.adapter import Adapter, BaseShape
from lora_serve.kernels.contract import DeltaGroup, pointer_tables


def vacate(seated: Iterable[str], needed: int, keep: Set[str]) -> list[str] | None:
    """Which `needed` adapters give up their slots: the least recently used (first in `seated`) that are not in `keep`.

    None if too few may go.
    """
    gone = [digest for digest in seated if digest not in keep][:needed]
    return gone if len(gone) == needed else None


class Bank:
    """Slots of the device; slot 0 is the base.

    Args:
        base: sites and groups of the resident base.
        slots: adapters at once.
    """

    def __init__(self, base: BaseShape, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self.slots = slots
        self.groups: dict[tuple[str, ...], DeltaGroup] = {}
        self._tables = pointer_tables(sum(map(len, base.groups)), slots + 1, device)
        row = 0
        for names in base.groups:
            a, b, rank = (table[row : row + len(names)] for table in self._tables)
            self.groups[names] = DeltaGroup(
                base.sites[names[0]].in_features,
                tuple(base.sites[name].out_features for name in names),
                slots + 1,
                dtype,
                device,
                tables=(a, b, rank),
            )
            row += len(names)
        self._base = base
        self._device = device
        self._free = list(range(slots, 0, -1))
        self._seated: OrderedDict[str, tuple[int, Tensor]] = OrderedDict()  # digest → slot, flat; LRU first
        self.evictions = 0

    def __repr__(self) -> str:
        return f"<Bank {len(self._seated)} of {self.slots} slots, {self.bytes} bytes>"

    @property
    def seated(self) -> list[str]:
        """Digests on the device, least recently used first."""
        return list(self._seated)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def bytes(self) -> int:
        return sum(flat.numel() * flat.element_size() for _, flat in self._seated.values())

    def holds(self, digest: str) -> bool:
        return digest in self._seated

    def slot(self, digest: str) -> int | None:
        """The adapter's slot, if it has one; it is now the most recently used."""
        entry = self._seated.get(digest)
        if entry is None:
            return None
        self._seated.move_to_end(digest)
        return entry[0]

    def load(self, adapter: Adapter) -> int:
        """Give an adapter a free slot (there must be one); returns it."""
        slot = self._free.pop()
        flat = adapter.flat.to(self._device, non_blocking=True)
        self._seated[adapter.digest] = (slot, flat)
        start, step = flat.data_ptr(), flat.element_size()
        columns: tuple[list[int], list[int], list[int]] = ([], [], [])
        for names, group in self.groups.items():
            for module, name in enumerate(names):
                group.deltas[module][slot] = adapter.delta(self._base.sites[name], flat)
                place = adapter.places.get(name)
                entry = (0, 0, 0) if place is None else (start + step * place.a, start + step * place.b, place.rank)
                for column, value in zip(columns, entry, strict=True):
                    column.append(value)
        for table, column in zip(self._tables, columns, strict=True):
            table[:, slot] = torch.tensor(column, dtype=table.dtype)  # one copy a table, not one a module
        return slot

    def evict(self, digest: str) -> None:
        """Take an adapter off the device, if it is there; its memory returns."""
        entry = self._seated.pop(digest, None)
        if entry is None:
            return
        slot, _ = entry
        for table in self._tables:
            table[:, slot] = 0
        for group in self.groups.values():
            for row in group.deltas:
                row[slot] = None
        self._free.append(slot)
        self.evictions += 1
