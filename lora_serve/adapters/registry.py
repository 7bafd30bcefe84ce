"""The engine's one door to adapters: names become leases on exact versions, which move between disk, host and device.

Everything here belongs to the engine's loop and never waits; slow work goes to the `Loader`, whose results arrive in
`poll`. Because one thread owns names and leases, "publish, then ask" and "ask, then delete" mean what their order says.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_serve.adapters.adapter import ALIGNMENT, Adapter, BaseShape, flatten
from lora_serve.adapters.checkpoint import read
from lora_serve.adapters.device_slots import DeviceSlots
from lora_serve.adapters.formats.dispatch import lower
from lora_serve.adapters.host_cache import HostCache
from lora_serve.adapters.loader import Loader
from lora_serve.adapters.memory import InMemory, LoadFailed, Loading, Memory
from lora_serve.adapters.publisher import Published, Publisher
from lora_serve.adapters.store import Meta, Record, Store
from lora_serve.adapters.traits import Traits, traits
from lora_serve.errors import (
    AdapterBusy,
    AdapterExists,
    AdapterInvalid,
    BadRequest,
    EngineFault,
    ServeError,
)
from lora_serve.messages import AdapterInfo, AdapterVersion, Inspect, Inspection, Publish, Stats
from lora_serve.names import adapter_not_found, check_name
from lora_serve.request import AdapterUse

__all__ = ["InMemory", "Lease", "LoadFailed", "Loading", "Registry"]  # `state` answers with the first ones

Done = Callable[[Any], None]
ROUNDING = 8 * ALIGNMENT  # bytes a module: more than aligning all of its tensors takes


@dataclass(frozen=True)
class Lease:
    """A sequence's claim on one exact version, what that does to sequences, and the bytes it takes on the device."""

    name: str
    digest: str
    weight: float
    traits: Traits = field(default_factory=Traits)
    bytes: int = 0


