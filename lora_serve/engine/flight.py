"""A planned step on its way: its adapters seated, launched on the device, its outcomes to be read later."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from lora_serve.adapters.registry import Registry
from lora_serve.engine.runner import Landing, Outcome, Runner
from lora_serve.engine.scheduler import Work
from lora_serve.errors import ServeError


@dataclass(frozen=True)
class Flight:
    """A step that was launched and not landed yet.

    Attributes:
        work: what of the planned work is in it.
        adapters: how many it uses.
        started: by the process's performance counter.
        landing: waits for the device; the outcomes of `work`.
    """

    work: list[Work]
    adapters: int
    started: float
    landing: Landing

    @property
    def steers(self) -> bool:
        """Whether what comes next depends on its outcomes more than the device itself can know."""
        return any(item.seq.steered for item in self.work)


def launch(work: list[Work], runner: Runner, registry: Registry) -> Flight:
    """Seat the step's adapters and start it. If they cannot be seated, only those who wanted them fail.

    Work whose adapters have not arrived on the device is left out if there is any other: those sequences keep what they
    were given, and are planned again.
    """
    started = time.perf_counter()
    failed: list[Outcome] = []
    slots: dict[str, int] = {}
    try:
        slots = registry.seat(_digests(work))
        going = work = [item for item in work if registry.arrived(item.seq.digests)] or work
        registry.precede(_digests(work))
    except ServeError as error:
        failed = [Outcome(item, failure=error) for item in work if item.seq.digests]
        going = [item for item in work if not item.seq.digests]
    landing = runner.launch(going, slots) if going else list
    return Flight(work, len(_digests(work)), started, lambda: failed + landing())


def _digests(work: Iterable[Work]) -> list[str]:
    return list(dict.fromkeys(digest for item in work for digest in item.seq.digests))
