"""A simulated device, disk and memory for the real engine: they take virtual time and compute nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from heapq import heappop, heappush
from itertools import count
from typing import Any

from bench.simulation.costs import Costs
from lora_serve.adapters.device_copy import DeviceCopier
from lora_serve.engine.runner import LaunchSampling, Outputs, SequenceOutput
from lora_serve.engine.scheduled_sequence import ScheduledSequence

TOKEN = 7


class VirtualTime:
    """A clock that stands still until it is moved, and what is to happen."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = count()

    def __call__(self) -> float:
        return self.now

    def at(self, time: float, event: Callable[[], object]) -> None:
        """Let something happen at a time, or now if that has passed."""
        heappush(self._events, (time, next(self._numbers), event))

    @property
    def next(self) -> float | None:
        """Time of the next event."""
        return self._events[0][0] if self._events else None

    def run_due(self) -> None:
        """Let happen what is due."""
        while self._events and self._events[0][0] <= self.now:
            heappop(self._events)[2]()


class SimulatedRunner:
    """Runs steps as long as they cost.

    Attributes:
        steps: of each step, its decoding rows, prompt tokens and seconds.
        extra: seconds by which the next steps take longer than their costs.
    """

    out_of_memory = False

    def __init__(self, costs: Costs, time: VirtualTime, size: Callable[[str], int]) -> None:
        self._costs, self._time, self._size = costs, time, size
        self._free_at = 0.0
        self.steps: list[tuple[int, int, float]] = []
        self.extra: list[float] = []

    @property
    def overlaps(self) -> bool:
        return self._costs.overlaps

    def launch(self, scheduled: list[ScheduledSequence], slots: Mapping[str, int]) -> LaunchSampling:
        decoding = sum(part.decodes for part in scheduled)
        prompt = sum(part.count for part in scheduled) - decoding
        context = sum(part.end for part in scheduled if part.decodes)
        digests = {digest for part in scheduled for digest in part.seq.digests}
        seconds = self._costs.step(decoding, prompt, context, [self._size(digest) for digest in digests])
        seconds += self.extra.pop(0) if self.extra else 0.0
        self.steps.append((decoding, prompt, seconds))
        done = self._free_at = max(self._free_at, self._time.now) + seconds
        found = [SequenceOutput(part, TOKEN if part.samples else None) for part in scheduled]

        def outputs() -> list[SequenceOutput]:
            self._time.now = max(self._time.now, done)
            return found

        def sample() -> Outputs:
            return outputs

        return sample


class SimulatedAdapter:
    """A lowered adapter without content."""

    flat: Any = None

    def __init__(self, digest: str, nbytes: int) -> None:
        self.digest, self.nbytes = digest, nbytes


class SimulatedSlots:
    """Device slots whose copies take time."""

    bytes_per_second = DeviceCopier.bytes_per_second

    def __init__(self, slots: int, costs: Costs, time: VirtualTime) -> None:
        self.copier = self
        self._free = list(range(slots, 0, -1))
        self._costs, self._time = costs, time
        self._copied_at: dict[int, float] = {}
        self._bus_free_at = 0.0
        self.copies = 0

    def pin_memory(self, flat: Any) -> None:
        """Nothing to do."""

    def load(self, adapter: SimulatedAdapter) -> int:
        slot = self._free.pop()
        self.copies += 1
        begin = max(self._time.now, self._bus_free_at)
        self._bus_free_at = begin + adapter.nbytes * (self._costs.copy_byte or 0.0)
        self._copied_at[slot] = self._bus_free_at
        return slot

    def evict(self, slot: int) -> None:
        self._free.append(slot)

    def copied(self, slot: int) -> bool:
        return self._copied_at[slot] <= self._time.now

    def wait_for_copies(self, slots: Iterable[int]) -> None:
        self._time.now = max([self._time.now, *(self._copied_at[slot] for slot in slots)])


class SimulatedDisk:
    """Where adapters are read from: publisher and workers of the real `AdapterMemory`, in one thread."""

    broken: Mapping[str, str] = {}

    def __init__(self, costs: Costs, time: VirtualTime, size: Callable[[str], int]) -> None:
        self._costs, self._time, self._size = costs, time, size
        self._free_at = 0.0
        self._finished: list[Callable[[], None]] = []

    def check_not_broken(self, name: str) -> None:
        """Nothing is."""

    def read(self, digest: str) -> SimulatedAdapter:
        return SimulatedAdapter(digest, self._size(digest))

    def load(self, work: Callable[[], Any], done: Callable[[Any], None]) -> None:
        result = work()
        seconds = result[0].nbytes * self._costs.read_byte
        self._free_at = max(self._free_at, self._time.now) + seconds
        self._time.at(self._free_at, lambda: self._finished.append(lambda: done(result)))

    def poll(self, timeout: float | None = None) -> bool:
        finished, self._finished = self._finished, []
        for done in finished:
            done()
        return bool(finished)

    def close(self) -> None:
        """Nothing to do."""
