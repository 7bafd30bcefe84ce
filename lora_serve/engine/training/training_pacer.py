"""When training may run a quantum beside serving.

A quantum between two steps delays the next token of every stream that runs. Training gets

- all the time while nothing is served;
- beside streams, quanta with which a gap is at most `STRETCH` times the longest that these streams have anyway (the
  99th percentile of recent steps), or as long as `--itl-target` says; and longer ones in one gap of `RARE`, so that the
  99th percentile does not know them. All these together leave serving more than nine tenths of its throughput;
- nothing while prompts wait, which in turn wait for one step after a quantum, so that no stream waits for both;
- in spite of all this, `--training-share` of the time: it is saved up until it pays for the next quantum, however long
  that is. At the default share fewer than one gap in a hundred has one. A larger share trains faster at the streams'
  expense.

Passes are made small enough for their quanta to fit between steps, as far as whole sequences allow, also in a moment
without streams: others will come before such a pass has ended. Nothing here knows
tensors or a clock; the output of serving and training is the same whatever is decided.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from lora_serve.engine.training.quantum_costs import QuantumCosts
from lora_serve.engine.training.request_level import RequestLevel

STRETCH = 1.15  # times the longest usual gap; what clients measure then is below 1.3
IDLE_LEVEL = 0.05  # of requests lately, below which passes are as large as suits an idle server
RARE = 200  # gaps between two that are longer
FULL_SHARE = 0.05  # of the time beside as many requests as there have been lately, in quanta that they tolerate
SPARE_SHARE = 0.75  # of the time that fewer requests leave
SAVED = 1.0  # seconds of these that may be saved up
RECENT = 512  # steps whose longest is the usual gap
LONGEST = 0.985  # of these are shorter than the longest usual one: of so few the 99th percentile is a guess
FEW = 16  # steps before which that is not known
LONGEST_QUANTUM = 0.1  # seconds that passes aim at while nothing is served: a request that comes waits so long
MARGIN = 1.1  # times the expected duration of a quantum


class ServingLoad(NamedTuple):
    """What serving does.

    Attributes:
        active: whether anything runs or could run.
        prompts: whether prompts wait or are being computed.
        requests: number of unfinished requests.
    """

    active: bool
    prompts: bool
    requests: int


class TrainingPacer:
    """Decides about each quantum, and how large passes are.

    Attributes:
        costs: of quanta.
        in_gap: seconds of quanta since the last step in which a sequence decoded.

    Args:
        share: of the time, that training always gets.
        itl_target: seconds between two tokens of a stream that should not be exceeded; None: taken from the steps.
    """

    def __init__(self, share: float, itl_target: float | None = None) -> None:
        self.costs = QuantumCosts()
        self._share, self._itl_target = share, itl_target
        self._steps: deque[float] = deque(maxlen=RECENT)  # seconds
        self._usual: float | None = None  # the longest usual gap
        self._since: float | None = None  # when it was last decided that training waits or runs
        self._floor = self._tolerated = 0.0  # seconds that were saved up
        self._requests = RequestLevel()
        self._level = 0.0  # of requests
        self.in_gap = 0.0
        self._gaps = 0  # since the last one that was longer

    def __repr__(self) -> str:
        return f"<TrainingPacer {self._floor:.3f} s of its share, {self._tolerated:.3f} s beside streams>"

    def served(self, seconds: float, requests: int, now: float) -> None:
        """Record the duration of a step in which a sequence decoded, and the number of unfinished requests after it."""
        self._level = self._requests.observe(requests, now)
        self._steps.append(seconds)
        self._usual, self.in_gap = None, 0.0
        self._gaps += 1

    def rest(self) -> None:
        """There is nothing to train: no time is saved up for later."""
        self._since, self._floor, self._tolerated = None, 0.0, 0.0

    def allows(self, kind: str, size: int, load: ServingLoad, now: float) -> bool:
        """Whether the next quantum, which is of this kind and size, may run now (seconds on any clock)."""
        self._save_up(load, now)
        if not load.active:
            return True
        seconds = self.costs.seconds(kind, size)
        if seconds is None:  # it has to be tried once; the share pays for it as soon as there is any
            return self._floor > 0 or (not load.prompts and self._tolerated > 0)
        if seconds <= self._floor:
            return True
        room = self._largest_quantum()
        if load.prompts or room is None:
            return False
        if self.in_gap + seconds * MARGIN <= room:
            return self._tolerated > 0
        return self._gaps >= RARE and seconds <= self._tolerated

    def ran(self, kind: str, size: int, load: ServingLoad, seconds: float) -> None:
        """Record a quantum that was run."""
        self.costs.record(kind, size, seconds)
        if load.active:
            self.in_gap += seconds
            if self.in_gap > (self._largest_quantum() or 0.0):
                self._gaps = 0
            self._tolerated = max(-SAVED, self._tolerated - seconds)  # the share may have paid for it
            self._floor -= seconds
            if self._floor < 0 and self._share:  # tolerated quanta count as share, but are no debt to pay back
                self._floor = 0.0

    def pass_tokens(self, kind: str, load: ServingLoad) -> int | None:
        """Tokens of a new pass whose quanta of this kind, the longest one, fit; None: unknown."""
        busy = load.active or (self._level > IDLE_LEVEL and len(self._steps) >= FEW)
        room = self._largest_quantum() if busy else LONGEST_QUANTUM
        return None if room is None else self.costs.size_within(kind, room / MARGIN)

    def _save_up(self, load: ServingLoad, now: float) -> None:
        self._level = self._requests.observe(load.requests, now)
        passed = 0.0 if self._since is None else max(0.0, now - self._since)
        self._since = now
        if not load.active:
            self._floor = self._tolerated = 0.0
            return
        self._floor += self._share * passed
        tolerated = max(FULL_SHARE, SPARE_SHARE * (1 - self._level))
        self._tolerated = min(SAVED, self._tolerated + tolerated * passed)

    def _largest_quantum(self) -> float | None:
        """Seconds of a quantum with which no gap is too long; None: unknown."""
        if len(self._steps) < FEW:
            return None
        if self._usual is None:
            ordered = sorted(self._steps)
            self._usual = ordered[int(LONGEST * (len(ordered) - 1))]
            self._step = ordered[len(ordered) // 2]
        gap = STRETCH * self._usual if self._itl_target is None else self._itl_target
        return max(0.0, gap - self._step)
