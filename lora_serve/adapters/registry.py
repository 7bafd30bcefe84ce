"""What the names of adapters refer to, and leases of requests on exact versions.

Used by the engine's loop alone, and never blocks: slow work is the `Publisher`'s and the `AdapterMemory`'s, whose
results are handled in `poll`. Requests and operations take effect in the order in which they arrive.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field

import msgspec

from lora_serve.adapters.aliases import alias_broken
from lora_serve.adapters.device_slots import DeviceSlots
from lora_serve.adapters.lowered_file import Summary
from lora_serve.adapters.memory import AdapterMemory
from lora_serve.adapters.publisher import Publisher
from lora_serve.adapters.residency import Residency, Version
from lora_serve.adapters.store.records import NameRecord
from lora_serve.adapters.traits import Traits
from lora_serve.adapters.workers import Workers
from lora_serve.errors import AdapterBroken, AdapterNotFound, ServeError
from lora_serve.messages import ResolvedAdapter, Stats
from lora_serve.names import adapter_broken, adapter_not_found
from lora_serve.request import AdapterUse, Routing

NO_ROUTING = Routing()


@dataclass(frozen=True)
class Lease:
    """A sequence's claim on one exact version, with the version's traits."""

    name: str
    digest: str
    weight: float
    traits: Traits = field(default_factory=Traits)
    number: int = 0
    settings_missing: bool = False  # it has settings, by which the request was not made


class Registry:
    """The adapters of one resident base.

    Attributes:
        memory: the adapters in host memory and on the device.

    Args:
        residency: the state of all adapters; changed by this class and `AdapterMemory` only.
        clock: seconds, for turns in a host memory that is too small.
    """

    def __init__(
        self,
        residency: Residency,
        device_slots: DeviceSlots,
        publisher: Publisher,
        workers: Workers,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.memory = AdapterMemory(residency, device_slots, publisher, workers, self._on_load_ended, clock)
        self._residency, self._publisher, self._workers = residency, publisher, workers
        self._impossible = False  # whether requests may have become impossible
        self._some_settings = False  # whether any version has had settings
        self._changes = time.time_ns()  # of names, counted from a number that no engine before has come to

    def __repr__(self) -> str:
        return f"<Registry {self._residency!r}>"

    # --- requests ------------------------------------------------------------------------------------------------

    def acquire(self, use: AdapterUse, routing: Routing = NO_ROUTING) -> Lease:
        """Lease the version that a request names, or that an alias gives it.

        Raises AdapterNotFound, BadRequest for an ambiguous version, AdapterBroken.
        """
        use, version = self._find(use, routing)
        if version.failure is not None:
            if version.leases:  # of requests that are being ended for it
                raise _named(version, version.failure)
            version.failure = None
        version.last_used = time.time()
        self.memory.record_use(version)
        number = self._residency.lease(version)
        settings_missing = version.summary.settings is not None and not use.settings_applied
        return Lease(use.name, version.digest, use.weight, version.summary.traits, number, settings_missing)

    def resolve(self, use: AdapterUse, routing: Routing = NO_ROUTING) -> ResolvedAdapter:
        """The version that `acquire` would lease, and its settings. Raises as that does."""
        use, version = self._find(use, routing)
        summary = version.summary
        return ResolvedAdapter(use.name, version.digest, summary.settings, summary.traits.vocabulary or None)

    def release(self, lease: Lease) -> None:
        """Release a lease; after the last one, free a version that is unnamed or marked for eviction."""
        version = self._residency.versions[lease.digest]
        self._residency.release(version, lease.number)
        self.free_if_unused(version)
        self.memory.changed |= self._residency.unmet

    def check_possible(self, digests: Sequence[str]) -> None:
        """Check that a request's leased adapters can be had together. Raises the ServeError that ends it."""
        for version in map(self._residency.versions.__getitem__, digests):
            if version.failure is not None:
                raise _named(version, version.failure)
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
        self.memory.take_turns()
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

    @property
    def sticky_headers(self) -> list[str]:
        """Lower-case names of the headers that aliases go by."""
        return self._residency.aliases.sticky_headers

    @property
    def settings_state(self) -> int:
        """Another number whenever what an adapter's name stands for changes; 0 while no version has had settings."""
        return self._changes if self._some_settings else 0

    def bytes(self, digest: str) -> int:
        """Size of a version in memory."""
        return self._residency.versions[digest].bytes

    def fill_stats(self, stats: Stats) -> None:
        """Fill in the statistics of adapters."""
        residency = self._residency
        stats.resident = residency.current_names(residency.device)
        stats.versions_resident = len(residency.device)
        stats.resident_in_host = residency.current_names(residency.host)
        stats.pinned = residency.current_names(residency.versions[digest] for digest in residency.pinned)
        stats.adapters = sum(not record.unlisted for record in self._residency.names.values())
        stats.sticky_headers = self.sticky_headers
        stats.settings_state = self.settings_state
        self.memory.fill_stats(stats)

    # --- changes of names, by operations and at start ------------------------------------------------------------

    def add_version(self, summary: Summary, created: float) -> None:
        """Add a stored version, to which a name is about to refer."""
        known = self._residency.versions.get(summary.digest)
        if summary.settings is not None:
            self._some_settings = True
        if known is None:
            self._residency.versions[summary.digest] = Version(summary, created)
        else:
            known.summary, known.failure = summary, None  # perhaps with another report, perhaps repaired

    def set_name(self, name: str, record: NameRecord | None) -> None:
        """Let a name refer to a record's versions, or to nothing; free versions that nothing refers to any more."""
        before = self._residency.names.get(name)
        self._changes += 1
        self._residency.apply(name, record)
        for digest in () if before is None else before.versions:
            self.free_if_unused(self._residency.versions[digest])
        self.memory.changed = self._impossible = True

    def change_name(self, name: str, **changes: bool) -> None:
        """Change fields of what is recorded of a name."""
        self.set_name(name, msgspec.structs.replace(self._residency.names[name], **changes))

    def save_name(self, name: str, done: Callable[[ServeError | None], None], **changes: bool) -> None:
        """Change fields of what is recorded of a name, here and in the store; if the store fails, not at all."""
        record = self._residency.names.get(name)
        if record is None:
            raise adapter_not_found(name)
        before = {field: getattr(record, field) for field in changes}
        self.change_name(name, **changes)

        def on_saved(error: ServeError | None) -> None:
            if error is not None and name in self._residency.names:
                self.change_name(name, **before)
            done(error)

        self._publisher.save(name, self._residency.stored(name, self._residency.names[name]), on_saved)

    def free_if_unused(self, version: Version) -> None:
        """Free an unused version: its memory if it is to be evicted, and its files too if no name refers to it."""
        if version.leases or self.memory.is_coming(version) or version.digest not in self._residency.versions:
            return  # `release`, or the end of the load, calls this again
        garbage = not version.names
        if version.evict_when_unused or garbage:
            version.evict_when_unused = False
            self.memory.evict(version)
        if garbage:
            del self._residency.versions[version.digest]
            self._publisher.drop(version.digest)

    # --- parts of these ------------------------------------------------------------------------------------------

    def _find(self, use: AdapterUse, routing: Routing) -> tuple[AdapterUse, Version]:
        """The adapter and version that a request gets, also where it names an alias."""
        alias = use.name
        if alias not in self._residency.names:
            use = self._residency.aliases.resolve(use, routing)
        self._publisher.check_not_broken(use.name)
        try:
            return use, self._residency.find(use)
        except AdapterNotFound as error:
            raise alias_broken(alias, error.message) if alias != use.name else error from None

    def _on_load_ended(self, version: Version) -> None:
        self._impossible |= version.failure is not None
        self.free_if_unused(version)

    def _why_impossible(self, adapter_set: Sequence[str]) -> ServeError | None:
        try:
            self.check_possible(adapter_set)
        except ServeError as error:
            return error
        return None


def _named(version: Version, failure: ServeError) -> ServeError:
    """The failure of a version's load, for its requests."""
    if isinstance(failure, AdapterBroken) and version.names:
        return adapter_broken(min(version.names), failure.message)
    return failure
