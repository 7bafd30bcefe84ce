"""Changes of adapters and aliases that all replicas share: made in the catalog first, then here.

An answer says that the catalog has the change and that this replica serves it; the others follow as they read the
catalog, which all do every `READ_EVERY` seconds. Changes without a condition are made on whatever there is by then, so
the last one wins; those with a condition are refused if another replica was faster. While the shared store is away they
are refused, and what is here is served.

Used by the engine's loop alone, and never blocks: the shared store is asked in threads. `done` gets an operation's
result, or a ServeError, now or later; operations also raise ServeErrors.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from lora_serve.adapters.catalog_follower import CatalogFollower
from lora_serve.adapters.catalog_steps import CatalogSteps
from lora_serve.adapters.operation_queue import Done, OperationQueue, if_successful, next_step
from lora_serve.adapters.operations import AdapterOperations
from lora_serve.adapters.publisher import Publisher, StagedVersion
from lora_serve.adapters.registry import Registry
from lora_serve.adapters.residency import Residency
from lora_serve.adapters.shared.catalog import (
    Catalog,
    Edit,
    SharedVersion,
    check_may_publish,
    delete_adapter,
    delete_alias,
    publish_version,
    put_alias,
)
from lora_serve.adapters.shared.shared_store import SharedStore
from lora_serve.adapters.workers import Workers
from lora_serve.errors import AdapterExists, AdapterInvalid, PartlyApplied, ServeError, Unavailable
from lora_serve.messages import AdapterInfo, AliasInfo, DeleteAlias, Publish, PutAlias, SharedStatus
from lora_serve.names import check_adapter_name
from lora_serve.precondition import ANYTHING, Precondition

READ_EVERY = 0.5  # seconds between looks at the catalog
FETCH_EVERY, RETRY_EVERY = 4, 60  # looks after which what could not be fetched, or failed otherwise, is tried again

log = logging.getLogger(__name__)


class SharedOperations:
    """The changes of shared adapters and aliases at one replica.

    Args:
        keep_versions: versions of an adapter that the catalog keeps, beside those that aliases name.
        clock: seconds, for how old the last look at the catalog is.
    """

    def __init__(
        self,
        shared: SharedStore,
        operations: AdapterOperations,
        registry: Registry,
        residency: Residency,
        publisher: Publisher,
        workers: Workers,
        *,
        base_name: str,
        keep_versions: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._shared, self._operations, self._residency = shared, operations, residency
        self._registry, self._publisher, self._workers = registry, publisher, workers
        self._base_name, self._keep, self._clock = base_name, keep_versions, clock
        steps = CatalogSteps(shared, operations, registry, residency, publisher, workers, base_name)
        self._follower = CatalogFollower(steps, residency, publisher)
        self._order = OperationQueue()  # of changes on each name; that of `operations` is of what is done here
        self._problem: str | None = None  # why the catalog could not be read
        self._read_at = clock()  # when it was read last
        self._looks = self._errors = 0

    def start(self, progress: Callable[[int, int], None]) -> list[str]:
        """Serve what the catalog says, before there is a loop; returns notes for the operator.

        Raises: StoreUnusable if the shared store is for another base, or does not compare before it swaps.
        """
        try:
            catalog = self._shared.read()
        except Unavailable as error:
            self._note_failure(error)
            return [f"{error.message}; what is here is served, and nothing can be changed until it is as before"]
        finally:
            self._workers.repeat(self._shared.read, self.on_read, READ_EVERY, share=1.0)
        self.on_read(catalog)
        most = max(1, self._follower.behind)

        def is_settled() -> bool:
            progress(most - min(most, self._follower.behind), most)
            return self._follower.settled

        self._registry.wait(is_settled)
        return [f"{name} is not what the shared store says: {why}" for name, why in self._follower.failures.items()]

    def on_read(self, result: Catalog | ServeError) -> None:
        """Follow the catalog, or note why it could not be read."""
        self._looks += 1
        if isinstance(result, ServeError):
            self._note_failure(result)
            return
        was_away = self._problem is not None
        if was_away:
            log.warning("the shared store is back; its catalog is of generation %d", result.generation)
        self._problem, self._read_at = None, self._clock()
        self._follower.follow(result)
        if was_away or self._looks % FETCH_EVERY == 0:
            self._follower.retry(all_of_them=self._looks % RETRY_EVERY == 0)

    def status(self) -> SharedStatus:
        """How far this replica is, for metrics."""
        catalog = self._follower.catalog
        return SharedStatus(
            0 if catalog is None else catalog.generation,
            self._follower.behind,
            self._clock() - self._read_at,
            self._errors,
            self._problem is None,
        )

    # --- changes -----------------------------------------------------------------------------------------------------

    def publish(self, operation: Publish, done: Done) -> None:
        """Lower a folder, and store it as a version of a name at all replicas; the result is an `AdapterInfo`.

        What is of this replica alone (`Publish.local`) is published here, unless the catalog has the name.
        """
        name = check_adapter_name(operation.name, self._base_name)
        if operation.local:
            self._check_not_shared(name)
            self._operations.publish(operation, done)
        else:
            self._order.run(name, lambda end: self._publish(operation, end), done)

    def delete(self, name: str, done: Done, precondition: Precondition = ANYTHING) -> None:
        """Remove an adapter at all replicas, or one that this replica alone has."""
        record = self._residency.names.get(name)
        if record is not None and not record.shared and (record.source or not self._has(name)):
            self._operations.delete(name, done, precondition)
            return
        info = AdapterInfo(name, False, []) if record is None else self._operations.describe(name)
        self._order.run(
            name, lambda end: self._change(name, delete_adapter(name, precondition), lambda: info, end), done
        )

    def put_alias(self, operation: PutAlias, done: Done) -> None:
        """Let a name stand for shared adapters, at all replicas; the result is an `AliasInfo`."""
        name = check_adapter_name(operation.name, self._base_name)
        record = self._residency.names.get(name)
        if record is not None and not record.shared:
            raise AdapterExists(f"{name} is the name of an adapter", param="name")
        edit = put_alias(
            name, operation.targets, operation.sticky, operation.precondition, created=time.time(), keep=self._keep
        )
        self._order.run(
            name, lambda end: self._change(name, edit, lambda: self._operations.aliases.describe(name), end), done
        )

    def delete_alias(self, operation: DeleteAlias, done: Done) -> None:
        """Remove an alias at all replicas, or one that this replica alone has."""
        name = operation.name
        record = self._residency.aliases.records.get(name)
        if record is not None and not record.shared and not self._has(name):
            self._operations.aliases.delete(operation, done)
            return
        info = AliasInfo(name, [], None, "", 0.0) if record is None else self._operations.aliases.describe(name)
        edit = delete_alias(name, operation.precondition, keep=self._keep)
        self._order.run(name, lambda end: self._change(name, edit, lambda: info, end), done)

    def _publish(self, operation: Publish, done: Done) -> None:
        name = operation.name

        def on_read(catalog: Catalog) -> None:
            check_may_publish(catalog, name, replace=operation.replace, precondition=operation.precondition)
            self._check_free_here(name, catalog, replace=operation.replace)
            self._publisher.lower(
                Path(operation.folder), if_successful(on_lowered, done), trust_settings=operation.trust_settings
            )

        def on_lowered(staged: StagedVersion) -> None:
            summary = staged.version.summary
            try:
                if not summary.digest.startswith(operation.digest):
                    raise AdapterInvalid(
                        f"this is version {summary.digest}, not {operation.digest[:64]}", param="digest"
                    )
                self._residency.check_publish(name, summary.digest, summary.nbytes)
            except ServeError:
                self._publisher.discard(staged)
                raise

            def on_uploaded(version: SharedVersion | ServeError) -> None:
                if isinstance(version, ServeError):
                    on_changed(version)
                    return
                edit = publish_version(
                    name,
                    summary.digest,
                    version,
                    replace=operation.replace,
                    precondition=operation.precondition,
                    keep=self._keep,
                )
                self._workers.change_shared(lambda: self._shared.change(edit), next_step(on_changed, done))

            def on_changed(catalog: Catalog | ServeError) -> None:
                if isinstance(catalog, ServeError):
                    self._publisher.discard(staged)
                    done(catalog)
                    return
                self._follower.offer(staged)
                self._follow(name, catalog, lambda: self._operations.describe(name), done)

            record = staged.version.record
            self._workers.transfer(lambda: self._shared.upload(staged.folder, record), next_step(on_uploaded, done))

        # First, so that nothing is lowered that could not be published.
        self._workers.change_shared(self._shared.read, if_successful(on_read, done))

    def _change(self, name: str, edit: Edit, describe: Callable[[], object], done: Done) -> None:
        """Make a change in the catalog, then here."""

        def on_changed(catalog: Catalog) -> None:
            self._follow(name, catalog, describe, done)

        self._workers.change_shared(lambda: self._shared.change(edit), if_successful(on_changed, done))

    def _follow(self, name: str, catalog: Catalog, describe: Callable[[], object], done: Done) -> None:
        """Answer who made a change once this replica has made it too."""

        def on_settled(error: ServeError | None) -> None:
            if error is None:
                next_step(lambda _: done(describe()), done)(None)
            else:
                done(
                    PartlyApplied(
                        f"the shared store has the change, but this replica cannot follow it: {error.message}",
                        retry_after=RETRY_EVERY * READ_EVERY,
                    )
                )

        self._follower.follow(catalog)
        self._follower.wait(name, on_settled)

    # --- what is this replica's own ----------------------------------------------------------------------------------

    def _has(self, name: str) -> bool:
        """Whether the catalog, as far as it is known, has a name."""
        catalog = self._follower.catalog
        return catalog is not None and catalog.entry(name) is not None

    def _check_not_shared(self, name: str) -> None:
        """Check that a name may be this replica's own. Raises AdapterExists."""
        records = (
            self._residency.names.get(name),
            self._publisher.stored(name),
            self._residency.aliases.records.get(name),
        )
        if self._has(name) or any(record is not None and record.shared for record in records):
            raise AdapterExists(f"the shared store has {name}, which is served instead", param="name")

    def _check_free_here(self, name: str, catalog: Catalog, *, replace: bool) -> None:
        """Check that a name is not this replica's own, if that would be in the way. Raises AdapterExists."""
        record, alias = self._residency.names.get(name), self._residency.aliases.records.get(name)
        if record is not None and not record.shared and not record.unlisted and not replace:
            raise AdapterExists(f"adapter {name} exists; PUT publishes a new version of it", param="name")
        if alias is not None and not alias.shared and name not in catalog.aliases:
            raise AdapterExists(f"{name} is an alias", param="name")

    def _note_failure(self, error: ServeError) -> None:
        self._errors += 1
        if self._problem != error.message:
            log.warning("%s; what is here is served, and nothing can be changed", error.message)
        self._problem = error.message
