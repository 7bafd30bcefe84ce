"""The `lora-serve store …` commands, which work on a store's folder itself, without a server.

All but `import` only read, so they work beside a server that has the store open.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, Field
from pydantic_settings import CliPositionalArg, CliSubCommand

from lora_serve import reports
from lora_serve.adapters.store.folder import StoreFolder
from lora_serve.adapters.store.location import default_store_folder, default_stores
from lora_serve.adapters.store.records import AliasRecord, find_damage
from lora_serve.adapters.store.scan import StoreContents, is_first_format, read_marker, scan_store
from lora_serve.adapters.store.store import Store
from lora_serve.adapters.store.transfer import (
    AdapterSource,
    export_version,
    find_aliases,
    find_sources,
    import_adapter,
    import_alias,
)
from lora_serve.errors import AdapterBroken, BadRequest, ServeError, StorageFull, StoreUnusable, Unavailable
from lora_serve.shared_store_commands import CleanSharedCommand


class StoreCommand(BaseModel, ABC):
    """Base of the commands: which store."""

    store: Path | None = Field(
        None, description="folder of the store (or in the environment as LORA_SERVE_STORE; default: the only one)"
    )
    model: str | None = Field(None, description="base whose default store it is: local folder or hub id")
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")

    def run(self) -> None:
        """Execute the command. Raises: `ServeError`."""
        try:
            self.act()
        except OSError as error:
            raise ServeError(f"{error.filename or self.store}: {error.strerror or error}") from error

    @abstractmethod
    def act(self) -> None:
        """As `run`; raises OSError too."""

    def fingerprint(self) -> str:
        """Fingerprint of --model; empty without one."""
        if self.model is None:
            return ""
        from lora_serve.model.fingerprint import base_fingerprint  # here: it imports transformers

        return base_fingerprint(self.model, self.revision)

    def folder(self) -> StoreFolder:
        """The store: --store, or the default one of --model, or the only one in the user's data folder."""
        if given := self.store or os.environ.get("LORA_SERVE_STORE"):
            return StoreFolder(Path(given))
        if self.model is not None:
            return StoreFolder(default_store_folder(self.model, self.fingerprint()))
        stores = list(default_stores())
        if len(stores) != 1:
            found = f"there are {len(stores)} stores: {', '.join(map(str, stores))}" if stores else "there is no store"
            raise BadRequest(f"{found}; name one with --store or --model")
        return StoreFolder(stores[0])

    def read(self) -> tuple[StoreFolder, StoreContents]:
        """The store and its records. Raises StoreUnusable if it is none."""
        folder = self.folder()
        if not folder.root.is_dir():
            raise StoreUnusable(f"{folder.root} is not {'a folder' if folder.root.exists() else 'there'}")
        if read_marker(folder) is None:
            why = "has format 1; a server upgrades it" if is_first_format(folder) else "is not an adapter store"
            raise StoreUnusable(f"{folder.root} {why}")
        return folder, scan_store(folder)


class StoreListCommand(StoreCommand):
    """List the adapters of a store with their versions, its aliases, and what is broken."""

    def act(self) -> None:
        folder, contents = self.read()
        marker = read_marker(folder)
        base = "" if marker is None or not marker.base else f", for {marker.model} ({marker.base[:12]})"
        reports.print_lines([f"{folder.root}{base}"])
        reports.print_stored(_rows(contents))
        reports.print_lines(f"{name} is broken: {reason}" for name, reason in sorted(contents.broken().items()))
        reports.print_lines(f"{alias} → {_targets(record)}" for alias, record in sorted(contents.aliases.items()))
        unreadable = sorted(contents.unreadable_aliases.items())
        reports.print_lines(f"alias {alias} is broken: {reason}" for alias, reason in unreadable)


class StoreVerifyCommand(StoreCommand):
    """Hash all files of a store. Prints one line per problem; the exit status is 1 if there is one."""

    def act(self) -> None:
        folder, contents = self.read()
        problems = _find_problems(folder, contents)
        if problems:  # perhaps only because a server replaced or deleted an adapter meanwhile
            problems = {key: reason for key, reason in _find_problems(*self.read()).items() if key in problems}
        reports.print_lines(f"{name}: {reason}" for name, reason in sorted(problems.items()))
        adapters = len(contents.names) + len(contents.unreadable)
        if problems:
            damaged = {name.partition("@")[0] for name in problems}
            aliases = {name for name in damaged if name.startswith("alias ")}
            found = reports.count_both(len(damaged - aliases), len(aliases))
            raise ServeError(f"{reports.count(len(problems), 'problem')}, in {found} of {folder.root}")
        are = "is" if adapters + len(contents.aliases) == 1 else "are"
        found = reports.count_both(adapters, len(contents.aliases))
        reports.print_lines([f"{found} in {folder.root} {are} intact"])


class StoreExportCommand(StoreCommand):
    """Copy an adapter out of a store, as the PEFT folder that was published."""

    adapter: CliPositionalArg[str] = Field(description="NAME, or NAME@VERSION with the beginning of a digest")
    target: CliPositionalArg[Path] = Field(description="folder to make")

    def act(self) -> None:
        name, _, prefix = self.adapter.partition("@")
        digest = export_version(*self.read(), name, prefix, self.target)
        reports.print_lines([f"{name}@{digest[:12]} → {self.target}"])