class Registry:
    """Adapters of one resident base.

    Args:
        wake: called from other threads when `poll` has something to do.
        max_bytes: largest weights file.
    """

    def __init__(
        self,
        store: Store,
        cache: HostCache,
        device_slots: DeviceSlots,
        base: BaseShape,
        dtype: torch.dtype,
        wake: Callable[[], None],
        *,
        max_bytes: int,
    ) -> None:
        self._store, self._base = store, base
        self._dtype, self._max_bytes = dtype, max_bytes
        self._publisher = Publisher(store, base, max_bytes=max_bytes, most_elements=cache.capacity // dtype.itemsize)
        self._loader = Loader(wake)
        self._memory = Memory(cache, device_slots, self._loader, self._fetch, self, self._tidy)
        self._pins_at_most = device_slots.slots - 1  # one slot is left for everyone else,
        self._pinned_bytes = (
            None if device_slots.capacity is None else device_slots.capacity // 2
        )  # and half of the memory
        self._names: dict[str, Record] = dict(store.names())
        self._meta: dict[str, Meta] = {record.digest: store.meta(record.digest) for record in self._names.values()}
        self._old: dict[str, list[str]] = {}  # name → earlier versions that are still leased
        self._leases: Counter[str] = Counter()  # digest → claims; in the order in which they were first taken
        self._used: dict[str, float] = {}
        self._pins: set[str] = set()  # names
        self._evicting: set[str] = set()  # digests to be evicted when their last lease is released

    def __repr__(self) -> str:
        return f"<Registry {len(self._names)} names, {self._leases.total()} leases, {self._memory!r}>"

    # --- requests ------------------------------------------------------------------------------------------------

    def acquire(self, use: AdapterUse) -> Lease:
        """Claim the version that a request names. Raises AdapterNotFound, or BadRequest for an ambiguous version."""
        record = self._names.get(use.name)
        digests = [] if record is None else [record.digest, *self._old.get(use.name, [])]
        if use.version is not None:
            digests = [digest for digest in digests if digest.startswith(use.version)]
            if len(digests) > 1:
                raise BadRequest(f"{use.version} names more than one version of {use.name}", param="adapter")
        if not digests:
            raise adapter_not_found(use.name if use.version is None else f"{use.name}@{use.version}")
        digest = digests[0]
        self._leases[digest] += 1
        self._used[digest] = time.time()
        self._memory.touch(digest)
        return Lease(use.name, digest, use.weight, self._meta[digest].traits, self.bytes(digest))

    def release(self, lease: Lease) -> None:
        """Give a claim back. With the last one goes what was only kept for it."""
        self._leases[lease.digest] -= 1
        if self._leases[lease.digest]:
            return
        del self._leases[lease.digest]
        self._memory.forget_failure(lease.digest)
        for name, digests in list(self._old.items()):
            self._old[name] = [digest for digest in digests if digest != lease.digest]
            if not self._old[name]:
                del self._old[name]
        self._tidy(lease.digest)

    def state(self, digest: str) -> InMemory | Loading | LoadFailed:
        """How far a leased version is."""
        return self._memory.state(digest)

    def want(self, digest: str) -> None:
        """Have a version brought into host memory, unless it is there or on its way."""
        self._memory.want(digest)

    def assign_slots(self, digests: Sequence[str]) -> dict[str, int]:
        """A slot for each of these; they are in memory, and no more than there are slots beside the pinned ones."""
        return self._memory.assign_slots(digests)

    def bytes(self, digest: str) -> int:
        """What a version takes in memory, alignment too: no less, and hardly more."""
        meta = self._meta[digest]
        return meta.bytes(self._dtype.itemsize) + ROUNDING * meta.modules

    def copied(self, digests: Iterable[str]) -> bool:
        """Whether seated versions can be used without waiting for them to arrive on the device."""
        return self._memory.copied(digests)

    def wait_for_copies(self, digests: Sequence[str]) -> None:
        """Have the next step wait for seated versions."""
        self._memory.wait_for_copies(digests)

    @property
    def leased(self) -> Sequence[str]:
        """Versions that sequences hold, the one held longest first."""
        return list(self._leases)

    @property
    def kept(self) -> Set[str]:
        """Versions that never leave memory by LRU, whether or not they are there yet."""
        return {self._names[name].digest for name in self._pins}

    @property
    def pinned(self) -> Set[str]:
        """Versions on the device that never leave it."""
        return self.kept & set(self._memory.resident)

    def poll(self) -> bool:
        """Take in what the threads finished; whether there was anything."""
        return self._loader.poll()

    def close(self) -> None:
        self._loader.close()
        self._store.close()

    # --- operations ----------------------------------------------------------------------------------------------

    def publish(self, operation: Publish, done: Done) -> None:
        """Check and store a folder as a version of a name; `done` gets `AdapterInfo` or the error."""
        name = check_name(operation.name)
        if name in self._names and not operation.replace:
            raise AdapterExists(f"adapter {name} exists; PUT publishes a new version of it", param="name")

        def work() -> Published:
            return self._publisher.publish(name, Path(operation.folder), replace=operation.replace)

        def stored(result: Published | ServeError) -> None:
            if isinstance(result, ServeError):
                done(result)
                return
            self._take(result)
            done(self.describe(name))

        self._loader.publish(work, stored)

    def inspect(self, operation: Inspect, done: Done) -> None:
        """Check a folder as publishing would, and keep nothing; `done` gets an `Inspection` or the error."""

        def checked(result: tuple[str, Meta] | ServeError) -> None:
            done(result if isinstance(result, ServeError) else self._inspection(*result))

        self._loader.publish(lambda: self._publisher.inspect(Path(operation.folder)), checked)

    def publish_folder(self, folder: Path) -> list[tuple[str, ServeError]]:
        """At start: publish every PEFT folder in `folder` under its own name, unless unchanged. Returns what failed."""
        failed: list[tuple[str, ServeError]] = []
        for path in sorted(folder.iterdir()):
            if not (path / "adapter_config.json").exists():
                continue
            try:
                published = self._publisher.publish_unchanged(check_name(path.name), path, self._names.get(path.name))
                if published is not None:
                    self._take(published)
            except ServeError as error:
                failed.append((path.name, error))
            except Exception as error:  # a fault of ours or the disk's keeps no other adapter from being served
                failed.append((path.name, EngineFault(f"it could not be read or stored ({type(error).__name__})")))
        self.poll()
        return failed

    def describe_all(self) -> list[AdapterInfo]:
        return [self.describe(name) for name in sorted(self._names)]

    def describe(self, name: str) -> AdapterInfo:
        record = self._record(name)
        versions = [self._version(digest) for digest in (record.digest, *self._old.get(name, []))]
        return AdapterInfo(name, name in self._pins, versions)

    def load(self, name: str, done: Done) -> None:
        """Bring the newest version into memory, and onto the device if a slot is free."""
        digest = self._record(name).digest
        self._evicting.discard(digest)

        def copied(error: ServeError | None) -> None:
            if error is None and name in self._names:
                self._memory.warm(digest)
            done(error or (self.describe(name) if name in self._names else adapter_not_found(name)))

        self._memory.want(digest, copied)

    def evict(self, name: str, done: Done) -> None:
        """Out of host and device memory: now, or when the last request that uses it ends."""
        digest = self._record(name).digest
        if name in self._pins:
            raise AdapterBusy(f"adapter {name} is pinned; unpin it first", param="name")
        self._evicting.add(digest)
        self._tidy(digest)
        done(self.describe(name))

    def pin(self, name: str, pinned: bool, done: Done) -> None:
        """Load and never evict; or let go again."""
        self._record(name)
        if not pinned:
            self._pins.discard(name)
            done(self.describe(name))
            return
        if len(self._pins | {name}) > self._pins_at_most:
            raise AdapterBusy(f"pinning {name} would leave no slot for other adapters", param="name")
        digests = {self._names[pin].digest for pin in self._pins | {name}}
        if self._pinned_bytes is not None and sum(map(self.bytes, digests)) > self._pinned_bytes:
            raise AdapterBusy(
                f"pinning {name} would take more than {self._pinned_bytes} bytes, which is half of the device's memory "
                "for adapters",
                param="name",
            )
        self._pins.add(name)

        def held(result: AdapterInfo | ServeError) -> None:
            if isinstance(result, ServeError):
                self._pins.discard(name)
            done(result)

        self.load(name, held)

    def delete(self, name: str, done: Done) -> None:
        """Unlist at once; what it was disappears with its last lease."""
        info = self.describe(name)
        digest = self._names.pop(name).digest
        self._pins.discard(name)
        self._old.pop(name, None)

        def unlisted(result: ServeError | None) -> None:
            self._tidy(digest)
            done(result or info)

        self._loader.publish(lambda: self._publisher.unpublish(name), unlisted)

    def fill(self, stats: Stats) -> None:
        """Write the adapters' share of the numbers."""
        names = {record.digest: name for name, record in self._names.items()}
        stats.resident = sorted(names[digest] for digest in self._memory.resident if digest in names)
        stats.adapters = len(self._names)
        self._memory.fill(stats)

    # --- inside --------------------------------------------------------------------------------------------------

    def _record(self, name: str) -> Record:
        if name not in self._names:
            raise adapter_not_found(name)
        return self._names[name]

    def _take(self, published: Published) -> None:
        """A publish succeeded: the name means the new version from now on."""
        before = self._names.get(published.name)
        self._names[published.name] = published.record
        self._meta[published.record.digest] = published.meta
        if before is None or before.digest == published.record.digest:
            return
        older = [digest for digest in self._old.get(published.name, []) if digest != published.record.digest]
        self._old[published.name] = [digest for digest in (before.digest, *older) if self._leases[digest]]
        self._tidy(before.digest)
        if published.name in self._pins:
            self.load(published.name, lambda result: None)

    def _tidy(self, digest: str) -> None:
        """Free what nobody uses: memory of a version that is to be evicted, everything of one without a name."""
        if self._leases[digest] or self._memory.is_loading(digest):
            return  # `release`, or the end of the load, comes back here
        named = any(record.digest == digest for record in self._names.values())
        if named and digest not in self._evicting:
            return
        self._evicting.discard(digest)
        self._memory.evict(digest)
        if not named:
            self._meta.pop(digest, None)
            self._used.pop(digest, None)
            self._loader.publish(lambda: self._publisher.drop(digest), lambda result: None)

    def _fetch(self, digest: str) -> Adapter:
        """From disk to the flat form; in the reading thread."""
        lowered = lower(read(self._store.folder(digest), max_bytes=self._max_bytes), self._base)
        if traits(lowered, self._base) != self._store.meta(digest).traits:
            raise AdapterInvalid("the base was loaded in another form when the adapter was published; publish it again")
        return flatten(digest, lowered, self._dtype)

    def _inspection(self, digest: str, meta: Meta) -> Inspection:
        memory = meta.bytes(self._dtype.itemsize)
        return Inspection(digest, meta.rank, meta.modules, meta.file_bytes, memory, meta.report)

    def _version(self, digest: str) -> AdapterVersion:
        meta = self._meta[digest]
        return AdapterVersion(
            digest=digest,
            created=meta.created,
            rank=meta.rank,
            modules=meta.modules,
            file_bytes=meta.file_bytes,
            memory_bytes=meta.bytes(self._dtype.itemsize),
            tiers=["disk", *self._memory.tiers(digest)],
            leases=self._leases[digest],
            last_used=self._used.get(digest),
            report=meta.report,
        )
