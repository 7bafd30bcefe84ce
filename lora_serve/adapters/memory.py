"""Which versions are in host or device memory, on their way there, or failed to come.

Names are not known here, only digests: the registry says who has claims (leases and pins), this room moves adapters
between the tiers accordingly and counts what that took. Belongs to the engine's loop; reading happens in the `Loader`.
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
    """In memory: it can be seated at once."""


@dataclass(frozen=True)
class Loading:
    """On its way, or not asked for yet."""


@dataclass(frozen=True)
class LoadFailed:
    """The load that was asked for last did not succeed."""

    error: ServeError


class Claims(Protocol):
    """Who must not lose what."""

    @property
    def leased(self) -> Sequence[str]:
        """Digests that sequences hold, the one held longest first."""
        ...

    @property
    def kept(self) -> Set[str]:
        """Digests that never leave by LRU, whether or not they are in memory yet."""
        ...


class Memory:
    """The two memory tiers.

    Args:
        fetch: reads, lowers and flattens a version; called in the reading thread.
        claims: consulted whenever something has to leave.
        landed: called after each load, in the loop's thread, before those who waited are told.
    """

    def __init__(
        self,
        cache: HostCache,
        device_slots: DeviceSlots,
        loader: Loader,
        fetch: Callable[[str], Adapter],
        claims: Claims,
        landed: Callable[[str], None],
    ) -> None:
        self._cache, self._device_slots, self._loader = cache, device_slots, loader
        self._fetch, self._claims, self._landed = fetch, claims, landed
        self._loading: dict[str, list[Callable[[ServeError | None], None]]] = {}  # digest → who waits
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
        """The memory tiers that hold a version: of 'host' and 'device'."""
        there = {"host": digest in self._cache, "device": self._device_slots.holds(digest)}
        return [tier for tier, holds in there.items() if holds]

    def is_loading(self, digest: str) -> bool:
        return digest in self._loading

    def state(self, digest: str) -> InMemory | Loading | LoadFailed:
        """How far a leased version is."""
        if digest in self._failed:
            return LoadFailed(self._failed[digest])
        return InMemory() if digest in self else Loading()

    def touch(self, digest: str) -> None:
        """A request begins to use a version: it is recently used, and the counters learn where it was found."""
        for tier, there in (
            ("device", self._device_slots.slot(digest) is not None),
            ("host", self._cache.get(digest) is not None),
        ):
            (self._hits if there else self._misses)[tier] += 1
            if there:
                break

    def want(self, digest: str, done: Callable[[ServeError | None], None] | None = None) -> None:
        """Have a version brought into host memory, unless it is there or on its way; one load serves all who wait."""
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
        """A slot for each of these; they are in memory, and no more than there are slots beside the pinned ones."""
        keep = {*digests, *self._claims.kept}
        slots: dict[str, int] = {}
        for digest in digests:
            slot = self._device_slots.slot(digest)
            slots[digest] = self._seat(digest, keep) if slot is None else slot
        return slots

    def copied(self, digests: Iterable[str]) -> bool:
        """Whether seated versions can be used without waiting."""
        return all(map(self._device_slots.copied, digests))

    def wait_for_copies(self, digests: Sequence[str]) -> None:
        """Have the next step wait for seated versions."""
        self._device_slots.wait_for_copies(digests)

    def warm(self, digest: str) -> None:
        """Seat a version ahead of its use, if that takes nobody's seat who is in use."""
        if digest not in self or self._device_slots.holds(digest):
            return
        with suppress(ServeError):
            self._seat(digest, {*self._claims.leased, *self._claims.kept})

    def evict(self, digest: str) -> None:
        """Out of both tiers; what it took returns."""
        self._device_slots.evict(digest)
        self._cache.evict(digest)

    def forget_failure(self, digest: str) -> None:
        """Everyone who waited for a failed load has been told; the next who wants it tries again."""
        self._failed.pop(digest, None)

    def fill(self, stats: Stats) -> None:
        """Write the tiers' share of the numbers."""
        stats.adapter_slots = self._device_slots.slots
        stats.bytes = {"host": self._cache.bytes, "device": self._device_slots.bytes}
        stats.evictions_total = {"host": self._cache.evictions, "device": self._device_slots.evictions}
        stats.cache_hits_total = dict(self._hits)
        stats.cache_misses_total = dict(self._misses)
        stats.loads_total = dict(self._loads)
        stats.load_seconds_total = dict(self._seconds)

    def _seat(self, digest: str, keep: Set[str]) -> int:
        started = time.perf_counter()
        adapter = self._cache.get(digest)
        if adapter is None:
            raise EngineFault("an adapter was scheduled that is not in memory")
        if not self._device_slots.room(adapter.nbytes, keep):
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
            self._device_slots.upload.pin(adapter.flat)
            return adapter, time.perf_counter() - started

        def copied(result: tuple[Adapter, float] | ServeError) -> None:
            failure = result if isinstance(result, ServeError) else self._keep(*result)
            if failure is not None and digest in self._claims.leased:
                self._failed[digest] = failure
            waiters = self._loading.pop(digest)
            self._landed(digest)
            for waiter in waiters:
                waiter(failure)

        self._loader.load(work, copied)

    def _keep(self, adapter: Adapter, seconds: float) -> ServeError | None:
        """Put a loaded adapter into the cache; the error if it does not fit."""
        self._loads["host"] += 1
        self._seconds["host"] += seconds
        for digest in reversed(self._claims.leased):  # what is leased leaves last, the longest held last of all
            self._cache.get(digest)
        try:
            self._cache.put(adapter, self._claims.kept.__contains__)
        except ServeError as error:
            return error
        return None
