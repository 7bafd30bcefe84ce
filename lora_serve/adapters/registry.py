"""The engine's one door to adapters: names become leases on exact versions, which move between disk, host and device.

Everything here belongs to the engine's loop and never waits; slow work goes to the `Loader`, whose results arrive in
`poll`. Because one thread owns names and leases, "publish, then ask" and "ask, then delete" mean what their order says.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_serve.adapters.adapter import Adapter, BaseShape, flatten
from lora_serve.adapters.bank import Bank, vacate
from lora_serve.adapters.cache import Cache
from lora_serve.adapters.checkpoint import read
from lora_serve.adapters.digest import check_name
from lora_serve.adapters.formats.registry import lower
from lora_serve.adapters.loader import Loader
from lora_serve.adapters.publisher import Published, Publisher
from lora_serve.adapters.store import Meta, Record, Store
from lora_serve.errors import (
    AdapterBusy,
    AdapterExists,
    AdapterNotFound,
    BadRequest,
    EngineFault,
    ServeError,
)
from lora_serve.messages import AdapterInfo, AdapterVersion, Publish, Stats
from lora_serve.request import AdapterUse

Done = Callable[[Any], None]


@dataclass(frozen=True)
class Lease:
    """A sequence's claim on one exact version."""

    name: str
    digest: str
    weight: float


@dataclass(frozen=True)
class Ready:
    """In memory: it can be seated at once."""


@dataclass(frozen=True)
class Loading:
    """On its way, or not asked for yet."""


@dataclass(frozen=True)
class Failed:
    """The load that was asked for last did not succeed."""

    error: ServeError


