"""The engine's interface to adapters: leases on exact versions, and the admin operations on names.

Used by the engine's loop alone, and never blocks: slow work is the `Publisher`'s and the `AdapterMemory`'s, whose
results are handled in `poll`. Requests and operations take effect in the order in which they arrive: those that change
what a name refers to, or how, wait for each other.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from lora_serve.adapters.device_slots import DeviceSlots
from lora_serve.adapters.lowered_file import Summary
from lora_serve.adapters.lowering_job import LoweredVersion
from lora_serve.adapters.memory import AdapterMemory
from lora_serve.adapters.publisher import Publisher, StagedVersion
from lora_serve.adapters.residency import Residency, Version
from lora_serve.adapters.store_records import NameRecord
from lora_serve.adapters.traits import Traits
from lora_serve.adapters.workers import Workers
from lora_serve.errors import AdapterBroken, AdapterBusy, AdapterExists, ServeError
from lora_serve.messages import AdapterInfo, AdapterVersion, Inspect, Inspection, Publish, Stats
from lora_serve.names import adapter_broken, adapter_not_found, check_adapter_name
from lora_serve.request import AdapterUse

Done = Callable[[Any], None]


@dataclass(frozen=True)
class Lease:
    """A sequence's claim on one exact version, with the version's traits."""

    name: str
    digest: str
    weight: float
    traits: Traits = field(default_factory=Traits)
    number: int = 0


class Registry:
    """The adapters of one resident base.

    Attributes:
        memory: the adapters in host memory and on the device.

    Args:
        residency: the state of all adapters; changed by this class and `AdapterMemory` only.
        base_name: name of the base in the API, which no adapter may have.
    """

    def __init__(
        self,
        residency: Residency,
        device_slots: DeviceSlots,
        publisher: Publisher,
        workers: Workers,
        *,
        base_name: str = "",
    ) -> None:
        self.memory = AdapterMemory(residency, device_slots, publisher, workers, self._on_load_ended)
        self._residency, self._publisher, self._workers = residency, publisher, workers
        self.base_name = base_name
        self._operations: dict[str, deque[Callable[[], None]]] = {}  # by name; the first one is under way
        self._last_used: dict[str, float] = {}
        self._impossible = False  # whether requests may have become impossible

    def __repr__(self) -> str:
        return f"<Registry {self._residency!r}>"

    # --- requests ------------------------------------------------------------------------------------------------

    def acquire(self, use: AdapterUse) -> Lease:
        """Lease the version that a request names.

        Raises AdapterNotFound, BadRequest for an ambiguous version, AdapterBroken.
        """
        self._check_not_broken(use.name)
        version = self._residency.find(use)
        if version.failure is not None:
            if version.leases:  # of requests that are being ended for it
                raise self._named(version, version.failure)
            version.failure = None
        self._last_used[version.digest] = time.time()
        self.memory.record_use(version)
        number = self._residency.lease(version)
        return Lease(use.name, version.digest, use.weight, version.summary.traits, number)

    def release(self, lease: Lease) -> None:
        """Release a lease; after the last one, free a version that is unnamed or marked for eviction."""
        version = self._residency.versions[lease.digest]
        self._residency.release(version, lease.number)
        self._free_if_unused(version)
        self.memory.changed = True

    def check_possible(self, digests: Sequence[str]) -> None:
        """Check that a request's leased adapters can be had together. Raises the ServeError that ends it."""
        for version in map(self._residency.versions.__getitem__, digests):
            if version.failure is not None:
                raise self._named(version, version.failure)
        self._residency.check_fits(digests)

    def take_impossible(self, adapter_sets: Iterable[Sequence[str]]) -> list[tuple[Sequence[str], ServeError]]:
        """Of the adapter sets of requests, those that can be served no more, with the reason.

        Their loads failed, or pins and new versions took their place. Empty unless that may have happened since the
        last call.
        """
        if not self._impossible:
            return []
        self._impossible = False
        reasons = ((adapter_set, self._why_impossible(adapter_set)) for adapter_set in adapter_sets)
        return [(adapter_set, reason) for adapter_set, reason in reasons if reason is not None]

    def poll(self) -> bool:
        """Handle the results of finished work and start loads; returns whether anything finished."""
        finished = self._workers.poll()
        if self.memory.changed:
            self.memory.load_next()
        return finished

    def wait(self, condition: Callable[[], bool]) -> None:
        """Handle results until a condition holds; at start only, before there is a loop."""
        while not condition():
            self._workers.poll(timeout=1.0)

    def close(self) -> None:
        self._workers.close()
        self._publisher.close()

    @property
    def pinned(self) -> Set[str]:
        """Digests of pinned versions, for which slots are reserved."""
        return self._residency.pinned

    def bytes(self, digest: str) -> int:
        """Size of a version in memory."""
        return self._residency.versions[digest].bytes

    # --- operations: `done` gets the result or a ServeError, now or later; they also raise ServeErrors -----------

    def publish(self, operation: Publish, done: Done) -> None:
        """Lower and store a folder as a version of a name; the result is an `AdapterInfo`."""
        check_adapter_name(operation.name, self.base_name)
        self._in_order(operation.name, lambda done: self._publish(operation, done), done)

    def inspect(self, operation: Inspect, done: Done) -> None:
        """Lower a folder as `publish` does, without storing it; the result is an `Inspection`."""

        def on_lowered(result: LoweredVersion | ServeError) -> None:
            done(result if isinstance(result, ServeError) else _inspection(result.summary))

        self._publisher.inspect(Path(operation.folder), on_lowered)

    def describe_all(self) -> list[AdapterInfo]:
        """All adapters that are listed, by name; those that cannot be served as well."""
        listed = {name for name, record in self._residency.names.items() if not record.unlisted}
        return [self.describe(name) for name in sorted(listed | self._publisher.broken.keys())]

    def describe(self, name: str) -> AdapterInfo:
        """The state of one adapter. Raises AdapterNotFound."""
        reason = self._publisher.broken.get(name)
        if reason is not None:
            return AdapterInfo(name, False, [], reason)
        return self._info(name, self._residency.record(name))

    def load(self, name: str, done: Done) -> None:
        """Load the newest version into host memory, and onto the device if a slot is free."""
        self._check_not_broken(name)
        record = self._residency.names.get(name)
        if record is not None and record.unlisted:
            on_listed = _if_successful(lambda: self.load(name, done), done)
            self._in_order(name, lambda end: self._set(name, end, unlisted=False), on_listed)
            return
        version = self._residency.current(name)
        version.evict_when_unused = False

        def finish() -> None:
            self.memory.prefetch(version)
            done(self.describe(name))

        self.memory.load(version, _if_successful(finish, done))

    def evict(self, name: str, done: Done) -> None:
        """Free the newest version's host and device memory: now, or when its last lease is released."""
        self._check_not_broken(name)
        version = self._residency.current(name)
        if version.digest in self._residency.pinned:
            raise AdapterBusy(f"adapter {name} is pinned, perhaps under another name; unpin it first", param="name")
        version.evict_when_unused = True
        self._free_if_unused(version)
        done(self.describe(name))

    def pin(self, name: str, pinned: bool, done: Done) -> None:
        """Pin an adapter (load it and never evict it), or unpin it; this outlasts the engine."""
        self._in_order(name, lambda done: self._pin(name, pinned, done), done)

    def delete(self, name: str, done: Done) -> None:
        """Remove an adapter; its memory and files are freed when its last lease is released."""
        self._in_order(name, lambda done: self._delete(name, done), done)

    def unload(self, name: str, done: Done) -> None:
        """Evict and unlist an adapter, until it is loaded or published again; delete it if it is a folder's copy."""
        self._in_order(name, lambda done: self._unload(name, done), done)

    def fill_stats(self, stats: Stats) -> None:
        """Fill in the statistics of adapters."""
        names = {record.versions[0]: name for name, record in self._residency.names.items()}
        resident = (version.digest for version in self._residency.resident)
        stats.resident = sorted(names[digest] for digest in resident if digest in names)
        stats.adapters = sum(not record.unlisted for record in self._residency.names.values())
        self.memory.fill_stats(stats)

    # --- parts of these ------------------------------------------------------------------------------------------

    def _in_order(self, name: str, start: Callable[[Done], None], done: Done) -> None:
        """Start an operation on a name once earlier ones on it have ended."""

        def run() -> None:
            try:
                start(end)
            except ServeError as error:
                end(error)

        def end(result: Any) -> None:
            done(result)
            queue.popleft()
            if queue:
                queue[0]()
            else:
                del self._operations[name]

        queue = self._operations.setdefault(name, deque())
        queue.append(run)
        if len(queue) == 1:
            run()

    def _publish(self, operation: Publish, done: Done) -> None:
        name = operation.name
        stored = self._publisher.stored(name) or NameRecord([])  # more than the residency knows if it is broken
        record = self._residency.names.get(name)
        taken = name in self._publisher.broken or (record is not None and not record.unlisted)
        if taken and not operation.replace:
            raise AdapterExists(f"adapter {name} exists; PUT publishes a new version of it", param="name")

        def on_lowered(staged: StagedVersion | ServeError) -> None:
            if isinstance(staged, ServeError):
                done(staged)
                return
            version, digest = staged.version, staged.version.summary.digest
            try:
                self._residency.check_publish(name, digest, version.summary.nbytes)
            except ServeError as error:
                self._publisher.discard(staged)
                done(error)
                return

            def record_now() -> NameRecord:
                older = self._residency.names.get(name, NameRecord([])).versions
                return NameRecord(
                    [digest, *(each for each in older if each != digest)], operation.source, stored.pinned
                )

            def finish() -> None:
                self.add(version.summary, version.record.created)
                self._apply(name, record_now())
                self._add_repaired(digest)
                self._drop_unknown(stored)
                done(self.describe(name))

            self._publisher.store(name, staged, self._residency.stored(record_now()), _if_successful(finish, done))

        self._publisher.lower(Path(operation.folder), on_lowered)

    def _pin(self, name: str, pinned: bool, done: Done) -> None:
        self._check_not_broken(name)
        record = self._residency.record(name)
        if pinned:
            digest = record.versions[0]
            self._residency.check_pins(name, digest, self._residency.versions[digest].bytes)

        def finish() -> None:
            if pinned:
                self.load(name, on_loaded)
            else:
                done(self.describe(name))

        def on_loaded(result: AdapterInfo | ServeError) -> None:
            if isinstance(result, ServeError) and name in self._residency.names:
                self._set(name, lambda error: done(result), pinned=False)
            else:
                done(result)

        self._set(name, _if_successful(finish, done), pinned=pinned)

    def _unload(self, name: str, done: Done) -> None:
        stored = self._publisher.stored(name)
        if stored is not None and stored.source:
            self._delete(name, done)
            return
        self._check_not_broken(name)
        info, version = self.describe(name), self._residency.current(name)

        def on_saved(error: ServeError | None) -> None:
            if error is None and version.digest not in self._residency.pinned:
                version.evict_when_unused = True
                self._free_if_unused(version)
            done(error or info)

        self._set(name, on_saved, pinned=False, unlisted=True)

    def _delete(self, name: str, done: Done) -> None:
        record, stored = self._residency.names.get(name), self._publisher.stored(name) or NameRecord([])
        info = self.describe(name) if record is None else self._info(name, record)  # an unloaded one too
        if name in self._residency.names:  # unlisted at once; its versions go when the store has forgotten the name
            self._change(name, unlisted=True)

        def on_removed(error: ServeError | None) -> None:
            if error is None:
                self._apply(name, None)
                self._drop_unknown(stored)
            elif record is not None and name in self._residency.names:
                self._change(name, unlisted=record.unlisted)
            done(error or info)

        self._publisher.remove(name, on_removed)

    def add(self, summary: Summary, created: float) -> None:
        """Add a stored version, to which a name is about to refer."""
        known = self._residency.versions.get(summary.digest)
        if known is None:
            self._residency.versions[summary.digest] = Version(summary, created)
        else:
            known.summary, known.failure = summary, None  # perhaps with another report, perhaps repaired

    def forget_beyond(self, name: str, served: Sequence[str]) -> None:
        """At start: delete versions of a name that are more than are kept now."""
        rest = [digest for digest in served if not self._residency.versions[digest].names]
        if rest:
            self._publisher.save(name, self._residency.stored(self._residency.names[name]), lambda error: None)
        for digest in rest:
            self._free_if_unused(self._residency.versions[digest])

    def _set(self, name: str, done: Callable[[ServeError | None], None], **changes: bool) -> None:
        """Change fields of a name's record, in memory and in the store; if the store fails, not at all."""
        record = self._residency.names.get(name)
        if record is None:
            raise adapter_not_found(name)
        before = {field: getattr(record, field) for field in changes}
        self._change(name, **changes)

        def on_saved(error: ServeError | None) -> None:
            if error is not None and name in self._residency.names:
                self._change(name, **before)
            done(error)

        self._publisher.save(name, self._residency.stored(self._residency.names[name]), on_saved)

    def _change(self, name: str, **changes: bool) -> None:
        self._apply(name, msgspec.structs.replace(self._residency.names[name], **changes))

    def _add_repaired(self, digest: str) -> None:
        """Serve other names of a version that was broken until it was published again."""
        for name, record in self._publisher.names().items():
            if name not in self._residency.names and record.versions[0] == digest:
                self._apply(name, record)

    def _drop_unknown(self, stored: NameRecord) -> None:
        """Delete versions of a broken name, of which nobody knows any more."""
        for digest in stored.versions:
            if digest not in self._residency.versions:
                self._publisher.drop(digest)

    def _apply(self, name: str, record: NameRecord | None) -> None:
        before = self._residency.names.get(name)
        self._residency.apply(name, record)
        for digest in () if before is None else before.versions:
            self._free_if_unused(self._residency.versions[digest])
        self.memory.changed = self._impossible = True

    def _free_if_unused(self, version: Version) -> None:
        """Free an unused version: its memory if it is to be evicted, and its files too if no name refers to it."""
        if version.leases or self.memory.is_coming(version) or version.digest not in self._residency.versions:
            return  # `release`, or the end of the load, calls this again
        garbage = not version.names
        if version.evict_when_unused or garbage:
            version.evict_when_unused = False
            self.memory.evict(version)
        if garbage:
            del self._residency.versions[version.digest]
            self._last_used.pop(version.digest, None)
            self._publisher.drop(version.digest)

    def _on_load_ended(self, version: Version) -> None:
        self._impossible |= version.failure is not None
        self._free_if_unused(version)

    def _why_impossible(self, adapter_set: Sequence[str]) -> ServeError | None:
        try:
            self.check_possible(adapter_set)
        except ServeError as error:
            return error
        return None

    @staticmethod
    def _named(version: Version, failure: ServeError) -> ServeError:
        """The failure of a version's load, for its requests."""
        if isinstance(failure, AdapterBroken) and version.names:
            return adapter_broken(min(version.names), failure.message)
        return failure

    def _check_not_broken(self, name: str) -> None:
        reason = self._publisher.broken.get(name)
        if reason is not None:
            raise adapter_broken(name, reason)

    def _info(self, name: str, record: NameRecord) -> AdapterInfo:
        failure = self._residency.versions[record.versions[0]].failure
        broken = failure.message if isinstance(failure, AdapterBroken) else None
        return AdapterInfo(name, record.pinned, [self._describe(digest) for digest in record.versions], broken)

    def _describe(self, digest: str) -> AdapterVersion:
        version = self._residency.versions[digest]
        return AdapterVersion(
            digest=digest,
            created=version.created,
            rank=version.summary.rank,
            modules=version.summary.modules,
            file_bytes=version.summary.file_bytes,
            memory_bytes=version.bytes,
            tiers=["disk", *version.tiers],
            leases=len(version.leases),
            last_used=self._last_used.get(digest),
            report=version.summary.report,
            vocab_size=version.summary.traits.vocabulary or None,
        )


def _if_successful(action: Callable[[], None], done: Done) -> Callable[[ServeError | None], None]:
    """A callback that goes on with an operation, or ends it with the error that it gets or that going on raises."""

    def callback(error: ServeError | None) -> None:
        try:
            if error is not None:
                raise error
            action()
        except ServeError as failure:
            done(failure)

    return callback


def _inspection(summary: Summary) -> Inspection:
    return Inspection(summary.digest, summary.rank, summary.modules, summary.file_bytes, summary.nbytes, summary.report)
