"""The adapter store on disk: immutable versions in folders named by digest, and records of names and aliases.

A version is completed in staging and moved into place by one rename; a name changes by one rename. So `kill -9` at any
moment leaves the old state or the new one. What this server did not write is never deleted. `folder.py` has the
layout. Methods may block, and are not thread-safe.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from lora_serve.adapters.store.alias_files import AliasFiles
from lora_serve.adapters.store.disk import Disk
from lora_serve.adapters.store.folder import LOWERED, RECORD, StoreFolder, unwanted_entries
from lora_serve.adapters.store.records import (
    AliasRecord,
    FollowedCatalog,
    NameRecord,
    VersionRecord,
    find_damage,
    find_missing,
    read_sealed,
    read_version,
    seal,
    version_digest,
)
from lora_serve.adapters.store.recovery import open_folder
from lora_serve.errors import AdapterBroken, AdapterBusy, AdapterInvalid, StorageFull, StoreUnusable
from lora_serve.names import check_name

log = logging.getLogger(__name__)


class Store:
    """A folder of adapters, opened by one process at a time.

    Args:
        base: fingerprint of the base model; a new store is for this base. Empty: whatever the store is for.
        model: name of the base for people.

    Attributes:
        broken: name → why it cannot be served; of these, `names` has those whose record is readable.
        notes: what the operator should know about the opening.

    Raises: StoreUnusable if the folder cannot be used or is something else; Unavailable if another process has it open.
    """

    def __init__(self, root: Path, base: str = "", model: str = "", disk: Disk | None = None) -> None:
        self._folder = StoreFolder(root, disk)
        self._disk = self._folder.disk
        self.notes: list[str] = []
        self._lock, contents = open_folder(self._folder, base, model, self.notes)
        self._names = contents.names
        self._unreadable = set(contents.unreadable)
        self._versions = contents.versions
        self._damaged = contents.damaged
        self.broken = contents.broken()
        self._aliases = AliasFiles(self._folder, contents)

    def __repr__(self) -> str:
        return f"<Store {len(self._names)} names, {len(self._versions)} versions, {len(self.broken)} broken>"

    def close(self) -> None:
        """Let another process open the store; closing twice is harmless."""
        self._lock.close()

    # --- reading -----------------------------------------------------------------------------------------------------

    @property
    def staging(self) -> Path:
        """Folder of unfinished work, on the store's file system; an upload's folder is `upload-` and 32 hex digits."""
        return self._folder.staging

    def names(self) -> dict[str, NameRecord]:
        """Readable names, as on disk; those in `broken` are to be listed, not served."""
        return dict(self._names)

    def aliases(self) -> dict[str, AliasRecord]:
        """Readable aliases, as on disk."""
        return dict(self._aliases.records)

    def unreadable_aliases(self) -> dict[str, str]:
        """Alias → why its record cannot be read, of the others."""
        return dict(self._aliases.unreadable)

    def followed(self) -> FollowedCatalog:
        """Which catalog of a shared store was followed, and how far; if that cannot be read, whatever comes is."""
        if not self._folder.shared.exists():
            return FollowedCatalog()
        try:
            return read_sealed(self._folder.shared, FollowedCatalog)
        except ValueError as error:
            log.warning("%s (in %s); the shared store is followed whatever it was before", error, self._folder.root)
            return FollowedCatalog()

    def version(self, digest: str) -> VersionRecord:
        """The record of a version that a name refers to. Raises AdapterBroken if it is damaged or missing."""
        if digest in self._versions:
            return self._versions[digest]
        raise self._broken_version(digest, self._damaged.get(digest, "it is not in the store"))

    def folder(self, digest: str) -> Path:
        """The folder of a version, with its PEFT files as they came."""
        return self._folder.version(digest)

    def lowered(self, digest: str) -> Path:
        """The folder of a version's lowered form; missing if it was not made yet."""
        return self.folder(digest) / LOWERED

    def verify(self, digest: str) -> None:
        """Hash a version's PEFT files. Raises AdapterBroken that says what is wrong."""
        try:
            damage = find_damage(self.folder(digest), read_version(self.folder(digest)))
        except ValueError as error:
            damage = str(error)
        if damage:
            raise self._broken_version(digest, damage)

    def mark_broken(self, name: str, reason: str) -> None:
        """List a name as broken until this version is published again, it gets another, or the store is reopened."""
        self.broken[name] = reason

    # --- writing: each method raises StorageFull or StoreUnusable, without effect ------------------------------------

    def stage(self) -> Path:
        """A new folder in staging."""
        with self._writing():
            path = self._folder.new_path("publish")
            self._disk.make_folder(path)
            return path

    def new_folder(self) -> Path:
        """The path of a folder in staging that somebody else is to make."""
        return self._folder.new_path("publish")

    def is_staged(self, folder: Path) -> bool:
        """Whether a folder is in the store's staging, so that publishing may move it."""
        staging = self.staging.resolve()
        return staging in folder.resolve().parents

    def publish(
        self, name: str, staged: Path, version: VersionRecord, named: NameRecord, *, durable: bool = True
    ) -> None:
        """Move a staged folder into the store as `version`, and let `name` refer to it.

        The folder holds the version's PEFT files, and its lowered form in `lowered/`; other files are removed. If the
        store has the version, only its lowered form is replaced, unless it is damaged: then it is set aside. After a
        failure the folder may be incomplete, or gone. Unless it is to be `durable`, it is not waited for the disk: if
        the machine ends, the version may be found damaged.

        Raises: AdapterInvalid if the files are not those of the version.
        """
        check_name(name)
        if not self.is_staged(staged) or version.digest not in named.versions:
            raise ValueError("only a staged folder can be published, as a version of the name")
        with self._writing(), self._disk.waiting(durable):
            added = self._add(staged, version)
            self._damaged.pop(version.digest, None)
            for each, record in self._names.items():
                if record.versions[0] == version.digest:
                    self.broken.pop(each, None)
            try:
                self._write_name(name, named)
            except BaseException:
                if added and not self._is_named(version.digest):
                    self._remove_version(version.digest)
                raise

    def replace_lowered(self, digest: str, staged: Path) -> None:
        """Move `staged`/lowered into a version, in place of its lowered form.

        Killed in between, the version has no lowered form, as if it was not made yet.
        """
        with self._writing():
            new, old, trash = staged / LOWERED, self.lowered(digest), self._folder.new_path("lowered")
            for path in (*new.rglob("*"), new):
                self._disk.sync(path)
            replaced = old.exists()
            if replaced:
                self._disk.move(old, trash)
            try:
                self._disk.move(new, old)
            except BaseException:
                if replaced and not old.exists():
                    with suppress(OSError):
                        self._disk.move(trash, old)
                raise
            self._folder.sync_entries(old.parent)
            self._folder.discard(trash)

    def set_name(self, name: str, record: NameRecord) -> None:
        """Let a name refer to these versions, which are in the store, and to those that aliases name."""
        check_name(name)
        with self._writing():
            self._write_name(name, record)

    def remove_name(self, name: str) -> None:
        """Remove a name, if there; its versions stay until `drop`. An unreadable record is set aside."""
        path = self._folder.name(check_name(name))
        with self._writing():
            if name in self._unreadable:
                self._folder.set_aside(path)
            else:
                self._disk.remove(path)
            self._names.pop(name, None)
            self._unreadable.discard(name)
            self.broken.pop(name, None)
            self._folder.sync_entries(path.parent)

    def set_alias(self, alias: str, record: AliasRecord) -> None:
        """Let an alias stand for these adapters. Their names keep the versions that it names."""
        check_name(alias)
        with self._writing():
            for target in record.targets:
                named = self._names.get(target.name)
                if target.version and named is not None and target.version not in named.versions:
                    versions = [*named.versions, target.version]
                    self._write_name(target.name, msgspec.structs.replace(named, versions=versions))
            self._aliases.write(alias, record)

    def remove_alias(self, alias: str) -> None:
        """Remove an alias, if there; versions that only it named stay until `set_name`."""
        check_name(alias)
        with self._writing():
            self._aliases.remove(alias)

    def set_followed(self, followed: FollowedCatalog) -> None:
        """Note which catalog of a shared store was followed, and how far."""
        with self._writing():
            self._folder.replace_file(self._folder.shared, seal(followed))

    def drop(self, digest: str) -> None:
        """Delete a version, if there. Raises AdapterBusy if a name refers to it."""
        if self._is_named(digest):
            raise AdapterBusy(f"a name refers to version {digest[:12]}")
        with self._writing():
            self._remove_version(digest)

    # --- parts of these ----------------------------------------------------------------------------------------------

    def _add(self, staged: Path, version: VersionRecord) -> bool:
        """Move a staged folder into place as a version; False if there was one already, intact or not."""
        folder = self.folder(version.digest)
        exists = os.path.lexists(folder)
        if exists and self._is_intact(folder):
            self._keep_vocabulary(version)
            if (staged / LOWERED).is_dir():
                self.replace_lowered(version.digest, staged)
            self._folder.discard(staged)
            return False
        self._complete(staged, version)
        aside = self._folder.set_aside(folder) if exists else None
        try:
            self._disk.move(staged, folder)
            self._disk.sync(folder.parent)
        except BaseException:
            with suppress(OSError):
                if folder.exists():
                    self._remove_version(version.digest)
                if aside is not None:
                    self._disk.move(aside, folder)
            raise
        self._versions[version.digest] = version
        return not exists

    def _complete(self, staged: Path, version: VersionRecord) -> None:
        """Make a staged folder what a version's folder is, and wait until it is on the disk."""
        if version.digest != version_digest(version.files):
            raise ValueError("the record is not of these files")
        if damage := find_missing(staged, version):
            raise AdapterInvalid(f"the files changed while they were published: {damage}")
        for path in unwanted_entries(staged, version.files):
            self._disk.remove(path)
        self._disk.write(staged / RECORD, seal(version))
        for path in (*staged.rglob("*"), staged):
            self._disk.sync(path)

    def _is_named(self, digest: str) -> bool:
        return any(digest in record.versions for record in self._names.values())

    def _is_intact(self, folder: Path) -> bool:
        try:
            return not find_damage(folder, read_version(folder))
        except ValueError:
            return False

    def _keep_vocabulary(self, version: VersionRecord) -> None:
        """Note the vocabulary that came with a version that was published before without one."""
        folder = self.folder(version.digest)
        known = read_version(folder)
        if version.vocabulary not in ("", known.vocabulary):
            known = msgspec.structs.replace(known, vocabulary=version.vocabulary)
            self._folder.replace_file(folder / RECORD, seal(known))
        self._versions[version.digest] = known

    def _write_name(self, name: str, record: NameRecord) -> None:
        path, before = self._folder.name(name), self._names.get(name)
        if before is not None:
            record = self._aliases.keep(name, record, before.versions)
        if name in self._unreadable:
            self._disk.link(path, self._folder.aside_path(path))
        self._folder.replace_file(path, seal(record))
        newest = record.versions[0]
        self._names[name] = record
        self._unreadable.discard(name)
        if newest not in self._versions:
            self.broken[name] = self._damaged.get(newest, "its folder is missing")
        elif before is None or before.versions[0] != newest:
            self.broken.pop(name, None)

    def _remove_version(self, digest: str) -> None:
        """Rename a version into staging, then remove it, so that a half-deleted version is never visible."""
        trash = self._folder.new_path("drop")
        with suppress(FileNotFoundError):
            self._disk.move(self.folder(digest), trash)
        self._versions.pop(digest, None)
        self._damaged.pop(digest, None)
        self._folder.discard(trash)

    def _broken_version(self, digest: str, reason: str) -> AdapterBroken:
        name = next((name for name, record in self._names.items() if digest in record.versions), None)
        of = "" if name is None else f" of adapter {name}"
        return AdapterBroken(f"version {digest[:12]}{of} is broken in the store: {reason}; publish it again")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            log.error("the adapter store %s cannot be written: %s", self._folder.root, error)
            if error.errno in StorageFull.errnos:
                raise StorageFull("the disk of the adapter store is full; nothing was changed") from error
            raise StoreUnusable(
                f"the adapter store cannot be written ({error.strerror}); nothing was changed"
            ) from error
