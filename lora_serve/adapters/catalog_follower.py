"""Makes this replica serve what the catalog of a shared store says.

For every name the next step towards the newest catalog is decided from the state here, taken, and decided again, until
there is none: so a step may fail, be repeated or be overtaken by a newer catalog, and several catalogs later only the
last one counts. Versions are published through the same pipeline as uploads; what only this replica has (adapters of
folders, of sources, or from before there was a shared store) is left alone, unless the catalog has the name too.

Used by the engine's loop alone, and never blocks.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from lora_serve.adapters.lowered_file import Summary
from lora_serve.adapters.lowering_job import LoweredVersion
from lora_serve.adapters.operation_queue import Done, if_successful, next_step
from lora_serve.adapters.operations import AdapterOperations
from lora_serve.adapters.publisher import Publisher, StagedVersion
from lora_serve.adapters.registry import Registry
from lora_serve.adapters.residency import Residency
from lora_serve.adapters.shared.catalog import Catalog, find_changed
from lora_serve.adapters.shared.shared_store import SharedStore
from lora_serve.adapters.store.records import FollowedCatalog, NameRecord
from lora_serve.adapters.workers import Workers
from lora_serve.errors import (
    AdapterBusy,
    AdapterExists,
    AdapterInvalid,
    AdapterNotFound,
    EngineFault,
    ServeError,
    TooLarge,
    Unavailable,
)
from lora_serve.messages import DeleteAlias
from lora_serve.names import check_adapter_name

Step = Callable[[Done], None]  # begins something that ends by the call of what it is given

LASTING = (AdapterInvalid, TooLarge)  # about a version: it would be the same again
WAITING = (AdapterBusy, AdapterExists, AdapterNotFound)  # for what another name has to become first
MOST_STEPS = 200  # of one name towards one catalog, beyond which something is wrong

log = logging.getLogger(__name__)


class CatalogFollower:
    """What this replica has made of the catalog.

    Args:
        base_name: name of the base in the API, which no adapter may have.

    Attributes:
        catalog: the newest one; None until there was one.
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
        self._active: set[str] = set()  # names of which a step is under way
        self._blocked: dict[str, ServeError] = {}  # names that wait for others, which are active
        self._failed: dict[str, ServeError] = {}
        self._holding = 0  # how often `_holding_blocked` is entered
        self._waiting: dict[str, list[Callable[[ServeError | None], None]]] = {}
        self._steps: Counter[str] = Counter()
        self._lowered_here: dict[str, StagedVersion] = {}  # digest → what was published at this replica
        self._unavailable: dict[str, tuple[str, ServeError]] = {}  # digest → its upload, and why it cannot be had

    def __repr__(self) -> str:
        generation = "no catalog" if self.catalog is None else f"generation {self.catalog.generation}"
        return f"<CatalogFollower {generation}, {self.behind} behind>"

    @property
    def behind(self) -> int:
        """How many names are not, or not yet, what the catalog says."""
        return len(self._active | self._blocked.keys() | self._failed.keys())

    @property
    def settled(self) -> bool:
        """Whether no step is under way."""
        return not self._active

    @property
    def failures(self) -> dict[str, str]:
        """Name → why it is not what the catalog says."""
        return {name: error.message for name, error in sorted(self._failed.items())}

    def follow(self, catalog: Catalog) -> None:
        """Serve what a catalog says, unless a newer one is followed already."""
        before = self.catalog
        if before is not None and catalog.generation <= before.generation:
            return
        self.catalog = catalog
        self._publisher.save_followed(FollowedCatalog(catalog.id, catalog.generation))
        names = find_changed(before, catalog) | self._failed.keys()
        if before is None:
            names |= {name for name, record in self._residency.names.items() if record.shared}
            names |= {name for name, record in self._residency.aliases.records.items() if record.shared}
            names |= self._publisher.broken.keys()
        # Versions that aliases are about to name are kept from now on, and their adapters have to bring them.
        for alias in names & catalog.aliases.keys():
            self._prepare_alias(alias)
            names |= {target.name for target in catalog.aliases[alias].targets}
        self._advance_all(names)

    def retry(self, *, all_of_them: bool) -> None:
        """Try again what could not be fetched, or whatever failed and may succeed now."""
        again = {digest for digest, (_, error) in self._unavailable.items() if _may_succeed(error, all_of_them)}
        self._unavailable = {digest: each for digest, each in self._unavailable.items() if digest not in again}
        self._advance_all([name for name, error in self._failed.items() if _may_succeed(error, all_of_them)])

    def offer(self, staged: StagedVersion) -> None:
        """Take a version that was lowered here, and that the catalog names from now on, instead of fetching it."""
        digest = staged.version.summary.digest
        if (other := self._lowered_here.pop(digest, None)) is not None:
            self._publisher.discard(other)
        self._unavailable.pop(digest, None)
        self._lowered_here[digest] = staged

    def wait(self, name: str, done: Callable[[ServeError | None], None]) -> None:
        """Call `done` once a name is what the catalog says, or with the reason for which it is not."""
        self._waiting.setdefault(name, []).append(done)
        self._advance(name)

    # --- decisions ---------------------------------------------------------------------------------------------------

    def _decide(self, name: str) -> Step | None:
        """The next step towards what the catalog says of a name; None if there is none. Raises AdapterExists."""
        assert self.catalog is not None
        versions, alias = self.catalog.adapters.get(name), self.catalog.aliases.get(name)
        self._prepare_alias(name)
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

    def _prepare_alias(self, name: str) -> None:
        """Keep the versions that an alias is going to name, so that they can be here before it does."""
        assert self.catalog is not None
        alias, aliases = self.catalog.aliases.get(name), self._residency.aliases
        if name in self._active:
            return  # its last step is being taken; the next one is decided after it
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
                self._publisher.lower(folder, next_step(on_lowered, done), version.vocabulary)

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

    # --- order -------------------------------------------------------------------------------------------------------

    def _advance_all(self, names: Iterable[str]) -> None:
        """Take the next steps of names; one that has to wait for another does so."""
        with self._holding_blocked():
            for name in sorted(names):
                self._steps.pop(name, None)
                self._advance(name)
            self._advance_blocked()

    def _advance_blocked(self) -> None:
        for name in list(self._blocked):
            self._advance(name)

    def _advance(self, name: str) -> None:
        """Take the next step of a name, unless one is under way."""
        if name in self._active or self.catalog is None:
            return
        self._blocked.pop(name, None)
        try:
            step = self._decide(name)
            if step is not None and self._steps[name] >= MOST_STEPS:
                raise EngineFault("it does not become what the shared store says")
        except ServeError as error:
            self._stop(name, error)
            return
        if step is None:
            self._end(name, self._missing(name))
            return
        self._steps[name] += 1
        self._active.add(name)
        alias = self._residency.aliases.records.get(name)

        def on_done(result: object) -> None:
            self._active.discard(name)
            if isinstance(result, ServeError):
                self._stop(name, result)
                return
            with self._holding_blocked():
                self._advance(name)
                for target in () if alias is None else alias.targets:  # which may have versions less to keep
                    self._advance(target.name)
                self._advance_blocked()

        next_step(step, on_done)(on_done)

    def _stop(self, name: str, error: ServeError) -> None:
        """A step failed, or there can be none: perhaps until other names are what they have to be."""
        if isinstance(error, WAITING):
            self._blocked[name] = error
            self._end_blocked()
        else:
            self._end(name, error)

    @contextmanager
    def _holding_blocked(self) -> Iterator[None]:
        """Let names that wait for others go on waiting meanwhile, and then only if a step is under way."""
        self._holding += 1
        try:
            yield
        finally:
            self._holding -= 1
            self._end_blocked()

    def _end_blocked(self) -> None:
        if not self._active and not self._holding:
            blocked, self._blocked = self._blocked, {}
            for name, error in blocked.items():
                self._end(name, error)

    def _missing(self, name: str) -> ServeError | None:
        """Why a version that a name should have is not here."""
        assert self.catalog is not None
        versions = self.catalog.adapters.get(name, [])
        wanted = self._residency.stored(name, NameRecord(versions)).versions
        missing = (digest for digest in wanted if digest not in self._residency.versions)
        return next((self._unavailable[digest][1] for digest in missing if digest in self._unavailable), None)

    def _end(self, name: str, error: ServeError | None) -> None:
        """A name is what the catalog says, or cannot become it."""
        self._steps.pop(name, None)
        if error is None:
            self._failed.pop(name, None)
        else:
            before = self._failed.get(name)
            if before is None or before.message != error.message:
                log.warning("%s is not what the shared store says: %s", name, error.message)
            self._failed[name] = error
        for done in self._waiting.pop(name, []):
            done(error)
        self._end_blocked()


def _may_succeed(error: ServeError, or_others: bool) -> bool:
    """Whether what failed may succeed soon: the shared store was away, or it was something that does not last."""
    return isinstance(error, Unavailable) or (or_others and not isinstance(error, LASTING))
