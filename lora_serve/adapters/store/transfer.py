"""Copies adapters between a store and folders of PEFT files, or from another store. Nothing is lowered here."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from lora_serve.adapters.store.folder import DIGEST, StoreFolder
from lora_serve.adapters.store.records import (
    KEPT,
    UNTRUSTED,
    AliasRecord,
    NameRecord,
    VersionRecord,
    describe_folder,
    find_damage,
    read_version,
)
from lora_serve.adapters.store.scan import StoreContents, read_alias, read_marker
from lora_serve.adapters.store.store import Store
from lora_serve.adapters.store.upgrade import read_any_name
from lora_serve.adapters.vocabulary import vocabulary_digest
from lora_serve.errors import (
    AdapterBroken,
    AdapterExists,
    AdapterInvalid,
    AdapterNotFound,
    BadRequest,
    ServeError,
    StoreUnusable,
)
from lora_serve.names import CONFIG, adapter_not_found, check_adapter_name


@dataclass(frozen=True)
class AdapterSource:
    """An adapter to import: the folders of its versions, newest first; `record` if it comes from another store."""

    name: str
    versions: list[Path]
    record: NameRecord | None = None


def find_sources(path: Path, base: str, problems: list[str]) -> list[AdapterSource]:
    """The adapters in a PEFT folder, or in another store of any format, which may be damaged.

    Args:
        base: fingerprint of the base that they are for; a store of another base is refused.
        problems: gets a line for each name that cannot be read.

    Raises: BadRequest if the folder is neither.
    """
    if (path / CONFIG).is_file():
        return [AdapterSource(path.resolve().name, [path])]
    folder = StoreFolder(path)
    if not folder.names.is_dir() or not folder.versions.is_dir():
        raise BadRequest(f"{path} is neither a PEFT folder nor an adapter store")
    other = _base_of(folder)
    if base and other and base != other:
        raise BadRequest(f"{path} has adapters of another base model (fingerprint {other[:12]}, not {base[:12]})")
    found = []
    for file in sorted(folder.names.glob("*.json")):
        try:
            record = read_any_name(file)
            found.append(AdapterSource(file.stem, [folder.version(digest) for digest in record.versions], record))
        except ValueError as error:
            problems.append(f"{file.stem}: {error}")
    return found


def import_adapter(store: Store, source: AdapterSource, *, replace: bool) -> bool:
    """Copy an adapter into the store, its newest version first. Returns False if the store has it already.

    Raises: AdapterExists if the name has another newest version and is not to be replaced; AdapterInvalid,
    AdapterBroken, BadRequest, StorageFull.
    """
    name = check_adapter_name(source.name)
    if name in store.aliases() or name in store.unreadable_aliases():
        raise AdapterExists(f"{name} is an alias", param="name")
    before = store.names().get(name)
    digests: list[str] = []
    for folder in source.versions:
        staged = store.stage()
        try:
            version = _copy_version(folder, staged, UNTRUSTED if source.record is None else KEPT)
            if not digests and before is not None and name not in store.broken:
                if before.versions[0] == version.digest:
                    return False
                if not replace:
                    raise AdapterExists(f"adapter {name} exists with other files; --replace replaces it", param="name")
            digests.append(version.digest)
            record = source.record or NameRecord([])
            store.publish(name, staged, version, msgspec.structs.replace(record, versions=list(digests)))
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    named = {digest for record in store.names().values() for digest in record.versions}
    for digest in set(() if before is None else before.versions) - named:
        store.drop(digest)
    return True


def find_aliases(path: Path, problems: list[str]) -> dict[str, AliasRecord]:
    """The aliases of another store; none of a PEFT folder. `problems` gets a line for each that cannot be read."""
    found = {}
    for file in sorted(StoreFolder(path).aliases.glob("*.json")):
        try:
            found[file.stem] = read_alias(file)
        except ValueError as error:
            problems.append(f"alias {file.stem}: {error}")
    return found


def import_alias(store: Store, alias: str, record: AliasRecord, *, replace: bool) -> bool:
    """Copy an alias into the store, which has the adapters that it names. Returns False if the store has it already.

    Raises: AdapterExists if the name is taken; AdapterNotFound if an adapter or a version is not there; BadRequest,
    StorageFull.
    """
    check_adapter_name(alias)
    before = store.aliases().get(alias)
    if before is not None and before.etag == record.etag:
        return False
    if before is not None and not replace:
        raise AdapterExists("it exists and stands for something else; --replace replaces it", param="name")
    if alias in store.names() or alias in store.broken:
        raise AdapterExists("an adapter has the same name", param="name")
    for target in record.targets:
        named = store.names().get(target.name)
        if named is None or (target.version and target.version not in named.versions):
            raise adapter_not_found(f"{target.name}@{target.version[:12]}" if target.version else target.name)
    store.set_alias(alias, record)
    return True


def export_version(folder: StoreFolder, contents: StoreContents, name: str, prefix: str, target: Path) -> str:
    """Copy a version's PEFT files as they came into a new or empty folder. Returns its digest.

    Args:
        prefix: how the digest begins; empty: the newest version.

    Raises: AdapterNotFound, BadRequest, AdapterBroken; OSError if the target cannot be written.
    """
    if name in contents.unreadable:
        raise AdapterBroken(f"adapter {name} is broken in the store: {contents.unreadable[name]}")
    if name in contents.aliases:
        targets = ", ".join(map(str, contents.aliases[name].targets))
        raise BadRequest(f"{name} is an alias, of {targets}: export one of these", param="adapter")
    if name not in contents.names:
        raise adapter_not_found(name)
    digests = [digest for digest in contents.names[name].versions if digest.startswith(prefix)]
    if not digests:
        raise AdapterNotFound(f"adapter {name} has no version {prefix[:64]}", param="adapter")
    if prefix and len(digests) > 1:
        raise BadRequest(f"{prefix} names more than one version of {name}", param="adapter")
    digest = digests[0]
    if digest not in contents.versions:
        raise AdapterBroken(f"version {digest[:12]} of {name} is broken in the store: {contents.damaged[digest]}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BadRequest(f"{target} exists and is not an empty folder")
    _copy_files(folder.version(digest), target)
    if damage := find_damage(target, contents.versions[digest]):
        raise AdapterBroken(f"version {digest[:12]} of {name} is broken in the store, and so is its copy: {damage}")
    return digest


def _copy_version(folder: Path, staged: Path, names: Sequence[str]) -> VersionRecord:
    """Copy and hash a version's files of these names; of a version of this format, check them."""
    if not folder.is_dir():
        raise AdapterInvalid(f"version {folder.name[:12]} has no folder")
    try:
        _copy_files(folder, staged, names)
    except OSError as error:
        raise ServeError(f"the files of {folder} cannot be copied: {error.strerror or error}") from error
    found = describe_folder(staged, vocabulary_digest(folder))
    try:
        known = read_version(folder)
    except ValueError:  # a PEFT folder, or damaged: then the files tell
        known = None
    digest = folder.name if DIGEST.fullmatch(folder.name) and not (folder / "meta.json").exists() else found.digest
    if digest != found.digest or (known is not None and known.files != found.files):
        raise AdapterInvalid(f"version {folder.name[:12]} has been altered")
    return known or found


def _copy_files(source: Path, target: Path, names: Sequence[str] = KEPT) -> None:
    """Copy the PEFT files of a folder; links are copied as links, which nothing accepts."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (source / name).exists():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name, follow_symlinks=False)


def _base_of(folder: StoreFolder) -> str:
    """Fingerprint of the base that a store is for; empty if it does not say."""
    try:
        marker = read_marker(folder)
    except StoreUnusable:  # a damaged marker does not keep adapters from being saved
        return ""
    return "" if marker is None else marker.base
