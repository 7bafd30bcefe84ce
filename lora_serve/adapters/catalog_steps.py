"""The steps by which a name becomes what the catalog of a shared store says.

`CatalogSteps.decide` looks at the catalog and at the state here, and returns the next one. Versions are published
through the same pipeline as uploads. Used by the engine's loop alone, and never blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import msgspec

from lora_serve.adapters.lowered_file import Summary
from lora_serve.adapters.lowering_job import LoweredVersion
from lora_serve.adapters.operation_queue import Done, if_successful, next_step
from lora_serve.adapters.operations import AdapterOperations
from lora_serve.adapters.publisher import Publisher, StagedVersion
from lora_serve.adapters.registry import Registry
from lora_serve.adapters.residency import Residency
from lora_serve.adapters.shared.catalog import Catalog
from lora_serve.adapters.shared.shared_store import SharedStore
from lora_serve.adapters.store.records import NameRecord
from lora_serve.adapters.workers import Workers
from lora_serve.errors import AdapterBusy, AdapterExists, AdapterInvalid, AdapterNotFound, ServeError
from lora_serve.messages import DeleteAlias
from lora_serve.names import SETTINGS, check_adapter_name

Step = Callable[[Done], None]  # begins something that ends by the call of what it is given

WAITING = (AdapterBusy, AdapterExists, AdapterNotFound)  # for what another name has to become first

log = logging.getLogger(__name__)


class CatalogSteps:
    """What can be done at this replica about the names of a catalog.

    Attributes:
        catalog: the newest one; None until there was one.

    Args:
        base_name: name of the base in the API, which no adapter may have.
    """

    def __init__(
        self,
        shared: SharedStore,
        operations: AdapterOperations,
        registry: Registry,
        residency: Residency,
        publisher: Publisher,
        workers: Workers,
        base_name: str,
    ) -> None:
        self.catalog: Catalog | None = None
        self._shared, self._operations, self._registry = shared, operations, registry
        self._residency, self._publisher, self._workers = residency, publisher, workers
        self._base_name = base_name
        self._lowered_here: dict[str, StagedVersion] = {}  # digest → what was published at this replica
        self._unavailable: dict[str, tuple[str, ServeError]] = {}  # digest → its upload, and why it cannot be had

    @property
    def shared_names(self) -> set[str]:
        """Names of adapters and aliases here that the catalog decides, and of those that cannot be read."""
        names = {name for name, record in self._residency.names.items() if record.shared}
        aliases = {name for name, record in self._residency.aliases.records.items() if record.shared}
        return names | aliases | self._publisher.broken.keys()

    def offer(self, staged: StagedVersion) -> None:
        """Take a version that was lowered here, and that the catalog names from now on, instead of fetching it."""
        digest = staged.version.summary.digest
        if (other := self._lowered_here.pop(digest, None)) is not None:
            self._publisher.discard(other)
        self._unavailable.pop(digest, None)
        self._lowered_here[digest] = staged

    def forget_failures(self, may_succeed: Callable[[ServeError], bool]) -> None:
        """Try again, at the next step, to get versions whose failure may not last."""
        self._unavailable = {digest: each for digest, each in self._unavailable.items() if not may_succeed(each[1])}

    def missing(self, name: str) -> ServeError | None:
        """Why a version that a name should have is not here."""
        assert self.catalog is not None
        versions = self.catalog.adapters.get(name, [])
        wanted = self._residency.stored(name, NameRecord(versions)).versions
        missing = (digest for digest in wanted if digest not in self._residency.versions)
        return next((self._unavailable[digest][1] for digest in missing if digest in self._unavailable), None)

    # --- decisions ---------------------------------------------------------------------------------------------------

    def decide(self, name: str) -> Step | None:
        """The next step towards what the catalog says of a name; None if there is none. Raises AdapterExists."""
        assert self.catalog is not None
        versions, alias = self.catalog.adapters.get(name), self.catalog.aliases.get(name)
        self.prepare_alias(name)
        if versions or alias is not None:
            check_adapter_name(name, self._base_name)
        known_alias = self._residency.aliases.records.get(name)
        record, stored = self._residency.names.get(name), self._publisher.stored(name)
        if known_alias is not None and alias is None and (known_alias.shared or versions):
            return lambda done: self._operations.aliases.delete(DeleteAlias(name), done)
        if versions:
            return self._decide_versions(name, versions, record, stored)
        shared = any(each is not None and each.shared for each in (record, stored))
        if alias is not None and (record is not None or name in self._publisher.broken) and not shared:
            raise AdapterExists(f"an adapter of this replica alone has the name of the shared alias {name}")
        if shared:
            return lambda done: self._operations.delete(name, done)
        if alias is not None and alias != known_alias:
            return lambda done: self._operations.aliases.put_shared(name, alias, done)
        return None

    def prepare_alias(self, name: str) -> None:
        """Keep the versions that an alias is going to name, so that they can be here before it does."""
        assert self.catalog is not None
        alias, aliases = self.catalog.aliases.get(name), self._residency.aliases
        if alias is not None and alias != aliases.records.get(name):
            aliases.begin(name, alias)
        else:
            aliases.cancel(name)

    def _decide_versions(
        self, name: str, versions: list[str], record: NameRecord | None, stored: NameRecord | None
    ) -> Step | None:
        wanted = self._residency.stored(name, NameRecord(versions)).versions
        for digest in wanted:
            if digest in self._lowered_here or (digest not in self._residency.versions and self._may_be_had(digest)):
                return lambda done: self._bring(name, digest, wanted, done)  # called at once
        known = self._known(wanted)
        if not known:
            return None
        is_so = record is not None and record.shared and stored is not None
        if is_so and stored is not None and stored.versions == [*known, *self._aliased(name, wanted)]:
            return None
        return lambda done: self._set_versions(name, wanted, done)

    def _may_be_had(self, digest: str) -> bool:
        """Whether a version can be fetched and lowered, as far as known."""
        assert self.catalog is not None
        return self._unavailable.get(digest, ("", None))[0] != self.catalog.versions[digest].upload

    def _known(self, wanted: list[str]) -> list[str]:
        return [digest for digest in wanted if digest in self._residency.versions]

    def _aliased(self, name: str, wanted: list[str]) -> list[str]:
        """Stored versions that are not wanted, which aliases name until they have been changed too."""
        stored = self._publisher.stored(name) or NameRecord([])
        keeps = self._residency.aliases.keeps
        return [digest for digest in stored.versions if digest not in wanted and keeps(name, digest)]

    # --- steps -------------------------------------------------------------------------------------------------------

    def _bring(self, name: str, digest: str, wanted: list[str], done: Done) -> None:
        """Publish a version here: what was lowered here, or what is fetched now."""
        assert self.catalog is not None
        version = self.catalog.versions[digest]

        def on_failed(error: ServeError) -> None:
            self._unavailable[digest] = version.upload, error
            done(None)  # the next step is decided without it

        def on_fetched(folder: Path | ServeError) -> None:
            if isinstance(folder, ServeError):
                on_failed(folder)
            else:
                # A version has settings if an administrator vouched for them where it was published.
                trust = SETTINGS in version.files
                self._publisher.lower(folder, next_step(on_lowered, done), version.vocabulary, trust_settings=trust)

        def on_lowered(staged: StagedVersion | ServeError) -> None:
            if isinstance(staged, ServeError):
                on_failed(staged)
                return
            found = staged.version.summary.digest
            if found != digest:
                self._publisher.discard(staged)
                on_failed(AdapterInvalid(f"version {digest[:12]} is damaged in the shared store; publish it again"))
                return
            store(staged)

        def store(staged: StagedVersion) -> None:
            record = msgspec.structs.replace(staged.version.record, created=version.created)
            dated = StagedVersion(staged.folder, LoweredVersion(record, staged.version.summary))

            def on_stored(result: object) -> None:
                if isinstance(result, ServeError) and not isinstance(result, WAITING):
                    on_failed(result)
                else:
                    done(result)

            self._operations.queue.run(name, lambda end: self._store(name, dated, wanted, end), on_stored)

        staged = self._lowered_here.pop(digest, None)
        if staged is not None:
            store(staged)
            return

        def fetch() -> Path:
            return self._publisher.receive(lambda folder: self._shared.fetch(digest, version, folder))

        self._workers.transfer(fetch, next_step(on_fetched, done))

    def _store(self, name: str, staged: StagedVersion, wanted: list[str], done: Done) -> None:
        """Store a version, and let its name, whose turn it is, refer to the wanted ones that are here."""
        try:
            if name in self._residency.aliases:
                raise AdapterExists(f"{name} is an alias")
            self._residency.check_size(staged.version.summary.nbytes)
        except ServeError:
            self._publisher.discard(staged)
            raise
        summary = staged.version.summary

        def record_now() -> NameRecord:
            return self._record(name, wanted, summary)

        self._operations.store_staged(name, staged, record_now, done)

    def _set_versions(self, name: str, wanted: list[str], done: Done) -> None:
        """Let a name refer to the wanted versions, which are here."""

        def start(end: Done) -> None:
            if name in self._residency.aliases:
                raise AdapterExists(f"{name} is an alias")
            stored = self._publisher.stored(name) or NameRecord([])
            record = self._record(name, wanted)
            if not record.versions:
                end(None)
                return

            def on_saved(_: None) -> None:
                self._operations.drop_unknown(stored)
                end(None)

            # First in memory: until then nothing but other names keeps these versions.
            self._registry.set_name(name, record)
            self._publisher.save(name, self._residency.stored(name, record), if_successful(on_saved, end))

        self._operations.queue.run(name, start, done)

    def _record(self, name: str, wanted: list[str], coming: Summary | None = None) -> NameRecord:
        """What a name refers to: of the wanted versions those that are here, or coming, and those that aliases name."""
        arriving = "" if coming is None else coming.digest
        known = [digest for digest in wanted if digest in self._residency.versions or digest == arriving]
        before = self._residency.names.get(name) or self._publisher.stored(name) or NameRecord([])
        pinned = before.pinned and bool(known)
        if pinned:
            newest = coming or self._residency.versions[known[0]].summary
            newest = newest if newest.digest == known[0] else self._residency.versions[known[0]].summary
            try:
                self._residency.check_pins(name, newest.digest, newest.nbytes)
            except AdapterBusy as error:  # pins are this replica's own; they do not keep it from what all others serve
                log.warning("adapter %s is not pinned any more: %s", name, error.message)
                pinned = False
        unlisted = before.unlisted and before.versions[:1] == known[:1]
        return NameRecord([*known, *self._aliased(name, wanted)], "", pinned, unlisted, shared=True)
