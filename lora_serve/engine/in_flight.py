"""The in-flight step: its adapters have slots, it was launched on the device, and its outputs are not read yet."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from lora_serve.adapters.registry import Registry
from lora_serve.engine.runner import Outputs, Runner, SequenceOutput
from lora_serve.engine.scheduler import ScheduledSequence
from lora_serve.errors import ServeError


@dataclass(frozen=True)
class InFlightStep:
    """A step between launch and the reading of its outputs.

    Attributes:
        scheduled: the scheduled sequences that are in it.
        adapters: how many it uses.
        started: in seconds, by the process's performance counter.
        outputs: waits for the device; one output for each of `scheduled`.
    """

    scheduled: list[ScheduledSequence]
    adapters: int
    started: float
    outputs: Outputs

    @property
    def blocks_next(self) -> bool:
        """Whether the next step needs its tokens on the host before it can be launched (penalties)."""
        return any(part.seq.needs_previous_tokens for part in self.scheduled)


def launch(scheduled: list[ScheduledSequence], runner: Runner, registry: Registry) -> InFlightStep:
    """Assign slots to the step's adapters and start it. If they do not fit, only those who wanted them fail.

    Sequences whose adapters are still being copied to the device are left out if there are any others: they keep their
    KV blocks and are scheduled again.
    """
    started = time.perf_counter()
    slots, failed = _assign_slots(scheduled, registry)
    resident = [part for part in scheduled if all(digest in slots for digest in part.seq.digests)]
    going = [part for part in resident if registry.copied(part.seq.digests)] or resident
    registry.wait_for_copies(_digests(going))
    outputs = runner.launch(going, slots) if going else list
    parts = going + [output.part for output in failed]
    return InFlightStep(parts, len(_digests(parts)), started, lambda: failed + outputs())


def _assign_slots(
    scheduled: list[ScheduledSequence], registry: Registry
) -> tuple[dict[str, int], list[SequenceOutput]]:
    """Slots by adapter; and the outputs of sequences whose adapters could not all get one."""
    try:
        return registry.assign_slots(_digests(scheduled)), []
    except ServeError:
        slots: dict[str, int] = {}
        failed = []
        for part in scheduled:  # those who need no more than there is are not the ones to fail
            try:
                slots |= registry.assign_slots([*slots, *part.seq.digests])
            except ServeError as error:
                failed.append(SequenceOutput(part, failure=error))
        return slots, failed


def _digests(scheduled: Iterable[ScheduledSequence]) -> list[str]:
    return list(dict.fromkeys(digest for part in scheduled for digest in part.seq.digests))
