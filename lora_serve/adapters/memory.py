"""Moves adapters between disk, host memory and device, as `residency.py` decides, and counts what was moved.

Used by the engine's loop alone; files are read in a thread of `Workers`.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set

import torch

from lora_serve.adapters.adapter import Adapter
from lora_serve.adapters.device_slots import DeviceSlots
from lora_serve.adapters.lowered_file import Summary
from lora_serve.adapters.publisher import Publisher
from lora_serve.adapters.residency import Residency, Version
from lora_serve.adapters.workers import Workers
from lora_serve.errors import AdapterBroken, EngineFault, Overloaded, ServeError, Unavailable
from lora_serve.malloc import trim
from lora_serve.messages import Stats

TURN = 0.5  # seconds for which an adapter stays in host memory while others that are needed wait
MOST_LOADS = 2  # at the same time: while one is read, the next is ready to be
Loaded = Callable[[ServeError | None], None]

log = logging.getLogger(__name__)


class AdapterMemory:
    """The adapters in host memory and on the device.

    Attributes:
        changed: whether something may have to be loaded since `load_next`.

    Args:
        on_load_ended: called with a version for which no load is under way or wanted any more.
        clock: seconds.
    """

    def __init__(
        self,
        residency: Residency,
        device_slots: DeviceSlots,
        publisher: Publisher,
        workers: Workers,
        on_load_ended: Callable[[Version], None],
        clock: Callable[[], float],
    ) -> None:
        self.changed = True
        self._residency, self._device_slots, self._publisher = residency, device_slots, publisher
        self._workers, self._on_load_ended, self._clock = workers, on_load_ended, clock
        self._adapters: dict[str, Adapter] = {}  # in host memory
        self._copying: dict[str, float] = {}  # digest → when the copy to the device should be complete
        self._arrived: list[str] = []
        self._wanted: dict[str, list[Loaded]] = {}  # digests to load for operations, and who waits for each
        self._hits: Counter[str] = Counter(host=0, device=0)
        self._misses: Counter[str] = Counter(host=0, device=0)
        self._loads: Counter[str] = Counter(host=0, device=0)
        self._evictions: Counter[str] = Counter(host=0, device=0)
        self._seconds = {"host": 0.0, "device": 0.0}

    def holds(self, digest: str) -> bool:
        """Whether a version is in memory, so that it can get a slot at once."""
        return self._residency.versions[digest].in_memory

    def take_arrived(self) -> list[str]:
        """Digests of versions that came into memory since the last call."""
        arrived, self._arrived = self._arrived, []
        return arrived

    def record_use(self, version: Version) -> None:
        """Count a hit or a miss per tier; a version that is not in memory will be loaded."""
        for tier, present in (("device", version.slot is not None), ("host", version.in_host)):
            (self._hits if present else self._misses)[tier] += 1
            if present:
                return
        self.changed = True

    # --- host memory ---------------------------------------------------------------------------------------------

    def load(self, version: Version, done: Loaded) -> None:
        """Load a version for an operation; `done` gets None or the error, also if there is no memory for it now."""
        if version.in_memory:
            done(None)
            return
        version.failure = None
        self._wanted.setdefault(version.digest, []).append(done)
        self.changed = True

    def is_coming(self, version: Version) -> bool:
        """Whether a version is being loaded, or will be for an operation."""
        return version.loading or version.digest in self._wanted

    def take_turns(self) -> None:
        """Where memory holds fewer adapters than are in use: end turns that have lasted for long enough."""
        if self._residency.unmet and self._residency.end_turns(self._clock(), TURN):
            self.changed = True

    def load_next(self) -> None:
        """Load what is needed most, in place of what is needed least."""
        self.changed = False
        loads = self._residency.decide_loads(list(self._wanted), MOST_LOADS)
        for digest in loads.evict:
            self._evict_from_host(self._residency.versions[digest], loads.load)
        for digest in loads.load:
            version = self._residency.versions[digest]
            self._residency.begin_load(version)
            if log.isEnabledFor(logging.DEBUG):
                log.debug("load of %s begun: %d bytes", _shown(version), version.bytes)
            self._read(version)
        busy = Unavailable("the memory for adapters is taken by those in use", retry_after=1)
        for digest in loads.refuse:
            self._answer(self._residency.versions[digest], busy)

    def evict(self, version: Version) -> None:
        """Free a version in both tiers."""
        self._evict_from_device(version)
        self._evict_from_host(version)

    # --- what training shares --------------------------------------------------------------------------------------

    def begin_training(self) -> None:
        """Free training's part of the memory. Raises Overloaded, with the numbers, if adapters in use take it."""
        residency = self._residency
        evict = residency.decide_training()
        if evict is None:
            excess, training = residency.excess / 2**20, residency.budget.training / 2**20
            raise Overloaded(
                f"adapters that are in use take {excess:.1f} of the {training:.1f} MiB for training, until the "
                "requests for them end",
                retry_after=1,
            )
        for digest in evict:
            if residency.budget.device is None:
                self._evict_from_host(residency.versions[digest])
            else:
                self._evict_from_device(residency.versions[digest])
        residency.training = True
        if evict:
            trim()  # else the allocator keeps it for tensors of their sizes

    def end_training(self) -> None:
        """Let adapters take training's part of the memory again."""
        self._residency.training = False

    def _read(self, version: Version, *, again: bool = False) -> None:
        def work() -> tuple[Adapter, float]:
            started = time.perf_counter()
            adapter = self._publisher.read(version.digest)
            self._device_slots.copier.pin_memory(adapter.flat)
            return adapter, time.perf_counter() - started

        def on_read(result: tuple[Adapter, float] | ServeError) -> None:
            if isinstance(result, AdapterBroken) and not again:
                log.warning("version %s: %s; lowering it again", version.digest[:12], result.message)
                self._lower_again(version)
            else:
                self._finish(version, result)

        self._workers.load(work, on_read)

    def _lower_again(self, version: Version) -> None:
        """Make a damaged lowered file again from the version's PEFT files, then read it."""

        def on_stored(result: Summary | ServeError) -> None:
            if isinstance(result, ServeError):
                self._finish(version, result)
            else:
                version.summary = result
                self._read(version, again=True)

        self._publisher.lower_again(version.digest, on_stored)

    def _finish(self, version: Version, result: tuple[Adapter, float] | ServeError) -> None:
        self.changed = True
        error = result if isinstance(result, ServeError) else None
        self._residency.end_load(version, self._clock(), error)
        if log.isEnabledFor(logging.DEBUG):
            ended = f"failed ({result.kind})" if isinstance(result, ServeError) else f"complete after {result[1]:.3g} s"
            log.debug("load of %s %s; host memory has %d bytes", _shown(version), ended, self._residency.host_bytes)
        if not isinstance(result, ServeError):
            adapter, seconds = result
            self._arrived.append(version.digest)
            self._adapters[version.digest] = adapter
            self._loads["host"] += 1
            self._seconds["host"] += seconds
        self._answer(version, error)

    def _answer(self, version: Version, error: ServeError | None) -> None:
        """Tell the operations that wait for a version how its load ended, or that it does not begin."""
        waiting = self._wanted.pop(version.digest, ())
        self._on_load_ended(version)
        for done in waiting:
            done(error)

    def _evict_from_host(self, version: Version, making_room_for: Sequence[str] = ()) -> None:
        if not version.in_host:
            return
        self._tell_eviction(version, "host memory", making_room_for)
        if self._residency.budget.device is None:  # its slot points to this memory
            self._evict_from_device(version, making_room_for)
        self._residency.leave_host(version)
        del self._adapters[version.digest]
        self._evictions["host"] += 1

    # --- device --------------------------------------------------------------------------------------------------

    def assign_slots(self, digests: Sequence[str]) -> dict[str, int]:
        """Slots of versions in memory, assigned where needed. Raises Unavailable if they do not fit the device."""
        versions = [self._residency.versions[digest] for digest in digests]
        evict = self._residency.decide_slots(digests)
        if evict is None:
            raise Unavailable("the device has no room for this adapter beside those in use", retry_after=1)
        for digest in evict:
            self._evict_from_device(self._residency.versions[digest], digests)
        return {version.digest: self._assign_slot(version) for version in versions}

    def prefetch(self, digests: Iterable[str], keep: Callable[[Version], bool]) -> None:
        """Assign slots to versions before a step uses them, so that their copies run beside other steps.

        Does nothing where they are not in host memory, or do not fit beside the versions to `keep`.
        """
        versions = self._residency.versions
        coming = [digest for digest in digests if digest in versions and versions[digest].slot is None]
        coming = [digest for digest in coming if versions[digest].in_host]
        if not coming:
            return
        kept = [version.digest for version in self._residency.device if keep(version)]
        evict = self._residency.decide_slots([*coming, *kept])
        if evict is None:
            return
        for digest in evict:
            self._evict_from_device(versions[digest], coming)
        for digest in coming:
            try:
                self._assign_slot(versions[digest])
            except Unavailable:  # the step that needs it will try again
                return

    def copying(self, within: float = 0.0) -> Set[str]:
        """Digests of the versions whose host-to-device copies are not expected to end in so many seconds from now."""
        if not self._copying:
            return frozenset()
        versions, now = self._residency.versions, self._clock()
        self._copying = {digest: end for digest, end in self._copying.items() if not self._is_copied(versions[digest])}
        return {digest for digest, end in self._copying.items() if not now <= end <= now + within}  # late ones included

    def wait_for_copies(self, digests: Iterable[str]) -> None:
        """Make the next step wait for the copies of resident versions."""
        slots = [self._residency.versions[digest].slot for digest in digests if digest in self._copying]
        self._device_slots.wait_for_copies([slot for slot in slots if slot is not None])

    def _is_copied(self, version: Version) -> bool:
        return version.slot is not None and self._device_slots.copied(version.slot)

    def _assign_slot(self, version: Version) -> int:
        self._residency.touch(version)
        if version.slot is not None:
            return version.slot
        if not version.in_host:
            raise EngineFault("an adapter was scheduled that is not in memory")
        started = time.perf_counter()
        try:
            slot = self._device_slots.load(self._adapters[version.digest])
        except torch.OutOfMemoryError as error:
            raise Unavailable("the device has no memory left for this adapter", retry_after=1) from error
        self._residency.enter_device(version, slot)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s gets device slot %d", _shown(version), slot)
        if not self._is_copied(version):
            begin = max([self._clock(), *self._copying.values()])  # one after the other
            self._copying[version.digest] = begin + version.bytes / self._device_slots.copier.bytes_per_second
        self._loads["device"] += 1
        self._seconds["device"] += time.perf_counter() - started
        return slot

    def _evict_from_device(self, version: Version, making_room_for: Sequence[str] = ()) -> None:
        if version.slot is not None:
            self._tell_eviction(version, "the device", making_room_for)
            self._device_slots.evict(version.slot)
            self._residency.leave_device(version)
            self._copying.pop(version.digest, None)
            self._evictions["device"] += 1
            self.changed |= not version.in_host  # if it is leased, it must be read again

    def _tell_eviction(self, version: Version, tier: str, making_room_for: Sequence[str]) -> None:
        if log.isEnabledFor(logging.DEBUG):
            others = ", ".join(_shown(self._residency.versions[digest]) for digest in making_room_for)
            log.debug("evicted %s from %s%s", _shown(version), tier, f" for {others}" if others else "")

    # --- statistics ----------------------------------------------------------------------------------------------

    def fill_stats(self, stats: Stats) -> None:
        """Fill in the statistics of the memory tiers."""
        residency = self._residency
        stats.adapter_slots = residency.budget.slots
        stats.bytes = {"host": residency.host_bytes, "device": residency.device.bytes}
        stats.evictions_total = dict(self._evictions)
        stats.cache_hits_total, stats.cache_misses_total = dict(self._hits), dict(self._misses)
        stats.loads_total, stats.load_seconds_total = dict(self._loads), dict(self._seconds)


def _shown(version: Version) -> str:
    return f"{min(version.names, default='')}@{version.digest[:12]}"
