"""Aliases: names that stand for adapters or versions of them, from which every API call gets one by weight.

Plain data and the choice, without files: `alias_operations.py` changes it. A choice is a weighted rendezvous hash: of
two calls that stick to the same value, both get the same target, and a change of weights moves only as many as it must.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypeVar

from lora_serve.adapters.store.records import AliasRecord, TargetRecord
from lora_serve.errors import AdapterBroken
from lora_serve.names import adapter_not_found
from lora_serve.request import AdapterUse, Routing

USER = "user"
HEADER = "header:"
MOST_ALIASES = 10_000
MOST_STICKY_HEADERS = 32  # that are sent with every request, and with the engine's statistics

_Counted = TypeVar("_Counted")


class Aliases:
    """All aliases of one resident base.

    Attributes:
        records: what each alias stands for.
        broken: alias → why it cannot be served.
        sticky_headers: lower-case names of the headers that they go by, sorted; those of aliases that are on their way
            to the disk as well.
    """

    def __init__(self) -> None:
        self.records: dict[str, AliasRecord] = {}
        self.broken: dict[str, str] = {}
        self.sticky_headers: list[str] = []
        self._unreadable = False  # whether the record of one is: then no version is given up, since it may name it
        self._coming: dict[str, AliasRecord] = {}  # on their way to the disk
        # Of all records, those on their way included: how many targets are a version, or an adapter; headers.
        self._named: Counter[tuple[str, str]] = Counter()
        self._headers: Counter[str] = Counter()
        self._held: dict[str, int] = {}  # adapter → number of the change by which an alias ceased to name it
        self._changes = 0

    def __repr__(self) -> str:
        return f"<Aliases {len(self.records)} aliases, {len(self.broken)} broken>"

    def __contains__(self, name: str) -> bool:
        return name in self.records or name in self.broken

    def resolve(self, use: AdapterUse, routing: Routing) -> AdapterUse:
        """The adapter that a request gets; what names no alias is returned as it is.

        Raises AdapterBroken if the alias cannot be served, AdapterNotFound if a version of it is asked for.
        """
        record = self.records.get(use.name)
        if record is None:
            if use.name in self.broken:
                raise alias_broken(use.name, self.broken[use.name])
            return use
        if use.version is not None:
            raise adapter_not_found(f"{use.name}@{use.version}")
        target = choose_target(use.name, record, routing)
        return AdapterUse(target.name, target.version or None, use.weight)

    def names(self, adapter: str, version: str) -> bool:
        """Whether an alias names this version of an adapter, or may do so."""
        return self._unreadable or (adapter, version) in self._named

    def keeps(self, adapter: str, version: str) -> bool:
        """Whether this version of an adapter must stay: an alias names it, or versions of the adapter are held."""
        return adapter in self._held or self.names(adapter, version)

    def hold(self, adapters: Iterable[str]) -> None:
        """Keep the versions of adapters that an alias is about to name no more, until they are let go of."""
        self._changes += 1
        self._held.update(dict.fromkeys(adapters, self._changes))

    def held_since(self, adapter: str) -> int:
        """Number of the last change by which an adapter's versions came to be held; 0 if they are not."""
        return self._held.get(adapter, 0)

    def let_go(self, adapter: str, since: int) -> None:
        """Hold an adapter's versions no more, unless they were held again since then."""
        if self._held.get(adapter) == since:
            del self._held[adapter]

    def naming(self, adapter: str) -> list[str]:
        """The aliases that name an adapter, or a version of it."""
        each = (*self.records.items(), *self._coming.items())
        return sorted({alias for alias, record in each if record.names(adapter)})

    def has_room(self, alias: str) -> bool:
        """Whether there may be an alias of this name: it exists, or there are not too many."""
        return alias in self or len(self.records.keys() | self._coming.keys()) + len(self.broken) < MOST_ALIASES

    def may_go_by(self, sticky: str) -> bool:
        """Whether an alias may stick to this: it is no header, or aliases do not go by too many other ones."""
        header = _header_of(sticky)
        return not header or header in self._headers or len(self._headers) < MOST_STICKY_HEADERS

    def open(self, records: dict[str, AliasRecord], broken: dict[str, str], *, unreadable: bool) -> None:
        """Take over the aliases of a store; `unreadable`: whether broken ones are that for their records."""
        self.records, self.broken, self._unreadable = records, broken, unreadable
        for record in records.values():
            self._count(record, 1)

    def begin(self, alias: str, record: AliasRecord) -> None:
        """Keep what an alias is going to stand for, instead of what it was going to before."""
        self.cancel(alias)
        self._coming[alias] = record
        self._count(record, 1)

    def end(self, alias: str, record: AliasRecord | None) -> None:
        """Let an alias stand for what it does on the disk now; None: it is gone, or never came."""
        self.cancel(alias)
        self.broken.pop(alias, None)
        self._unreadable = self._unreadable and bool(self.broken)
        self._count(self.records.pop(alias, None), -1)
        if record is not None:
            self.records[alias] = record
        self._count(record, 1)

    def cancel(self, alias: str) -> None:
        """Leave an alias as it is: what it was going to stand for could not be stored."""
        self._count(self._coming.pop(alias, None), -1)

    def _count(self, record: AliasRecord | None, by: int) -> None:
        """Count what a record names and goes by."""
        if record is None:
            return
        for target in record.targets:
            _change(self._named, (target.name, target.version), by)
        if header := _header_of(record.sticky):
            _change(self._headers, header, by)
            self.sticky_headers = sorted(self._headers)


def choose_target(alias: str, record: AliasRecord, routing: Routing) -> TargetRecord:
    """The target of a request: the same for equal values of what it sticks to, or of the call's id without one."""
    value = _sticky_value(record.sticky, routing.user, routing.headers) or f"call {routing.call}"

    def score(target: TargetRecord) -> float:
        return -math.log(_uniform(alias, str(target), value)) / target.weight

    return min((target for target in record.targets if target.weight > 0), key=score)


def alias_broken(alias: str, reason: str) -> AdapterBroken:
    """The error for an alias that cannot be served."""
    return AdapterBroken(f"alias {alias} cannot be served: {reason}", param="adapter")


def _sticky_value(sticky: str, user: str, headers: Mapping[str, str]) -> str:
    """What a request sticks to, with its kind; empty if it has none of it."""
    value = user if sticky == USER else headers.get(_header_of(sticky), "")
    return f"{sticky} {value}" if sticky and value else ""


def _header_of(sticky: str) -> str:
    """The lower-case name of the header that is stuck to; empty if it is none."""
    return sticky.removeprefix(HEADER).lower() if sticky.startswith(HEADER) else ""


def _change(counter: Counter[_Counted], key: _Counted, by: int) -> None:
    counter[key] += by
    if not counter[key]:
        del counter[key]


def _uniform(*parts: str) -> float:
    """A hash of texts as a number in (0, 1), the same in every process and release."""
    digest = hashlib.sha256("\0".join(parts).encode(errors="surrogatepass")).digest()
    return (int.from_bytes(digest[:8]) + 0.5) / 2**64
