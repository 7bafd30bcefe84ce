"""The engine's interface to adapters: names, leases on exact versions, pins, and the admin operations on them.

Used by the engine's loop alone, and never blocks: slow work goes to the `Loader`, whose results are handled in `poll`.
Since one thread owns names and leases, requests and operations take effect in the order in which they arrive.
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
from lora_serve.adapters.memory import AdapterMemory, InMemory, LoadFailed, Loading
from lora_serve.adapters.publisher import PublishedVersion, Publisher
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

__all__ = ["InMemory", "Lease", "LoadFailed", "Loading", "Registry"]  # the classes are what `state` returns

Done = Callable[[Any], None]
MAX_ALIGNMENT = 8 * ALIGNMENT  # bytes per module: an upper bound of what aligning its tensors takes


@dataclass(frozen=True)
class Lease:
    """A sequence's claim on one exact version, with the version's traits and its size in bytes on the device."""

    name: str
    digest: str
    weight: float
    traits: Traits = field(default_factory=Traits)
    bytes: int = 0


class Registry:
    """The adapters of one resident base.

    Args:
        wake: called from other threads when `poll` has work to do.
        max_bytes: largest weights file.
        base_name: name of the base in the API, which no adapter may have.
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
        base_name: str = "",
    ) -> None:
        self._store, self._base, self._base_name = store, base, base_name
        self._dtype, self._max_bytes = dtype, max_bytes
        self._publisher = Publisher(store, base, max_bytes=max_bytes, most_elements=cache.capacity // dtype.itemsize)
        self._loader = Loader(wake)
        self._memory = AdapterMemory(cache, device_slots, self._loader, self._fetch, self, self._free_if_unused)
        self._max_pins = device_slots.slots - 1  # one slot is left for everyone else,
        self._max_pinned_bytes = (
            None if device_slots.capacity is None else device_slots.capacity // 2
        )  # and half of the memory
        self._names: dict[str, Record] = dict(store.names())
        self._unlisted: set[str] = set()  # of them, those that were unloaded
        self._meta: dict[str, Meta] = {record.digest: store.meta(record.digest) for record in self._names.values()}
        self._older_versions: dict[str, list[str]] = {}  # name → earlier versions that are still leased
        self._leases: Counter[str] = Counter()  # digest → number of leases, oldest first
        self._last_used: dict[str, float] = {}
        self._pins: set[str] = set()  # names
        self._evicting: set[str] = set()  # digests to be evicted when their last lease is released

    def __repr__(self) -> str:
        return f"<Registry {len(self._names)} names, {self._leases.total()} leases, {self._memory!r}>"

    # --- requests ------------------------------------------------------------------------------------------------

    def acquire(self, use: AdapterUse) -> Lease:
        """Lease the version that a request names. Raises AdapterNotFound, or BadRequest for an ambiguous version."""
        record = None if use.name in self._unlisted else self._names.get(use.name)
        digests = [] if record is None else [record.digest, *self._older_versions.get(use.name, [])]
        if use.version is not None:
            digests = [digest for digest in digests if digest.startswith(use.version)]
            if len(digests) > 1:
                raise BadRequest(f"{use.version} names more than one version of {use.name}", param="adapter")
        if not digests:
            raise adapter_not_found(use.name if use.version is None else f"{use.name}@{use.version}")
        digest = digests[0]
        self._leases[digest] += 1
        self._last_used[digest] = time.time()
        self._memory.record_use(digest)
        return Lease(use.name, digest, use.weight, self._meta[digest].traits, self.bytes(digest))

    def release(self, lease: Lease) -> None:
        """Release a lease; after the last one, free a version that is unnamed or marked for eviction."""
        self._leases[lease.digest] -= 1
        if self._leases[lease.digest]:
            return
        del self._leases[lease.digest]
        self._memory.forget_failure(lease.digest)
        for name, digests in list(self._older_versions.items()):
            self._older_versions[name] = [digest for digest in digests if digest != lease.digest]
            if not self._older_versions[name]:
                del self._older_versions[name]
        self._free_if_unused(lease.digest)

    def state(self, digest: str) -> InMemory | Loading | LoadFailed:
        """Whether a leased version is in memory, loading, or failed to load."""
        return self._memory.state(digest)

    def request_load(self, digest: str) -> None:
        """Load a version into host memory, unless it is in memory or loading."""
        self._memory.request_load(digest)

    def assign_slots(self, digests: Sequence[str]) -> dict[str, int]:
        """Slots of these versions, assigned where needed. All are in memory, and they fit beside the pinned ones."""
        return self._memory.assign_slots(digests)

    def bytes(self, digest: str) -> int:
        """Size of a version in memory: an upper bound that includes alignment."""
        meta = self._meta[digest]
        return meta.bytes(self._dtype.itemsize) + MAX_ALIGNMENT * meta.modules

    def copied(self, digests: Iterable[str]) -> bool:
        """Whether the host-to-device copies are complete."""
        return self._memory.copied(digests)

    def wait_for_copies(self, digests: Sequence[str]) -> None:
        """Make the next step wait for the copies of resident versions."""
        self._memory.wait_for_copies(digests)

    @property
    def leased(self) -> Sequence[str]:
        """Digests leased by sequences, oldest lease first."""
        return list(self._leases)

    @property
    def unevictable(self) -> Set[str]:
        """Digests of pinned versions, which LRU never evicts, whether or not they are in memory yet."""
        return {self._names[name].digest for name in self._pins}

    @property
    def pinned(self) -> Set[str]:
        """Digests of pinned versions that are on the device."""
        return self.unevictable & set(self._memory.resident)

    def poll(self) -> bool:
        """Handle the results of finished loads and publishes; returns whether there were any."""
        return self._loader.poll()

    def close(self) -> None:
        self._loader.close()
        self._store.close()

    # --- operations ----------------------------------------------------------------------------------------------

    def publish(self, operation: Publish, done: Done) -> None:
        """Check and store a folder as a version of a name; `done` gets `AdapterInfo` or the error."""
        name = self._check_adapter_name(operation.name)
        replace = operation.replace or name in self._unlisted
        if name in self._names and not replace:
            raise AdapterExists(f"adapter {name} exists; PUT publishes a new version of it", param="name")

        def work() -> PublishedVersion:
            return self._publisher.publish(name, Path(operation.folder), replace=replace, source=operation.source)

        def on_published(result: PublishedVersion | ServeError) -> None:
            if isinstance(result, ServeError):
                done(result)
                return
            self._apply_published(result)
            done(self.describe(name))

        self._loader.publish(work, on_published)

    def inspect(self, operation: Inspect, done: Done) -> None:
        """Check a folder as `publish` does, without storing it; `done` gets an `Inspection` or the error."""

        def on_inspected(result: tuple[str, Meta] | ServeError) -> None:
            done(result if isinstance(result, ServeError) else self._inspection(*result))

        self._loader.publish(lambda: self._publisher.inspect(Path(operation.folder)), on_inspected)

    def publish_folder(self, folder: Path) -> list[tuple[str, ServeError]]:
        """At start: publish every PEFT folder in `folder` under its own name, unless unchanged. Returns what failed."""
        failed: list[tuple[str, ServeError]] = []
        for path in sorted(folder.iterdir()):
            if not (path / "adapter_config.json").exists():
                continue
            try:
                published = self._publisher.publish_unchanged(
                    self._check_adapter_name(path.name), path, self._names.get(path.name)
                )
                if published is not None:
                    self._apply_published(published)
            except ServeError as error:
                failed.append((path.name, error))
            except Exception as error:  # a bug or a disk fault must not keep other adapters from being served
                failed.append((path.name, EngineFault(f"it could not be read or stored ({type(error).__name__})")))
        self.poll()
        return failed

    def describe_all(self) -> list[AdapterInfo]:
        return [self.describe(name) for name in sorted(self._names.keys() - self._unlisted)]

    def describe(self, name: str) -> AdapterInfo:
        record = self._record(name)
        versions = [self._version(digest) for digest in (record.digest, *self._older_versions.get(name, []))]
        return AdapterInfo(name, name in self._pins, versions)

    def load(self, name: str, done: Done) -> None:
        """Load the newest version into host memory, and onto the device if a slot is free."""
        self._unlisted.discard(name)
        digest = self._record(name).digest
        self._evicting.discard(digest)

        def on_finished(error: ServeError | None) -> None:
            if error is None and name in self._names:
                self._memory.prefetch(digest)
            done(error or (self.describe(name) if name in self._names else adapter_not_found(name)))

        self._memory.request_load(digest, on_finished)

    def evict(self, name: str, done: Done) -> None:
        """Free the newest version's host and device memory: now, or when its last lease is released."""
        digest = self._record(name).digest
        if name in self._pins:
            raise AdapterBusy(f"adapter {name} is pinned; unpin it first", param="name")
        self._evicting.add(digest)
        self._free_if_unused(digest)
        done(self.describe(name))

    def pin(self, name: str, pinned: bool, done: Done) -> None:
        """Pin an adapter (load it and never evict it), or unpin it."""
        self._record(name)
        if not pinned:
            self._pins.discard(name)
            done(self.describe(name))
            return
        if len(self._pins | {name}) > self._max_pins:
            raise AdapterBusy(f"pinning {name} would leave no slot for other adapters", param="name")
        digests = {self._names[pin].digest for pin in self._pins | {name}}
        if self._max_pinned_bytes is not None and sum(map(self.bytes, digests)) > self._max_pinned_bytes:
            raise AdapterBusy(
                f"pinning {name} would take more than {self._max_pinned_bytes} bytes, "
                "which is half of the device's memory for adapters",
                param="name",
            )
        self._pins.add(name)

        def on_loaded(result: AdapterInfo | ServeError) -> None:
            if isinstance(result, ServeError):
                self._pins.discard(name)
            done(result)

        self.load(name, on_loaded)

    def delete(self, name: str, done: Done) -> None:
        """Unlist an adapter at once; its memory and files are freed when its last lease is released."""
        self._unlisted.discard(name)
        info = self.describe(name)
        digest = self._names.pop(name).digest
        self._pins.discard(name)
        self._older_versions.pop(name, None)

        def on_unpublished(result: ServeError | None) -> None:
            self._free_if_unused(digest)
            done(result or info)

        self._loader.publish(lambda: self._publisher.unpublish(name), on_unpublished)

    def unload(self, name: str, done: Done) -> None:
        """Evict and unlist an adapter, until it is loaded or published again; delete it if it is a folder's copy."""
        record = self._record(name)
        if record.source:
            self.delete(name, done)
            return
        info = self.describe(name)
        self._pins.discard(name)
        self._unlisted.add(name)
        self._evicting.add(record.digest)
        self._free_if_unused(record.digest)
        done(info)

    def fill_stats(self, stats: Stats) -> None:
        """Fill in the statistics of adapters."""
        names = {record.digest: name for name, record in self._names.items()}
        stats.resident = sorted(names[digest] for digest in self._memory.resident if digest in names)
        stats.adapters = len(self._names) - len(self._unlisted)
        self._memory.fill_stats(stats)

    # --- internals -----------------------------------------------------------------------------------------------

    def _check_adapter_name(self, name: str) -> str:
        """Return `name` if an adapter may have it. Raises BadRequest, AdapterExists."""
        if name == self._base_name:
            raise AdapterExists(f"{name} is the name of the base model", param="name")
        return check_name(name)

    def _record(self, name: str) -> Record:
        if name not in self._names or name in self._unlisted:
            raise adapter_not_found(name)
        return self._names[name]

    def _apply_published(self, published: PublishedVersion) -> None:
        """Let the name refer to the new version from now on."""
        before = self._names.get(published.name)
        self._names[published.name] = published.record
        self._unlisted.discard(published.name)
        self._meta[published.record.digest] = published.meta
        if before is None or before.digest == published.record.digest:
            return
        older = [digest for digest in self._older_versions.get(published.name, []) if digest != published.record.digest]
        self._older_versions[published.name] = [digest for digest in (before.digest, *older) if self._leases[digest]]
        self._free_if_unused(before.digest)
        if published.name in self._pins:
            self.load(published.name, lambda result: None)

    def _free_if_unused(self, digest: str) -> None:
        """Free an unused version: its memory if it is to be evicted, and its files too if no name refers to it."""
        if self._leases[digest] or self._memory.is_loading(digest):
            return  # `release`, or the end of the load, calls this again
        named = any(record.digest == digest for record in self._names.values())
        if named and digest not in self._evicting:
            return
        self._evicting.discard(digest)
        self._memory.evict(digest)
        if not named:
            self._meta.pop(digest, None)
            self._last_used.pop(digest, None)
            self._loader.publish(lambda: self._publisher.drop(digest), lambda result: None)

    def _fetch(self, digest: str) -> Adapter:
        """Read, lower and flatten a stored version; called in the loading thread."""
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
            last_used=self._last_used.get(digest),
            report=meta.report,
            vocab_size=meta.traits.vocabulary or None,
        )