class StoreImportCommand(StoreCommand):
    """Copy adapters into a store that no server has open: PEFT folders, or all adapters and aliases of other stores.

    They are checked against the base when a server opens the store.
    """

    folders: CliPositionalArg[list[Path]] = Field(min_length=1, description="PEFT folders, or folders of other stores")
    name: str | None = Field(None, description="name of the adapter, if it is one PEFT folder (default: the folder's)")
    replace: bool = Field(False, description="replace adapters of the same name")

    def act(self) -> None:
        folder, fingerprint = self.folder(), self.fingerprint()
        try:
            store = Store(folder.root, fingerprint, self.model or "")
        except Unavailable:
            raise Unavailable(
                f"a server has the adapter store {folder.root} open; stop it, or use: lora-serve adapter upload"
            ) from None
        try:
            self._import(store, fingerprint or getattr(read_marker(folder), "base", ""))
        finally:
            store.close()

    def _import(self, store: Store, base: str) -> None:
        problems: list[str] = []
        sources = [source for folder in self.folders for source in find_sources(folder, base, problems)]
        adapters = len(sources) + len(problems)
        aliases = [each for folder in self.folders for each in find_aliases(folder, problems).items()]
        found = reports.count_both(adapters, len(sources) + len(aliases) + len(problems) - adapters)
        if self.name is not None:
            if len(sources) != 1:
                raise BadRequest("--name is for one PEFT folder", param="name")
            sources = [AdapterSource(self.name, sources[0].versions, sources[0].record)]
        for source in sources:
            try:
                added = import_adapter(store, source, replace=self.replace)
                reports.print_lines([f"{source.name}: {'imported' if added else 'is there already'}"])
            except StorageFull:
                raise
            except ServeError as error:
                problems.append(f"{source.name}: {error.message}")
        for alias, record in aliases:
            try:
                added = import_alias(store, alias, record, replace=self.replace)
                reports.print_lines([f"alias {alias}: {'imported' if added else 'is there already'}"])
            except StorageFull:
                raise
            except ServeError as error:
                problems.append(f"alias {alias}: {error.message}")
        if problems:
            reports.print_lines(problems)
            raise ServeError(f"not imported: {len(problems)} of {found}")


class StoreCommands(BaseModel):
    """List, verify, export and import the adapters in a store's folder, and its aliases; needs no server."""

    list: CliSubCommand[StoreListCommand] = Field(description="adapters with their versions, and what is broken")
    verify: CliSubCommand[StoreVerifyCommand] = Field(description="hash all files")
    export: CliSubCommand[StoreExportCommand] = Field(description="copy an adapter out, as a PEFT folder")
    import_: CliSubCommand[StoreImportCommand] = Field(alias="import", description="copy adapters in, without a server")
    clean_shared: CliSubCommand[CleanSharedCommand] = Field(
        alias="clean-shared", description="remove what is not needed any more from a store that replicas share"
    )


def _rows(contents: StoreContents) -> Iterator[tuple[str, ...]]:
    broken = contents.broken()
    for name in sorted(contents.names.keys() | contents.unreadable):
        record = contents.names.get(name)
        if record is None:
            yield name, "", "", "", "broken"
            continue
        flags = [flag for flag, holds in (("pinned", record.pinned), ("unlisted", record.unlisted)) if holds]
        for number, digest in enumerate(record.versions):
            version = contents.versions.get(digest)
            state = "broken" if version is None or (number == 0 and name in broken) else ""
            yield (
                name,
                digest[:12],
                "" if version is None else reports.format_bytes(sum(file.size for file in version.files.values())),
                "" if version is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(version.created)),
                ", ".join([*flags, state] if state else flags),
            )


def _targets(record: AliasRecord) -> str:
    """What an alias stands for, with weights where there are several."""
    shown = [f"{each.name}@{each.version[:12]}" if each.version else each.name for each in record.targets]
    if len(shown) > 1:
        shown = [f"{name} ({each.weight:g})" for name, each in zip(shown, record.targets, strict=True)]
    return ", ".join(shown) + (f", by {record.sticky}" if record.sticky else "")


def _find_problems(folder: StoreFolder, contents: StoreContents) -> dict[str, str]:
    """NAME, or NAME@VERSION → what is wrong with it, hashing every file once."""
    from lora_serve.adapters import lowered_file  # imports torch, which other commands do not wait for

    problems = dict(contents.unreadable)
    damage = dict(contents.damaged)
    for digest, version in contents.versions.items():
        if found := find_damage(folder.version(digest), version):
            damage[digest] = found
        elif (folder.version(digest) / lowered_file.NAME).exists():  # if not, a server makes it
            try:
                lowered_file.verify(folder.version(digest))
            except AdapterBroken as error:
                damage[digest] = f"{error.message}; a server makes them again from the adapter's files"
    for name, record in contents.names.items():
        problems |= {f"{name}@{digest[:12]}": damage[digest] for digest in record.versions if digest in damage}
    problems |= {f"alias {alias}": reason for alias, reason in contents.unreadable_aliases.items()}
    for alias, aliased in contents.aliases.items():
        for target in aliased.targets:
            named = contents.names.get(target.name)
            if named is None or (target.version and target.version not in named.versions):
                problems[f"alias {alias}"] = f"{target} is not in the store"
    return problems
