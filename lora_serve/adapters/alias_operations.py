"""The admin operations on aliases: put, delete, describe.

Used by the engine's loop alone, and never blocks: `done` gets an operation's result, or a ServeError, now or later. A
change takes effect once it is on the disk; until then the versions before and after it are kept.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from functools import partial
from heapq import nsmallest

from lora_serve.adapters.aliases import MOST_ALIASES, MOST_STICKY_HEADERS
from lora_serve.adapters.operation_queue import Done, OperationQueue, next_step
from lora_serve.adapters.publisher import Publisher
from lora_serve.adapters.registry import Registry
from lora_serve.adapters.residency import Residency
from lora_serve.adapters.store.records import AliasRecord, TargetRecord
from lora_serve.errors import AdapterExists, BadRequest, ServeError, TooLarge
from lora_serve.messages import AliasInfo, AliasTarget, DeleteAlias, PutAlias
from lora_serve.names import alias_not_found, check_adapter_name
from lora_serve.request import AdapterUse

PAGE = 50  # aliases that are described at once: the engine computes nothing else meanwhile


class AliasOperations:
    """The admin operations on the aliases of one resident base.

    Args:
        base_name: name of the base in the API, which no alias may have.
        queue: of operations on names, which adapters and aliases share.
    """

    def __init__(
        self, registry: Registry, residency: Residency, publisher: Publisher, base_name: str, queue: OperationQueue
    ) -> None:
        self._registry, self._residency, self._publisher = registry, residency, publisher
        self._aliases = residency.aliases
        self._base_name, self._queue = base_name, queue

    def names(self) -> Iterator[str]:
        """The names of all aliases; those that cannot be served as well."""
        yield from self._aliases.records
        yield from self._aliases.broken

    def describe_some(self, after: str) -> list[AliasInfo]:
        """The next aliases by name; those that cannot be served as well."""
        return [self.describe(name) for name in nsmallest(PAGE, (name for name in self.names() if name > after))]

    def describe(self, name: str) -> AliasInfo:
        """One alias. Raises AdapterNotFound."""
        if name in self._aliases.broken:
            return AliasInfo(name, [], None, "", 0.0, self._aliases.broken[name])
        record = self._aliases.records.get(name)
        if record is None:
            raise alias_not_found(name)
        targets = [AliasTarget(str(each), each.weight) for each in record.targets]
        problem = find_problem(record, self._residency, self._publisher)
        return AliasInfo(name, targets, record.sticky or None, record.etag, record.created, problem)

    def put(self, operation: PutAlias, done: Done) -> None:
        """Let a name stand for adapters; the result is an `AliasInfo`."""
        check_adapter_name(operation.name, self._base_name)
        self._queue.run(operation.name, lambda end: self._put(operation, end), done)

    def put_shared(self, name: str, record: AliasRecord, done: Done) -> None:
        """Let a name stand for what the catalog of a shared store says; the result is an `AliasInfo`.

        Raises, through `done`, AdapterExists and AdapterNotFound while what has to come or go first has not.
        """

        def put(end: Done) -> None:
            self._check_free(name)
            for target in record.targets:
                self._residency.find(AdapterUse(target.name, target.version or None))
            self._store(name, record, end)

        self._queue.run(name, put, done)

    def delete(self, operation: DeleteAlias, done: Done) -> None:
        """Remove an alias; versions that only it kept are freed when their last lease is released."""
        self._queue.run(operation.name, lambda end: self._delete(operation, end), done)

    def _put(self, operation: PutAlias, done: Done) -> None:
        name = operation.name
        self._check_free(name)
        operation.precondition.check(self._etag(name))
        before = self._aliases.records.get(name)
        targets = [self._find_target(number, target) for number, target in enumerate(operation.targets)]
        if not any(target.weight > 0 for target in targets):
            raise BadRequest("no target has a weight above 0", param="targets")
        if not self._aliases.has_room(name):
            raise TooLarge(f"there may be {MOST_ALIASES:,} aliases; delete others first", param="name")
        if not self._aliases.may_go_by(operation.sticky):
            raise BadRequest(f"aliases may go by {MOST_STICKY_HEADERS} different headers", param="sticky")
        record = AliasRecord(targets, operation.sticky, time.time() if before is None else before.created)
        self._store(name, record, done)

    def _check_free(self, name: str) -> None:
        """Check that no adapter has a name. Raises AdapterExists."""
        if name in self._residency.names or name in self._publisher.broken:
            raise AdapterExists(f"{name} is the name of an adapter", param="name")

    def _store(self, name: str, record: AliasRecord, done: Done) -> None:
        before = self._aliases.records.get(name)
        self._aliases.begin(name, record)

        def on_stored(error: ServeError | None) -> None:
            released = self._named(name, before if error is None else record)
            self._aliases.hold(released)
            if error is None:
                self._aliases.end(name, record)
            else:
                self._aliases.cancel(name)
            done(error or self.describe(name))
            self._review(released)

        self._publisher.save_alias(name, record, next_step(on_stored, done))

    def _delete(self, operation: DeleteAlias, done: Done) -> None:
        name = operation.name
        info = self.describe(name)
        operation.precondition.check(self._etag(name))
        before = self._aliases.records.get(name)

        def on_removed(error: ServeError | None) -> None:
            if error is None:
                released = self._named(name, before)
                self._aliases.hold(released)
                self._aliases.end(name, None)
                self._review(released)
            done(error or info)

        self._publisher.remove_alias(name, next_step(on_removed, done))

    def _named(self, name: str, record: AliasRecord | None) -> set[str]:
        """The adapters that an alias names."""
        if name in self._aliases.broken:  # nobody knows
            return set(self._residency.names)
        return set() if record is None else {target.name for target in record.targets}

    def _review(self, names: Iterable[str]) -> None:
        """Give up the versions of adapters that neither are among the newest ones nor named by an alias any more.

        In turn with other changes of a name, and on the disk first: until then they are held in memory.
        """
        for name in sorted(names):
            self._queue.run(name, partial(self._review_versions, name), lambda result: None)

    def _review_versions(self, name: str, done: Done) -> None:
        record, stored = self._residency.names.get(name), self._publisher.stored(name)
        since = self._aliases.held_since(name)
        if record is None or stored is None:
            self._aliases.let_go(name, since)
            done(None)
            return
        kept = self._residency.stored(name, record, review=True)

        def on_saved(error: ServeError | None) -> None:
            if error is None:
                self._aliases.let_go(name, since)
                self._registry.set_name(name, self._residency.names[name])
                for digest in stored.versions:  # of a name that was broken, memory does not know all
                    if digest not in self._residency.versions:
                        self._publisher.drop(digest)
            done(error)

        if kept.versions == stored.versions:
            on_saved(None)
        else:
            self._publisher.save(name, kept, next_step(on_saved, done))

    def _find_target(self, number: int, target: AliasTarget) -> TargetRecord:
        """What a target names, with the whole digest of a version. Raises the ServeError that names its field."""
        field = f"targets.{number}.adapter"
        name, at, version = target.adapter.partition("@")
        if name in self._aliases:
            raise BadRequest(f"{name} is an alias; an alias stands for adapters", param=field)
        try:
            if at and not version:
                raise BadRequest("an adapter's name ends in @ without a version")
            self._publisher.check_not_broken(name)
            found = self._residency.find(AdapterUse(name, version or None))
        except ServeError as error:
            raise type(error)(error.message, param=field) from None
        return TargetRecord(name, found.digest if version else "", target.weight)

    def _etag(self, name: str) -> str | None:
        """What conditions are compared with; empty for an alias that cannot be read, None if there is none."""
        record = self._aliases.records.get(name)
        return record.etag if record is not None else "" if name in self._aliases.broken else None


def open_aliases(residency: Residency, publisher: Publisher, base_name: str) -> None:
    """Take over the aliases of the store; before its adapters, of which they keep versions."""
    broken = publisher.unreadable_aliases()
    records, unreadable = dict[str, AliasRecord](), bool(broken)
    for name, record in publisher.aliases().items():
        try:
            check_adapter_name(name, base_name)
            if publisher.stored(name) is not None or name in publisher.broken:
                raise AdapterExists("an adapter has the same name")
        except ServeError as error:
            broken[name] = error.message
        else:
            records[name] = record
    residency.aliases.open(records, broken, unreadable=unreadable)


def find_problem(record: AliasRecord, residency: Residency, publisher: Publisher) -> str | None:
    """Why one of an alias's targets cannot be served; None if all can be."""
    for target in record.targets:
        try:
            publisher.check_not_broken(target.name)
            residency.find(AdapterUse(target.name, target.version or None))
        except ServeError as error:
            return error.message
    return None


def describe_problems(residency: Residency, publisher: Publisher) -> list[str]:
    """Notes for the operator on aliases that cannot be served, or with some of their targets only."""
    aliases = residency.aliases
    notes = [f"alias {name} is not served: {reason}" for name, reason in sorted(aliases.broken.items())]
    found = {name: find_problem(record, residency, publisher) for name, record in sorted(aliases.records.items())}
    return notes + [f"alias {name}: {problem}" for name, problem in found.items() if problem is not None]
