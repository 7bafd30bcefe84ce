"""Adapters on the device: a slot is a row of pointers, an adapter one flat tensor of exactly its own size.

Seating an adapter writes one column of the bank's tables, of which every group has some rows; nothing is copied into a
stack and nothing padded. On a CPU the device's memory is the host's, so the flat tensor itself is used, without a copy.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Set

import torch
from torch import Tensor

from lora_serve.adapters.adapter import Adapter, BaseShape, Change, Prefix
from lora_serve.kernels.contract import DeltaGroup, pointer_tables


def vacate(seated: Iterable[str], needed: int, keep: Set[str]) -> list[str] | None:
    """Which `needed` adapters give up their slots: the least recently used (first in `seated`) that are not in `keep`.

    None if too few may go.
    """
    gone = [digest for digest in seated if digest not in keep][:needed]
    return gone if len(gone) == needed else None


class Bank:
    """Slots of the device; slot 0 is the base.

    Attributes:
        groups: pointer tables by group of sites.
        changes, prefixes: what else the seated adapters do, by slot; only those that do.

    Args:
        base: sites and groups of the resident base.
        slots: adapters at once.
    """

    def __init__(self, base: BaseShape, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self.slots = slots
        self.groups: dict[tuple[str, ...], DeltaGroup] = {}
        self.changes: dict[int, dict[str, Change]] = {}
        self.prefixes: dict[int, Prefix] = {}
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
        self._seated: OrderedDict[str, tuple[int, Tensor, list[str]]] = OrderedDict()  # LRU first; see `load`
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
        return sum(flat.numel() * flat.element_size() for _, flat, _ in self._seated.values())

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
        self._seated[adapter.digest] = (slot, flat, list(adapter.places))
        start, step = flat.data_ptr(), flat.element_size()
        columns = [torch.zeros(table.shape[0], dtype=table.dtype) for table in self._tables]
        entries = [column.numpy() for column in columns]  # sharing memory: setting single numbers of a tensor is slow
        for name, place in adapter.places.items():
            row, group, module = self._rows[name]
            group.deltas[module][slot] = adapter.delta(self._base.sites[name], flat)
            for entry, value in zip(entries, (start + step * place.a, start + step * place.b, place.rank), strict=True):
                entry[row] = value
        for table, column in zip(self._tables, columns, strict=True):
            table[:, slot] = column.to(self._device)  # one copy a table, not one a module
        changes, prefix = adapter.moved(flat)
        if changes:
            self.changes[slot] = changes
        if prefix is not None:
            self.prefixes[slot] = prefix
        return slot

    def evict(self, digest: str) -> None:
        """Take an adapter off the device, if it is there; its memory returns."""
        entry = self._seated.pop(digest, None)
        if entry is None:
            return
        slot, _, names = entry
        for table in self._tables:
            table[:, slot] = 0
        for name in names:
            _, group, module = self._rows[name]
            group.deltas[module][slot] = None
        self.changes.pop(slot, None)
        self.prefixes.pop(slot, None)
        self._free.append(slot)
        self.evictions += 1
