"""LoRA affinity: in which order the replicas of a base are tried for a request, so that it finds its adapter loaded.

Pure decisions over plain state. A request goes to a replica that holds its adapter; an adapter that none holds has a
home among the replicas, by rendezvous hashing, so that independent routers choose the same one. A replica with many
requests in flight gives some away, with the adapter, to one that has far fewer: loading an adapter takes milliseconds,
waiting in a queue takes longer.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from hashlib import blake2b
from typing import NamedTuple

REMEMBERED = 10.0  # seconds for which a replica is taken to hold what was sent to it; statistics are newer by then
MOST_REMEMBERED = 10_000  # adapters


class ReplicaLoad(NamedTuple):
    """A replica, as the decision sees it.

    Attributes:
        in_flight: requests that it has and has not finished.
        level: 2 if it has the adapter on the device, 1 in host memory, 0 not at all.
        ready: whether it takes requests.
    """

    id: str
    in_flight: int
    level: int = 0
    ready: bool = True


def rank(adapter: str, replicas: Sequence[ReplicaLoad], spill_at: int, avoid: Collection[str] = ()) -> list[str]:
    """Ids of the replicas, best first.

    Args:
        adapter: empty for the base, which every replica holds.
        spill_at: requests in flight from which on a replica is passed over for one that has less than half as many.
        avoid: replicas that have failed this request; the last resort.
    """

    usable = [each for each in replicas if each.ready and each.id not in avoid]
    last = sorted((each for each in replicas if each not in usable), key=lambda each: (not each.ready, each.in_flight))
    if not adapter:
        ranked = sorted(usable, key=lambda each: each.in_flight)
    else:
        holders = sorted((each for each in usable if each.level), key=lambda each: (-each.level, each.in_flight))
        ranked = holders + _by_home(adapter, [each for each in usable if not each.level])
    if ranked and adapter and ranked[0].in_flight >= spill_at:
        idle = [each for each in ranked if 2 * each.in_flight < ranked[0].in_flight]
        idle.sort(key=lambda each: (each.in_flight, -each.level))
        ranked = idle + [each for each in ranked if each not in idle]
    return [each.id for each in ranked + last]


def _by_home(adapter: str, replicas: Sequence[ReplicaLoad]) -> list[ReplicaLoad]:
    """Replicas that do not have an adapter, the one first that should get it: its home, unless that has much to do."""
    fewest = min((each.in_flight for each in replicas), default=0)
    return sorted(
        replicas,
        key=lambda each: (0 if each.in_flight <= 2 * fewest + 1 else each.in_flight, _home(adapter, each.id)),
    )


def _home(adapter: str, replica: str) -> int:
    """Rendezvous hash: the replica with the smallest is the adapter's home."""
    return int.from_bytes(blake2b(f"{adapter}\0{replica}".encode(), digest_size=8).digest(), "big")


def residency_level(adapters: Collection[str], on_device: Collection[str], in_host: Collection[str]) -> int:
    """`ReplicaLoad.level` of a replica for a request of these adapters: of the one that is furthest away."""
    if all(adapter in on_device for adapter in adapters):
        return 2
    return 1 if all(adapter in on_device or adapter in in_host for adapter in adapters) else 0


class SentAdapters:
    """Which adapters were sent to which replicas lately: they are there, though statistics do not say so yet."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: OrderedDict[tuple[str, str], float] = OrderedDict()  # oldest first

    def note(self, adapter: str, replica: str) -> None:
        """A request of the adapter went to the replica."""
        self._until[adapter, replica] = self._clock() + REMEMBERED
        self._until.move_to_end((adapter, replica))
        while len(self._until) > MOST_REMEMBERED:
            self._until.popitem(last=False)

    def holds(self, adapter: str, replica: str) -> bool:
        """Whether one did within the last seconds."""
        return self._until.get((adapter, replica), 0.0) > self._clock()
