"""Serves traffic in virtual time: the real engine, scheduler, pacer, fairness and residency on a simulated device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

from bench.simulation.costs import Costs
from bench.simulation.device import SimulatedDisk, SimulatedRunner, SimulatedSlots, VirtualTime
from lora_serve.adapters.lowered_file import Summary
from lora_serve.adapters.registry import Registry
from lora_serve.adapters.residency import Budget, Residency
from lora_serve.adapters.store.records import NameRecord
from lora_serve.adapters.traits import Traits
from lora_serve.engine.engine import Engine
from lora_serve.engine.fairness import Fairness
from lora_serve.engine.prefill_pacer import PrefillPacer
from lora_serve.engine.scheduler import Scheduler
from lora_serve.engine.slot_rotation import SlotRotation
from lora_serve.engine.startup import QUANTUM
from lora_serve.kv.pool import BlockPool
from lora_serve.messages import Abort, EngineInfo, Generate
from lora_serve.request import AdapterUse, Finished, Request, Sampling, Tokens

BLOCK = 16
CONTEXT = 32_768


class Job(NamedTuple):
    """A request: sizes in tokens; it is aborted `patience` seconds after it was sent."""

    prompt: int
    output: int
    adapter: str | None = None
    key: str = ""
    weight: float = 1.0
    priority: int = 0
    patience: float | None = None


@dataclass
class Served:
    """What became of a request: times in seconds."""

    job: Job
    sent: float
    tokens: list[float] = field(default_factory=list)
    finished: float | None = None
    failed: str = ""

    @property
    def ttft(self) -> float:
        return self.tokens[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in pairwise(self.tokens)]


@dataclass(frozen=True)
class Hardware:
    """A device and its limits.

    Attributes:
        slots, host, device: adapters on the device, and bytes of them in host memory and on the device.
        seqs, tokens: limits of a step.
        kv_tokens: that fit the KV cache.
    """

    costs: Costs
    slots: int = 64
    host: int = 64 << 30
    device: int | None = None
    seqs: int = 64
    tokens: int = 512
    kv_tokens: int = 400_000


class Simulation:
    """An engine with adapters, in virtual time.

    Args:
        adapters: sizes in bytes, by name.
    """

    def __init__(
        self,
        hardware: Hardware,
        adapters: Mapping[str, int],
        *,
        itl_target: float | None = None,
        ttft_target: float | None = None,
    ) -> None:
        self.time = VirtualTime()
        sizes = {_digest(name): size for name, size in adapters.items()}
        costs = hardware.costs
        self.runner = SimulatedRunner(costs, self.time, sizes.__getitem__)
        self.slots = SimulatedSlots(hardware.slots, costs, self.time)
        disk: Any = SimulatedDisk(costs, self.time, sizes.__getitem__)
        budget = Budget(hardware.slots, hardware.host, hardware.device)
        self.residency = Residency(budget)
        slots: Any = self.slots
        self.registry = Registry(self.residency, slots, disk, disk, self.time)
        for name, size in adapters.items():
            self.registry.add_version(Summary(_digest(name), "", "", size, "", 16, 1, size, {}, Traits()), 0.0)
            self.registry.set_name(name, NameRecord([_digest(name)]))
        fairness = Fairness()
        self.scheduler = Scheduler(
            BlockPool(hardware.kv_tokens // BLOCK, BLOCK),
            SlotRotation(fairness, hardware.slots, QUANTUM, hardware.device, sizes.__getitem__),
            fairness,
            max_seqs=hardware.seqs,
            max_tokens=hardware.tokens,
            prefix_cache=True,
        )
        nothing: Any = _Nothing()
        runner: Any = self.runner
        self.engine = Engine(
            _info(hardware), self.scheduler, runner, self.registry, nothing, nothing,
            PrefillPacer(itl_target, ttft_target, self.time, costs.buckets), max_queue=1_000_000, clock=self.time,
        )  # fmt: skip
        self.served: dict[str, Served] = {}
        self._next: dict[
            str, tuple[Iterator[Job], float]
        ] = {}  # what a closed loop sends when a request has ended, and when

    def closed_loop(self, jobs: Iterable[Job], *, start: float = 0.0, think: float = 0.0) -> None:
        """Let a client send its jobs one after the other."""
        self._send_next(iter(jobs), think, start)

    def open_loop(self, arrivals: Iterable[tuple[float, Job]]) -> None:
        """Let jobs arrive at their times."""
        for at, job in arrivals:
            self.time.at(at, partial(self._send, job))

    def run(self, seconds: float) -> list[Served]:
        """Serve until a time; returns all requests that were sent."""
        while self.time.now < seconds:
            self.time.run_due()
            if self.engine.busy:
                for event in self.engine.step().events:
                    self._receive(event)
            elif (following := self.time.next) is None:
                break
            else:
                self.time.now = max(self.time.now, following)
                self.time.run_due()
                self.engine._stalled = False
        return list(self.served.values())

    def _send_next(self, jobs: Iterator[Job], think: float, now: float) -> None:
        job = next(jobs, None)
        if job is not None:
            self.time.at(now + think, lambda: self._next.update({self._send(job): (jobs, think)}))

    def _send(self, job: Job) -> str:
        id = str(len(self.served))
        self.served[id] = Served(job, self.time.now)
        uses = () if job.adapter is None else (AdapterUse(job.adapter),)
        sampling = Sampling(job.output, temperature=0.0, ignore_eos=True)
        request = Request(id, [len(self.served)] * job.prompt, sampling, uses, job.key, None, job.priority, job.weight)
        self.engine.receive(Generate(request))
        if job.patience is not None:
            self.time.at(self.time.now + job.patience, lambda: self.engine.receive(Abort(id)))
        return id

    def _receive(self, event: Any) -> None:
        served = self.served.get(getattr(event, "request_id", ""))
        if served is None:
            return
        if isinstance(event, Tokens):
            served.tokens += [self.time.now] * len(event.token_ids)
        elif isinstance(event, Finished):
            served.finished = self.time.now
            served.failed = "" if event.failure is None else event.failure.message
            following = self._next.pop(event.request_id, None)
            if following is not None:
                self._send_next(*following, self.time.now)


class _Nothing:
    """Operations and grammars that nobody asks for."""

    def poll(self) -> bool:
        return False

    def close(self) -> None:
        """Nothing to do."""


def _digest(name: str) -> str:
    return f"digest of {name}"


def _info(hardware: Hardware) -> EngineInfo:
    return EngineInfo(
        model="simulated", root="", device="simulated", dtype="bfloat16", kernels="simulated", max_model_len=CONTEXT,
        vocab_size=1 << 30, eos_token_ids=(), kv_tokens=hardware.kv_tokens, adapter_slots=hardware.slots, adapters=0,
        parameters=0, created=0,
    )  # fmt: skip
