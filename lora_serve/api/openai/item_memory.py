"""Recent output items of responses, in memory, for clients that refer to them by id instead of sending them again."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import msgspec

MOST_BYTES = 4 << 20  # of each key's items

_encode = msgspec.json.Encoder().encode


class ItemMemory:
    """Output items by key and id. Of each key, the least recently used are forgotten first.

    Args:
        most_bytes: of one key's items, as JSON.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._items: dict[str, OrderedDict[str, bytes]] = {}
        self._bytes: dict[str, int] = {}

    def remember(self, tenant: str, items: list[dict[str, Any]]) -> None:
        """Keep output items, by their `id`."""
        kept = self._items.setdefault(tenant, OrderedDict())
        size = self._bytes.get(tenant, 0)
        for item in items:
            kept[item["id"]] = encoded = _encode(item)
            size += len(encoded)
        while size > self._most_bytes:
            size -= len(kept.popitem(last=False)[1])
        self._bytes[tenant] = size

    def find(self, tenant: str, id_: str) -> dict[str, Any] | None:
        """An item of this key; None if it is not known, or not any more."""
        kept = self._items.get(tenant, OrderedDict())
        if id_ not in kept:
            return None
        kept.move_to_end(id_)
        item: dict[str, Any] = msgspec.json.decode(kept[id_])
        return item
