"""What a store's folder holds: readable records, damaged ones with the reason, and entries that are not the store's.

Reading only, so that it works beside a server that has the store open. Files are compared by size; hashing them is
`find_damage`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from lora_serve.adapters.store.folder import DIGEST, FORMAT, MARKER, STAGED, StoreFolder
from lora_serve.adapters.store.records import (
    AliasRecord,
    NameRecord,
    StoreMarker,
    VersionRecord,
    find_missing,
    read_sealed,
    read_version,
)
from lora_serve.errors import StoreUnusable
from lora_serve.names import NAME_PATTERN

_NAME_FILE = re.compile(f"({NAME_PATTERN})\\.json")
_MAY_BE_IN_EMPTY = {"lock", "staging", "lost+found"}  # of an opening that was interrupted; of an ext4 volume
_FIRST_FORMAT = {"lock", "names", "versions"}


@dataclass
class StoreContents:
    """The result of `scan_store`.

    Attributes:
        names: name → its record, also where the version is damaged.
        unreadable: name → why its record cannot be read.
        versions: digest → record, of the versions that names refer to.
        damaged: digest → what is wrong, of the other versions that names refer to.
        aliases: alias → its record.
        unreadable_aliases: alias → why its record cannot be read.
        unnamed: folders of versions that no name refers to.
        strays: other entries of names/, aliases/ and versions/.
    """

    names: dict[str, NameRecord] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    versions: dict[str, VersionRecord] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, AliasRecord] = field(default_factory=dict)
    unreadable_aliases: dict[str, str] = field(default_factory=dict)
    unnamed: list[Path] = field(default_factory=list)
    strays: list[Path] = field(default_factory=list)

    def broken(self) -> dict[str, str]:
        """Names that cannot be served, with the reason: record unreadable, or newest version damaged."""
        newest = {name: record.versions[0] for name, record in self.names.items()}
        return self.unreadable | {
            name: self.damaged[digest] for name, digest in newest.items() if digest in self.damaged
        }


def scan_store(folder: StoreFolder) -> StoreContents:
    """Read all records of a store. Raises OSError if a folder of the store cannot be listed."""
    found = StoreContents()
    for name, path in _named_files(folder.names, found.strays):
        try:
            found.names[name] = read_name(path)
        except ValueError as error:
            found.unreadable[name] = str(error)
    for name, path in _named_files(folder.aliases, found.strays):
        try:
            found.aliases[name] = read_alias(path)
        except ValueError as error:
            found.unreadable_aliases[name] = str(error)
    for digest in sorted({digest for record in found.names.values() for digest in record.versions}):
        check_version(folder, digest, found)
    for path in _entries(folder.versions):
        if path.name in found.versions or path.name in found.damaged:
            continue
        own = DIGEST.fullmatch(path.name) is not None and path.is_dir() and not path.is_symlink()
        (found.unnamed if own else found.strays).append(path)
    return found


def read_name(path: Path) -> NameRecord:
    """Read a name's record. Raises ValueError that says what is wrong with it."""
    record = read_sealed(path, NameRecord)
    if not record.versions or not all(map(DIGEST.fullmatch, record.versions)):
        raise ValueError(f"{path.name} names no version")
    return record


def read_alias(path: Path) -> AliasRecord:
    """Read an alias's record. Raises ValueError that says what is wrong with it."""
    record = read_sealed(path, AliasRecord)
    named = [re.fullmatch(NAME_PATTERN, target.name) for target in record.targets]
    digests = [DIGEST.fullmatch(target.version) for target in record.targets if target.version]
    if not named or not all(named) or not all(digests):
        raise ValueError(f"{path.name} names no adapter")
    return record


def check_version(folder: StoreFolder, digest: str, found: StoreContents) -> None:
    """Add a version to `found`, to its versions or to what is damaged."""
    path = folder.version(digest)
    found.damaged.pop(digest, None)
    if not path.is_dir():
        found.damaged[digest] = "its folder is missing"
        return
    try:
        record = read_version(path)
    except ValueError as error:
        found.damaged[digest] = str(error)
        return
    if damage := find_missing(path, record):
        found.damaged[digest] = damage
    else:
        found.versions[digest] = record


def read_marker(folder: StoreFolder) -> StoreMarker | None:
    """The store's marker; None if there is none, which is right for a new store and for one of the first format only.

    Raises: StoreUnusable for a folder that holds something else, and for a store that this version cannot read.
    """
    root = folder.root
    try:
        return _check_marker(root, msgspec.json.decode(folder.marker.read_bytes(), type=StoreMarker))
    except FileNotFoundError:
        pass
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise StoreUnusable(
            f"the adapter store {root} has a damaged {MARKER}; "
            f"name another folder with --store and copy the adapters there with: lora-serve store import {root}"
        ) from None
    entries = {path.name for path in _entries(root)}
    own_staging = all(STAGED.fullmatch(path.name) for path in _entries(folder.staging))
    if (entries <= _MAY_BE_IN_EMPTY and own_staging) or is_first_format(folder):
        return None
    raise StoreUnusable(
        f"{root} is not an adapter store and not empty (it has no {MARKER}): name another folder with --store"
    )


def is_first_format(folder: StoreFolder) -> bool:
    """Whether this is a store of format 1, which had no marker: it must look exactly like one."""
    entries = {path.name for path in _entries(folder.root)}
    return (
        entries >= _FIRST_FORMAT
        and entries <= _FIRST_FORMAT | {"staging"}
        and all(_NAME_FILE.fullmatch(path.name) and path.is_file() for path in _entries(folder.names))
        and all(DIGEST.fullmatch(path.name) and path.is_dir() for path in _entries(folder.versions))
    )


def _check_marker(root: Path, marker: StoreMarker) -> StoreMarker:
    if marker.format != FORMAT:
        raise StoreUnusable(
            f"the adapter store {root} has format {marker.format}, and this version of lora-serve reads {FORMAT}"
        )
    return marker


def _named_files(folder: Path, strays: list[Path]) -> Iterator[tuple[str, Path]]:
    """The records in a folder by name; other entries are added to `strays`."""
    for path in _entries(folder):
        match = _NAME_FILE.fullmatch(path.name)
        if match is None or path.is_symlink() or not path.is_file():
            strays.append(path)
        else:
            yield match[1], path


def _entries(folder: Path) -> list[Path]:
    """Entries in alphabetic order; none of a missing folder."""
    return sorted(folder.iterdir()) if os.path.lexists(folder) else []
