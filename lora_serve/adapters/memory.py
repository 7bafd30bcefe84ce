"""Moves adapter versions between disk, host cache and device slots, and counts loads, hits and evictions.

Versions are known by digest only; names, leases and pins are the registry's. Used by the engine's loop alone; files are
read in the `Loader`'s thread.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import torch

from lora_serve.adapters.adapter import Adapter
from lora_serve.adapters.device_slots import DeviceSlots
from lora_serve.adapters.host_cache import HostCache
from lora_serve.adapters.loader import Loader
from lora_serve.errors import EngineFault, ServeError, Unavailable
from lora_serve.messages import Stats


@dataclass(frozen=True)
class InMemory:
    """In memory: a slot can be assigned at once."""


@dataclass(frozen=True)
class Loading:
    """Not in memory: loading, or not requested yet."""


@dataclass(frozen=True)
class LoadFailed:
    """The last load failed."""

    error: ServeError


class Retention(Protocol):
    """Which versions must not be evicted, or should be last."""

    @property
    def leased(self) -> Sequence[str]:
        """Digests leased by sequences, oldest lease first."""
        ...

    @property
    def unevictable(self) -> Set[str]:
        """Digests of pinned versions, which LRU never evicts, whether or not they are in memory yet."""
        ...


class AdapterMemory:
    """The two memory tiers: host cache and device slots.

    Args:
        fetch: reads, lowers and flattens a version; called in the loading thread.
        retention: consulted on eviction.
        on_loaded: called after each load, in the loop's thread, before the callbacks of those who wait for it.
    """

    def __init__(
        self,
        cache: HostCache,
        device_slots: DeviceSlots,
        loader: Loader,
        fetch: Callable[[str], Adapter],
        retention: Retention,
        on_loaded: Callable[[str], None],
    ) -> None:
        self._cache, self._device_slots, self._loader = cache, device_slots, loader
        self._fetch, self._retention, self._on_loaded = fetch, retention, on_loaded
        self._loading: dict[str, list[Callable[[ServeError | None], None]]] = {}  # digest → callbacks
        self._failed: dict[str, ServeError] = {}
        self._hits: Counter[str] = Counter(host=0, device=0)
        self._misses: Counter[str] = Counter(host=0, device=0)
        self._loads: Counter[str] = Counter(host=0, device=0)
        self._seconds: dict[str, float] = {"host": 0.0, "device": 0.0}

    def __repr__(self) -> str:
        return f"<Memory {len(self._loading)} loading, {self._cache!r}, {self._device_slots!r}>"

    def __contains__(self, digest: str) -> bool:
        return digest in self._cache or self._device_slots.holds(digest)

    @property
    def resident(self) -> list[str]:
        """Digests on the device, least recently used first."""
        return self._device_slots.resident

    def tiers(self, digest: str) -> list[str]:
        """The memory tiers that hold a version: a subset of 'host' and 'device'."""
        present = {"host": digest in self._cache, "device": self._device_slots.holds(digest)}
        return [tier for tier, holds in present.items() if holds]

    def is_loading(self, digest: str) -> bool:
        return digest in self._loading

    def state(self, digest: str) -> InMemory | Loading | LoadFailed:
        """Whether a leased version is in memory, loading, or failed to load."""
        if digest in self._failed:
            return LoadFailed(self._failed[digest])
        return InMemory() if digest in self else Loading()

    def record_use(self, digest: str) -> None:
        """Touch a version in the LRU order and count a hit or miss per tier."""
        for tier, present in (
            ("device", self._device_slots.slot(digest) is not None),
            ("host", self._cache.get(digest) is not None),
        ):
            (self._hits if present else self._misses)[tier] += 1
            if present:
                break

    def request_load(self, digest: str, done: Callable[[ServeError | None], None] | None = None) -> None:
        """Load a version into host memory unless it is in memory or loading; `done` gets None or the error."""
        waiters = [] if done is None else [done]
        if digest in self:
            for waiter in waiters:
                waiter(None)
        elif digest in self._loading:
            self._loading[digest] += waiters
        else:
            self._failed.pop(digest, None)
            self._loading[digest] = waiters
            self._load(digest)

    def assign_slots(self, digests: Sequence[str]) -> dict[str, int]:
        """Slots of these versions, assigned where needed. All are in memory, and they fit beside the pinned ones."""
        keep = {*digests, *self._retention.unevictable}
        slots: dict[str, int] = {}
        for digest in digests:
            slot = self._device_slots.slot(digest)
            slots[digest] = self._assign_slot(digest, keep) if slot is None else slot
        return slots

    def copied(self, digests: Iterable[str]) -> bool:
        """Whether the host-to-device copies are complete."""
        return all(map(self._device_slots.copied, digests))

    def wait_for_copies(self, digests: Sequence[str]) -> None:
        """Make the next step wait for the copies of resident versions."""
        self._device_slots.wait_for_copies(digests)

    def prefetch(self, digest: str) -> None:
        """Assign a slot to a version before it is used, if that evicts none that is leased or pinned."""
        if digest not in self or self._device_slots.holds(digest):
            return
        with suppress(ServeError):
            self._assign_slot(digest, {*self._retention.leased, *self._retention.unevictable})

    def evict(self, digest: str) -> None:
        """Free a version in both tiers."""
        self._device_slots.evict(digest)
        self._cache.evict(digest)

    def forget_failure(self, digest: str) -> None:
        """Forget a failed load, so that the next request tries again."""
        self._failed.pop(digest, None)

    def fill_stats(self, stats: Stats) -> None:
        """Fill in the statistics of the memory tiers."""
        stats.adapter_slots = self._device_slots.slots
        stats.bytes = {"host": self._cache.bytes, "device": self._device_slots.bytes}
        stats.evictions_total = {"host": self._cache.evictions, "device": self._device_slots.evictions}
        stats.cache_hits_total = dict(self._hits)
        stats.cache_misses_total = dict(self._misses)
        stats.loads_total = dict(self._loads)
        stats.load_seconds_total = dict(self._seconds)

    def _assign_slot(self, digest: str, keep: Set[str]) -> int:
        started = time.perf_counter()
        adapter = self._cache.get(digest)
        if adapter is None:
            raise EngineFault("an adapter was scheduled that is not in memory")
        if not self._device_slots.evict_to_fit(adapter.nbytes, keep):
            raise Unavailable("the device has no room for this adapter beside those in use", retry_after=1)
        try:
            slot = self._device_slots.load(adapter)
        except torch.OutOfMemoryError as error:
            raise Unavailable("the device has no memory left for this adapter", retry_after=1) from error
        self._loads["device"] += 1
        self._seconds["device"] += time.perf_counter() - started
        return slot

    def _load(self, digest: str) -> None:
        def work() -> tuple[Adapter, float]:
            started = time.perf_counter()
            adapter = self._fetch(digest)
            self._device_slots.copier.pin_memory(adapter.flat)
            return adapter, time.perf_counter() - started

        def on_finished(result: tuple[Adapter, float] | ServeError) -> None:
            failure = result if isinstance(result, ServeError) else self._add_to_cache(*result)
            if failure is not None and digest in self._retention.leased:
                self._failed[digest] = failure
            waiters = self._loading.pop(digest)
            self._on_loaded(digest)
            for waiter in waiters:
                waiter(failure)

        self._loader.load(work, on_finished)

    def _add_to_cache(self, adapter: Adapter, seconds: float) -> ServeError | None:
        """Put a loaded adapter into the host cache; returns the error if it does not fit."""
        self._loads["host"] += 1
        self._seconds["host"] += seconds
        for digest in reversed(
            self._retention.leased
        ):  # leased versions are evicted last, the oldest lease last of all
            self._cache.get(digest)
        try:
            self._cache.put(adapter, self._retention.unevictable.__contains__)
        except ServeError as error:
            return error
        return None
