"""The admin operations on adapters: publish, inspect, list, load, evict, pin, delete, unload.

Used by the engine's loop alone, and never blocks: `done` gets an operation's result, or a ServeError, now or later;
operations also raise ServeErrors. Those that change what a name refers to, or how, wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import nsmallest
from pathlib import Path
from typing import Protocol

from lora_serve.adapters.alias_operations import AliasOperations
from lora_serve.adapters.descriptions import describe_adapter, describe_upload
from lora_serve.adapters.lowering_job import LoweredVersion
from lora_serve.adapters.operation_queue import Done, OperationQueue, if_successful, next_step
from lora_serve.adapters.publisher import Publisher, StagedVersion
from lora_serve.adapters.registry import Registry
from lora_serve.adapters.residency import Residency
from lora_serve.adapters.store.records import NameRecord
from lora_serve.errors import AdapterBusy, AdapterExists, AdapterInvalid, ServeError
from lora_serve.messages import AdapterFiles, AdapterInfo, Inspect, LocateFiles, Publish
from lora_serve.names import check_adapter_name, shorten
from lora_serve.precondition import ANYTHING, Precondition
from lora_serve.request import AdapterUse

PAGE = 50  # adapters that are described at once: the engine computes nothing else meanwhile


class AdapterChanges(Protocol):
    """Who publishes and deletes: `AdapterOperations`, or where replicas share a store, `SharedOperations`."""

    def publish(self, operation: Publish, done: Done) -> None: ...
    def delete(self, name: str, done: Done, precondition: Precondition = ANYTHING) -> None: ...


class AdapterOperations:
    """The admin operations on the adapters of one resident base.

    Attributes:
        aliases: the operations on aliases, which share names and order with these.
        queue: the order of operations on each name.

    Args:
        base_name: name of the base in the API, which no adapter may have.
    """

    def __init__(self, registry: Registry, residency: Residency, publisher: Publisher, base_name: str) -> None:
        self._registry, self._residency, self._publisher = registry, residency, publisher
        self._base_name = base_name
        self.queue = OperationQueue()
        self.aliases = AliasOperations(registry, residency, publisher, base_name, self.queue)

    # --- without changes -----------------------------------------------------------------------------------------

    def inspect(self, operation: Inspect, done: Done) -> None:
        """Lower a folder as `publish` does, without storing it; the result is an `Inspection`."""

        def on_lowered(version: LoweredVersion) -> None:
            done(describe_upload(version.summary))

        self._publisher.inspect(
            Path(operation.folder), if_successful(on_lowered, done), trust_settings=operation.trust_settings
        )

    def names(self) -> Iterator[str]:
        """The names of listed adapters and of aliases; of those that cannot be served as well."""
        yield from self._listed()
        yield from self.aliases.names()

    def describe_some(self, after: str) -> list[AdapterInfo]:
        """The next listed adapters by name; those that cannot be served as well."""
        return [self.describe(name) for name in nsmallest(PAGE, (name for name in self._listed() if name > after))]

    def count(self) -> tuple[int, int]:
        """How many adapters are listed, and how many of them cannot be served."""
        listed = [*self._listed()]
        return len(listed), sum(self.describe(name).broken is not None for name in listed)

    def describe(self, name: str) -> AdapterInfo:
        """The state of one adapter. Raises AdapterNotFound."""
        reason = self._publisher.broken.get(name)
        if reason is not None:
            return AdapterInfo(name, False, [], reason)
        return describe_adapter(name, self._residency.record(name), self._residency)

    def locate(self, operation: LocateFiles) -> AdapterFiles:
        """Where the PEFT files of a version are. Raises AdapterNotFound, AdapterBroken, BadRequest if ambiguous."""
        name = operation.name
        self._publisher.check_not_broken(name)
        self._residency.record(name)
        try:
            digest = self._residency.find(AdapterUse(name, operation.version)).digest
        except ServeError as error:
            raise type(error)(error.message, param="version") from None
        folder, record = self._publisher.files(digest)
        files = {path: (file.size, file.sha256) for path, file in record.files.items()}
        return AdapterFiles(name, digest, str(folder), files)

    # --- memory --------------------------------------------------------------------------------------------------

    def load(self, name: str, done: Done) -> None:
        """Load the newest version into host memory, and onto the device if a slot is free."""
        self._publisher.check_not_broken(name)
        record = self._residency.names.get(name)
        if record is not None and record.unlisted:
            on_listed = if_successful(lambda _: self.load(name, done), done)
            self.queue.run(name, lambda end: self._registry.save_name(name, end, unlisted=False), on_listed)
            return
        version = self._residency.current(name)
        version.evict_when_unused = False

        def on_loaded(_: None) -> None:
            self._registry.memory.prefetch([version.digest], keep=lambda other: bool(other.leases))
            done(self.describe(name))

        self._registry.memory.load(version, if_successful(on_loaded, done))

    def evict(self, name: str, done: Done) -> None:
        """Free the newest version's host and device memory: now, or when its last lease is released."""
        self._publisher.check_not_broken(name)
        version = self._residency.current(name)
        if version.digest in self._residency.pinned:
            raise AdapterBusy(f"adapter {name} is pinned, perhaps under another name; unpin it first", param="name")
        version.evict_when_unused = True
        self._registry.free_if_unused(version)
        done(self.describe(name))

    # --- names ---------------------------------------------------------------------------------------------------

    def publish(self, operation: Publish, done: Done, *, own: bool = False, durable: bool = True) -> None:
        """Lower and store a folder as a version of a name; the result is an `AdapterInfo`.

        Args:
            own: this engine wrote the files.
            durable: see `Store.publish`.
        """
        check_adapter_name(operation.name, self._base_name)
        self.queue.run(operation.name, lambda end: self._publish(operation, end, own, durable), done)

    def new_folder(self) -> Path:
        """A folder on the store's file system that is not there yet, for an adapter that is to be published."""
        return self._publisher.new_folder()

    def pin(self, name: str, pinned: bool, done: Done) -> None:
        """Pin an adapter (load it and never evict it), or unpin it; this outlasts the engine."""
        self.queue.run(name, lambda end: self._pin(name, pinned, end), done)

    def delete(self, name: str, done: Done, precondition: Precondition = ANYTHING) -> None:
        """Remove an adapter; its memory and files are freed when its last lease is released."""
        self.queue.run(name, lambda end: self._delete(name, end, precondition), done)

    def unload(self, name: str, done: Done) -> None:
        """Evict and unlist an adapter, until it is loaded or published again; delete it if it is a folder's copy."""
        self.queue.run(name, lambda end: self._unload(name, end), done)

    def _publish(self, operation: Publish, done: Done, own: bool, durable: bool) -> None:
        name = operation.name
        stored = self._publisher.stored(name) or NameRecord([])  # more than the residency knows if it is broken
        record = self._residency.names.get(name)
        taken = name in self._publisher.broken or (
            record is not None and not (record.unlisted and not operation.unless_known)
        )
        if record is None and name in self._residency.aliases:
            raise AdapterExists(f"{name} is an alias", param="name")
        operation.precondition.check(self._etag(name))
        if taken and not operation.replace:
            raise AdapterExists(f"adapter {name} exists; PUT publishes a new version of it", param="name")

        def on_lowered(staged: StagedVersion) -> None:
            summary = staged.version.summary
            digest = summary.digest
            try:
                if not digest.startswith(operation.digest):
                    raise AdapterInvalid(f"this is version {digest}, not {operation.digest[:64]}", param="digest")
                self._residency.check_publish(name, digest, summary.nbytes)
                operation.precondition.check(self._etag(name))
            except ServeError:
                self._publisher.discard(staged)
                raise

            def record_now() -> NameRecord:
                older = self._residency.names.get(name, NameRecord([])).versions
                versions = [digest, *(each for each in older if each != digest)]
                return NameRecord(versions, operation.source, stored.pinned)

            self.store_staged(name, staged, record_now, done, durable=durable)

        self._publisher.lower(
            Path(operation.folder),
            if_successful(on_lowered, done),
            trust_settings=operation.trust_settings,
            own=own,
        )

    def store_staged(
        self,
        name: str,
        staged: StagedVersion,
        record_now: Callable[[], NameRecord],
        done: Done,
        *,
        durable: bool = True,
    ) -> None:
        """Store a lowered version, and let a name, whose turn it is, refer to what `record_now` says then."""
        version, stored = staged.version, self._publisher.stored(name) or NameRecord([])

        def on_stored(_: None) -> None:
            self._registry.add_version(version.summary, version.record.created)
            self._registry.set_name(name, record_now())
            self._serve_repaired(version.summary.digest)
            self.drop_unknown(stored)
            done(self.describe(name))

        kept = self._residency.stored(name, record_now())
        self._publisher.store(name, staged, kept, if_successful(on_stored, done), durable=durable)

    def _pin(self, name: str, pinned: bool, done: Done) -> None:
        self._publisher.check_not_broken(name)
        record = self._residency.record(name)
        if pinned:
            digest = record.versions[0]
            self._residency.check_pins(name, digest, self._residency.versions[digest].bytes)

        def on_saved(_: None) -> None:
            if pinned:
                self.load(name, next_step(on_loaded, done))
            else:
                done(self.describe(name))

        def on_loaded(result: AdapterInfo | ServeError) -> None:
            if isinstance(result, ServeError) and name in self._residency.names:
                self._registry.save_name(name, lambda error: done(result), pinned=False)
            else:
                done(result)

        self._registry.save_name(name, if_successful(on_saved, done), pinned=pinned)

    def _unload(self, name: str, done: Done) -> None:
        self._check_unaliased(name)
        stored = self._publisher.stored(name)
        if stored is not None and stored.source:
            self._delete(name, done)
            return
        self._publisher.check_not_broken(name)
        info, version = self.describe(name), self._residency.current(name)

        def on_saved(_: None) -> None:
            if version.digest not in self._residency.pinned:
                version.evict_when_unused = True
                self._registry.free_if_unused(version)
            done(info)

        self._registry.save_name(name, if_successful(on_saved, done), pinned=False, unlisted=True)

    def _delete(self, name: str, done: Done, precondition: Precondition = ANYTHING) -> None:
        self._check_unaliased(name)
        stored = self._publisher.stored(name) or NameRecord([])
        record = self._residency.names.get(name)
        # An unloaded one can be deleted too.
        info = self.describe(name) if record is None else describe_adapter(name, record, self._residency)
        precondition.check(self._etag(name))
        if record is not None:
            self._registry.change_name(name, unlisted=True)  # at once; its versions go when the store has forgotten it

        def on_removed(error: ServeError | None) -> None:
            if error is None:
                self._registry.set_name(name, None)
                self.drop_unknown(stored)
            elif record is not None and name in self._residency.names:
                self._registry.change_name(name, unlisted=record.unlisted)
            done(error or info)

        self._publisher.remove(name, next_step(on_removed, done))

    def _etag(self, name: str) -> str | None:
        """The digest that conditions are compared with; empty for a name that cannot be read, None if there is none."""
        record = self._residency.names.get(name)
        if record is not None:
            return None if record.unlisted else record.versions[0]
        stored = self._publisher.stored(name)
        return None if name not in self._publisher.broken else "" if stored is None else stored.versions[0]

    def _listed(self) -> Iterator[str]:
        names, broken = self._residency.names, self._publisher.broken
        yield from (name for name, record in names.items() if not record.unlisted or name in broken)
        yield from (name for name in broken if name not in names)

    def _check_unaliased(self, name: str) -> None:
        """Check that no alias needs an adapter. Raises AdapterBusy that names those that do."""
        if aliases := self._residency.aliases.naming(name):
            found = f"alias {aliases[0]} stands" if len(aliases) == 1 else f"aliases {shorten(aliases)} stand"
            raise AdapterBusy(f"{found} for adapter {name}; change or delete it first", param="name")

    def _serve_repaired(self, digest: str) -> None:
        """Serve other names of a version that was broken until it was published again."""
        for name, record in self._publisher.names().items():
            if name not in self._residency.names and record.versions[0] == digest:
                self._registry.set_name(name, record)

    def drop_unknown(self, stored: NameRecord) -> None:
        """Delete versions of a broken name, of which nobody knows any more."""
        for digest in stored.versions:
            if digest not in self._residency.versions:
                self._publisher.drop(digest)
