"""State of all adapter versions (names, leases, pins, tiers, bytes) and the decisions over it.

Plain data, without files, tensors or clocks: `memory.py` carries the decisions out and reports back. Every byte of
host memory and of the device that adapters take is accounted for here, before it is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from lora_serve.adapters.aliases import Aliases
from lora_serve.adapters.lowered_file import Summary
from lora_serve.adapters.memory_tier import MemoryTier
from lora_serve.adapters.store.records import NameRecord
from lora_serve.errors import AdapterBusy, BadRequest, ServeError, TooLarge
from lora_serve.names import adapter_not_found
from lora_serve.request import AdapterUse


@dataclass(frozen=True)
class Budget:
    """What adapters may take: slots of the device, bytes of host memory, and bytes of the device.

    `device` is None on a CPU: there an adapter in a slot is the one in host memory, and is counted once. `training`:
    bytes of the same memory, the device's or on a CPU the host's, for training; while nothing is trained, adapters may
    stay there until they are evicted. What requests and pins need together must fit without it.
    """

    slots: int
    host: int
    device: int | None = None
    training: int = 0

    @property
    def pins(self) -> int:
        """Bytes that pinned versions may take together: half."""
        return (self.host if self.device is None else min(self.host, self.device)) // 2

    @property
    def one(self) -> int:
        """Bytes that one request's versions may take together: what pins never take, or all of a CPU's."""
        return self.host if self.device is None else min(self.host, self.device // 2)


@dataclass
class Version:
    """One version: what it is, who uses it and where it is.

    Attributes:
        bytes: in memory.
        names: that refer to it.
        leases: numbers of the leases on it, oldest first.
        loading, in_host, slot: whether it is on its way to host memory or there, and its slot on the device; set by
            `Residency`.
        failure: of its last load; it is not tried again before it has no leases and is wanted.
        turn: number of the lease since which it is the next one's turn; see `end_turns`.
        since: when it came into host memory, in seconds.
        last_used: when a request last asked for it, in seconds since the epoch.
        evict_when_unused: whether an operator asked for its eviction.
    """

    summary: Summary
    created: float
    names: set[str] = field(default_factory=set)
    leases: dict[int, None] = field(default_factory=dict)
    loading: bool = False
    in_host: bool = False
    slot: int | None = None
    failure: ServeError | None = None
    turn: int = 0
    since: float = 0.0
    last_used: float | None = None
    evict_when_unused: bool = False

    @property
    def digest(self) -> str:
        return self.summary.digest

    @property
    def bytes(self) -> int:
        return self.summary.nbytes

    @property
    def in_memory(self) -> bool:
        return self.in_host or self.slot is not None

    @property
    def holds_memory(self) -> bool:
        """Whether it is in memory, or on its way there."""
        return self.in_memory or self.loading

    @property
    def tiers(self) -> list[str]:
        """Where it is besides the disk."""
        return ["host"] * self.in_host + ["device"] * (self.slot is not None)


class Loads(NamedTuple):
    """A decision: versions to evict from host memory, then versions to load, and wanted ones that do not fit now."""

    evict: list[str]
    load: list[str]
    refuse: list[str]


class Residency:
    """All versions and names.

    Attributes:
        names: what each name refers to; of its versions, those after the first are older ones, newest first.
        aliases: what stands for these names.
        versions: by digest; every version that a name refers to or a lease is held on.
        pinned: digests of pinned versions, wherever they are.
        host, device: the versions in host memory and on the device.
        unmet: whether pinned or leased versions were missing in memory at the last decision: a release may help them.
        training: whether training has its part of the memory.

    Args:
        keep_versions: versions of a name that stay in the store; further ones go with their last lease, unless an alias
            names them.
    """

    def __init__(self, budget: Budget, keep_versions: int = 1) -> None:
        self.budget = budget
        self.names: dict[str, NameRecord] = {}
        self.aliases = Aliases()
        self.versions: dict[str, Version] = {}
        self.pinned: Set[str] = frozenset()
        self.unmet = False
        self.training = False
        self.host: MemoryTier[Version] = MemoryTier()
        self.device: MemoryTier[Version] = MemoryTier()
        self._loading: dict[str, Version] = {}
        self._keep_versions = keep_versions
        self._leased: dict[str, Version] = {}
        self._leases = 0  # given out so far

    def __repr__(self) -> str:
        taken = f"{self.host_bytes} of {self.budget.host} bytes"
        slots = f"{len(self.device)} of {self.budget.slots} slots"
        return f"<Residency {len(self.names)} names, {len(self.versions)} versions, {taken}, {slots}>"

    # --- names ---------------------------------------------------------------------------------------------------

    def record(self, name: str) -> NameRecord:
        """What a name refers to. Raises AdapterNotFound, also for an unlisted one."""
        record = self.names.get(name)
        if record is None or record.unlisted:
            raise adapter_not_found(name)
        return record

    def current(self, name: str) -> Version:
        """The version that a plain name refers to. Raises AdapterNotFound."""
        return self.versions[self.record(name).versions[0]]

    def current_names(self, versions: Iterable[Version]) -> list[str]:
        """The listed names that have one of these as their current version, sorted."""
        return sorted(
            name
            for version in versions
            for name in version.names
            if self.names[name].versions[0] == version.digest and not self.names[name].unlisted
        )

    def check_publish(self, name: str, digest: str, size: int) -> None:
        """Check that a name may refer to a new version of `size` bytes in memory.

        Raises TooLarge, or AdapterBusy if the name is pinned and the version too large for that.
        """
        self.check_size(size)
        if name in self.names and self.names[name].pinned:
            self.check_pins(name, digest, size)

    def stored(self, name: str, record: NameRecord, *, review: bool = False) -> NameRecord:
        """The part of a name's record that the store keeps: its newest versions, and those that aliases keep.

        Args:
            review: whether to leave out versions that are only held, since aliases named them.
        """
        newest, older = record.versions[: self._keep_versions], record.versions[self._keep_versions :]
        keeps = self.aliases.names if review else self.aliases.keeps
        kept = [*newest, *(digest for digest in older if keeps(name, digest))]
        return msgspec.structs.replace(record, versions=kept)

    def apply(self, name: str, record: NameRecord | None) -> None:
        """Let a name refer to a record's versions, or to nothing."""
        before = self.names.pop(name, NameRecord([]))
        for digest in before.versions:
            self.versions[digest].names.discard(name)
        if record is not None:
            known = [digest for digest in record.versions if digest in self.versions]
            record = msgspec.structs.replace(record, versions=known)
            kept = self.stored(name, record).versions
            leased = [digest for digest in known if digest not in kept and self.versions[digest].leases]
            self.names[name] = msgspec.structs.replace(record, versions=[*kept, *leased])
            for digest in self.names[name].versions:
                self.versions[digest].names.add(name)
        if before.pinned or (record is not None and record.pinned):
            named = self.names.values()
            self.pinned = frozenset(each.versions[0] for each in named if each.pinned and not each.unlisted)

    # --- leases --------------------------------------------------------------------------------------------------

    def find(self, use: AdapterUse) -> Version:
        """The version that a request names. Raises AdapterNotFound, or BadRequest for an ambiguous one."""
        digests = self.record(use.name).versions
        if use.version is not None:
            digests = [digest for digest in digests if digest.startswith(use.version)]
            if not digests:
                raise adapter_not_found(f"{use.name}@{use.version}")
            if len(digests) > 1:
                raise BadRequest(f"{use.version} names more than one version of {use.name}", param="adapter")
        return self.versions[digests[0]]

    def lease(self, version: Version) -> int:
        """Lease a version; returns the number of the lease."""
        self._leases += 1
        version.leases[self._leases] = None
        self._leased[version.digest] = version
        self.touch(version)
        return self._leases

    def release(self, version: Version, lease: int) -> None:
        """Release a lease."""
        del version.leases[lease]
        if version.leases:
            return
        del self._leased[version.digest]
        for name in list(version.names):
            record = self.names[name]
            if version.digest in record.versions[self._keep_versions :]:
                self.apply(name, record)

    def touch(self, version: Version) -> None:
        """Make a version the most recently used one."""
        self.host.touch(version)
        self.device.touch(version)

    @property
    def leased(self) -> list[Version]:
        """Leased versions, the one whose turn it is first: that with the oldest lease, counted from its last turn."""
        return sorted(self._leased.values(), key=lambda version: max(version.turn, next(iter(version.leases))))

    def end_turns(self, now: float, length: float) -> bool:
        """Let versions that have been in host memory for so many seconds come after those that are missing now.

        For a memory that holds fewer adapters than are in use. Returns whether there are any.
        """
        over = [version for version in self._leased.values() if version.in_host and now - version.since >= length]
        for version in over:
            self._leases += 1
            version.turn, version.since = self._leases, now
        return bool(over)

    # --- pins ----------------------------------------------------------------------------------------------------

    def check_pins(self, name: str, digest: str, size: int) -> None:
        """Check that a name may be pinned to a version of `size` bytes. Raises AdapterBusy."""
        others = {record.versions[0] for other, record in self.names.items() if record.pinned and other != name}
        others.discard(digest)
        if len(others) + 1 >= self.budget.slots:
            raise AdapterBusy(f"pinning {name} would leave no slot for other adapters", param="name")
        if self._bytes(others) + size > self.budget.pins:
            raise AdapterBusy(
                f"pinning {name} would take more than {self.budget.pins} bytes, "
                "which is half of the memory for adapters",
                param="name",
            )

    # --- what fits -----------------------------------------------------------------------------------------------

    def check_size(self, size: int) -> None:
        """Check that an adapter of that many bytes can be served at all. Raises TooLarge."""
        if size > self.budget.one:
            option = "--adapter-cache-memory" if self.budget.device is None else "half of --adapter-device-memory"
            raise TooLarge(f"the adapter takes {size} bytes in memory; {option} is {self.budget.one}")

    def check_fits(self, digests: Iterable[str]) -> None:
        """Check that a request's adapters fit beside the pinned ones. Raises BadRequest.

        Asked at admission, and again when pins or versions change: what became impossible must not wait.
        """
        pinned = self.pinned
        own = set(digests) - pinned
        if not own:
            return
        if len(own) > self.budget.slots - len(pinned):
            raise BadRequest("more adapters than can be on the device at once, beside pinned ones", param="adapter")
        most = self.budget.one - (self._bytes(pinned) if self.budget.device is None else 0)
        if self._bytes(own) > most:
            raise BadRequest(
                f"the request's adapters take {self._bytes(own)} bytes; {most} are there for one request's",
                param="adapter",
            )

    # --- decisions -----------------------------------------------------------------------------------------------

    def decide_loads(self, wanted: Sequence[str] = (), limit: int = 1) -> Loads:
        """What to load into host memory next, and what to evict for it.

        Pinned versions come first, then leased ones by their turn, then `wanted` ones. Each stays or comes only if it
        fits beside those before it, so the oldest request's adapters always come together, and whoever waits becomes
        the oldest. Of the others, the least recently used (LRU) are evicted, and only as far as needed.

        Args:
            wanted: versions that an operator asked for.
            limit: loads at the same time.
        """
        needed = (self.versions[digest] for digest in (*self.pinned, *self._leased))
        self.unmet = not all(version.holds_memory or version.failure is not None for version in needed)
        if not wanted and not self.unmet:
            return Loads([], [], [])
        order = dict.fromkeys([*sorted(self.pinned), *(version.digest for version in self.leased), *wanted])
        staying: set[str] = set()
        missing: list[Version] = []
        room = self.budget.host - self._loading_bytes
        for version in map(self.versions.__getitem__, order):
            if version.loading or (version.slot is not None and not version.in_host):
                continue
            if version.bytes > room:
                continue
            room -= version.bytes
            staying.add(version.digest)
            if not version.in_host and version.failure is None:
                missing.append(version)
        refuse = [digest for digest in wanted if not self.versions[digest].holds_memory and digest not in staying]
        load: list[str] = []
        evict: list[str] = []
        free = self._most_in_host - self.host_bytes
        for version in missing[: max(0, limit - len(self._loading))]:
            evicted = self._evictable(version.bytes - free, staying | set(evict))
            free += self._bytes(evicted) - version.bytes
            evict += evicted
            load.append(version.digest)
        return Loads(evict, load, refuse)

    def decide_slots(self, digests: Sequence[str]) -> list[str] | None:
        """Versions to evict from the device so that these get slots beside the pinned ones; None if they do not fit."""
        missing = [version for digest in dict.fromkeys(digests) if (version := self.versions[digest]).slot is None]
        if not missing:
            return []
        slots = len(self.device) + len(missing) - self.budget.slots
        excess = 0
        if self.budget.device is not None:
            excess = self.device.bytes + self._bytes(version.digest for version in missing) - self.budget.device
            excess -= self._lent
        keep = {*digests, *self.pinned}
        evict: list[str] = []
        for version in self.device:
            if slots <= 0 and excess <= 0:
                break
            if version.digest not in keep:
                evict.append(version.digest)
                slots, excess = slots - 1, excess - version.bytes
        return None if slots > 0 or excess > 0 else evict

    def decide_training(self) -> list[str] | None:
        """Versions to evict from the memory that training shares, so that it has its part of it.

        The least recently used ones (LRU), none that is leased or pinned; None if those take more than adapters' own
        part.
        """
        shared = self.host if self.budget.device is None else self.device
        keep = {*self.pinned, *self._leased}
        evict = self._evictable(self.excess, keep, shared)
        return evict if self._bytes(evict) >= self.excess else None

    @property
    def excess(self) -> int:
        """Bytes that adapters take of training's part of the memory; not positive if none."""
        if self.budget.device is None:
            return self.host_bytes - self.budget.host
        return self.device.bytes - self.budget.device

    @property
    def _lent(self) -> int:
        """Bytes of training's part that adapters may take now."""
        return 0 if self.training else self.budget.training

    @property
    def _most_in_host(self) -> int:
        return self.budget.host + (self._lent if self.budget.device is None else 0)

    def _evictable(self, needed: int, keep: Set[str], tier: MemoryTier[Version] | None = None) -> list[str]:
        """The least recently used versions in a tier, or in host memory, that free `needed` bytes, none of `keep`."""
        found: list[str] = []
        for version in self.host if tier is None else tier:
            if needed <= 0:
                break
            if version.digest not in keep:
                found.append(version.digest)
                needed -= version.bytes
        return found

    # --- tiers ---------------------------------------------------------------------------------------------------

    def begin_load(self, version: Version) -> None:
        """Note that a version is being read into host memory, whose bytes it takes from now on."""
        version.loading = True
        self._loading[version.digest] = version

    def end_load(self, version: Version, now: float, failure: ServeError | None = None) -> None:
        """Note that a version is in host memory, or why it is not; `now` in seconds."""
        version.loading, version.failure = False, failure
        del self._loading[version.digest]
        if failure is None:
            version.in_host, version.since = True, now
            self.host.add(version)

    def leave_host(self, version: Version) -> None:
        """Note that a version has left host memory."""
        version.in_host = False
        self.host.remove(version)

    def enter_device(self, version: Version, slot: int) -> None:
        """Note that a version has a slot on the device."""
        version.slot = slot
        self.device.add(version)

    def leave_device(self, version: Version) -> None:
        """Note that a version has lost its slot."""
        version.slot = None
        self.device.remove(version)

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that are taken, or will be by loads that have begun."""
        return self.host.bytes + self._loading_bytes

    @property
    def _loading_bytes(self) -> int:
        return sum(version.bytes for version in self._loading.values())

    def _bytes(self, digests: Iterable[str]) -> int:
        return sum(self.versions[digest].bytes for digest in digests)
