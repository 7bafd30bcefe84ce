"""A planned step on its way: its adapters seated, launched on the device, its outcomes to be read later."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from lora_serve.adapters.registry import Registry
from lora_serve.engine.runner import Landing, Runner, SequenceOutput
from lora_serve.engine.scheduler import Work
from lora_serve.errors import ServeError


@dataclass(frozen=True)
class InFlightStep:
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
        return any(item.seq.needs_previous_tokens for item in self.work)


def launch(work: list[Work], runner: Runner, registry: Registry) -> InFlightStep:
    """Seat the step's adapters and start it. If they cannot be seated, only those who wanted them fail.

    Work whose adapters have not arrived on the device is left out if there is any other: those sequences keep what they
    were given, and are planned again.
    """
    started = time.perf_counter()
    slots, failed = _resident(work, registry)
    resident = [item for item in work if all(digest in slots for digest in item.seq.digests)]
    going = [item for item in resident if registry.copied(item.seq.digests)] or resident
    registry.wait_for_copies(_digests(going))
    landing = runner.launch(going, slots) if going else list
    work = going + [outcome.work for outcome in failed]
    return InFlightStep(work, len(_digests(work)), started, lambda: failed + landing())


def _resident(work: list[Work], registry: Registry) -> tuple[dict[str, int], list[SequenceOutput]]:
    """Slots by adapter; and the outcomes of those whose adapters could not all be seated."""
    try:
        return registry.assign_slots(_digests(work)), []
    except ServeError:
        slots: dict[str, int] = {}
        failed = []
        for item in work:  # those who need no more than there is are not the ones to fail
            try:
                slots |= registry.assign_slots([*slots, *item.seq.digests])
            except ServeError as error:
                failed.append(SequenceOutput(item, failure=error))
        return slots, failed


def _digests(work: Iterable[Work]) -> list[str]:
    return list(dict.fromkeys(digest for item in work for digest in item.seq.digests))
