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
    slots, failed = _seated(work, registry)
    seated = [item for item in work if all(digest in slots for digest in item.seq.digests)]
    going = [item for item in seated if registry.arrived(item.seq.digests)] or seated
    registry.precede(_digests(going))
    landing = runner.launch(going, slots) if going else list
    work = going + [outcome.work for outcome in failed]
    return Flight(work, len(_digests(work)), started, lambda: failed + landing())


def _seated(work: list[Work], registry: Registry) -> tuple[dict[str, int], list[Outcome]]:
    """Slots by adapter; and the outcomes of those whose adapters could not all be seated."""
    try:
        return registry.seat(_digests(work)), []
    except ServeError:
        slots: dict[str, int] = {}
        failed = []
        for item in work:  # those who need no more than there is are not the ones to fail
            try:
                slots |= registry.seat([*slots, *item.seq.digests])
            except ServeError as error:
                failed.append(Outcome(item, failure=error))
        return slots, failed


def _digests(work: Iterable[Work]) -> list[str]:
    return list(dict.fromkeys(digest for item in work for digest in item.seq.digests))
