"""Publishes adapters: has them lowered by the compiler, and keeps them in the store.

The slow halves of operations on adapters. They run in threads of `Workers`, which pass the result, or the error, to
`done` in the engine's loop.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from lora_serve.adapters import lowered_file
from lora_serve.adapters.adapter import Adapter
from lora_serve.adapters.lowered_file import Summary
from lora_serve.adapters.lowering_job import LoweredVersion, LoweringJob
from lora_serve.adapters.store.records import AliasRecord, FollowedCatalog, NameRecord, VersionRecord
from lora_serve.adapters.store.store import Store
from lora_serve.adapters.workers import Workers
from lora_serve.errors import AdapterBroken, ServeError
from lora_serve.names import adapter_broken

Saved = Callable[[ServeError | None], None]


@dataclass(frozen=True)
class StagedVersion:
    """A lowered version in the store's staging, to be stored under a name or discarded."""

    folder: Path
    version: LoweredVersion


class AdapterCompiler(Protocol):
    """What lowers adapters: `Compiler`, or in tests a function."""

    fingerprint: str

    def lower(self, job: LoweringJob) -> LoweredVersion: ...

    def lower_own(self, job: LoweringJob) -> LoweredVersion: ...


class Publisher:
    """The compiler and the store, for one resident base.

    Attributes:
        broken: name → why it cannot be served.
    """

    def __init__(self, store: Store, compiler: AdapterCompiler, workers: Workers) -> None:
        self.broken = store.broken
        self._store, self._compiler, self._workers = store, compiler, workers

    # --- lowering ------------------------------------------------------------------------------------------------

    def lower(
        self,
        folder: Path,
        done: Callable[[StagedVersion | ServeError], None],
        vocabulary: str = "",
        *,
        trust_settings: bool = False,
        own: bool = False,
    ) -> None:
        """Lower a folder of PEFT files into staging; a folder in staging is removed, another one is copied.

        Args:
            vocabulary: as in `LoweringJob`.
            own: this engine wrote the files, so that no process of its own has to read them.
        """
        lower = self._compiler.lower_own if own else self._compiler.lower

        def work() -> StagedVersion:
            try:
                job = self._job(folder, trust_settings)
                return self._lower(msgspec.structs.replace(job, vocabulary=vocabulary), lower)
            finally:
                self._remove_staged(folder)

        (self._workers.save if own else self._workers.lower)(work, done)

    def new_folder(self) -> Path:
        """A folder in staging that is not there yet."""
        return self._store.new_folder()

    def inspect(
        self, folder: Path, done: Callable[[LoweredVersion | ServeError], None], *, trust_settings: bool = False
    ) -> None:
        """Lower a folder of PEFT files without keeping anything; a folder in staging is removed."""

        def work() -> LoweredVersion:
            try:
                return self._compiler.lower(self._job(folder, trust_settings))
            finally:
                self._remove_staged(folder)

        self._workers.lower(work, done)

    def lower_again(self, digest: str, done: Callable[[Summary | ServeError], None]) -> None:
        """Make a stored version's lowered file from its PEFT files, in place of any that it has."""

        def work() -> StagedVersion:
            job = LoweringJob(str(self._store.folder(digest)), version=self._store.version(digest))
            return self._lower(job, self._compiler.lower)

        def on_lowered(result: StagedVersion | ServeError) -> None:
            if isinstance(result, ServeError):
                done(result)
                return
            staged = result.folder

            def store() -> Summary:
                try:
                    self._store.replace_lowered(digest, staged)
                    return result.version.summary
                finally:
                    _remove(staged)

            self._workers.store(store, done)

        self._workers.lower(work, on_lowered)

    # --- store ---------------------------------------------------------------------------------------------------

    def names(self) -> dict[str, NameRecord]:
        """The names that can be served."""
        return {name: record for name, record in self._store.names().items() if name not in self.broken}

    def stored(self, name: str) -> NameRecord | None:
        """What the store says that a name refers to, broken or not."""
        return self._store.names().get(name)

    def aliases(self) -> dict[str, AliasRecord]:
        """The readable aliases."""
        return self._store.aliases()

    def unreadable_aliases(self) -> dict[str, str]:
        """Alias → why its record cannot be read, of the others."""
        return self._store.unreadable_aliases()

    def files(self, digest: str) -> tuple[Path, VersionRecord]:
        """The folder of a stored version with its PEFT files, and its record. Raises AdapterBroken."""
        return self._store.folder(digest), self._store.version(digest)

    def created(self, digest: str) -> float:
        """When a stored version was published first, in seconds since the epoch."""
        return self._store.version(digest).created

    def summary(self, digest: str) -> Summary:
        """The summary of a version that was lowered as it would be now. Raises AdapterBroken if there is none."""
        summary = lowered_file.read_summary(self._store.folder(digest))
        if summary.fingerprint != self._compiler.fingerprint:
            raise AdapterBroken("it was lowered for another base, precision or release")
        return summary

    def read(self, digest: str) -> Adapter:
        """Read a version's lowered file, verified. Blocks; raises AdapterBroken if it is missing or damaged."""
        return lowered_file.read(self._store.folder(digest), digest)

    def store(self, name: str, staged: StagedVersion, record: NameRecord, done: Saved, *, durable: bool = True) -> None:
        """Store a staged version, and let a name refer to it; see `Store.publish`."""

        def work() -> None:
            try:
                self._store.publish(name, staged.folder, staged.version.record, record, durable=durable)
            finally:
                _remove(staged.folder)

        self._workers.store(work, done)

    def receive(self, fetch: Callable[[Path], None]) -> Path:
        """A new folder in staging that `fetch` has filled. Blocks; raises what `fetch` raises."""
        folder = self._store.stage()
        try:
            fetch(folder)
            return folder
        except BaseException:
            _remove(folder)
            raise

    def discard(self, staged: StagedVersion) -> None:
        """Remove a staged version."""
        self._workers.store(lambda: _remove(staged.folder), lambda result: None)

    def save(self, name: str, record: NameRecord, done: Saved) -> None:
        """Let a name refer to stored versions."""
        self._workers.store(lambda: self._store.set_name(name, record), done)

    def remove(self, name: str, done: Saved) -> None:
        """Remove a name from the store; its versions stay until `drop`."""
        self._workers.store(lambda: self._store.remove_name(name), done)

    def save_alias(self, alias: str, record: AliasRecord, done: Saved) -> None:
        """Let an alias stand for stored adapters."""
        self._workers.store(lambda: self._store.set_alias(alias, record), done)

    def remove_alias(self, alias: str, done: Saved) -> None:
        """Remove an alias from the store."""
        self._workers.store(lambda: self._store.remove_alias(alias), done)

    def save_followed(self, followed: FollowedCatalog) -> None:
        """Note which catalog of a shared store was followed, and how far."""
        self._workers.store(lambda: self._store.set_followed(followed), lambda result: None)

    def drop(self, digest: str) -> None:
        """Delete a version that no name refers to."""
        self._workers.store(lambda: self._store.drop(digest), lambda result: None)

    def check_not_broken(self, name: str) -> None:
        """Check that a name can be served. Raises AdapterBroken."""
        reason = self.broken.get(name)
        if reason is not None:
            raise adapter_broken(name, reason)

    def mark_broken(self, name: str, reason: str) -> None:
        """List a name as broken until it is published or removed."""
        self._store.mark_broken(name, reason)

    def close(self) -> None:
        self._store.close()

    def _job(self, folder: Path, trust_settings: bool) -> LoweringJob:
        return LoweringJob(str(folder), move=self._store.is_staged(folder), trust_settings=trust_settings)

    def _lower(self, job: LoweringJob, lower: Callable[[LoweringJob], LoweredVersion]) -> StagedVersion:
        """Lower an adapter into a new folder in staging."""
        staged = self._store.stage()
        try:
            return StagedVersion(staged, lower(msgspec.structs.replace(job, staged=str(staged))))
        except BaseException:
            _remove(staged)
            raise

    def _remove_staged(self, folder: Path) -> None:
        if self._store.is_staged(folder):
            _remove(folder)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
