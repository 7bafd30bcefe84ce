"""The aliases in a store: which there are, and changes to their records by one rename each."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from lora_serve.adapters.store.folder import StoreFolder
from lora_serve.adapters.store.records import AliasRecord, NameRecord, seal
from lora_serve.adapters.store.scan import StoreContents


class AliasFiles:
    """The records of a store's aliases. Methods that change something raise OSError.

    Attributes:
        records: of readable ones.
        unreadable: alias → why its record cannot be read. While there is one, no version is given up: it may name it.
    """

    def __init__(self, folder: StoreFolder, contents: StoreContents) -> None:
        self._folder = folder
        self.records = contents.aliases
        self.unreadable = contents.unreadable_aliases

    def keep(self, name: str, record: NameRecord, before: Iterable[str]) -> NameRecord:
        """A name's new record, with those of its versions before that aliases name."""
        kept = [each for each in before if each not in record.versions and self._names(name, each)]
        return msgspec.structs.replace(record, versions=[*record.versions, *kept]) if kept else record

    def write(self, alias: str, record: AliasRecord) -> None:
        """Write an alias's record; an unreadable one is set aside."""
        path = self._folder.alias(alias)
        if alias in self.unreadable:
            self._folder.disk.link(path, self._folder.aside_path(path))
        self._folder.replace_file(path, seal(record))
        self.records[alias] = record
        self.unreadable.pop(alias, None)

    def remove(self, alias: str) -> None:
        """Remove an alias, if there; an unreadable record is set aside."""
        path = self._folder.alias(alias)
        if alias in self.unreadable:
            self._folder.set_aside(path)
        else:
            self._folder.disk.remove(path)
        self.records.pop(alias, None)
        self.unreadable.pop(alias, None)
        self._folder.sync_entries(path.parent)

    def _names(self, adapter: str, version: str) -> bool:
        return bool(self.unreadable) or any(record.names(adapter, version) for record in self.records.values())
