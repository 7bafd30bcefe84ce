"""Upgrades a store of format 1, whose versions were named by the digest of what they were lowered to.

Each version's files get a second folder, named by their own digest (hard links where possible), then the names refer to
these, then the old folders are removed; the marker is written last. Interrupted, it is done again from the start.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from lora_serve.adapters.store.folder import DIGEST, RECORD, StoreFolder
from lora_serve.adapters.store.records import NameRecord, StoreMarker, VersionRecord, describe_folder, seal
from lora_serve.adapters.store.scan import read_name
from lora_serve.errors import AdapterInvalid

OLD_RECORD = "meta.json"  # of a version in format 1


class _OldName(msgspec.Struct):
    digest: str
    created: float
    source: str = ""


class _OldVersion(msgspec.Struct):
    created: float


def upgrade_first_format(folder: StoreFolder, marker: StoreMarker, notes: list[str]) -> None:
    """Make a store of format 1 one of this format. Raises OSError, after which it can be tried again."""
    digests: dict[str, str] = {}  # of format 1 → of this one
    for old in sorted(folder.versions.iterdir()):
        if (old / OLD_RECORD).is_file():
            try:
                digests[old.name] = _copy_version(folder, old)
            except AdapterInvalid as error:
                notes.append(f"version {old.name[:12]} could not be upgraded: {error.message}")
    folder.disk.sync(folder.versions)
    for path in sorted(folder.names.iterdir()):
        old_name = _read_old_name(path)
        if old_name is not None:
            # A version that could not be upgraded stays named, so that its name is listed as broken.
            record = NameRecord([digests.get(digest, digest) for digest in old_name.versions], old_name.source)
            folder.replace_file(path, seal(record))
    for digest in digests:
        trash = folder.new_path("drop")
        folder.disk.move(folder.version(digest), trash)
        folder.discard(trash)
    folder.replace_file(folder.marker, msgspec.json.encode(marker))
    notes.append(f"the adapter store was upgraded from format 1: {len(digests)} versions")


def _copy_version(folder: StoreFolder, old: Path) -> str:
    """Give a version's files a folder of this format. Returns its digest. Raises AdapterInvalid if one is missing."""
    version = describe_folder(old)
    target = folder.version(version.digest)
    if target.exists():  # of an interrupted upgrade, or two old versions of the same files
        return version.digest
    version = VersionRecord(version.digest, _created(old) or version.created, version.files)
    staged = folder.new_path("publish")
    for name in version.files:
        folder.disk.make_folder((staged / name).parent)
        folder.disk.link(old / name, staged / name)
    folder.disk.write(staged / RECORD, seal(version))
    for path in (*staged.rglob("*"), staged):
        folder.disk.sync(path)
    folder.disk.move(staged, target)
    return version.digest


def _created(old: Path) -> float:
    """When a version was published, in seconds since the epoch; 0 if its record does not say."""
    try:
        return msgspec.json.decode((old / OLD_RECORD).read_bytes(), type=_OldVersion).created
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return 0.0


def read_any_name(path: Path) -> NameRecord:
    """Read a name's record of this format or of format 1. Raises ValueError that says what is wrong with it."""
    try:
        return read_name(path)
    except ValueError:
        old = _read_old_name(path)
        if old is None:
            raise
        return old


def _read_old_name(path: Path) -> NameRecord | None:
    """A name's record of format 1, with the digest of that format; None if it is not one."""
    try:
        old = msgspec.json.decode(path.read_bytes(), type=_OldName)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return NameRecord([old.digest], old.source) if DIGEST.fullmatch(old.digest) else None