class Registry:
    """Adapters of one resident base.

    Args:
        wake: called from other threads when `poll` has something to do.
        max_bytes: largest weights file.
    """

    def __init__(
        self,
        store: Store,
        cache: Cache,
        bank: Bank,
        base: BaseShape,
        dtype: torch.dtype,
        wake: Callable[[], None],
        *,
        max_bytes: int,
    ) -> None:
        self._store, self._cache, self._bank, self._base = store, cache, bank, base
        self._dtype, self._max_bytes = dtype, max_bytes
        self._publisher = Publisher(store, base, max_bytes=max_bytes, most_elements=cache.capacity // dtype.itemsize)
        self._loader = Loader(wake)
        self._names: dict[str, Record] = dict(store.names())
        self._meta: dict[str, Meta] = {record.digest: store.meta(record.digest) for record in self._names.values()}
        self._old: dict[str, list[str]] = {}  # name → earlier versions that are still leased
        self._leases: Counter[str] = Counter()
        self._used: dict[str, float] = {}
        self._loading: dict[str, list[Done]] = {}
        self._failed: dict[str, ServeError] = {}
        self._pins: set[str] = set()  # names
        self._evicting: set[str] = set()  # digests to be evicted when their last lease is released
        self._hits: Counter[str] = Counter(host=0, device=0)
        self._misses: Counter[str] = Counter(host=0, device=0)
        self._loads: Counter[str] = Counter(host=0, device=0)
        self._seconds: dict[str, float] = {"host": 0.0, "device": 0.0}

    def __repr__(self) -> str:
        return f"<Registry {len(self._names)} names, {self._leases.total()} leases, {self._cache!r}, {self._bank!r}>"

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
            raise unknown(use.name if use.version is None else f"{use.name}@{use.version}")
        digest = digests[0]
        if not self._leases[digest]:
            self._failed.pop(digest, None)  # everyone who waited for that load has been told; try again
        self._leases[digest] += 1
        self._used[digest] = time.time()
        for tier, there in (("device", self._bank.slot(digest) is not None), ("host", digest in self._cache)):
            (self._hits if there else self._misses)[tier] += 1
            if there:
                break
        return Lease(use.name, digest, use.weight)

    def release(self, lease: Lease) -> None:
        """Give a claim back. With the last one goes what was only kept for it."""
        self._leases[lease.digest] -= 1
        if self._leases[lease.digest]:
            return
        del self._leases[lease.digest]
        for name, digests in list(self._old.items()):
            self._old[name] = [digest for digest in digests if digest != lease.digest]
            if not self._old[name]:
                del self._old[name]
        self._tidy(lease.digest)

    def state(self, digest: str) -> Ready | Loading | Failed:
        """How far a leased version is."""
        if digest in self._failed:
            return Failed(self._failed[digest])
        return Ready() if self._is_in_memory(digest) else Loading()

    def want(self, digest: str) -> None:
        """Have a version brought into host memory, unless it is there or on its way."""
        if digest not in self._loading and not self._is_in_memory(digest):
            self._fetch(digest, [])

    def seat(self, digests: Sequence[str]) -> dict[str, int]:
        """A slot for each of these; they are in memory, and no more than there are slots beside the pinned ones."""
        started = time.perf_counter()
        keep = {*digests, *self.pinned}
        slots: dict[str, int] = {}
        for digest in digests:
            slot = self._bank.slot(digest)
            if slot is None:
                if not self._bank.free:
                    for gone in vacate(self._bank.seated, 1, keep) or []:
                        self._bank.evict(gone)
                adapter = self._cache.get(digest)
                if adapter is None or not self._bank.free:
                    raise EngineFault("an adapter was scheduled that cannot be seated")
                slot = self._bank.load(adapter)
                self._loads["device"] += 1
                self._seconds["device"] += time.perf_counter() - started
            slots[digest] = slot
        return slots

    @property
    def pinned(self) -> Set[str]:
        """Versions on the device that never leave it."""
        return {digest for name in self._pins if self._bank.holds(digest := self._names[name].digest)}

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

        def arrived(error: ServeError | None) -> None:
            if error is None and name in self._names:
                self._warm(digest)
            done(error or (self.describe(name) if name in self._names else unknown(name)))

        if self._is_in_memory(digest):
            arrived(None)
        elif digest in self._loading:
            self._loading[digest].append(arrived)
        else:
            self._fetch(digest, [arrived])

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
        if len(self._pins | {name}) >= self._bank.slots:
            raise AdapterBusy(f"pinning {name} would leave no slot for other adapters", param="name")
        self._pins.add(name)
        self.load(name, done)

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
        by_digest = {record.digest: name for name, record in self._names.items()}
        stats.resident = sorted(by_digest[digest] for digest in self._bank.seated if digest in by_digest)
        stats.adapters = len(self._names)
        stats.adapter_slots = self._bank.slots
        stats.bytes = {"host": self._cache.bytes, "device": self._bank.bytes}
        stats.evictions_total = {"host": self._cache.evictions, "device": self._bank.evictions}
        stats.cache_hits_total = dict(self._hits)
        stats.cache_misses_total = dict(self._misses)
        stats.loads_total = dict(self._loads)
        stats.load_seconds_total = dict(self._seconds)

    # --- inside --------------------------------------------------------------------------------------------------

    def _record(self, name: str) -> Record:
        if name not in self._names:
            raise unknown(name)
        return self._names[name]

    def _is_in_memory(self, digest: str) -> bool:
        return digest in self._cache or self._bank.holds(digest)

    def _take(self, published: Published) -> None:
        """A publish succeeded: the name means the new version from now on."""
        before = self._names.get(published.name)
        self._names[published.name] = published.record
        self._meta[published.record.digest] = published.meta
        if before is not None and before.digest != published.record.digest:
            if self._leases[before.digest]:
                self._old.setdefault(published.name, []).insert(0, before.digest)
            self._tidy(before.digest)

    def _tidy(self, digest: str) -> None:
        """Free what nobody uses: memory of a version that is to be evicted, everything of one without a name."""
        if self._leases[digest]:
            return
        named = any(record.digest == digest for record in self._names.values())
        if named and digest not in self._evicting:
            return
        self._evicting.discard(digest)
        self._bank.evict(digest)
        self._cache.evict(digest)
        if not named:
            self._meta.pop(digest, None)
            self._used.pop(digest, None)
            self._loader.publish(lambda: self._publisher.drop(digest), lambda result: None)

    def _fetch(self, digest: str, waiters: list[Done]) -> None:
        self._failed.pop(digest, None)
        self._loading[digest] = waiters
        folder = self._store.folder(digest)

        def work() -> tuple[Adapter, float]:
            started = time.perf_counter()
            lowered = lower(read(folder, max_bytes=self._max_bytes), self._base)
            return flatten(digest, lowered, self._dtype), time.perf_counter() - started

        def arrived(result: tuple[Adapter, float] | ServeError) -> None:
            failure = result if isinstance(result, ServeError) else self._keep(*result)
            if failure is not None:
                self._failed[digest] = failure
            for waiter in self._loading.pop(digest):
                waiter(failure)

        self._loader.load(work, arrived)

    def _keep(self, adapter: Adapter, seconds: float) -> ServeError | None:
        """Put a loaded adapter into the cache, unless it was deleted meanwhile; the error if it does not fit."""
        self._loads["host"] += 1
        self._seconds["host"] += seconds
        if adapter.digest not in self._meta:
            return AdapterNotFound("the adapter was deleted while it was loaded", param="adapter")
        pinned = {self._names[name].digest for name in self._pins}
        try:
            self._cache.put(adapter, pinned.__contains__)
        except ServeError as error:
            return error
        return None

    def _warm(self, digest: str) -> None:
        """Seat an adapter ahead of its use, if that takes nobody's seat who is in use."""
        if self._bank.holds(digest):
            return
        keep = {seated for seated in self._bank.seated if self._leases[seated]} | self.pinned
        if self._bank.free or vacate(self._bank.seated, 1, keep):
            self.seat([digest, *(seated for seated in self._bank.seated if seated in keep)])

    def _version(self, digest: str) -> AdapterVersion:
        meta = self._meta[digest]
        tiers = ["disk"]
        if digest in self._cache:
            tiers.append("host")
        if self._bank.holds(digest):
            tiers.append("device")
        return AdapterVersion(
            digest=digest,
            created=meta.created,
            rank=meta.rank,
            modules=meta.modules,
            file_bytes=meta.file_bytes,
            memory_bytes=meta.elements * self._dtype.itemsize,
            tiers=tiers,
            leases=self._leases[digest],
            last_used=self._used.get(digest),
            report=meta.report,
        )


def unknown(name: str) -> AdapterNotFound:
    """The one answer about adapters that are not there, or not for this caller."""
    return AdapterNotFound(f"adapter {name[:100]} does not exist", param="adapter")
